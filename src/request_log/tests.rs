//! Tests of the log: what is written is read again, what is too old is deleted, and nothing that is wrong with the file reaches a request.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::HeaderValue;
use rusqlite::Connection;

use super::logged::Logged;
use super::queue::Queue;
use super::reader::{Filter, From, Reader, StatusWanted};
use super::writer::Writer;
use super::*;
use crate::config::LimitKind;
use crate::fault::HeldBy;
use crate::limit::LimitReason;
use crate::usage::Tokens;
use crate::usage::prices::NanoUsd;

const ALL: Retention = Retention { age: Duration::from_hours(24 * 30), bytes_max: 1 << 40 };

#[expect(clippy::unnecessary_wraps, reason = "most names of an entry are optional")]
fn known(name: &str) -> Option<Arc<str>> {
    Some(name.into())
}

/// A request of this number that was answered by an endpoint.
fn entry(number: u64) -> Entry {
    let attempt = Attempted {
        began: Duration::from_micros(250),
        took: Duration::from_millis(20),
        first_byte: Some(Duration::from_millis(10)),
        endpoint: "main".into(),
        lane: None,
        model: Some(Name::Known("m".into())),
        span: u64::MAX,
        outcome: "ok",
        status: Some(200),
        trouble: None,
        passed_over: Vec::new(),
    };
    Entry {
        ended: SystemTime::now(),
        id: HeaderValue::from_str(&format!("request-{number}")).ok(),
        trace: None,
        key: known("ada"),
        tags: None,
        address: Some("127.0.0.1".parse().unwrap()),
        session: Some(u64::MAX - number),
        method: Name::Known("POST".into()),
        path: Name::Known("/v1/chat/completions".into()),
        model: Some(Name::Any("m".into())),
        fallback: None,
        endpoint_model: None,
        endpoint: known("main"),
        lane: None,
        affinity: None,
        stream: false,
        status: Some(200),
        fault: None,
        trouble: None,
        queued: Duration::ZERO,
        first_byte: Some(Duration::from_micros(10_250)),
        first_token: None,
        generation: None,
        total: Duration::from_micros(20_250),
        tokens: None,
        cost: None,
        request_bytes: 100,
        bytes: 1000,
        held: Vec::new(),
        outside: None,
        cause: None,
        config: 1,
        attempts: vec![attempt],
        bodies: None,
    }
}

fn failed(number: u64) -> Entry {
    let tried = Attempted { endpoint: "spare".into(), outcome: "status_5xx", status: Some(503), ..attempt() };
    Entry {
        status: Some(502),
        fault: Some("endpoint_error"),
        trouble: Some(("model_failure", "status")),
        attempts: vec![tried, attempt()],
        ..entry(number)
    }
}

fn attempt() -> Attempted {
    entry(0).attempts.remove(0)
}

fn written(entries: &[Entry]) -> (tempfile::TempDir, Reader) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log/requests.db");
    Store::open(&path).unwrap().write(entries).unwrap();
    let reader = Reader::open(&path).unwrap();
    (folder, reader)
}

fn ids(requests: &[Logged]) -> Vec<&str> {
    requests.iter().map(|request| request.id.strip_prefix("request-").unwrap()).collect()
}

#[test]
fn what_is_written_is_read_again() {
    let held = HeldBy {
        endpoint: "full".into(),
        is_public: false,
        models: known("m*"),
        key: known("…abcd"),
        reason: LimitReason::Full(LimitKind::Rpm, 3),
        wait: Duration::from_secs(30),
    };
    let missing =
        HeldBy { reason: LimitReason::CallMissing, wait: Duration::ZERO, models: None, key: None, ..held.clone() };
    let first = Attempted {
        outcome: "rate_limited",
        status: Some(429),
        trouble: Some(("model_limit", "openai/rate_limit")),
        lane: known("…wxyz"),
        passed_over: vec![held.clone(), missing],
        ..attempt()
    };
    let whole = Entry {
        trace: Some(0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736),
        tags: known(r#"["nightly","team, a"]"#),
        fallback: known("other"),
        endpoint_model: known("vendor/m"),
        affinity: Some("moved"),
        stream: true,
        queued: Duration::from_millis(7),
        first_token: Some(Duration::from_millis(11)),
        generation: Some(Duration::from_millis(500)),
        tokens: Some(Tokens { prompt: 10, completion: 50, total: 60, cached: 4, reasoning: 2, audio: 1 }),
        cost: Some(NanoUsd(1_500_000)),
        held: vec![held],
        outside: known(r#"[{"endpoint":"off","reason":"disabled"}]"#),
        cause: Some("x".repeat(300)),
        attempts: vec![first, attempt()],
        ..entry(1)
    };
    let (_folder, mut reader) = written(&[whole]);
    let request = reader.request("request-1").unwrap().unwrap();
    let json = serde_json::to_value(&request).unwrap();
    for (name, value) in [
        ("row", serde_json::json!(1)),
        ("key", "ada".into()),
        ("trace", "4bf92f3577b34da6a3ce929d0e0e4736".into()),
        ("address", "127.0.0.1".into()),
        ("tags", serde_json::json!(["nightly", "team, a"])),
        ("session", "fffffffffffffffe".into()),
        ("method", "POST".into()),
        ("path", "/v1/chat/completions".into()),
        ("model", "m".into()),
        ("fallback", "other".into()),
        ("endpoint", "main".into()),
        ("endpointModel", "vendor/m".into()),
        ("affinity", "moved".into()),
        ("stream", true.into()),
        ("status", 200.into()),
        ("queuedMs", 7.0.into()),
        ("firstByteMs", 10.3.into()),
        ("totalMs", 20.3.into()),
        ("tokensPerSecond", 100.0.into()),
        ("cachedTokens", 4.into()),
        ("audioTokens", 1.into()),
        ("costUsd", 0.0015.into()),
        ("requestBytes", 100.into()),
        ("outside", serde_json::json!([{ "endpoint": "off", "reason": "disabled" }])),
    ] {
        assert_eq!(json[name], value, "{name}");
    }
    assert_eq!(request.cause.as_ref().unwrap().len(), 200);
    let [first, second] = &request.attempts[..] else { panic!("{request:?}") };
    assert_eq!(first.span, "ffffffffffffffff");
    assert_eq!((first.status, first.endpoint_key.as_deref(), second.status), (Some(429), Some("…wxyz"), Some(200)));
    assert_eq!(first.rule.as_deref(), Some("openai/rate_limit"));
    let [full, missing] = &first.passed_over[..] else { panic!("{first:?}") };
    assert_eq!(full.shown(|_| "then".into()), "full, key …abcd: 3 requests a minute for m*, until then");
    assert_eq!(missing.shown(|_| "never".into()), "full: it does not have the call");
    assert_eq!(request.held[0].reason, "rpm");
    assert!(reader.request("request-2").unwrap().is_none());
}

#[test]
fn requests_are_found_by_what_is_said_of_them() {
    let mut entries: Vec<_> = (0..10).map(entry).collect();
    entries[3] = failed(3);
    entries[4] = Entry { key: known("bob"), status: Some(429), fault: Some("limits_reached"), ..entry(4) };
    entries[5] = Entry { status: None, fault: Some("client_gone"), model: Some(Name::Known("n".into())), ..entry(5) };
    // It was answered, after another endpoint failed.
    entries[6] = Entry { attempts: failed(6).attempts, ..entry(6) };
    entries[7] = Entry { endpoint: None, fault: Some("stream_broken"), ..entry(7) };
    let (_folder, mut reader) = written(&entries);
    let mut found = |filter: Filter| {
        let page = reader.page(&filter, From::Newest, 50).unwrap();
        ids(&page.requests).join(" ")
    };
    let all = Filter::default();
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(found(all.clone()), "9 8 7 6 5 4 3 2 1 0");
    assert_eq!(found(Filter { key: text("bob"), ..all.clone() }), "4");
    assert_eq!(found(Filter { key: text("nobody"), ..all.clone() }), "");
    assert_eq!(found(Filter { failed: true, ..all.clone() }), "7 4 3", "a client that has gone is no failure");
    assert_eq!(found(Filter { model: text("n"), ..all.clone() }), "5");
    assert_eq!(found(Filter { endpoint: text("spare"), ..all.clone() }), "6 3");
    assert_eq!(found(Filter { endpoint: text("spare"), failed: true, ..all.clone() }), "6 3");
    assert_eq!(found(Filter { endpoint: text("main"), failed: true, ..all.clone() }), "4 3");
    assert_eq!(found(Filter { status: Some(StatusWanted::One(429)), ..all.clone() }), "4");
    assert_eq!(found(Filter { status: Some(StatusWanted::Class(5)), key: text("ada"), ..all.clone() }), "3");
    assert_eq!(found(Filter { session: Some(u64::MAX - 8), ..all.clone() }), "8");
    assert_eq!(found(Filter { id: text("request-2"), ..all }), "2");
}

#[test]
fn names_of_clients_do_not_pass_for_names_of_ours() {
    let made_up = Entry { model: Some(Name::Any("1".into())), path: Name::Any("/v1/files/2".into()), ..entry(1) };
    let (_folder, mut reader) = written(&[made_up, entry(2)]);
    let request = reader.request("request-1").unwrap().unwrap();
    assert_eq!((request.model.as_deref(), &*request.path), (Some("1"), "/v1/files/2"));
    let filter = Filter { endpoint: Some("%".to_owned()), ..Filter::default() };
    assert!(reader.page(&filter, From::Newest, 50).unwrap().requests.is_empty());
}

#[test]
fn pages_follow_each_other() {
    let entries: Vec<_> = (0..25).map(|number| if number % 5 == 0 { failed(number) } else { entry(number) }).collect();
    let (_folder, mut reader) = written(&entries);
    let filter = Filter { failed: true, ..Filter::default() };
    let first = reader.page(&filter, From::Newest, 2).unwrap();
    assert_eq!(ids(&first.requests), ["20", "15"]);
    let second = reader.page(&filter, From::Before(first.next.unwrap()), 2).unwrap();
    assert_eq!(ids(&second.requests), ["10", "5"]);
    let last = reader.page(&filter, From::Before(second.next.unwrap()), 2).unwrap();
    assert_eq!((ids(&last.requests), last.next), (vec!["0"], None));
    let after = reader.page(&Filter::default(), From::After(23), 50).unwrap();
    assert_eq!((ids(&after.requests), after.searched_to), (vec!["23", "24"], 25));
    let none = reader.page(&Filter::default(), From::After(25), 50).unwrap();
    assert_eq!((none.requests.len(), none.searched_to), (0, 25));
}

#[test]
fn moments_bound_a_search() {
    let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let entries: Vec<_> = (0..20).map(|number| Entry { ended: at(1000 + number), ..entry(number) }).collect();
    let (_folder, mut reader) = written(&entries);
    let mut found = |since: Option<i64>, until: Option<i64>| {
        let filter = Filter { since, until, ..Filter::default() };
        ids(&reader.page(&filter, From::Newest, 50).unwrap().requests).join(" ")
    };
    assert_eq!(found(Some(1_017_000), None), "19 18 17");
    assert_eq!(found(Some(1_016_001), Some(1_018_000)), "17");
    assert_eq!(found(None, Some(1_001_000)), "0");
    assert_eq!(found(Some(2_000_000), None), "");
    assert_eq!(found(None, Some(5)), "");
}

#[test]
fn what_is_too_old_is_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("requests.db");
    let mut store = Store::open(&path).unwrap();
    let now = SystemTime::now();
    let days = |days: u64| now - Duration::from_hours(24 * days);
    let old = |number| Entry { ended: days(31), ..failed(number) };
    store.write(&(0..2500).map(old).collect::<Vec<_>>()).unwrap();
    store.write(&(2500..2510).map(|number| Entry { ended: days(29), ..entry(number) }).collect::<Vec<_>>()).unwrap();
    let mut steps = 0;
    while store.retain(ALL, now).unwrap() {
        steps += 1;
        assert!(steps < 10);
    }
    assert_eq!(steps, 3, "a thousand at once");
    let mut reader = Reader::open(&path).unwrap();
    let left = reader.page(&Filter::default(), From::Newest, 50).unwrap();
    assert_eq!((left.requests.len(), left.requests[9].row), (10, 2501));
    let rows = |table: &str| -> u32 {
        let connection = Connection::open(&path).unwrap();
        connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
    };
    assert_eq!((rows("detail"), rows("attempt")), (10, 10), "their rows elsewhere, too");
    // The newest stays, so that its number is not given again.
    while store.retain(ALL, now + Duration::from_hours(24 * 90)).unwrap() {}
    assert_eq!(rows("request"), 1);
    store.write(&[entry(9999)]).unwrap();
    assert_eq!(reader.request("request-9999").unwrap().unwrap().row, 2511);
}

#[test]
fn the_file_stays_within_its_size() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("requests.db");
    let mut store = Store::open(&path).unwrap();
    let retention = Retention { bytes_max: 2 * 1024 * 1024, ..ALL };
    let mut largest = 0;
    for batch in 0..100 {
        store.write(&(0..500).map(|number| failed(batch * 500 + number)).collect::<Vec<_>>()).unwrap();
        while store.retain(retention, SystemTime::now()).unwrap() {}
        largest = largest.max(fs::metadata(&path).unwrap().len());
    }
    assert!(largest <= retention.bytes_max + 256 * 1024, "{largest} bytes");
    assert!(store.used() > retention.bytes_max / 2, "no more is deleted than has to be: {}", store.used());
    let mut reader = Reader::open(&path).unwrap();
    assert_eq!(reader.page(&Filter::default(), From::Newest, 1).unwrap().requests[0].id, "request-49999");
    // A smaller size is reached in steps.
    let smaller = Retention { bytes_max: 1024 * 1024, ..ALL };
    while store.retain(smaller, SystemTime::now()).unwrap() {}
    drop(reader);
    drop(store);
    let bytes = fs::metadata(&path).unwrap().len();
    assert!(bytes <= smaller.bytes_max, "{bytes} bytes");
}

#[test]
fn a_full_disk_loses_no_more_than_what_comes_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("requests.db");
    let mut store = Store::open(&path).unwrap();
    store.write(&[entry(1)]).unwrap();
    store.limit_pages(Some(30));
    let many: Vec<_> = (2..2000).map(failed).collect();
    let error = store.write(&many).unwrap_err();
    assert!(error.message.contains("make room on that disk") && !error.is_corrupt, "{error:?}");
    store.limit_pages(None);
    // Names that the failed batch had added are not taken for known.
    store.write(&many).unwrap();
    let request = Reader::open(&path).unwrap().request("request-2").unwrap().unwrap();
    assert_eq!((request.fault.as_deref(), &*request.attempts[0].endpoint), (Some("endpoint_error"), "spare"));
}

#[test]
fn bodies_are_kept_without_keys() {
    let mut request = KeptBody::default();
    request.add(br#"{"content":"my key is sk-abcdefghijklmnop1234"}"#);
    let mut answer = KeptBody::default();
    answer.add(&b"x".repeat(60_000));
    answer.add("é".repeat(4000).as_bytes());
    let secrets = [&b"endpoint-secret"[..]].into_iter().collect();
    let mut quoting = KeptBody::default();
    quoting.add(b"it was endpoint-secret");
    let mut audio = KeptBody::default();
    audio.add(&[0xff, 0xfb, 0x90, 0x64]);
    let bodies = |request, answer, secrets| Some(Box::new(Bodies { request, answer, secrets }));
    let entries = [
        Entry { bodies: bodies(request, answer, crate::response::redact::Secrets::default()), ..entry(1) },
        Entry { bodies: bodies(audio, quoting, secrets), ..entry(2) },
        entry(3),
    ];
    let (_folder, reader) = written(&entries);
    let [request, answer] = reader.bodies(1).unwrap().map(Option::unwrap);
    assert_eq!(request.shown(), r#"{"content":"my key is sk-…1234"}"#);
    assert_eq!((answer.length, answer.kept, answer.text.len()), (68_000, 65_536, 65_536));
    assert!(answer.shown().ends_with("é… (2464 more bytes are not kept)"));
    let [audio, quoting] = reader.bodies(2).unwrap().map(Option::unwrap);
    assert_eq!(
        (audio.shown().as_str(), quoting.text.as_str()),
        ("… (4 more bytes are not kept)", "it was ***************")
    );
    assert_eq!(reader.bodies(3).unwrap(), [None, None]);
}

#[test]
fn the_file_is_its_owners_alone_and_nobody_elses() {
    use std::os::unix::fs::PermissionsExt as _;
    let (folder, reader) = written(&[entry(1)]);
    drop(reader);
    let path = folder.path().join("log/requests.db");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let before: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
    Reader::open(&path).unwrap().page(&Filter::default(), From::Newest, 1).unwrap();
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), before.len(), "a reader leaves nothing behind");
    let other = folder.path().join("other.db");
    Connection::open(&other).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
    let why = "is another program's database; name another file in server.requestLog.path";
    assert!(Store::open(&other).unwrap_err().message.contains(why));
    assert!(Reader::open(&other).err().unwrap().contains("is empty") || Reader::open(&other).is_err());
    assert!(Reader::open(&folder.path().join("none.db")).err().unwrap().contains("there is no request log at"));
}

/// A log of its own, whose thread runs until it is closed.
fn running(path: &Path) -> (Arc<Queue>, std::thread::JoinHandle<()>) {
    let queue = Arc::new(Queue::new(ALL));
    let mut writer = Writer::new(path, Arc::clone(&queue));
    (queue, std::thread::spawn(move || writer.run()))
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(20), "this never came: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_last_entries_are_written_at_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("requests.db");
    let (queue, thread) = running(&path);
    for number in 0..5 {
        queue.add(entry(number));
    }
    queue.close();
    assert!(queue.wait_until_ended(Duration::from_secs(10)));
    thread.join().unwrap();
    assert_eq!(Reader::open(&path).unwrap().page(&Filter::default(), From::Newest, 50).unwrap().requests.len(), 5);
}

#[test]
fn a_corrupt_file_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("requests.db");
    fs::write(folder.path().join("requests.db.corrupt-20200101T000000Z"), "older").unwrap();
    fs::write(&path, [0xA5; 8192]).unwrap();
    let (queue, thread) = running(&path);
    until("it is written", || {
        queue.add(entry(1));
        queue.state(path.as_path().into()).written > 0
    });
    queue.close();
    thread.join().unwrap();
    let names: Vec<_> =
        fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    let aside: Vec<_> = names.iter().filter(|name| name.contains(".corrupt-")).collect();
    assert!(matches!(aside[..], [one] if !one.contains("2020")), "{names:?}");
    assert!(Reader::open(&path).unwrap().request("request-1").unwrap().is_some());
}

/// A log that has one entry, locked by somebody else.
fn locked(path: &Path, queue: &Queue) -> Connection {
    queue.add(entry(1));
    until("the first is written", || queue.state(path.into()).written == 1);
    let lock = Connection::open(path).unwrap();
    lock.execute_batch("BEGIN EXCLUSIVE").unwrap();
    lock
}

#[test]
fn what_meets_a_lock_for_a_while_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("requests.db");
    let (queue, thread) = running(&path);
    let state = || queue.state(path.as_path().into());
    let lock = locked(&path, &queue);
    queue.add(entry(2));
    std::thread::sleep(Duration::from_millis(2500));
    queue.add(entry(3));
    lock.execute_batch("COMMIT").unwrap();
    until("the others are written", || state().written == 3);
    assert_eq!(state().dropped.by_reason().map(|(_, count)| count).sum::<u64>(), 0);
    queue.close();
    thread.join().unwrap();
}

#[test]
fn a_file_that_is_locked_or_gone_holds_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("requests.db");
    let (queue, thread) = running(&path);
    let state = || queue.state(path.as_path().into());
    let lock = locked(&path, &queue);
    until("it says that it fails", || {
        let begun = Instant::now();
        if queue.takes(false) {
            queue.add(entry(2));
        }
        assert!(begun.elapsed() < Duration::from_secs(1), "nobody waits for the file");
        state().error.is_some()
    });
    lock.execute_batch("COMMIT").unwrap();
    drop(lock);
    until("it works again", || {
        queue.add(entry(3));
        state().error.is_none() && state().written > 1
    });
    fs::remove_file(&path).unwrap();
    until("there is another file", || {
        queue.add(entry(4));
        Reader::open(&path).is_ok_and(|mut log| log.request("request-4").is_ok_and(|found| found.is_some()))
    });
    queue.close();
    thread.join().unwrap();
}

#[test]
fn more_than_can_wait_is_dropped_and_counted() {
    let queue = Queue::new(ALL);
    let taken = (0..10_000).filter(|number| queue.takes(false).then(|| queue.add(entry(*number))).is_some()).count();
    assert_eq!(taken, 8192);
    assert_eq!(queue.dropped().total(), 10_000 - 8192);
    let queue = Queue::new(ALL);
    let strangers = (0..100).filter(|_| queue.takes(true)).count();
    assert_eq!(strangers, 10, "in one second");
    assert!(queue.takes(false), "they push nobody out");
    let by_reason: Vec<_> = queue.dropped().by_reason().map(|(reason, count)| (reason.name(), count)).collect();
    assert_eq!(by_reason, [("full", 0), ("failing", 0), ("strangers", 90)]);
}
