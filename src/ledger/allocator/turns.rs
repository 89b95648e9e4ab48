//! Whose turn it is in the queue. Callers take turns by their weights, however much each of them has sent; the requests of one caller
//! keep the order of their arrival. This is fair queueing by start times, each permit being one unit.
//!
//! Who waits for other accounts stands in another line: what is full for one says nothing of the other.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::ledger::messages::{Draw, Otherwise, QueuedBy};

/// Length of a turn of weight 1. The greatest weight is 100, whose share is whole.
const UNITS: u64 = 2_520_000;

/// Turns of the callers in the queue, by line. A line that nobody stands in is forgotten, and with it whose turns were ahead.
#[derive(Debug, Default)]
pub(super) struct Turns(HashMap<LineId, Line>);

/// Address of the account that draws of one line want, or of one of those that they all want. It tells accounts apart, and is never followed.
type LineId = Option<usize>;

#[derive(Debug, Default)]
struct Line {
    /// Beginning of the turn that was served last. A caller that comes begins here, so it waits for one turn of each other one, and has
    /// nothing saved up from when it did not wait.
    now: u64,
    /// Beginnings of the next turns, of callers that were served a turn ahead of `now`.
    next: HashMap<u64, u64>,
}

impl Turns {
    /// All that wait, in the order in which they are served.
    pub(super) fn order(&mut self, waiting: BTreeMap<u64, Draw>) -> Vec<Draw> {
        let mut lines: HashMap<LineId, Line> = HashMap::new();
        let mut provisional: HashMap<(LineId, u64), u64> = HashMap::new();
        let mut ordered: Vec<(u64, Draw)> = Vec::with_capacity(waiting.len());
        for draw in waiting.into_values() {
            let (id, by) = (line_of(&draw), draw.otherwise.queued_by());
            let line = lines.entry(id).or_insert_with(|| self.0.remove(&id).unwrap_or_default());
            let begins = provisional.entry((id, by.caller)).or_insert_with(|| line.begins(by));
            // Lines have clocks of their own, so what counts is how far ahead it is.
            ordered.push((begins.saturating_sub(line.now), draw));
            *begins += share(by);
        }
        for line in lines.values_mut() {
            line.next.retain(|_, begins| *begins > line.now);
        }
        self.0 = lines;
        // Stable: of equal turns the one that came first has the first.
        ordered.sort_by_key(|(ahead, _)| *ahead);
        ordered.into_iter().map(|(_, draw)| draw).collect()
    }

    /// Notes that a request has got its permit, if others stand in its line.
    pub(super) fn served(&mut self, draw: &Draw) {
        let Otherwise::Wait { by, .. } = draw.otherwise else { return };
        let Some(line) = self.0.get_mut(&line_of(draw)) else { return };
        let begins = line.begins(by);
        line.now = line.now.max(begins);
        line.next.insert(by.caller, begins + share(by));
    }

    /// Forgets all, once nobody waits.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

impl Line {
    fn begins(&self, by: QueuedBy) -> u64 {
        self.next.get(&by.caller).copied().unwrap_or_default().max(self.now)
    }
}

/// Draws that want other accounts are in different lines. Where there are several, the order in which they are wanted may differ.
fn line_of(draw: &Draw) -> LineId {
    let of_models = draw.wanted.iter().filter_map(|wanted| wanted.accounts.accounts().last());
    of_models.map(|of| Arc::as_ptr(&of.account).addr()).min()
}

fn share(by: QueuedBy) -> u64 {
    UNITS / u64::from(by.weight.max(1))
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Endpoint;
    use crate::config::test_support::config;
    use crate::ledger::budgets::Spends;
    use crate::ledger::{AccountId, AccountSet, Client, LimitedAccount, Wanted};
    use crate::limit::{Clock, Limits, Stamp};
    use jiff::tz::TimeZone;
    use proptest::prelude::*;
    use tokio::sync::oneshot;

    fn draw(ticket: u64, caller: u64, weight: u32) -> Draw {
        let end = Stamp::NEVER;
        let otherwise = Otherwise::Wait { until: end, end, by: QueuedBy { caller, weight } };
        let (reply, _) = oneshot::channel();
        let (wanted, caller, budgets) = (Vec::new(), None, None);
        Draw { ticket, wanted, caller, budgets, otherwise, instead_of: None, keeps_place: false, reply }
    }

    fn endpoint() -> Endpoint {
        config(r#"[{"id":"a"}]"#).endpoints.remove(0)
    }

    /// Serves the queue one permit at a time. Returns whose they were.
    fn serve(turns: &mut Turns, waiting: &mut BTreeMap<u64, Draw>, permits: usize) -> Vec<u64> {
        let mut served = Vec::new();
        for _ in 0..permits {
            let mut ordered = turns.order(std::mem::take(waiting)).into_iter();
            let Some(first) = ordered.next() else { break };
            turns.served(&first);
            served.push(first.otherwise.queued_by().caller);
            waiting.extend(ordered.map(|draw| (draw.ticket, draw)));
        }
        served
    }

    fn queue(draws: impl IntoIterator<Item = Draw>) -> BTreeMap<u64, Draw> {
        draws.into_iter().map(|draw| (draw.ticket, draw)).collect()
    }

    #[test]
    fn callers_take_turns_and_a_newcomer_does_not_wait_behind_all_of_another_one() {
        let mut turns = Turns::default();
        let mut waiting = queue((0..50).map(|ticket| draw(ticket, 1, 1)));
        assert_eq!(serve(&mut turns, &mut waiting, 10), [1; 10]);
        waiting.insert(50, draw(50, 2, 1));
        waiting.insert(51, draw(51, 2, 1));
        assert_eq!(serve(&mut turns, &mut waiting, 6), [2, 1, 2, 1, 1, 1]);
        // Who did not wait has saved nothing up.
        waiting.extend((60..70).map(|ticket| (ticket, draw(ticket, 3, 1))));
        let served = serve(&mut turns, &mut waiting, 8);
        assert_eq!(served.iter().filter(|caller| **caller == 3).count(), 4, "{served:?}");
    }

    #[test]
    fn what_is_full_for_one_line_says_nothing_of_the_other() {
        let client = Client::new(Clock::read);
        let accounts = ["first", "second"].map(|id| client.account(&AccountId::Endpoint(id.into())));
        let wants = |id: usize, ticket: u64, caller: u64| {
            let account = Arc::clone(&accounts[id]);
            let of = LimitedAccount { account, limits: Arc::new(Limits::new(&endpoint(), &TimeZone::UTC)) };
            let accounts = Arc::new(AccountSet::new(vec![of]));
            let wanted = Wanted { accounts, not_before: Stamp::default(), spends: Spends::default() };
            Draw { wanted: vec![wanted], ..draw(ticket, caller, 1) }
        };
        let (first, second) = (line_of(&wants(0, 0, 0)), line_of(&wants(1, 0, 0)));
        let mut turns = Turns::default();
        // A permit of one line, for the first that stands in it.
        let serve_in = |turns: &mut Turns, waiting: &mut BTreeMap<u64, Draw>, line: LineId| {
            let mut ordered = turns.order(std::mem::take(waiting));
            let at = ordered.iter().position(|draw| line_of(draw) == line).unwrap();
            let served = ordered.remove(at);
            turns.served(&served);
            waiting.extend(ordered.into_iter().map(|draw| (draw.ticket, draw)));
            served.otherwise.queued_by().caller
        };
        // One caller has twenty in the first line and one in the second, where another one has ten.
        let mut waiting = queue((0..20).map(|ticket| wants(0, ticket, 1)));
        waiting.insert(20, wants(1, 20, 1));
        waiting.extend((21..31).map(|ticket| (ticket, wants(1, ticket, 2))));
        let served: Vec<u64> = (0..2).map(|_| serve_in(&mut turns, &mut waiting, second)).collect();
        assert_eq!(served, [1, 2], "its twenty elsewhere are no turns here");
        // A third one comes to the first line; permits of the second come between.
        waiting.insert(40, wants(0, 40, 3));
        let mut served = Vec::new();
        for _ in 0..3 {
            served.push(serve_in(&mut turns, &mut waiting, first));
            serve_in(&mut turns, &mut waiting, second);
        }
        assert_eq!(served, [1, 3, 1], "nobody's turn is forgotten for it");
    }

    #[test]
    fn the_requests_of_one_caller_keep_their_order() {
        let mut turns = Turns::default();
        let waiting = queue([draw(7, 1, 3), draw(3, 1, 3), draw(5, 2, 1), draw(9, 1, 3)]);
        let order: Vec<u64> = turns.order(waiting).iter().map(|draw| draw.ticket).collect();
        assert_eq!(order, [3, 5, 7, 9]);
        assert!(turns.order(BTreeMap::new()).is_empty());
    }

    proptest! {
        /// While callers have requests in the queue, their permits are as their weights, but for one turn each.
        #[test]
        fn permits_are_shared_by_weight(weights in prop::collection::vec(1_u32..=10, 2..5), permits in 1_usize..200) {
            let mut turns = Turns::default();
            let callers = weights.iter().enumerate();
            let mut ticket = 0;
            let mut waiting = BTreeMap::new();
            for (caller, weight) in callers {
                for _ in 0..200 {
                    waiting.insert(ticket, draw(ticket, caller as u64, *weight));
                    ticket += 1;
                }
            }
            let served = serve(&mut turns, &mut waiting, permits);
            let all: u32 = weights.iter().sum();
            for (caller, weight) in weights.iter().enumerate() {
                let got = served.iter().filter(|of| **of == caller as u64).count();
                let due = permits * *weight as usize / all as usize;
                // A turn is a permit of the lightest, and as many of the others as their weights say.
                let turn = 2 * *weight as usize + 1;
                prop_assert!(got + turn >= due && got <= due + turn, "{got} of {due}: {weights:?}");
            }
            prop_assert!(turns.0.len() == 1 && turns.0.values().all(|line| line.next.len() <= weights.len()));
        }
    }
}
