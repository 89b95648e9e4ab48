//! What only a ledger on a server meets: replies that are lost, a server that begins, one that has lost what it had. Without
//! `LEDGER_TESTED` there is no server, and nothing to test.

use std::sync::atomic::AtomicBool;

use super::budgets::{dollars, money, totals};
use super::*;
use crate::ledger::redis::{Arguments, Reply, Server};

/// A way to the server on which replies are lost.
#[derive(Debug)]
struct Lossy {
    inner: Connection,
    /// The server does what it is asked for, and its reply does not arrive.
    loses_reply: Arc<AtomicBool>,
}

impl Server for Lossy {
    fn batch(&mut self, arguments: Arguments) -> Result<Reply, LedgerError> {
        let reply = self.inner.batch(arguments)?;
        if self.loses_reply.load(Ordering::Relaxed) {
            return Err(LedgerError { kind: FaultKind::Unusable, message: "the reply is lost".into() });
        }
        Ok(reply)
    }

    fn run(&mut self, commands: Vec<Arguments>) -> Result<Vec<::redis::Value>, LedgerError> {
        self.inner.run(commands)
    }

    fn name(&self) -> &str {
        self.inner.name()
    }
}

/// A process on a server that begins with this grace, and the switch that loses its replies.
fn process(folder: &std::path::Path, grace: Duration) -> Option<(Process, Arc<AtomicBool>)> {
    let options = server_tested()?;
    let mut process = Process::new(folder, &Arc::new(AtomicU64::new(1_000_000)), LedgerOnError::Deny);
    let loses_reply = Arc::new(AtomicBool::new(false));
    let server = Lossy { inner: Connection::new(options).unwrap(), loses_reply: Arc::clone(&loses_reply) };
    let clock = process.client.clone();
    let time = Time::Given(Arc::new(move || clock.clock()));
    // Another prefix than the ledger's that the process has opened.
    let prefix = format!("{}-lossy", prefix_of(folder));
    process.ledger = Box::new(RedisLedger::open(server, &prefix, time, grace).unwrap());
    Some((process, loses_reply))
}

#[test]
fn a_batch_whose_reply_is_lost_is_done_once_and_its_draws_are_given_back() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut process, loses_reply)) = process(folder.path(), Duration::ZERO) else { return };
    let wanted = [process.wanted("a", r#""rpm":5,"rpd":5,"maxConcurrent":2"#)];
    let first = process.draw(&wanted);
    assert!(first.is_granted());
    let set = dollars(100);
    let (_permit, hold) = process.reserve(&set, money(40), money(1)).unwrap();
    let wall = process.client.clock().wall;
    for round in 1..=3 {
        // Tokens of an answer, a draw, and a growth of a reservation go out with one batch.
        let cost = Cost::exact(Tokens { total: 7, ..Tokens::default() }, Speed::default());
        let spent = Spent::now(&"a".into(), "m", cost, &TimeZone::UTC, wall);
        process.client.spend_tokens(&wanted[0].accounts, None, spent, process.client.clock().boot);
        process.serve();
        process.now_ms.fetch_add(100, Ordering::Relaxed);
        let mut answer = process.ask(&wanted, Otherwise::Refuse(CALLER));
        loses_reply.store(true, Ordering::Relaxed);
        let error = process.allocator.serve(Some(&mut *process.ledger)).unwrap_err();
        assert_eq!(error.kind, FaultKind::Unanswered);
        assert!(matches!(ready(&mut answer), Drawn::Unavailable));
        // Nor does it learn of it the next time.
        process.now_ms.fetch_add(1000, Ordering::Relaxed);
        process.allocator.serve(Some(&mut *process.ledger)).unwrap_err();
        loses_reply.store(false, Ordering::Relaxed);
        process.pass(Duration::from_secs(1));
        process.write();
        assert_eq!(process.used(&wanted[0]), (1, 1), "round {round}");
        let tokens = process.tokens_of(&wanted[0]);
        assert_eq!(tokens, 7 * round, "counted once each");
    }
    let second = process.draw(&wanted);
    assert!(second.is_granted(), "one place is in use, not two");
    assert!(!process.draw(&wanted).is_granted(), "of two");
    hold.settle(money(3));
    process.write();
    assert_eq!(process.totals(&set), [totals(3, 0)]);
}

#[test]
fn while_a_server_begins_nothing_with_a_limit_is_granted() {
    let folder = tempfile::tempdir().unwrap();
    let Some((mut process, _)) = process(folder.path(), Duration::from_secs(5)) else { return };
    let set = dollars(100);
    for limits in [r#""rpm":5"#, r#""rpd":5"#, r#""tpm":5"#, r#""maxConcurrent":5"#] {
        let wanted = [process.wanted(limits, limits)];
        let refusal = refused(process.draw(&wanted));
        assert_eq!(reasons(&refusal), [(0, LimitReason::LedgerBegins)], "{limits}");
        assert_eq!(refusal.wait, Duration::from_secs(5), "{limits}");
    }
    let refusal = match process.reserve(&set, money(1), money(1)) {
        Err(drawn) => refused(drawn),
        Ok(_) => panic!("a budget is open"),
    };
    assert_eq!(reasons(&refusal), [(0, LimitReason::LedgerBegins)]);
    let unlimited = [process.wanted("free", r#""rpm":-1"#)];
    assert!(process.draw(&unlimited).is_granted());
    process.pass(Duration::from_secs(5));
    for limits in [r#""rpm":5"#, r#""rpd":5"#, r#""tpm":5"#, r#""maxConcurrent":5"#] {
        let wanted = [process.wanted(limits, limits)];
        assert!(process.draw(&wanted).is_granted(), "{limits}");
    }
    assert!(process.reserve(&set, money(1), money(1)).is_ok());
}

impl Process {
    /// The tokens of an account in the minute.
    fn tokens_of(&mut self, wanted: &Wanted) -> u64 {
        self.used(wanted);
        whole(wanted).account.view().used.tpm
    }
}
