//! Draws of a caller's own accounts together with an endpoint's: both or neither.

use super::*;
use crate::ledger::{CallerDraw, OwnDraw};

impl Process {
    /// What a caller draws whose key has these limits.
    fn of_caller(&self, name: &str, limits: &str, tokens: u64) -> CallerDraw {
        let of = self.limited(&AccountId::Caller(name.into()), limits);
        CallerDraw { accounts: Arc::new(AccountSet::new(vec![of])), tokens }
    }

    fn ask_for(&self, wanted: &[Wanted], caller: &CallerDraw, otherwise: Otherwise) -> Answer {
        let (client, wanted) = (self.client.clone(), wanted.to_vec());
        let own = OwnDraw { caller: Some(caller.clone()), budgets: None };
        let _entered = self.runtime.enter();
        let mut answer: Answer =
            Box::pin(async move { client.draw_for(client.ticket(), wanted, own, otherwise).await });
        assert!(poll(&mut answer).is_pending());
        answer
    }

    fn draw_for(&mut self, wanted: &[Wanted], caller: &CallerDraw) -> Drawn {
        let mut answer = self.ask_for(wanted, caller, Otherwise::LookElsewhere);
        self.serve();
        ready(&mut answer)
    }

    fn used_by(&mut self, caller: &CallerDraw) -> (u64, u64) {
        let account = caller.accounts.accounts()[0].clone();
        (self.used_of(&account).0, self.view_of(&account).used.tpm)
    }

    fn view_of(&mut self, account: &LimitedAccount) -> crate::limit::View {
        let accounts = vec![account.clone()];
        let client = self.client.clone();
        let mut look = Box::pin(async move { client.look(accounts).await.unwrap()[0] });
        let mut context = Context::from_waker(Waker::noop());
        assert!(look.as_mut().poll(&mut context).is_pending());
        self.serve();
        let Poll::Ready(view) = look.as_mut().poll(&mut context) else { panic!("no answer") };
        view
    }
}

/// Both permits of a draw.
fn both(drawn: Drawn) -> (usize, Permit, Permit) {
    let Drawn::Granted(at, mut permit) = drawn else { panic!("{drawn:?}") };
    let caller = permit.take_caller().unwrap();
    (at, permit, caller)
}

#[test]
fn whoever_is_full_nothing_is_counted_for_the_other() {
    let (_folder, mut process) = Process::alone();
    let endpoints = [process.wanted("a", r#""rpm":1"#), process.wanted("b", r#""rpm":2"#)];
    let ada = process.of_caller("ada", r#""rpm":2"#, 0);
    let bob = process.of_caller("bob", r#""rpm":9"#, 0);
    for expected in [0, 1] {
        let (at, mut permit, mut caller) = both(process.draw_for(&endpoints, &ada));
        permit.spend();
        caller.spend();
        assert_eq!(at, expected, "the first endpoint that has room");
    }
    let refusal = refused(process.draw_for(&endpoints, &ada));
    let (account, held) = refusal.caller.unwrap();
    assert_eq!((account, held.by), (AccountId::Caller("ada".into()), LimitReason::Full(LimitKind::Rpm, 2)));
    assert!(refusal.held.is_empty(), "no endpoint is looked at");
    assert_eq!(process.used(&endpoints[1]).0, 1, "nor counted");
    // Another caller takes what is left; then the endpoints are full for everybody.
    let (at, mut permit, mut caller) = both(process.draw_for(&endpoints, &bob));
    permit.spend();
    caller.spend();
    assert_eq!(at, 1);
    let refusal = refused(process.draw_for(&endpoints, &bob));
    assert!(refusal.caller.is_none() && refusal.held.len() == 2, "{refusal:?}");
    assert_eq!(process.used_by(&bob).0, 1, "what is refused by the endpoints counts for no caller");
}

#[test]
fn a_caller_at_its_limit_does_not_wait_in_the_queue() {
    let (_folder, mut process) = Process::alone();
    let endpoint = [process.wanted("a", r#""rpm":1"#)];
    let ada = process.of_caller("ada", r#""rpd":1"#, 0);
    let until = process.client.clock().boot + Duration::from_secs(100);
    let wait = Otherwise::Wait { until, end: until, by: QueuedBy::default() };
    let (_, mut permit, mut caller) = both(process.draw_for(&endpoint, &ada));
    permit.spend();
    caller.spend();
    let mut waiting = process.ask_for(&endpoint, &ada, wait);
    process.serve();
    assert!(refused(ready(&mut waiting)).caller.is_some());
}

#[test]
fn permits_that_are_not_used_come_back_to_both() {
    let (_folder, mut process) = Process::alone();
    let endpoint = [process.wanted("a", r#""rpm":1"#)];
    let ada = process.of_caller("ada", r#""rpm":1,"maxConcurrent":1,"tpm":100"#, 60);
    let (_, permit, caller) = both(process.draw_for(&endpoint, &ada));
    assert_eq!((process.used(&endpoint[0]).0, process.used_by(&ada)), (1, (1, 60)));
    drop((permit, caller));
    process.pass(WRITE_DELAY);
    assert_eq!((process.used(&endpoint[0]).0, process.used_by(&ada)), (0, (0, 0)));
    // A permit that nobody takes apart gives both back as well.
    drop(process.draw_for(&endpoint, &ada));
    process.pass(WRITE_DELAY);
    assert_eq!((process.used(&endpoint[0]).0, process.used_by(&ada)), (0, (0, 0)));
}

#[test]
fn tokens_are_reserved_before_and_settled_after() {
    let (_folder, mut process) = Process::alone();
    let endpoint = [process.wanted("a", r#""rpm":100"#)];
    let ada = process.of_caller("ada", r#""tpm":100"#, 40);
    let (_, mut first, mut own) = both(process.draw_for(&endpoint, &ada));
    let (_, mut second, mut other) = both(process.draw_for(&endpoint, &ada));
    for permit in [&mut first, &mut own, &mut second, &mut other] {
        permit.spend();
    }
    let refusal = refused(process.draw_for(&endpoint, &ada));
    assert_eq!(refusal.caller.unwrap().1.by, LimitReason::Full(LimitKind::Tpm, 100), "80 are reserved");
    assert!(process.draw_for(&endpoint, &CallerDraw { tokens: 20, ..ada.clone() }).is_granted());
    process.pass(WRITE_DELAY);
    assert_eq!(process.used_by(&ada).1, 80, "that one was given back");
    // The first took 10 tokens in truth.
    let tokens = Tokens { prompt: 6, completion: 4, total: 10, ..Tokens::default() };
    let spent = Spent::now(
        &"a".into(),
        "m",
        Cost::exact(tokens, Speed::default()),
        &TimeZone::UTC,
        process.client.clock().wall,
    );
    process.client.spend_tokens(&endpoint[0].accounts, Some(&ada.accounts), spent, process.client.clock().boot);
    drop(own);
    process.pass(WRITE_DELAY);
    assert_eq!(process.used_by(&ada).1, 50, "10 and what the second has reserved");
    drop(both(process.draw_for(&endpoint, &ada)));
    // One that may take more than the limit goes alone.
    let large = CallerDraw { tokens: 1000, ..ada.clone() };
    assert!(refused(process.draw_for(&endpoint, &large)).caller.is_some());
    drop(other);
    process.pass(Duration::from_secs(61));
    assert!(process.draw_for(&endpoint, &large).is_granted());
}

#[test]
fn two_processes_share_the_limits_of_a_caller() {
    let (folder, mut one) = Process::alone();
    let mut two = Process::new(folder.path(), &one.now_ms, LedgerOnError::Deny);
    let mut granted = 0;
    for number in 0..20 {
        let process = if number % 2 == 0 { &mut one } else { &mut two };
        let endpoint = [process.wanted("a", r#""rpm":100"#)];
        let ada = process.of_caller("ada", r#""rpm":7"#, 0);
        if let Drawn::Granted(_, mut permit) = process.draw_for(&endpoint, &ada) {
            permit.take_caller().unwrap().spend();
            permit.spend();
            granted += 1;
        }
    }
    assert_eq!(granted, 7);
    // A caller has what an endpoint or a model of the same name has not.
    let endpoint = [one.wanted("ada", r#""rpm":100"#)];
    assert_eq!(one.used(&endpoint[0]).0, 0);
}

#[test]
fn without_the_ledger_a_limited_caller_is_refused_unless_the_config_says_otherwise() {
    for (on_error, is_granted) in [(LedgerOnError::Deny, false), (LedgerOnError::Allow, true)] {
        let folder = tempfile::tempdir().unwrap();
        let mut process = Process::new(folder.path(), &Arc::new(AtomicU64::new(1_000_000)), on_error);
        // The endpoint itself needs none.
        let endpoint = [process.wanted("a", r#""maxConcurrent":9"#)];
        let ada = process.of_caller("ada", r#""rpm":9,"maxConcurrent":1"#, 0);
        let mut answer = process.ask_for(&endpoint, &ada, Otherwise::LookElsewhere);
        process.allocator.serve(None).unwrap_err();
        let drawn = ready(&mut answer);
        assert_eq!(drawn.is_granted(), is_granted, "{drawn:?}");
        if is_granted {
            let mut second = process.ask_for(&endpoint, &ada, Otherwise::LookElsewhere);
            process.allocator.serve(None).unwrap_err();
            assert!(refused(ready(&mut second)).caller.is_some(), "one at once");
        }
    }
}

#[test]
fn a_permit_that_cannot_be_swapped_leaves_its_request_in_flight() {
    let (_folder, mut process) = Process::alone();
    let wanted = [process.wanted("a", r#""rpm":1,"maxConcurrent":1"#)];
    let Drawn::Granted(0, mut permit) = process.draw(&wanted) else { panic!("it is free") };
    permit.spend();
    let client = process.client.clone();
    let entered = process.runtime.enter();
    let mut swapped = Box::pin(async move {
        let drawn = client.swap(&mut permit).await;
        (drawn, permit)
    });
    let mut context = Context::from_waker(Waker::noop());
    assert!(swapped.as_mut().poll(&mut context).is_pending());
    process.allocator.serve(Some(&mut *process.ledger)).unwrap();
    let Poll::Ready((drawn, permit)) = swapped.as_mut().poll(&mut context) else { panic!("no answer") };
    assert!(!drawn.is_granted() && !permit.is_unspent());
    drop(entered);
    process.pass(Duration::from_secs(61));
    let refusal = refused(process.draw(&wanted));
    assert_eq!(refusal.held[0].held.by, LimitReason::Full(LimitKind::MaxConcurrent, 1), "its session goes on");
    drop(permit);
    process.serve();
    assert!(process.draw(&wanted).is_granted());
}
