//! What a request draws of its caller's own: limits and budgets of the key, as far as what it takes can be foreseen.

use std::sync::Arc;

use crate::config::{CallKind, CallSet};
use crate::fault::{Fault, excerpt};
use crate::json::{members, part};
use crate::ledger::CallerDraw;
use crate::ledger::budgets::BudgetSet;
use crate::request::call::Call;
use crate::request::fields::ServiceTier;
use crate::request::token_bound::{TokenBound, token_bound};
use crate::routing::budgets::BudgetAsk;
use crate::routing::callers::Caller;
use crate::routing::pool::Pool;
use crate::routing::router::{Candidate, Candidates};

/// What a request draws of the limits of its caller's key.
pub(super) fn own_draw(caller: &Caller, model: Option<&str>, bound: impl Fn() -> TokenBound) -> Option<CallerDraw> {
    let accounts = caller.accounts.of_model(model).filter(|accounts| accounts.is_limited())?;
    let tokens = if accounts.counts_tokens() { bound().total() } else { 0 };
    Some(CallerDraw { accounts: Arc::clone(accounts), tokens })
}

/// The most tokens that a request can take, as far as that can be foreseen. `reserve`: of an answer that is not bounded.
pub(super) fn token_bound_of(call: Call, has_model: bool, (body, is_json): (&[u8], bool), reserve: u64) -> TokenBound {
    match call {
        Call::Completion | Call::Responses | Call::Messages => token_bound(body, reserve),
        // They answer with no text of their own.
        Call::Embeddings => token_bound(body, 0),
        Call::Other if is_json && has_model => token_bound(body, reserve),
        // A form's file is no text.
        Call::Other if has_model => TokenBound { prompt: 0, answer: reserve },
        Call::Other | Call::Unmetered => TokenBound::default(),
    }
}

/// What a request asks for, as far as its price goes.
pub(super) struct Asked<'a> {
    pub(super) call: Call,
    pub(super) kind: CallKind,
    pub(super) model: Option<&'a str>,
    pub(super) body: &'a [u8],
    pub(super) bound: TokenBound,
    pub(super) tier: Option<ServiceTier>,
}

/// What a request may take of its caller's budgets, and its candidates that have a price for that.
pub(super) fn budget_of(
    (pool, caller, set): (&Pool, &Caller, &Arc<BudgetSet>),
    asked: &Asked<'_>,
    candidates: Arc<Candidates>,
) -> Result<(Option<BudgetAsk>, Arc<Candidates>), Fault> {
    let is_billed_later = matches!(asked.kind, CallKind::Batches | CallKind::FineTuning)
        || asked.call == Call::Responses && is_in_background(asked.body);
    if set.counts_money() && is_billed_later && caller.key.calls == CallSet::ALL {
        return Err(Fault::CallWithoutPrice { name: caller.name().to_string(), call: asked.kind.name() });
    }
    if asked.bound == TokenBound::default() || is_billed_later {
        return Ok((None, candidates));
    }
    let budget = BudgetAsk {
        set: Arc::clone(set),
        bound: asked.bound,
        tier: asked.tier,
        step_tokens: pool.server.budget_reserve_tokens.into(),
        on_overrun: caller.key.on_overrun,
    };
    if !set.counts_money() {
        return Ok((Some(budget), candidates));
    }
    let wall = pool.clock().wall;
    let has_price = |candidate: &Candidate| {
        let model = candidates.model_of(candidate, asked.model);
        let endpoint = pool.endpoints.get(candidate.endpoint);
        endpoint.is_some_and(|endpoint| budget.spends(endpoint, model.name, wall).is_some())
    };
    if candidates.list().iter().all(has_price) {
        return Ok((Some(budget), candidates));
    }
    let priced = candidates.narrowed(has_price);
    if priced.list().is_empty() {
        let model = excerpt(asked.model.unwrap_or_default());
        return Err(Fault::ModelWithoutPrice { name: caller.name().to_string(), model });
    }
    let candidates = Arc::new(priced);
    Ok((Some(budget), candidates))
}

/// True if a response is made in the background, and billed when it is done.
fn is_in_background(body: &[u8]) -> bool {
    let mut is_so = false;
    // What is not JSON has been refused.
    let _whole = members::members(body, |key, range| is_so |= key == b"background" && part(body, range) == b"true");
    is_so
}
