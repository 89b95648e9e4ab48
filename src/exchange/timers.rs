//! Deadlines of an answer: what is due next, and when. Pure; moments are passed in.

use std::time::{Duration, Instant};

/// Time after which we end a stream that is complete but that its endpoint keeps open: clients that read to the
/// end should not wait for it. The endpoint's connection is then lost for the next request.
const LINGER_MAX: Duration = Duration::from_millis(80);

/// Deadlines of one request. Those of an attempt are set anew with each attempt.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Timers {
    /// When the attempt is given up unless something comes.
    pub(super) deadline: Option<Instant>,
    /// The latest moment of that, whatever comes, until the answer says something.
    pub(super) thinking_ends: Option<Instant>,
    /// When a stream that has begun, but has had no content yet, is let through anyway, or at least its comments are.
    pub(super) held_until: Option<Instant>,
    /// When the pace of a stream is known.
    pub(super) pace_known_at: Option<Instant>,
    /// When a stream that is complete is ended.
    pub(super) lingers_until: Option<Instant>,
    /// When the client of a silent stream is sent a ping.
    pub(super) ping_at: Option<Instant>,
}

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The stream is complete and ends.
    End,
    /// The attempt is given up.
    GiveUp,
    /// The pace of the stream is known.
    Pace,
    /// It has been held long enough.
    Release,
    /// The client is sent a ping.
    Ping,
}

impl Timers {
    /// Returns when the next action is due, unless something arrives before.
    pub(super) fn due_at(&self) -> Option<Instant> {
        let Self { deadline, thinking_ends, held_until, pace_known_at, lingers_until, ping_at } = *self;
        [deadline, thinking_ends, held_until, pace_known_at, lingers_until, ping_at].into_iter().flatten().min()
    }

    /// Returns what is due at this moment. Nothing, if a timer rang that was moved along since.
    pub(super) fn due(&self, now: Instant) -> Option<Due> {
        let is_over = |moment: Option<Instant>| moment.is_some_and(|moment| moment <= now);
        let due = [
            (self.lingers_until, Due::End),
            (self.pace_known_at, Due::Pace),
            (self.held_until, Due::Release),
            (self.deadline, Due::GiveUp),
            (self.thinking_ends, Due::GiveUp),
            (self.ping_at, Due::Ping),
        ];
        due.into_iter().find(|(moment, _)| is_over(*moment)).map(|(_, due)| due)
    }

    /// Stops those of the endpoint while the client is being written to, since a slow client is not the endpoint's failure.
    pub(super) fn pause(&mut self) {
        self.deadline = None;
        self.lingers_until = None;
        self.ping_at = None;
    }

    /// Starts them again: the endpoint is waited for.
    pub(super) fn resume(&mut self, now: Instant, idle: Duration, complete: bool, ping: Option<Duration>) {
        self.deadline = now.checked_add(idle);
        self.lingers_until = now.checked_add(LINGER_MAX).filter(|_| complete);
        self.ping_at = ping.and_then(|ping| now.checked_add(ping));
    }

    /// The answer is let through: what bounded the wait for it is over.
    pub(super) fn committed(&mut self) {
        self.held_until = None;
        self.thinking_ends = None;
        self.pace_known_at = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_due_is_told() {
        let now = Instant::now();
        let after = |millis| now.checked_add(Duration::from_millis(millis));
        let timers = Timers { deadline: after(30), held_until: after(10), ping_at: after(20), ..Timers::default() };
        assert_eq!(timers.due_at(), after(10));
        assert_eq!(timers.due(now), None);
        assert_eq!(timers.due(after(10).unwrap()), Some(Due::Release));
        let released = Timers { held_until: None, ..timers };
        assert_eq!(released.due(after(25).unwrap()), Some(Due::Ping));
        assert_eq!(released.due(after(30).unwrap()), Some(Due::GiveUp));
        assert_eq!(Timers::default().due_at(), None);
    }
}
