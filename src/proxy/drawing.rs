//! What a request draws of its caller's own: limits and budgets of the key, as far as what it takes can be foreseen.

use std::cell::OnceCell;
use std::sync::Arc;

use crate::config::{CallKind, CallSet};
use crate::fault::{Fault, excerpt};
use crate::json::{members, part};
use crate::ledger::CallerDraw;
use crate::ledger::budgets::BudgetSet;
use crate::request::call::Call;
use crate::request::fields::ServiceTier;
use crate::request::token_bound::{TokenBound, token_bound};
use crate::routing::admission::FallbackDraw;
use crate::routing::budgets::BudgetAsk;
use crate::routing::callers::Caller;
use crate::routing::pool::Pool;
use crate::routing::router::{Candidate, Candidates};

/// What a request draws of the limits of its caller's key, where this model serves it.
fn own_draw_for((pool, caller): (&Pool, &Caller), asked: &Asked<'_>, model: Option<&str>) -> Option<CallerDraw> {
    let accounts = caller.accounts.of_model(model).filter(|accounts| accounts.is_limited())?;
    // Each response of a WebSocket has its own permit, and settles what it took.
    let counts = accounts.counts_tokens() && !asked.opens_socket;
    let tokens = if counts { asked.bound(pool.server.budget_reserve_tokens.into()).total() } else { 0 };
    Some(CallerDraw { accounts: Arc::clone(accounts), tokens })
}

/// What a request draws of the limits of its caller's key.
pub(super) fn own_draw(of: (&Pool, &Caller), asked: &Asked<'_>) -> Option<CallerDraw> {
    own_draw_for(of, asked, asked.model)
}

/// The same for each model that may serve in place of the one that is asked for, where the key has limits by model.
pub(super) fn fallback_draws(of: (&Pool, &Caller), asked: &Asked<'_>, candidates: &Candidates) -> Vec<FallbackDraw> {
    if of.1.key.model_limits.is_empty() || !candidates.have_fallbacks() {
        return Vec::new();
    }
    let mut draws: Vec<FallbackDraw> = Vec::new();
    for model in candidates.list().iter().filter_map(|candidate| candidate.fallback.as_ref()) {
        if !draws.iter().any(|known| known.model == *model) {
            draws.push(FallbackDraw { model: Arc::clone(model), own: own_draw_for(of, asked, Some(model)) });
        }
    }
    draws
}

/// By what a call is paid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Payment {
    /// By nothing, or with another call.
    Free,
    /// By the tokens that its answer reports.
    Answer,
    /// By what is billed later, or never seen here.
    Elsewhere,
}

/// Calls that nothing but such costs: billed later, by the hour, the gigabyte or the search. An operator who names them in the
/// `calls` of a key with a budget accepts that no budget limits them; to name chats or messages says nothing of that.
const NAMED: [CallKind; 6] = [
    CallKind::Batches,
    CallKind::FineTuning,
    CallKind::Evals,
    CallKind::Threads,
    CallKind::Containers,
    CallKind::VectorStores,
];

/// What a request asks for, as far as its price goes.
pub(super) struct Asked<'a> {
    pub(super) call: Call,
    pub(super) kind: CallKind,
    pub(super) path: &'a str,
    pub(super) opens_socket: bool,
    pub(super) model: Option<&'a str>,
    pub(super) body: &'a [u8],
    pub(super) is_json: bool,
    pub(super) tier: Option<ServiceTier>,
    /// By what it is paid, once that was looked for, which may take a walk through the body.
    pub(super) payment: OnceCell<Payment>,
}

impl Asked<'_> {
    /// The most tokens that it can take, as far as that can be foreseen. `reserve`: of an answer that is not bounded.
    pub(super) fn bound(&self, reserve: u64) -> TokenBound {
        match self.call {
            _ if self.payment() == Payment::Free => TokenBound::default(),
            Call::Completion | Call::Responses | Call::Messages => token_bound(self.body, reserve),
            // They answer with no text of their own.
            Call::Embeddings => token_bound(self.body, 0),
            Call::Other if self.is_json => token_bound(self.body, reserve),
            // A form's file is no text, and a WebSocket has said nothing yet.
            Call::Other | Call::Unmetered => TokenBound { prompt: 0, answer: reserve },
        }
    }

    fn payment(&self) -> Payment {
        *self.payment.get_or_init(|| self.find_payment())
    }

    fn find_payment(&self) -> Payment {
        let has_part = |part: &str| self.path.split('/').any(|segment| segment == part);
        match self.kind {
            _ if self.opens_socket => Payment::Answer,
            _ if self.call == Call::Unmetered => Payment::Free,
            _ if self.call == Call::Responses && is_in_background(self.body) => Payment::Elsewhere,
            CallKind::Messages if has_part("batches") => Payment::Elsewhere,
            CallKind::Other if has_part("batch") => Payment::Elsewhere,
            // What opens a realtime session outside of the gateway says nothing of what it takes there.
            CallKind::Realtime => Payment::Elsewhere,
            // A run goes on, and a later request reads what it took.
            CallKind::Threads if !has_part("runs") => Payment::Free,
            _ if NAMED.contains(&self.kind) => Payment::Elsewhere,
            CallKind::Assistants
            | CallKind::Conversations
            | CallKind::Files
            | CallKind::Uploads
            | CallKind::Moderations => Payment::Free,
            _ => Payment::Answer,
        }
    }
}

/// What a request may take of its caller's budgets, and its candidates that have a price for that.
pub(super) fn budget_of(
    (pool, caller, set): (&Pool, &Caller, &Arc<BudgetSet>),
    asked: &Asked<'_>,
    candidates: Arc<Candidates>,
) -> Result<(Option<BudgetAsk>, Arc<Candidates>), Fault> {
    let payment = asked.payment();
    let has_no_price = asked.model.is_none() && set.counts_money();
    if payment == Payment::Elsewhere || payment == Payment::Answer && has_no_price {
        let is_named = caller.key.calls != CallSet::ALL && NAMED.contains(&asked.kind);
        if is_named {
            return Ok((None, candidates));
        }
        return Err(Fault::CallWithoutPrice { name: caller.name().to_string(), call: asked.kind.name() });
    }
    if payment == Payment::Free {
        return Ok((None, candidates));
    }
    let step_tokens = pool.server.budget_reserve_tokens.into();
    let budget = BudgetAsk {
        set: Arc::clone(set),
        bound: asked.bound(step_tokens),
        tier: asked.tier,
        step_tokens,
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
    // Kept, so that they take turns from one request to the next.
    let priced = candidates.priced(asked.model, has_price);
    if priced.list().is_empty() {
        let model = excerpt(asked.model.unwrap_or_default());
        return Err(Fault::ModelWithoutPrice { name: caller.name().to_string(), model });
    }
    Ok((Some(budget), priced))
}

/// True if a response is made in the background, and billed when it is done.
pub(super) fn is_in_background(body: &[u8]) -> bool {
    let mut is_so = false;
    // What is not JSON has been refused.
    let _whole = members::members(body, |key, range| is_so |= key == b"background" && part(body, range) == b"true");
    is_so
}
