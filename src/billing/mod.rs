//! Charges for an answer, once it is over: reported tokens are counted, others estimated.

pub(crate) mod estimate;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::billing::estimate::{Estimator, Job};
use crate::exchange::{Ask, Attempt};
use crate::fault::excerpt;
use crate::ledger::{Permit, Spent};
use crate::request::call::Call;
use crate::telemetry::metrics::metrics;
use crate::usage::prices::{NanoUsd, PricedTokens};
use crate::usage::{Cost, Speed, Tokens, Usage};

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

/// Shorter than that is not how long a stream took to be generated: all of it lay ready.
const GENERATION_MIN: Duration = Duration::from_millis(10);

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
        let (tokens, time) = (self.tokens?.completion, self.generation.filter(|time| *time >= GENERATION_MIN)?);
        #[expect(clippy::cast_precision_loss, reason = "nobody counts that many")]
        (tokens > 0).then(|| tokens as f64 / time.as_secs_f64())
    }
}

/// Charges for an answer that was not good enough for the client, as far as the endpoint reported its tokens.
pub fn bill_dropped(attempt: &Attempt, ask: &Ask) {
    let meter = &attempt.meter;
    match (meter.reported(), meter.prompt_reported()) {
        (Some(usage), _) => bill_response(attempt, ask, &usage),
        (None, Some(prompt)) => {
            let tokens = PricedTokens::plain(prompt, 0);
            spend(attempt, ask, Cost::estimated(prompt, 0), (tokens, Instant::now()));
        }
        (None, None) => {}
    }
}

/// Charges for one response of a realtime session, which goes on.
pub fn bill_response(attempt: &Attempt, ask: &Ask, usage: &Usage) {
    let cost = Cost::exact(usage.tokens(), Speed::default());
    spend(attempt, ask, cost, (PricedTokens::of(usage), Instant::now()));
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
        attempt.endpoint.live.usage_injection.note_unneeded();
    }
    let has_succeeded = attempt.has_succeeded();
    let meter = &mut attempt.meter;
    if let Some(usage) = meter.reported() {
        let tokens = usage.tokens();
        measured.tokens = Some(tokens);
        let cost = Cost::exact(tokens, measured.speed(tokens));
        measured.price = spend(attempt, ask, cost, (PricedTokens::of(&usage), ended));
    } else if ask.is_estimated()
        && (meter.has_text() || meter.prompt_reported().is_some() || ask.call == Call::Embeddings && has_succeeded)
    {
        estimator.submit(Job {
            id: id.to_owned(),
            pool: Arc::clone(&ask.pool),
            prompt_reported: meter.prompt_reported(),
            answer: meter.take_text(),
            endpoint: Arc::clone(&attempt.endpoint),
            accounts: Arc::clone(attempt.accounts()),
            caller: ask.named.as_ref().map(|named| Arc::clone(&named.caller)),
            caller_accounts: ask.own_accounts().cloned(),
            reservation: ask.own_permit.as_mut().and_then(Permit::take_reservation),
            model: model_name(attempt, ask),
            call: ask.call,
            candidates: Arc::clone(&ask.candidates),
            prompt: ask.prompt.clone(),
        });
    }
    measured
}

/// The model that answered; a client may call it anything.
fn model_name(attempt: &Attempt, ask: &Ask) -> String {
    excerpt(attempt.model.mapped.as_deref().or(ask.model.as_deref()).unwrap_or("-"))
}

/// Adds to the statistics, by hours and days of the server's time zone. Returns what the tokens cost, if they have a price.
fn spend(attempt: &Attempt, ask: &Ask, cost: Cost, (tokens, ended): (PricedTokens, Instant)) -> Option<NanoUsd> {
    let endpoint = &attempt.endpoint.config.id;
    let pool = &ask.pool;
    let clock = attempt.clock_at(ended);
    let model = model_name(attempt, ask);
    let price = attempt.endpoint.prices.cost(&model, &tokens, clock.wall);
    let cost = cost.priced(price);
    if let Some(metrics) = metrics() {
        metrics.spent(endpoint, ask.candidates.label(), &cost, attempt.counters.as_deref());
        if let Some(named) = &ask.named {
            metrics.spent_with(&named.caller.counters, &cost);
        }
    }
    let key = ask.named.as_ref().map(|named| named.caller.name());
    let spent = Spent::now(endpoint, &model, cost, &pool.server.timezone, clock.wall).by(key);
    pool.ledger.spend_tokens(attempt.accounts(), ask.own_accounts(), spent, clock.boot);
    price
}
