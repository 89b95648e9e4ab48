//! Candidates → one, with a permit: the choice and the permit are one step, since an endpoint that turns out to have none is
//! no choice.
//!
//! 1. The strategy's choice ([`balance::pick`]) draws a permit, or takes one that was drawn ahead. That is all, nearly always.
//! 2. If it has none, every endpoint that is open is drawn from in one step of the ledger: a request is refused only if all of
//!    them were full at one moment.
//! 3. Then those that are cooling down are tried out, one request at a time; if nobody else is left, by as many as come.
//! 4. Then the request waits in the queue, if the config allows it, or is refused with the moment to come back.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::config::Queue;
use crate::fault::{BudgetShortage, Fault, HeldBy};
use crate::ledger::budgets::{BudgetView, HeldBudget};
use crate::ledger::{
    AccountId, CallerDraw, CallerId, Drawn, Otherwise, OwnDraw, Permit, QueuePlace, QueuedBy, Refusal, Wanted,
};
use crate::limit::{Clock, Held, LimitReason, Stamp};
use crate::routing::balance::{self, OpenWay, Options, Pick, Way};
use crate::routing::budgets::BudgetAsk;
use crate::routing::health::Gate;
use crate::routing::health_record::Trial;

/// Most times that a request waits again because the endpoint it waited for began to cool down.
const GRANTS_MAX: usize = 16;
/// Interval at which a queued request checks which endpoints are open; it keeps its place among its caller's.
const WAIT_SLICE: Duration = Duration::from_millis(500);
/// Most cooling endpoints that are tried for one request before it is refused.
const RESORTS_MAX: usize = 16;

/// The endpoint that a request goes to.
#[derive(Debug)]
pub struct Choice {
    /// Place among the candidates.
    pub candidate: usize,
    /// The key, by its place among the endpoint's.
    pub lane: usize,
    /// Held by the request that tries an endpoint or a key out after its errors.
    pub trial: Option<Trial>,
    /// The right to one attempt.
    pub permit: Permit,
    /// When the choice was made.
    pub at: Clock,
}

/// A request that needs one of its candidates.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The choices it has.
    pub options: Options<'a>,
    /// Queue, if the request may wait.
    pub queue: Option<Queue>,
    /// Who waits there.
    pub queued_by: QueuedBy,
    /// The caller, which is promised a time if it is refused.
    pub caller: CallerId,
    /// What is drawn of the caller's own accounts together with the endpoint's permit; none if that is limited by nothing, or was drawn
    /// for an earlier attempt.
    pub own: Option<&'a CallerDraw>,
    /// The same where another model serves; empty if that makes no difference.
    pub fallbacks: &'a [FallbackDraw],
    /// What it may take of its caller's budgets, which each attempt reserves; none if the caller has none, or it takes nothing.
    pub budget: Option<&'a BudgetAsk>,
}

/// What is drawn of a caller's own accounts where this model serves in place of the one that is asked for.
#[derive(Clone, Debug)]
pub struct FallbackDraw {
    /// The model.
    pub model: Arc<str>,
    /// What is drawn; none if nothing of it is limited.
    pub own: Option<CallerDraw>,
}

impl<'a> Request<'a> {
    /// What is drawn of the caller's own at a candidate.
    fn own_at(&self, index: usize) -> Option<&'a CallerDraw> {
        match self.fallback_at(index) {
            None => self.own,
            Some(draw) => draw.own.as_ref(),
        }
    }

    fn fallback_at(&self, index: usize) -> Option<&'a FallbackDraw> {
        let model =
            self.options.candidates.list().get(index)?.fallback.as_ref().filter(|_| !self.fallbacks.is_empty())?;
        self.fallbacks.iter().find(|draw| draw.model == *model)
    }

    /// The same with what is reserved of its budgets.
    fn own_draw(&self, index: usize) -> OwnDraw {
        OwnDraw { caller: self.own_at(index).cloned(), budgets: self.budget.map(|budget| Arc::clone(&budget.set)) }
    }
}

/// State if no endpoint could be given at once: the strategy's choice, if it made one.
#[derive(Debug)]
pub struct Undecided(Option<(Pick, Clock)>);

/// Gives a request an endpoint and a permit of it.
pub async fn admit(request: Request<'_>) -> Result<Choice, Fault> {
    match at_once(&request) {
        Ok(choice) => Ok(choice),
        // Boxed, since it is rare and would make every request's future larger.
        Err(undecided) => Box::pin(decide(request, undecided)).await,
    }
}

/// Chooses without waiting: the strategy's choice has no limits, or prefetched permits.
pub fn at_once(request: &Request<'_>) -> Result<Choice, Undecided> {
    let options = &request.options;
    let pool = options.pool;
    let clock = pool.clock();
    let pick = balance::pick(options, &clock);
    let Some(accounts) = pick.as_ref().and_then(|pick| options.accounts(pick.candidate, pick.lane)) else {
        return Err(Undecided(None));
    };
    let permit = match pick.as_ref().and_then(|pick| request.own_at(pick.candidate)) {
        // What is reserved is written before anything is sent.
        _ if request.budget.is_some() => None,
        Some(own) => pool.ledger.draw_both_at_once(&accounts, own, &clock),
        None if accounts.is_limited() => pool.ledger.draw_at_once(&accounts, &clock),
        None => Some(pool.ledger.unlimited(&accounts)),
    };
    match (pick, permit) {
        (Some(Pick { candidate, lane, trial }), Some(permit)) => {
            Ok(Choice { candidate, lane, trial, permit, at: clock })
        }
        (pick, _) => Err(Undecided(pick.map(|pick| (pick, clock)))),
    }
}

/// Gives an endpoint and a permit to a request that [`at_once`] had none for.
pub async fn decide(request: Request<'_>, undecided: Undecided) -> Result<Choice, Fault> {
    let Options { pool, .. } = request.options;
    let Some((Pick { candidate, lane, trial }, clock)) = undecided.0 else { return spill(request).await };
    let way = OpenWay { index: candidate, lane, from: Stamp::default() };
    let Some(wanted) = wanted(&request, way) else { return spill(request).await };
    let own = request.own_draw(candidate);
    match pool.ledger.draw_for(pool.ledger.ticket(), vec![wanted], own, Otherwise::LookElsewhere).await {
        Drawn::Granted(_, permit) => Ok(Choice { candidate, lane, trial, permit, at: clock }),
        Drawn::Refused(Refusal { caller: Some(held), wait, .. }) if request.fallback_at(candidate).is_none() => {
            Err(key_limits_reached(&held, wait))
        }
        Drawn::Refused(_) | Drawn::Unavailable => {
            drop(trial);
            spill(request).await
        }
    }
}

/// Spills: the first choice has no permit, so the others are asked.
async fn spill(request: Request<'_>) -> Result<Choice, Fault> {
    let pool = request.options.pool;
    if request.options.is_call_unknown(pool.clock().now) {
        return Err(Fault::CallUnknown);
    }
    let turn = Turn { ticket: pool.ledger.ticket(), place: None, until: Stamp::default() };
    let clock = pool.clock();
    let resorts = balance::last_resorts(&request.options, &clock);
    let floor = balance::floor(&request.options, &clock);
    if resorts.is_empty() && floor.is_empty() {
        return wait_or_refuse(request, turn).await;
    }
    let open = balance::open(&request.options, &clock);
    match draw(request, &open, turn.ticket, Otherwise::LookElsewhere).await {
        Ok(Drawn::Granted(at, permit)) => return choice(&open, at, permit, clock),
        Ok(Drawn::Refused(Refusal { caller: Some(held), wait, .. })) => return Err(key_limits_reached(&held, wait)),
        Ok(Drawn::Refused(Refusal { budget: Some(held), .. })) => return Err(budget_exhausted(&held)),
        Ok(Drawn::Refused(_) | Drawn::Unavailable) | Err(_) => {}
    }
    let mut limited = None;
    let tries = resorts.into_iter().map(|way| (way, true)).take(RESORTS_MAX);
    for (way, as_trial) in tries.chain(floor.into_iter().map(|way| (way, false)).take(RESORTS_MAX)) {
        match try_out(request, way, as_trial, turn.ticket, clock).await {
            Some(Ok(choice)) => return Ok(choice),
            Some(Err(fault)) => limited = Some(fault),
            None => {}
        }
    }
    match wait_or_refuse(request, turn).await {
        // The endpoints that could be tried were at a limit, so the client has to wait for that limit.
        Err(Fault::NoneAvailable) => Err(limited.unwrap_or(Fault::NoneAvailable)),
        other => other,
    }
}

/// A place in the order of arrival, which is the caller's own.
struct Turn {
    ticket: u64,
    place: Option<QueuePlace>,
    until: Stamp,
}

/// Every endpoint that is open is drawn from in one step; if none has a permit, the request waits, or is refused.
async fn wait_or_refuse(request: Request<'_>, mut turn: Turn) -> Result<Choice, Fault> {
    let pool = request.options.pool;
    if let Some(queue) = request.queue {
        turn.place = pool.ledger.enter_queue(request.queued_by, queue.requests_max, queue.requests_per_key_max);
        turn.until = pool.clock().boot + queue.wait_max;
    }
    let mut grants = 0;
    loop {
        let clock = pool.clock();
        let waits = turn.place.is_some() && clock.boot < turn.until;
        let open = balance::open(&request.options, &clock);
        let otherwise = if waits {
            let until = turn.until.min(clock.boot + WAIT_SLICE);
            Otherwise::Wait { until, end: end_of_wait(request, &turn, &clock), by: request.queued_by }
        } else {
            Otherwise::Refuse(request.caller)
        };
        match draw(request, &open, turn.ticket, otherwise).await? {
            Drawn::Granted(at, permit) => {
                let choice = choice(&open, at, permit, clock)?;
                // It may have failed others while this one waited for it; then the permit is given back.
                grants += 1;
                if request.options.gate_at(choice.candidate, choice.lane, &pool.clock()) == Some(Gate::Open) {
                    return Ok(choice);
                }
            }
            Drawn::Refused(Refusal { caller: Some(held), wait, .. }) => return Err(key_limits_reached(&held, wait)),
            Drawn::Refused(Refusal { budget: Some(held), .. }) => return Err(budget_exhausted(&held)),
            Drawn::Refused(refusal) if waits => {
                if !refusal.may_end_by(end_of_wait(request, &turn, &clock)) {
                    // Its time would pass in vain.
                    turn.until = clock.boot;
                }
            }
            Drawn::Refused(refusal) => return Err(limits_reached(request, &open, &refusal)),
            Drawn::Unavailable => return Err(Fault::LedgerUnavailable),
        }
        if grants > GRANTS_MAX {
            return Err(Fault::NoneAvailable);
        }
    }
}

/// End of a request's time in the queue; never, if an endpoint that is cooling down may be back before it.
fn end_of_wait(request: Request<'_>, turn: &Turn, clock: &Clock) -> Stamp {
    let left = clock.boot.until(turn.until);
    let comes_back = out_of_service(&request.options).iter().any(|held| held.wait <= left);
    if comes_back { Stamp::NEVER } else { turn.until }
}

/// Draws from candidates. It is a fault if there are none.
async fn draw(request: Request<'_>, open: &[OpenWay], ticket: u64, otherwise: Otherwise) -> Result<Drawn, Fault> {
    // Where other models serve, what is drawn of the key's own differs: each model is drawn for by itself.
    let asked = open.iter().take_while(|way| request.fallback_at(way.index).is_none()).count();
    let (asked, others) = open.split_at(asked);
    if others.is_empty() {
        return draw_alike(request, asked, ticket, otherwise).await;
    }
    if let Ok(granted @ (Drawn::Granted(..) | Drawn::Refused(Refusal { caller: Some(_), .. }))) =
        draw_alike(request, asked, ticket, Otherwise::LookElsewhere).await
    {
        return Ok(granted);
    }
    let model = |way: &OpenWay| request.fallback_at(way.index).map(|draw| &draw.model);
    let groups: Vec<&[OpenWay]> = others.chunk_by(|one, other| model(one) == model(other)).collect();
    let mut begins = asked.len();
    for (number, alike) in groups.iter().enumerate() {
        // Who is left to wait for: those of the model that was asked for, or else the last.
        let is_waited_for = asked.is_empty() && number + 1 == groups.len();
        let then = if is_waited_for { otherwise } else { Otherwise::LookElsewhere };
        match draw_alike(request, alike, ticket, then).await {
            Ok(Drawn::Granted(at, permit)) => return Ok(Drawn::Granted(begins + at, permit)),
            Ok(Drawn::Refused(mut refusal)) if is_waited_for => {
                refusal.held.iter_mut().for_each(|held| held.at += begins);
                return Ok(Drawn::Refused(refusal));
            }
            other if is_waited_for => return other,
            _ => begins += alike.len(),
        }
    }
    draw_alike(request, asked, ticket, otherwise).await
}

/// Draws from candidates that serve one model.
async fn draw_alike(request: Request<'_>, open: &[OpenWay], ticket: u64, otherwise: Otherwise) -> Result<Drawn, Fault> {
    let wanted: Vec<_> = open.iter().filter_map(|way| wanted(&request, *way)).collect();
    let (Some(first), false) = (open.first(), wanted.is_empty()) else { return Err(Fault::NoneAvailable) };
    Ok(request.options.pool.ledger.draw_for(ticket, wanted, request.own_draw(first.index), otherwise).await)
}

/// The draw of a permit of a way, which may be asked from its moment on. The candidates of a request whose caller has a budget in
/// dollars have prices, so that none is left out here.
fn wanted(request: &Request<'_>, OpenWay { index, lane, from }: OpenWay) -> Option<Wanted> {
    let options = &request.options;
    let (endpoint, model) = (options.endpoint(index)?, options.model_of(index)?);
    let wanted = endpoint.wanted(model, lane, from);
    let Some(budget) = request.budget else { return Some(wanted) };
    let spends = budget.spends(endpoint, model.name, options.pool.clock().wall)?;
    Some(Wanted { spends, ..wanted })
}

fn choice(open: &[OpenWay], at: usize, permit: Permit, clock: Clock) -> Result<Choice, Fault> {
    let OpenWay { index: candidate, lane, .. } = *open.get(at).ok_or(Fault::Internal)?;
    Ok(Choice { candidate, lane, trial: None, permit, at: clock })
}

/// Tries an endpoint out that is cooling down or rests by our guess: as the one trial, if no other request is that, or as one
/// that has nobody else left. A fault is its limit.
async fn try_out(
    request: Request<'_>,
    (candidate, way): (usize, Way),
    as_trial: bool,
    ticket: u64,
    clock: Clock,
) -> Option<Result<Choice, Fault>> {
    let lane = way.lane;
    let accounts = request.options.accounts(candidate, lane)?;
    let trial = if as_trial { Some(request.options.begin_trial(candidate, way)?) } else { None };
    if !accounts.is_limited() && request.own_at(candidate).is_none() && request.budget.is_none() {
        let permit = request.options.pool.ledger.unlimited(&accounts);
        return Some(Ok(Choice { candidate, lane, trial, permit, at: clock }));
    }
    let open = [OpenWay { index: candidate, lane, from: Stamp::default() }];
    match draw(request, &open, ticket, Otherwise::LookElsewhere).await.ok()? {
        Drawn::Granted(_, permit) => Some(Ok(Choice { candidate, lane, trial, permit, at: clock })),
        Drawn::Refused(Refusal { caller: Some(held), wait, .. }) => Some(Err(key_limits_reached(&held, wait))),
        Drawn::Refused(Refusal { budget: Some(held), .. }) => Some(Err(budget_exhausted(&held))),
        Drawn::Refused(refusal) => Some(Err(limits_reached(request, &open, &refusal))),
        Drawn::Unavailable => Some(Err(Fault::LedgerUnavailable)),
    }
}

/// Names the limit of the caller's own key that is reached.
pub fn key_limits_reached((account, held): &(AccountId, Held), wait: Duration) -> Fault {
    Fault::KeyLimitsReached {
        name: account.owner().to_string(),
        models: account.models().map(ToString::to_string),
        reason: held.by,
        wait,
    }
}

/// Names the budget that has no room for the request.
pub fn budget_exhausted(HeldBudget { key, view, wanted }: &HeldBudget) -> Fault {
    let BudgetView { kind, limit, totals, ends } = view;
    let amount = |number: u64| kind.amount(number);
    let has_room_later = totals.spent.saturating_add(*wanted) <= *limit;
    let shortage = Box::new(BudgetShortage {
        name: key.to_string(),
        budget: format!("{} ({})", amount(*limit), kind.period.word()),
        spent: amount(totals.spent),
        reserved: amount(totals.reserved),
        wanted: amount(*wanted),
        is_too_large: wanted > limit,
        ends: ends.and_then(|ends| Timestamp::try_from(ends).ok()).map(|ends| ends.to_string()),
    });
    if has_room_later { Fault::BudgetReserved(shortage) } else { Fault::BudgetExhausted(shortage) }
}

/// The same of a draw of nothing but the key's own accounts.
pub fn own_limits_reached(Refusal { held, wait, .. }: Refusal) -> Fault {
    let held = held.into_iter().find_map(|held| Some((held.account?, held.held)));
    held.map_or(Fault::Internal, |held| key_limits_reached(&held, wait))
}

/// Names everybody who could have taken the request, why it does not, and for how long.
fn limits_reached(request: Request<'_>, open: &[OpenWay], refusal: &Refusal) -> Fault {
    let options = request.options;
    let now = options.pool.clock().boot;
    let mut all: Vec<(usize, HeldBy)> = Vec::new();
    for held in &refusal.held {
        let Some(OpenWay { index, lane, .. }) = open.get(held.at) else { continue };
        let Some(endpoint) = options.endpoint(*index) else { continue };
        let by = held.held_by(Arc::clone(&endpoint.config.id), options.pool.server.endpoint_headers, now);
        let is_keys = matches!(held.account, Some(AccountId::Lane { .. }));
        let key = endpoint.lanes.get(*lane).filter(|_| is_keys).map(|lane| Arc::clone(&lane.config.label));
        let by = HeldBy { key, ..by };
        // Of the keys of one endpoint, the one that has room first.
        match all.iter_mut().find(|(known, _)| known == index) {
            Some((_, known)) if by.wait < known.wait => *known = by,
            Some(_) => {}
            None => all.push((*index, by)),
        }
    }
    let held = all.into_iter().map(|(_, by)| by).chain(out_of_service(&options)).collect();
    Fault::LimitsReached { wait: refusal.wait, held }
}

/// The candidates that are cooling down.
pub fn out_of_service(options: &Options<'_>) -> Vec<HeldBy> {
    let clock = options.pool.clock();
    let now = clock.now;
    let held = |candidate: usize| {
        let wait = match options.gate(candidate, &clock)? {
            Gate::Cooling { until } => until.saturating_duration_since(now),
            Gate::OnTrial | Gate::TrialDue => Duration::ZERO,
            Gate::Open | Gate::Resting { .. } => return None,
        };
        let endpoint = Arc::clone(&options.endpoint(candidate)?.config.id);
        let is_public = options.pool.server.endpoint_headers;
        Some(HeldBy { endpoint, is_public, models: None, key: None, reason: LimitReason::CoolingDown, wait })
    };
    (0..options.candidates.list().len()).filter_map(held).collect()
}
