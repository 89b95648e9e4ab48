//! An attempt's reservation of its caller's budgets: watched while its answer comes, and settled at its end.

use crate::config::OnOverrun;
use crate::ledger::budgets::{Amount, BudgetHold};

/// Bytes of text that a token of an answer has at least.
const BYTES_OF_TOKEN: u64 = 3;

/// The reservation of one attempt.
#[derive(Debug)]
pub struct AttemptBudget {
    hold: BudgetHold,
    /// What it takes whatever the answer is.
    prompt: Amount,
    /// What this many tokens of the answer take.
    step: Amount,
    on_overrun: OnOverrun,
}

impl AttemptBudget {
    /// The reservation of an attempt with this prompt, whose answer grows by such steps.
    pub fn new(hold: BudgetHold, prompt: Amount, step: Amount, on_overrun: OnOverrun) -> Self {
        Self { hold, prompt, step, on_overrun }
    }

    /// Notes that the attempt has been sent, or certainly was not received.
    pub fn set_sent(&mut self, is_sent: bool) {
        self.hold.set_sent(is_sent);
    }

    /// Notes how much text has come, and reserves more where that is needed. True if the answer is to be cut off here.
    pub fn watch(&mut self, text_bytes: u64) -> bool {
        let tokens = text_bytes.div_ceil(BYTES_OF_TOKEN);
        let parts = u128::from(tokens) * u128::from(self.step.nano_usd);
        let nano_usd = u64::try_from(parts.div_ceil(self.step.tokens.max(1).into())).unwrap_or(u64::MAX);
        self.hold.progress(self.prompt.plus(Amount { tokens, nano_usd }), self.step);
        self.on_overrun == OnOverrun::Cut && self.hold.has_overrun()
    }

    /// Settles it at what the attempt took.
    pub fn settle(self, amount: Amount) {
        self.hold.settle(amount);
    }

    /// Settles it at what was reserved, as nothing better is known.
    pub fn settle_as_foreseen(self) {
        let reserved = self.hold.reserved();
        self.hold.settle(reserved);
    }

    /// Settles it at nothing, as the attempt is not billed.
    pub fn release(self) {
        self.hold.release();
    }
}
