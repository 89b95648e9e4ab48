//! Charges for an answer, once it is over: reported tokens are counted, others estimated.

pub(crate) mod estimate;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::billing::estimate::{Estimator, Job};
use crate::exchange::{Ask, Attempt, AttemptBudget};
use crate::fault::excerpt;
use crate::ledger::budgets::Amount;
use crate::ledger::{Permit, Spent};
use crate::request::call::Call;
use crate::routing::retry::Outcome;
use crate::telemetry::metrics::metrics;
use crate::usage::prices::{NanoUsd, PricedTokens};
use crate::usage::{Cost, Speed, Tokens, Usage, tokens_per_second};

/// Measurements of a request's answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// Tokens that the endpoint reported.
    pub tokens: Option<Tokens>,
    /// Time from the request to the first token of a stream.
    pub first_token: Option<Duration>,
    /// Time from the first token to the end.
    pub generation: Option<Duration>,
    /// What those tokens cost, if they have a price.
    pub price: Option<NanoUsd>,
}

impl Measured {
    fn speed(&self, tokens: Tokens) -> Speed {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        match (self.first_token, self.generation) {
            (Some(first_token), Some(generation)) => {
                Speed { streams: 1, tokens: tokens.completion, first_token_ms: ms(first_token), ms: ms(generation) }
            }
            _ => Speed::default(),
        }
    }

    /// Tokens a second, from the first one to the end.
    pub fn tokens_per_second(&self) -> Option<f64> {
        tokens_per_second(self.tokens?.completion, self.generation?)
    }
}

/// Charges for an attempt that came to this end without an answer for the client, as far as the endpoint reported its tokens.
pub fn bill_dropped(attempt: &mut Attempt, ask: &Ask, outcome: &Outcome) {
    match (attempt.meter.reported(), attempt.meter.prompt_reported()) {
        (Some(usage), _) => bill_response(attempt, ask, &usage, true),
        (None, Some(prompt)) => {
            let tokens = PricedTokens::plain(prompt, 0);
            let amount = spend(attempt, ask, Cost::estimated(prompt, 0), (tokens, Instant::now()));
            settle(attempt.budget.take(), ask, amount);
        }
        // What it would have been billed by then, if it has been sent at all.
        (None, None) if outcome.may_be_billed() => drop(attempt.budget.take()),
        (None, None) => attempt.budget.take().into_iter().for_each(|budget| budget.release()),
    }
}

/// Charges for one response, which need not be the last one: a realtime session goes on. `ends`: it is the one that a reservation is for.
pub fn bill_response(attempt: &mut Attempt, ask: &Ask, usage: &Usage, ends: bool) {
    let cost = Cost::exact(usage.tokens(), Speed::default());
    let amount = spend(attempt, ask, cost, (PricedTokens::of(usage), Instant::now()));
    let reserved = if ends { attempt.budget.take() } else { None };
    settle(reserved, ask, amount);
}

/// Settles what was reserved of the caller's budgets. What had no reservation is taken of them all the same.
fn settle(budget: Option<Box<AttemptBudget>>, ask: &Ask, amount: Amount) {
    match (budget, &ask.budget) {
        (Some(budget), _) => budget.settle(amount),
        (None, Some(budget)) => ask.pool.ledger.spend_unreserved(&budget.set, amount),
        (None, None) => {}
    }
}

/// Charges for the last answer. Unreported tokens are estimated later, if the answer had any content.
///
/// `id` and `arrived` are the request's, which may have been at other endpoints before; `ended` is when its answer was whole.
pub fn bill(
    attempt: &mut Attempt,
    ask: &mut Ask,
    id: &str,
    (arrived, ended): (Instant, Instant),
    estimator: &Estimator,
) -> Measured {
    let first_token = attempt.first_token();
    let mut measured = Measured {
        tokens: None,
        first_token: first_token.map(|first| first.saturating_duration_since(arrived)),
        generation: first_token.map(|first| ended.saturating_duration_since(first)),
        price: None,
    };
    if attempt.terms.usage.injected && attempt.meter.has_timings() {
        // Asked, it moves its timings from the last chunk with choices into the one that is taken out.
        attempt.asked.endpoint.live.usage_injection.note_unneeded();
    }
    let has_succeeded = attempt.has_succeeded();
    let is_error = attempt.meaning().is_some();
    let budget = attempt.budget.take();
    let meter = &mut attempt.meter;
    let has_text = meter.has_text();
    if let Some(usage) = meter.reported() {
        let tokens = usage.tokens();
        measured.tokens = Some(tokens);
        let cost = Cost::exact(tokens, measured.speed(tokens));
        let priced = PricedTokens::of(&usage);
        measured.price = price_of(attempt, ask, &priced, ended);
        let amount = spend(attempt, ask, cost, (priced, ended));
        settle(budget, ask, amount);
    } else if ask.is_estimated()
        && (meter.has_text() || meter.prompt_reported().is_some() || ask.call == Call::Embeddings && has_succeeded)
    {
        estimator.submit(Job {
            id: id.to_owned(),
            pool: Arc::clone(&ask.pool),
            prompt_reported: meter.prompt_reported(),
            answer: meter.take_text(),
            endpoint: Arc::clone(&attempt.asked.endpoint),
            accounts: Arc::clone(attempt.accounts()),
            caller: ask.named.as_ref().map(|named| Arc::clone(&named.caller)),
            caller_accounts: ask.own_accounts().cloned(),
            reservation: ask.own_permit.as_mut().and_then(Permit::take_reservation),
            model: model_name(attempt, ask),
            call: ask.call,
            candidates: Arc::clone(&ask.candidates),
            prompt: ask.prompt.clone(),
            tier: ask.tier,
            budget,
        });
    } else if is_error && !has_text {
        // Otherwise it is settled at what is known: nobody answers for nothing.
        if let Some(budget) = budget {
            budget.release();
        }
    } else if let Some(budget) = budget.filter(|_| ask.call == Call::Other && has_succeeded) {
        // What it took is not told, as with speech and text files: as much as was foreseen.
        budget.settle_as_foreseen();
    }
    measured
}

/// The model that answered; a client may call it anything.
fn model_name(attempt: &Attempt, ask: &Ask) -> String {
    excerpt(attempt.model.mapped.as_deref().or(ask.model.as_deref()).unwrap_or("-"))
}

/// What the tokens of an attempt's model cost, if it has a price.
fn price_of(attempt: &Attempt, ask: &Ask, tokens: &PricedTokens, ended: Instant) -> Option<NanoUsd> {
    attempt.asked.endpoint.prices.cost(&model_name(attempt, ask), tokens, ask.tier, attempt.clock_at(ended).wall)
}

/// Adds to the statistics, by hours and days of the server's time zone. Returns what the tokens took.
fn spend(attempt: &Attempt, ask: &Ask, cost: Cost, (tokens, ended): (PricedTokens, Instant)) -> Amount {
    let endpoint = &attempt.asked.endpoint.config.id;
    let pool = &ask.pool;
    let clock = attempt.clock_at(ended);
    let price = price_of(attempt, ask, &tokens, ended);
    let cost = cost.priced(price);
    if let Some(metrics) = metrics() {
        metrics.spent(endpoint, ask.candidates.label(), &cost, attempt.counters.as_deref());
        if let Some(named) = &ask.named {
            metrics.spent_with(&named.caller.counters, &cost);
        }
    }
    let key = ask.named.as_ref().map(|named| named.caller.name());
    let spent = Spent::now(endpoint, &model_name(attempt, ask), cost, &pool.server.timezone, clock.wall).by(key);
    pool.ledger.spend_tokens(attempt.accounts(), ask.own_accounts(), spent, clock.boot);
    Amount { tokens: cost.tokens(), nano_usd: price.unwrap_or_default().0 }
}
