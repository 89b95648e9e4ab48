//! What a ledger keeps beside limits: places, lists of models, and token statistics by key.

use super::*;
use crate::ledger::places::{Place, PlaceChange, Thing, ThingKind};
use crate::usage::prices::NanoUsd;

/// A moment that is to come, in seconds of Unix time: a server forgets places by its own clock.
const LATER: i64 = 4_000_000_000;

fn thing(kind: ThingKind, name: &str) -> Thing {
    Thing { kind, name: name.into() }
}

fn place(owner: &str, endpoint: &str, until: i64) -> Place {
    Place { owner: owner.into(), endpoint: endpoint.into(), organization: "org: one".into(), until }
}

impl Process {
    fn note(&mut self, thing: &Thing, place: Place) {
        self.client.change_place(PlaceChange::Note(thing.clone(), place));
    }

    fn find(&mut self, thing: &Thing) -> Vec<Place> {
        let (client, things) = (self.client.clone(), vec![thing.clone()]);
        let _entered = self.runtime.enter();
        let mut find = Box::pin(async move { client.find_places(things).await.unwrap().remove(0) });
        let mut context = Context::from_waker(Waker::noop());
        assert!(find.as_mut().poll(&mut context).is_pending());
        self.serve();
        let Poll::Ready(found) = find.as_mut().poll(&mut context) else { panic!("no answer") };
        found
    }
}

#[test]
fn what_one_process_has_noted_another_one_finds() {
    let folder = tempfile::tempdir().unwrap();
    let now_ms = Arc::new(AtomicU64::new(1_000_000));
    let [mut one, mut other] = [(); 2].map(|()| Process::new(folder.path(), &now_ms, LedgerOnError::Deny));
    let (file, session) = (thing(ThingKind::Object, "file-1: a%"), thing(ThingKind::Session, "s"));
    one.note(&file, place("ada", "a", LATER));
    one.note(&file, place("ada", "b", LATER + 1));
    one.note(&file, place("bob", "c", LATER + 2));
    one.note(&file, place("bob", "c", LATER - 5));
    one.write();
    let found = other.find(&file);
    assert_eq!(found, [place("bob", "c", LATER + 2), place("ada", "b", LATER + 1), place("ada", "a", LATER)]);
    assert_eq!(other.find(&thing(ThingKind::Session, "file-1: a%")), [], "another kind of thing");
    // A session is at one endpoint only.
    one.note(&session, place("ada", "a", LATER));
    one.note(&session, place("bob", "a", LATER));
    one.note(&session, place("ada", "b", LATER));
    one.write();
    let mut found = other.find(&session);
    found.sort_by_key(|place| place.owner.clone());
    assert_eq!(found, [place("ada", "b", LATER), place("bob", "a", LATER)]);
    other.client.change_place(PlaceChange::Forget(file.clone(), "ada".into()));
    other.write();
    assert_eq!(one.find(&file), [place("bob", "c", LATER + 2)]);
}

#[test]
fn lists_of_models_and_accounts_of_models_are_there_for_the_next_process() {
    let (folder, mut process) = Process::alone();
    process.client.keep_models("a: b".into(), r#"["m"]"#.into());
    process.client.keep_models("a: b".into(), r#"["m","n"]"#.into());
    let wanted = process.wanted_of_models("a: b", r#""rpm":5"#, "m*%", r#""rpm":5"#);
    spent(process.draw(&[wanted]));
    process.write();
    let client = Client::new(Clock::read);
    let mut ledger = open_ledger(folder.path(), &client);
    assert_eq!(ledger.model_lists().unwrap(), [("a: b".into(), r#"["m","n"]"#.into())]);
    let models = AccountId::Models { endpoint: "a: b".into(), models: "m*%".into() };
    assert_eq!(ledger.accounts_of_models().unwrap(), [models]);
}

#[test]
fn statistics_are_kept_by_key_and_reset_by_endpoint() {
    let (folder, mut process) = Process::alone();
    let wall = process.client.clock().wall;
    for (endpoint, model, key, tokens) in
        [("a", "m: 1", Some("ada"), 3), ("a", "m: 1", None, 4), ("b", "n", Some("ada"), 5), ("b", "n", Some("bob"), 6)]
    {
        let wanted = process.wanted(endpoint, r#""rpm":-1"#);
        let cost = Cost::exact(Tokens { total: tokens, ..Tokens::default() }, Speed::default());
        let cost = cost.priced(Some(NanoUsd(tokens * 10)));
        let key: Option<Arc<str>> = key.map(Into::into);
        let spent = Spent::now(&endpoint.into(), model, cost, &TimeZone::UTC, wall).by(key.as_ref());
        process.client.spend_tokens(&wanted.accounts, None, spent, process.client.clock().boot);
    }
    process.write();
    let statistics = statistics_of(folder.path());
    let (stats, keys) = statistics.read(wall).unwrap();
    let total = |stats: &crate::ledger::stats::Stats, endpoint: &str, model: &str| {
        stats.get(endpoint).and_then(|models| models.get(model)).map(|model| model.cost.exact.tokens.total)
    };
    assert_eq!((total(&stats, "a", "m: 1"), total(&stats, "b", "n")), (Some(7), Some(11)));
    assert_eq!(keys.keys().collect::<Vec<_>>(), ["ada", "bob"]);
    assert_eq!((total(&keys["ada"], "a", "m: 1"), total(&keys["ada"], "b", "n")), (Some(3), Some(5)));
    let of_bob = statistics.read_key("bob", wall).unwrap();
    assert_eq!((total(&of_bob, "b", "n"), of_bob.len()), (Some(6), 1));
    assert_eq!(of_bob["b"]["n"].days.values().map(|part| (part.tokens, part.spent.0)).collect::<Vec<_>>(), [(6, 60)]);
    assert_eq!(statistics.last_used_of_keys().unwrap().len(), 2);
    let usage = |by_key| {
        let mut rows: Vec<(String, Option<String>, u64)> = statistics
            .usage((crate::ledger::stats::Per::Day, by_key), wall)
            .unwrap()
            .into_iter()
            .map(|row| (row.endpoint, row.key, row.cost.exact.tokens.total))
            .collect();
        rows.sort();
        rows
    };
    let row = |endpoint: &str, key: Option<&str>, tokens| (endpoint.to_owned(), key.map(str::to_owned), tokens);
    assert_eq!(usage(false), [row("a", None, 7), row("b", None, 11)]);
    assert_eq!(usage(true), [row("a", Some("ada"), 3), row("b", Some("ada"), 5), row("b", Some("bob"), 6)]);
    process.reset(Some("b"));
    assert_eq!((usage(false), usage(true)), (vec![row("a", None, 7)], vec![row("a", Some("ada"), 3)]));
    assert_eq!(statistics.read_key("bob", wall).unwrap().len(), 0);
    process.reset(None);
    let (stats, keys) = statistics.read(wall).unwrap();
    assert!(stats.is_empty() && keys.is_empty(), "{stats:?}");
}

impl Process {
    fn reset(&mut self, endpoint: Option<&str>) {
        let (client, endpoint) = (self.client.clone(), endpoint.map(Into::into));
        let mut reset = Box::pin(async move { client.reset_tokens(endpoint).await });
        let mut context = Context::from_waker(Waker::noop());
        assert!(reset.as_mut().poll(&mut context).is_pending());
        self.serve();
        assert_eq!(reset.as_mut().poll(&mut context), Poll::Ready(true));
    }
}
