//! Draws from several accounts at once: all or none.

use super::*;

/// The account of some of the endpoint's models.
fn models(wanted: &Wanted) -> LimitedAccount {
    wanted.accounts.accounts()[1].clone()
}

fn of_one(process: &mut Process, wanted: &Wanted) -> Drawn {
    process.draw(std::slice::from_ref(wanted))
}

/// Requests in the minute of the endpoint, and of its models.
fn used(process: &mut Process, wanted: &Wanted) -> (u64, u64) {
    (process.used(wanted).0, process.used_of(&models(wanted)).0)
}

#[test]
fn a_request_counts_in_all_accounts_or_in_none() {
    let (_folder, mut process) = Process::alone();
    let small = process.wanted_of_models("a", r#""rpm":3"#, "gpt-4o*", r#""rpm":2,"rpd":100"#);
    let plain = process.wanted("a", r#""rpm":3"#);
    for _ in 0..2 {
        spent(of_one(&mut process, &small));
    }
    let refusal = refused(of_one(&mut process, &small));
    let full = LimitReason::Full(LimitKind::Rpm, 2);
    assert_eq!(
        (reasons(&refusal), &refusal.held[0].account),
        (vec![(0, full)], &Some(models(&small).account.id().clone()))
    );
    assert_eq!(used(&mut process, &small), (2, 2), "what is refused counts nowhere");
    // Other models have what the endpoint has left; then they fill it for this one as well.
    spent(of_one(&mut process, &plain));
    assert_eq!(used(&mut process, &small), (3, 2));
    process.pass(Duration::from_millis(60_500));
    for _ in 0..3 {
        spent(of_one(&mut process, &plain));
    }
    let refusal = refused(of_one(&mut process, &small));
    assert_eq!(refusal.held[0].account, Some(AccountId::Endpoint("a".into())));
    assert_eq!(used(&mut process, &small), (3, 0));
}

#[test]
fn a_permit_that_is_not_used_comes_back_to_all_accounts() {
    let (_folder, mut process) = Process::alone();
    let wanted = process.wanted_of_models("a", r#""rpm":1"#, "m", r#""rpm":1,"maxConcurrent":1"#);
    let Drawn::Granted(0, unused) = of_one(&mut process, &wanted) else { panic!("it is free") };
    assert_eq!(used(&mut process, &wanted), (1, 1));
    drop(unused);
    process.serve();
    assert_eq!(used(&mut process, &wanted), (0, 0));
    // Too old, it is swapped: it comes back and is drawn again in one step.
    let Drawn::Granted(0, old) = of_one(&mut process, &wanted) else { panic!("it is free again") };
    process.now_ms.fetch_add(1000, Ordering::Relaxed);
    assert!(old.is_stale(&process.client.clock()));
    let mut swapped = process.ask_to_swap(old);
    process.serve();
    let Drawn::Granted(0, mut fresh) = ready(&mut swapped) else { panic!("nobody else wants it") };
    fresh.spend();
    assert_eq!(used(&mut process, &wanted), (1, 1));
    assert_eq!(wanted.accounts.accounts().iter().map(|of| of.account.attempts()).collect::<Vec<_>>(), [1, 1]);
}

#[test]
fn concurrent_requests_of_some_models_leave_the_others_alone() {
    let (_folder, mut process) = Process::alone();
    let (one, other) = (
        process.wanted_of_models("a", r#""maxConcurrent":2"#, "m", r#""maxConcurrent":1"#),
        process.wanted_of_models("a", r#""maxConcurrent":2"#, "n", r#""maxConcurrent":5"#),
    );
    let Drawn::Granted(0, first) = of_one(&mut process, &one) else { panic!("it is free") };
    assert!(matches!(of_one(&mut process, &one), Drawn::Refused(_)));
    let Drawn::Granted(0, _second) = of_one(&mut process, &other) else { panic!("another model") };
    let refusal = refused(of_one(&mut process, &other));
    assert_eq!(refusal.held[0].account, Some(AccountId::Endpoint("a".into())), "two at once are all it takes");
    drop(first);
    process.serve();
    assert!(matches!(of_one(&mut process, &one), Drawn::Granted(..)));
}

#[test]
fn an_endpoint_without_limits_counts_what_its_models_draw() {
    let (_folder, mut process) = Process::alone();
    let limited = process.wanted_of_models("a", r#""rpm":-1"#, "m", r#""rpm":5"#);
    let plain = process.wanted("a", r#""rpm":-1"#);
    process.client.list_accounts(1, limited.accounts.accounts().iter().cloned());
    spent(of_one(&mut process, &limited));
    process.client.unlimited(&plain.accounts).spend();
    process.serve();
    process.pass(WRITE_DELAY);
    assert_eq!(used(&mut process, &limited), (2, 1));
    // Tokens count in both as well.
    let cost = Cost::exact(Tokens { total: 7, ..Tokens::default() }, Speed::default());
    let clock = process.client.clock();
    let bill = Spent::now(&"a".into(), "m", cost, &TimeZone::UTC, clock.wall);
    process.client.spend_tokens(&limited.accounts, None, bill, clock.boot);
    process.serve();
    let tokens = |of: &LimitedAccount| of.account.view().used.tpm;
    assert_eq!((tokens(&whole(&limited)), tokens(&models(&limited))), (7, 7));
}

#[test]
fn what_is_drawn_ahead_counts_in_all_accounts_and_comes_back_when_it_is_needed() {
    let (_folder, mut process) = Process::alone();
    let wanted = process.wanted_of_models("a", r#""rpm":1000000"#, "m", r#""rpm":100000"#);
    let sent = u64::try_from(busy(&mut process, &wanted)).unwrap();
    let counted = |of: &LimitedAccount, clock: &Clock| of.count_up(clock).used.rpm;
    let clock = process.client.clock();
    let ahead = counted(&whole(&wanted), &clock) - sent;
    assert!(ahead >= 8, "{ahead}");
    assert_eq!(counted(&models(&wanted), &clock), sent + ahead);
    // The smaller of the two is what a part of may be drawn ahead.
    assert!(ahead <= 100_000 / 256, "{ahead}");
    // Another model needs the endpoint's exact count, which has them back.
    let other = process.wanted_of_models("a", r#""rpm":1000000"#, "n", r#""rpm":10"#);
    let Drawn::Granted(0, mut permit) = of_one(&mut process, &other) else { panic!("there is plenty") };
    permit.spend();
    assert!(process.client.draw_at_once(&wanted.accounts, &process.client.clock()).is_none());
    assert_eq!(used(&mut process, &wanted), (sent + 1, sent));
    assert_eq!(used(&mut process, &other), (sent + 1, 1));
}

#[test]
fn nothing_is_drawn_ahead_while_one_account_has_little_left() {
    let (_folder, mut process) = Process::alone();
    let wanted = process.wanted_of_models("a", r#""rpm":1000000"#, "m", r#""rpm":1000"#);
    for _ in 0..100 {
        let mut first_choice = process.ask(std::slice::from_ref(&wanted), Otherwise::LookElsewhere);
        process.serve();
        spent(ready(&mut first_choice));
        assert!(process.client.draw_at_once(&wanted.accounts, &process.client.clock()).is_none());
        process.now_ms.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_batch_that_fails_counts_in_no_account() {
    let (folder, mut process) = Process::alone();
    let wanted = process.wanted_of_models("a", r#""rpm":2"#, "m", r#""rpm":2,"maxConcurrent":1"#);
    let Some(holder) = process.other_holder(folder.path()) else { return };
    holder.execute_batch("BEGIN IMMEDIATE").unwrap();
    let mut answer = process.ask(std::slice::from_ref(&wanted), Otherwise::Refuse(CALLER));
    process.allocator.serve(Some(&mut *process.ledger)).unwrap_err();
    assert!(matches!(ready(&mut answer), Drawn::Unavailable));
    holder.execute_batch("ROLLBACK").unwrap();
    process.pass(RENEW);
    assert_eq!(used(&mut process, &wanted), (0, 0));
    assert!(matches!(of_one(&mut process, &wanted), Drawn::Granted(..)), "nor is it in flight");
}

/// The wait that a refused caller gets, in milliseconds.
fn told(process: &mut Process, wanted: &Wanted, caller: u64) -> u128 {
    let mut answer = process.ask(std::slice::from_ref(wanted), Otherwise::Refuse(CallerId(caller)));
    process.serve();
    refused(ready(&mut answer)).wait.as_millis()
}

#[test]
fn a_moment_promised_for_one_model_puts_off_no_other() {
    let (_folder, mut process) = Process::alone();
    let one = process.wanted_of_models("a", r#""rpm":2"#, "m", r#""rpm":1"#);
    let plain = process.wanted("a", r#""rpm":2"#);
    spent(of_one(&mut process, &plain));
    process.pass(Duration::from_secs(30));
    spent(of_one(&mut process, &one));
    // The endpoint is free in 30.5 s, this model in 60.5 s; one caller may ask for both.
    assert_eq!(told(&mut process, &one, 1), 60_500);
    assert_eq!(told(&mut process, &plain, 2), 30_500);
    assert_eq!(
        told(&mut process, &plain, 1),
        60_500,
        "the first permit of the endpoint is promised to the other caller"
    );
}

#[test]
fn a_caller_is_told_the_moment_of_the_model_it_asks_for() {
    let (_folder, mut process) = Process::alone();
    let short = process.wanted_of_models("a", r#""rpm":100"#, "n", r#""rpm":1"#);
    let long = process.wanted_of_models("a", r#""rpm":100"#, "m", r#""rpd":1"#);
    spent(of_one(&mut process, &short));
    spent(of_one(&mut process, &long));
    for _ in 0..3 {
        assert_eq!(told(&mut process, &short, 1), 60_500);
        assert!(told(&mut process, &long, 1) > 3_600_000, "its day is used up, whatever was told for the other model");
    }
}

#[test]
fn a_full_model_waits_for_itself_and_not_for_the_promises_of_its_endpoint() {
    let (_folder, mut process) = Process::alone();
    let plain = process.wanted("a", r#""rpm":1"#);
    spent(of_one(&mut process, &plain));
    for caller in 0..5 {
        told(&mut process, &plain, caller);
    }
    // Nobody came back for what was promised, up to five minutes ahead, and the endpoint is free.
    process.pass(Duration::from_secs(61));
    let model = process.wanted_of_models("a", r#""rpm":1"#, "m", r#""maxConcurrent":1"#);
    let Drawn::Granted(0, _busy) = of_one(&mut process, &model) else { panic!("it is free") };
    let other = process.wanted_of_models("a", r#""rpm":100"#, "m", r#""maxConcurrent":1"#);
    assert_eq!(told(&mut process, &other, 9), 1000);
}

#[test]
fn a_crowd_at_an_endpoint_that_rests_is_spread_by_its_tightest_limit() {
    let (_folder, mut process) = Process::alone();
    let mut wanted = process.wanted_of_models("a", r#""rpm":2"#, "m", r#""tpd":1000"#);
    wanted.not_before = process.client.clock().boot + Duration::from_secs(30);
    let waits: Vec<u128> = (0..5).map(|caller| told(&mut process, &wanted, caller)).collect();
    assert_eq!(waits, [30_000, 30_000, 90_500, 90_500, 151_000]);
}

#[test]
fn an_account_has_the_limits_of_the_newest_config() {
    let (_folder, mut process) = Process::alone();
    let id = AccountId::Endpoint("a".into());
    let [old, new] = [r#""rpm":1"#, r#""rpm":9"#].map(|limits| process.limited(&id, limits));
    process.client.list_accounts(2, [new.clone()].into_iter());
    // A request that still runs under the old config lists it late.
    process.client.list_account(1, old);
    process.serve();
    assert_eq!(new.account.view().gauges.rpm.unwrap().limit, 9);
}

#[test]
fn processes_share_the_accounts_of_models_and_find_them_after_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let now_ms = Arc::new(AtomicU64::new(1_000_000));
    let mut granted = 0;
    for _ in 0..6 {
        // Each begins where the last one ended without a word.
        let mut process = Process::new(folder.path(), &now_ms, LedgerOnError::Deny);
        let wanted = process.wanted_of_models("a", r#""rpm":100"#, "m", r#""rpm":4,"rpd":5"#);
        if let Drawn::Granted(_, mut permit) = of_one(&mut process, &wanted) {
            permit.spend();
            std::mem::forget(permit);
            granted += 1;
        }
    }
    assert_eq!(granted, 4);
    let mut process = Process::new(folder.path(), &now_ms, LedgerOnError::Deny);
    let wanted = process.wanted_of_models("a", r#""rpm":100"#, "m", r#""rpm":4,"rpd":5"#);
    assert_eq!(used(&mut process, &wanted), (4, 4));
    process.pass(Duration::from_millis(60_500));
    spent(of_one(&mut process, &wanted));
    let refusal = refused(of_one(&mut process, &wanted));
    assert_eq!(reasons(&refusal), [(0, LimitReason::Full(LimitKind::Rpd, 5))]);
}
