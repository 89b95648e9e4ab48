//! Whose turn it is in the queue. Callers take turns by their weights, however much each of them has sent; the requests of one caller
//! keep the order of their arrival. This is fair queueing by start times, each permit being one unit.

use std::collections::{BTreeMap, HashMap};

use crate::ledger::messages::{Draw, QueuedBy};

/// Length of a turn of weight 1. The greatest weight is 100, whose share is whole.
const UNITS: u64 = 2_520_000;

/// Turns of the callers in the queue.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// Beginning of the turn that was served last. A caller that comes begins here, so it waits for one turn of each other one, and has
    /// nothing saved up from when it did not wait.
    now: u64,
    /// Beginnings of the next turns, of callers that were served a turn ahead of `now`. Forgotten once that is behind, and when the queue is
    /// empty.
    next: HashMap<u64, u64>,
}

impl Turns {
    /// All that wait, in the order in which they are served.
    pub(super) fn order(&mut self, waiting: BTreeMap<u64, Draw>) -> Vec<Draw> {
        if waiting.is_empty() {
            *self = Self::default();
            return Vec::new();
        }
        self.next.retain(|_, begins| *begins > self.now);
        let mut next = self.next.clone();
        let mut ordered: Vec<(u64, Draw)> = Vec::with_capacity(waiting.len());
        for draw in waiting.into_values() {
            let by = draw.otherwise.queued_by();
            let begins = next.entry(by.caller).or_insert(self.now);
            ordered.push((*begins, draw));
            *begins += share(by);
        }
        // Stable: of equal turns the one that came first has the first.
        ordered.sort_by_key(|(begins, _)| *begins);
        ordered.into_iter().map(|(_, draw)| draw).collect()
    }

    /// Notes that a request out of the queue has got its permit.
    pub(super) fn served(&mut self, by: QueuedBy) {
        let begins = self.next.get(&by.caller).copied().unwrap_or(self.now);
        self.now = self.now.max(begins);
        self.next.insert(by.caller, begins + share(by));
    }
}

fn share(by: QueuedBy) -> u64 {
    UNITS / u64::from(by.weight.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::messages::Otherwise;
    use crate::limit::Stamp;
    use proptest::prelude::*;
    use tokio::sync::oneshot;

    fn draw(ticket: u64, caller: u64, weight: u32) -> Draw {
        let end = Stamp::NEVER;
        let otherwise = Otherwise::Wait { until: end, end, by: QueuedBy { caller, weight } };
        let (reply, _) = oneshot::channel();
        Draw { ticket, wanted: Vec::new(), caller: None, otherwise, instead_of: None, keeps_place: false, reply }
    }

    /// Serves the queue one permit at a time. Returns whose they were.
    fn serve(turns: &mut Turns, waiting: &mut BTreeMap<u64, Draw>, permits: usize) -> Vec<u64> {
        let mut served = Vec::new();
        for _ in 0..permits {
            let mut ordered = turns.order(std::mem::take(waiting)).into_iter();
            let Some(first) = ordered.next() else { break };
            turns.served(first.otherwise.queued_by());
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
            prop_assert!(turns.next.len() <= weights.len());
        }
    }
}
