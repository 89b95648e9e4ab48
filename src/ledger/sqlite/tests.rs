use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::database::{beside, move_aside};
use crate::ledger::stats::{self, Statistics as _};
use crate::usage::prices::NanoUsd;
use crate::usage::{Speed, Tokens};
use jiff::civil::date;

const BOOT: Opening<'_> = Opening { boot_id: Some("boot"), now: Stamp(1_000_000), minute_unknown: false };

fn open(path: &Path, opening: &Opening<'_>) -> SqliteLedger {
    SqliteLedger::open(path, LedgerSync::Normal, opening).unwrap()
}

fn one_day() -> Days {
    Days { first: date(2026, 11, 25), last: date(2026, 11, 25) }
}

fn endpoint(id: &str) -> AccountId {
    AccountId::Endpoint(id.into())
}

fn batch(ledger: &mut SqliteLedger, work: impl FnOnce(&mut SqliteLedger)) -> u64 {
    let generation = ledger.begin().unwrap();
    work(ledger);
    ledger.commit(&Claims::default(), &Rows::default()).unwrap();
    generation
}

fn add(ledger: &mut SqliteLedger, slot: u64, attempts: i64) -> u64 {
    batch(ledger, |ledger| ledger.add(&endpoint("a"), Slot(slot), one_day(), Change { attempts, tokens: 7 }).unwrap())
}

fn minute(ledger: &mut SqliteLedger) -> Vec<(u64, u64)> {
    let mut slots = Vec::new();
    batch(ledger, |ledger| {
        let rows = ledger.minute(&endpoint("a"), Slot(0)).unwrap();
        slots = rows.into_iter().map(|(slot, counts)| (slot.0, counts.attempts)).collect();
    });
    slots
}

#[test]
fn what_is_added_is_there_and_what_is_rolled_back_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/folder/ledger.db");
    let mut ledger = open(&path, &BOOT);
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    add(&mut ledger, 4000, 2);
    add(&mut ledger, 4000, 1);
    add(&mut ledger, 4000, -1);
    ledger.begin().unwrap();
    ledger.add(&endpoint("a"), Slot(4000), one_day(), Change { attempts: 5, tokens: 0 }).unwrap();
    ledger.roll_back();
    assert_eq!(minute(&mut ledger), [(4000, 2)]);
    // If the counts were deleted meanwhile, taking them back does not make them negative.
    add(&mut ledger, 4001, -3);
    assert_eq!(minute(&mut ledger), [(4000, 2), (4001, 0)]);
    ledger.begin().unwrap();
    assert_eq!(ledger.day(&endpoint("a"), date(2026, 11, 25)).unwrap(), Counts { attempts: 0, tokens: 28 });
    assert_eq!(ledger.day(&endpoint("b"), date(2026, 11, 25)).unwrap(), Counts::default());
    ledger.forget(&endpoint("a"), Slot(4001)).unwrap();
    ledger.commit(&Claims::default(), &Rows::default()).unwrap();
    assert_eq!(minute(&mut ledger), [(4001, 0)]);
}

#[test]
fn places_are_found_until_they_are_over() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = open(&folder.path().join("ledger.db"), &BOOT);
    let thing = |kind, name: &str| Thing { kind, name: name.into() };
    let place = |owner: &str, endpoint: &str, until| Place {
        owner: owner.into(),
        endpoint: endpoint.into(),
        organization: "o".into(),
        until,
    };
    let file = thing(ThingKind::Object, "file-1");
    let session = thing(ThingKind::Session, "file-1");
    let note = |ledger: &mut SqliteLedger, thing: &Thing, place: Place| {
        batch(ledger, |ledger| ledger.change_place(&PlaceChange::Note(thing.clone(), place)).unwrap());
    };
    let at = |ledger: &mut SqliteLedger, thing: &Thing, now| {
        let mut found = Vec::new();
        batch(ledger, |ledger| found = ledger.places_of(thing, now).unwrap());
        found.iter().map(|place| format!("{} {} {}", place.owner, place.endpoint, place.until)).collect::<Vec<_>>()
    };
    for (thing, place) in [
        (&file, place("", "a", 100)),
        (&file, place("", "b", 200)),
        (&file, place("else", "c", 150)),
        // Used again, and a later moment is not taken back.
        (&file, place("", "a", 300)),
        (&file, place("", "b", 50)),
        (&session, place("", "a", 100)),
        (&session, place("", "b", 90)),
    ] {
        note(&mut ledger, thing, place);
    }
    assert_eq!(at(&mut ledger, &file, 99), [" a 300", " b 200", "else c 150"]);
    assert_eq!(at(&mut ledger, &file, 200), [" a 300"]);
    assert_eq!(at(&mut ledger, &session, 0), [" b 90"], "a session is at one place");
    batch(&mut ledger, |ledger| {
        ledger.change_place(&PlaceChange::Forget(file.clone(), "else".into())).unwrap();
        ledger.forget_places(ThingKind::Object, 200, false).unwrap();
    });
    assert_eq!(at(&mut ledger, &file, 0), [" a 300"]);
    assert_eq!(at(&mut ledger, &session, 0), [" b 90"], "another kind is left alone");
}

#[test]
fn of_too_many_places_those_used_longest_ago_are_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let mut ledger = open(&path, &BOOT);
    let count = |ledger: &SqliteLedger, sql: &str| ledger.connection.query_row(sql, [], |row| row.get::<_, u32>(0));
    let more = 10 + DELETED_AT_ONCE;
    let rows = PLACES_MAX + more;
    let fill = format!(
        "BEGIN; WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows}) \
         INSERT INTO place SELECT 'object', 'f' || i, '', 'a', 'o', i FROM n; COMMIT"
    );
    ledger.connection.execute_batch(&fill).unwrap();
    let forget = |ledger: &mut SqliteLedger, surplus| {
        let mut has_more = false;
        batch(ledger, |ledger| has_more = ledger.forget_places(ThingKind::Object, 0, surplus).unwrap());
        has_more
    };
    assert!(!forget(&mut ledger, false));
    assert_eq!(count(&ledger, "SELECT count(*) FROM place"), Ok(rows));
    assert!(forget(&mut ledger, true), "permits do not wait for all of them");
    assert_eq!(count(&ledger, "SELECT count(*) FROM place"), Ok(PLACES_MAX + 10));
    assert!(!forget(&mut ledger, true));
    assert_eq!(count(&ledger, "SELECT count(*) FROM place"), Ok(PLACES_MAX));
    assert_eq!(count(&ledger, "SELECT min(until) FROM place"), Ok(more + 1));
}

#[test]
fn accounts_of_models_are_kept_apart_from_their_endpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let mut ledger = open(&path, &BOOT);
    let models = |models: &str| AccountId::Models { endpoint: "a".into(), models: models.into() };
    let counts = |ledger: &mut SqliteLedger, account: &AccountId| {
        let mut counts = (Vec::new(), Counts::default());
        batch(ledger, |ledger| {
            let minute = ledger.minute(account, Slot(0)).unwrap();
            let minute = minute.iter().map(|(slot, counts)| (slot.0, counts.attempts)).collect();
            counts = (minute, ledger.day(account, date(2026, 11, 25)).unwrap());
        });
        counts
    };
    add(&mut ledger, 4000, 5);
    batch(&mut ledger, |ledger| {
        for (account, attempts) in [(models("m"), 2), (models("n"), 3), (models("m"), 1), (models("n"), -4)] {
            ledger.add(&account, Slot(4000), one_day(), Change { attempts, tokens: 1 }).unwrap();
        }
    });
    assert_eq!(counts(&mut ledger, &endpoint("a")).0, [(4000, 5)]);
    assert_eq!(counts(&mut ledger, &models("m")), (vec![(4000, 3)], Counts { attempts: 3, tokens: 2 }));
    assert_eq!(counts(&mut ledger, &models("n")).0, [(4000, 0)], "never negative");
    assert_eq!(counts(&mut ledger, &models("")).0, []);
    batch(&mut ledger, |ledger| ledger.forget(&models("m"), Slot(4001)).unwrap());
    assert_eq!(counts(&mut ledger, &models("m")).0, []);
    assert_eq!(counts(&mut ledger, &endpoint("a")).0, [(4000, 5)]);
    // A start of the machine closes their minute as well.
    batch(&mut ledger, |ledger| {
        ledger.add(&models("m"), Slot(4000), one_day(), Change { attempts: 1, tokens: 0 }).unwrap();
    });
    drop(ledger);
    let mut ledger = open(&path, &Opening { boot_id: Some("another"), now: Stamp(20_000), minute_unknown: false });
    assert_eq!(counts(&mut ledger, &models("m")), (vec![], Counts { attempts: 4, tokens: 2 }));
}

#[test]
fn counts_of_old_days_go_but_for_the_newest() {
    let folder = tempfile::tempdir().unwrap();
    let mut ledger = open(&folder.path().join("ledger.db"), &BOOT);
    for account in [endpoint("a"), AccountId::Models { endpoint: "a".into(), models: "m".into() }] {
        let on = |ledger: &mut SqliteLedger, day: i8| ledger.day(&account, date(2026, 11, day)).unwrap().attempts;
        batch(&mut ledger, |ledger| {
            for day in 1..=6 {
                let days = Days { first: date(2026, 11, day), last: date(2026, 11, day) };
                ledger.add(&account, Slot(4000), days, Change { attempts: 1, tokens: 0 }).unwrap();
            }
            ledger.forget_days(&account, date(2026, 11, 3)).unwrap();
            assert_eq!([1, 2, 3, 6].map(|day| on(ledger, day)), [0, 0, 1, 1]);
            // A clock that is years ahead makes them all old.
            ledger.forget_days(&account, date(2030, 1, 1)).unwrap();
            assert_eq!([3, 4, 5, 6].map(|day| on(ledger, day)), [0, 1, 1, 1]);
        });
    }
    let known = vec![AccountId::Models { endpoint: "a".into(), models: "m".into() }];
    assert_eq!(ledger.accounts_of_models().unwrap(), known);
}

#[test]
fn a_generation_changes_when_somebody_else_has_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let (mut one, mut other) = (open(&path, &BOOT), open(&path, &BOOT));
    let first = add(&mut one, 4000, 1);
    assert_eq!(add(&mut one, 4000, 1), first, "its own commits do not count");
    checkpoint(&path).unwrap();
    add(&mut other, 4000, 1);
    let second = add(&mut one, 4000, 1);
    assert_ne!(second, first);
    assert_eq!(minute(&mut other), [(4000, 4)]);
    drop(one);
    let mut again = open(&path, &BOOT);
    let third = add(&mut again, 4000, 1);
    assert!(third != first && third != second, "another connection begins to count anew");
}

#[test]
fn a_start_of_the_machine_closes_the_minute_and_keeps_the_day() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let mut ledger = open(&path, &BOOT);
    assert_eq!(ledger.unknown_until, Stamp(0), "a new ledger knows that there was nothing");
    add(&mut ledger, 4000, 3);
    drop(ledger);
    assert_eq!(open(&path, &BOOT).unknown_until, Stamp(0), "the same start");
    let later = Opening { boot_id: Some("another"), now: Stamp(20_000), minute_unknown: false };
    let mut ledger = open(&path, &later);
    assert_eq!(ledger.unknown_until, Stamp(0) + SPAN);
    assert_eq!(minute(&mut ledger), []);
    ledger.begin().unwrap();
    assert_eq!(ledger.day(&endpoint("a"), date(2026, 11, 25)).unwrap().attempts, 3);
    ledger.roll_back();
    drop(ledger);
    assert_eq!(open(&path, &later).unknown_until, Stamp(0) + SPAN, "whoever opens it later knows as well");
}

#[test]
fn without_a_boot_id_a_stamp_from_the_future_tells() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let unnamed = |now| Opening { boot_id: None, now: Stamp(now), minute_unknown: false };
    let mut ledger = open(&path, &unnamed(1_000_000));
    add(&mut ledger, 4000, 3);
    drop(ledger);
    assert_eq!(minute(&mut open(&path, &unnamed(1_001_000))), [(4000, 3)]);
    let mut ledger = open(&path, &unnamed(5000));
    assert_eq!((minute(&mut ledger), ledger.unknown_until), (Vec::new(), Stamp(0) + SPAN));
}

#[test]
fn the_schema_is_brought_forward_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let mut ledger = open(&path, &BOOT);
    add(&mut ledger, 4000, 3);
    let newer = [SCHEMA.steps, &["ALTER TABLE day ADD COLUMN note TEXT"]].concat();
    let newer = Schema { steps: &newer, ..SCHEMA };
    ledger.migrate(&newer).unwrap();
    ledger.migrate(&newer).unwrap();
    assert_eq!(minute(&mut ledger), [(4000, 3)]);
    let version: i64 = ledger.connection.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    assert_eq!(usize::try_from(version), Ok(newer.steps.len()));
    ledger.connection.prepare("SELECT note FROM day").unwrap();
    drop(ledger);
    // An older version refuses the file, since it cannot know what a newer schema means.
    let error = SqliteLedger::open(&path, LedgerSync::Normal, &BOOT).unwrap_err();
    assert_eq!(error.kind, FaultKind::Unusable);
    assert!(
        error.message.contains(&format!("schema version {}", newer.steps.len()))
            && error.message.contains("server.ledger"),
        "{error}"
    );
}

#[test]
fn a_step_that_fails_leaves_the_schema_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let mut ledger = open(&path, &BOOT);
    add(&mut ledger, 4000, 3);
    let failing = [SCHEMA.steps, &["ALTER TABLE day ADD COLUMN x TEXT; SELECT nonsense"]].concat();
    let failing = Schema { steps: &failing, ..SCHEMA };
    ledger.migrate(&failing).unwrap_err();
    drop(ledger);
    assert_eq!(minute(&mut open(&path, &BOOT)), [(4000, 3)]);
}

#[test]
fn a_damaged_file_is_found_out_and_moved_aside_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let mut ledger = open(&path, &BOOT);
    for slot in 4000..4200 {
        add(&mut ledger, slot, 1);
    }
    drop(ledger);
    // The header stays intact, a page inside is damaged.
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2 / 1024 * 1024;
    bytes[middle..middle + 1024].fill(0xA5);
    fs::write(&path, &bytes).unwrap();
    let seen = identity(&path).unwrap();
    let error = SqliteLedger::open(&path, LedgerSync::Normal, &BOOT).unwrap_err();
    assert_eq!(error.kind, FaultKind::Corrupt, "{error}");
    let aside = move_aside(&path, Some(seen)).unwrap().unwrap();
    assert_eq!(fs::read(&aside).unwrap(), bytes);
    let ledger = open(&path, &Opening { minute_unknown: true, ..BOOT });
    assert_eq!(ledger.unknown_until, BOOT.now + SPAN);
    // Another process that has seen the same damaged file does not move the new one.
    assert_eq!(move_aside(&path, Some(seen)).unwrap(), None);
    assert!(!ledger.was_replaced());
    fs::remove_file(&path).unwrap();
    assert!(ledger.was_replaced());
}

#[test]
fn statistics_that_are_too_old_are_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let mut ledger = open(&path, &BOOT);
    let now: i64 = 1_795_608_000;
    let spent = |hours_ago: i64| Spent {
        endpoint: "a".into(),
        model: "m".into(),
        key: Some("ada".into()),
        hour: now - hours_ago * 3600,
        day: now - hours_ago / 24 * 86_400,
        at_ms: (now - hours_ago * 3600) * 1000,
        cost: Cost::exact(Tokens { total: 3, ..Tokens::default() }, Speed::default()).priced(Some(NanoUsd(10))),
    };
    batch(&mut ledger, |ledger| {
        for hours_ago in [0, 47, 48, 399 * 24, 400 * 24] {
            ledger.add_tokens(&spent(hours_ago)).unwrap();
        }
    });
    let wall = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(now.unsigned_abs());
    let kept = |path: &Path| {
        let (stats, keys) = FileStatistics(path.to_owned()).read(wall).unwrap();
        let (model, of_key) = (&stats["a"]["m"], &keys["ada"]["a"]["m"]);
        assert_eq!((&of_key.days, of_key.cost, of_key.last_used_ms), (&model.days, model.cost, model.last_used_ms));
        assert_eq!((model.cost.money.spent, of_key.hours.len()), (NanoUsd(50), 0));
        assert!(model.days.values().all(|part| part.spent.0 == 10 * part.tokens / 3));
        (model.hours.len(), model.days.len(), model.cost.exact.requests, model.last_used_ms)
    };
    let expected = (2, 4, 5, now * 1000);
    assert_eq!(kept(&path), expected, "they are not shown any more");
    let rows = |ledger: &SqliteLedger| {
        let count = |table: &str| -> i64 {
            ledger.connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
        };
        ["token_hour", "token_day", "key_day"].map(count)
    };
    let before = rows(&ledger);
    let oldest = |kept| stats::oldest(now, kept);
    batch(&mut ledger, |ledger| {
        ledger.forget_tokens(oldest(stats::HOURS_KEPT), oldest(stats::DAYS_KEPT)).unwrap();
    });
    assert!(rows(&ledger).iter().zip(before).all(|(now, before)| *now < before), "nor kept");
    assert_eq!(kept(&path), expected);
    batch(&mut ledger, |ledger| ledger.reset_tokens(Some("b")).unwrap());
    assert_eq!(kept(&path), expected);
    batch(&mut ledger, |ledger| ledger.reset_tokens(Some("a")).unwrap());
    assert_eq!(FileStatistics(path.clone()).read_key("ada", wall).unwrap().len(), 0);
    let (stats, keys) = FileStatistics(path.clone()).read(wall).unwrap();
    assert!(stats.is_empty() && keys.is_empty());
}

#[test]
fn the_log_does_not_grow_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger.db");
    let mut ledger = open(&path, &BOOT);
    let log_bytes = || fs::metadata(beside(&path, "-wal")).unwrap().len();
    let mut greatest = 0;
    for _ in 0..40 {
        for slot in 4000..4300 {
            add(&mut ledger, slot, 1);
        }
        checkpoint(&path).unwrap();
        greatest = greatest.max(log_bytes());
    }
    assert!(greatest < 4 * 1024 * 1024, "{greatest}");
}
