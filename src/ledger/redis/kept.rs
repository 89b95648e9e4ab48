//! What is kept beside counts: places of objects and sessions, and statistics that are reset.

use super::wire::{self, Arguments, joined};
use super::{RedisLedger, Server, pairs, texts};
use crate::ledger::LedgerError;
use crate::ledger::places::{CHANGES_MAX, Place, PlaceChange, Thing, ThingKind};

impl<S: Server> RedisLedger<S> {
    /// Key of a thing's places. It has a hash tag of its own, so that the nodes of a cluster share them.
    pub(super) fn place_key(&self, thing: &Thing) -> String {
        let tag = self.prefix.trim_end_matches(':').trim_matches(['{', '}']).to_owned();
        format!("{{{tag}:{}:{}}}:place", thing.kind.name(), joined(&[&thing.name]))
    }

    /// Takes the places of this batch into the queue. They may be written twice, so they need not be a part of a batch.
    pub(super) fn queue_places(&mut self) {
        self.queued_places.extend(self.places.drain(..));
        let surplus = self.queued_places.len().saturating_sub(CHANGES_MAX);
        if surplus > 0 {
            log::error!("ledger {}: where {surplus} objects and sessions are is not noted", self.server.name());
            self.queued_places.drain(..surplus);
        }
    }

    /// Writes so many places of the queue.
    pub(super) fn write_places(&mut self, count: usize) -> Result<(), LedgerError> {
        let some: Vec<Arguments> = self.queued_places.iter().take(count).cloned().collect();
        if some.is_empty() {
            return Ok(());
        }
        let written = some.len();
        self.server.run(some)?;
        self.queued_places.drain(..written);
        Ok(())
    }

    pub(super) fn write_place(&mut self, change: &PlaceChange) {
        let mut command = Arguments::default();
        match change {
            PlaceChange::Forget(thing, owner) => {
                let key = self.place_key(thing);
                command
                    .text("EVAL")
                    .text(include_str!("forget_place.lua"))
                    .number(1)
                    .text(&key)
                    .text(&joined(&[owner]));
            }
            PlaceChange::Note(thing, Place { owner, endpoint, organization, until }) => {
                let key = self.place_key(thing);
                let is_session = thing.kind == ThingKind::Session;
                command.text("EVAL").text(include_str!("note_place.lua")).number(1).text(&key);
                command.text(&joined(&[owner])).text(&joined(&[endpoint])).text(&joined(&[organization]));
                command.number(*until).text(if is_session { "1" } else { "0" });
            }
        }
        self.places.push(command);
    }

    /// Resets what the batch that is done has asked for. What fails is tried again with the next one: the batch itself is done.
    pub(super) fn finish_resets(&mut self) {
        self.due_resets.extend(self.resets.drain(..));
        while let Some(endpoint) = self.due_resets.front().cloned() {
            if let Err(error) = self.reset_statistics(endpoint.as_deref()) {
                log::warn!("{error}; token statistics are not reset yet, which is tried again");
                return;
            }
            self.due_resets.pop_front();
        }
    }

    /// Deletes token statistics piece by piece, so that nobody waits for long.
    pub(super) fn reset_statistics(&mut self, endpoint: Option<&str>) -> Result<(), LedgerError> {
        for (table, at) in [("hour", 0), ("day", 0), ("total", 0), ("key-day", 1), ("key-total", 1)] {
            let key = self.key(&format!("tokens:{table}"));
            let mut keys = vec![key.clone()];
            if !table.ends_with("total") {
                let moments = texts(self.run_one(&["ZRANGE", &key, "0", "-1"])?);
                keys = moments.iter().map(|moment| format!("{key}:{moment}")).collect();
            }
            if endpoint.is_none() {
                keys.push(key.clone());
            }
            for key in keys {
                let Some(endpoint) = endpoint else {
                    self.run_one(&["UNLINK", &key])?;
                    continue;
                };
                let fields = texts(self.run_one(&["HKEYS", &key])?);
                let of_it = |field: &&String| {
                    wire::split(field).is_some_and(|names| names.get(at).is_some_and(|name| name == endpoint))
                };
                for field in fields.iter().filter(of_it) {
                    self.run_one(&["HDEL", &key, field])?;
                }
            }
        }
        Ok(())
    }
}

/// The places in a reply that are not over, those that were used last first.
pub(super) fn places_of(rows: redis::Value, now: i64) -> Vec<Place> {
    let rows = texts(rows);
    let mut places: Vec<Place> = pairs(&rows).filter_map(|(field, value)| place(field, value)).collect();
    places.retain(|place| place.until > now);
    places.sort_by_key(|place| std::cmp::Reverse(place.until));
    places
}

/// A place as its field and value have it.
fn place(field: &str, value: &str) -> Option<Place> {
    let names = wire::split(field)?;
    let [owner, endpoint] = <[String; 2]>::try_from(names).ok()?;
    let (until, organization) = value.split_once(' ')?;
    let organization = wire::split(organization)?.into_iter().next()?;
    Some(Place {
        owner: owner.into(),
        endpoint: endpoint.into(),
        organization: organization.into(),
        until: until.parse().ok()?,
    })
}
