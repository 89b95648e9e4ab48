//! The objects of an attempt: those that its request names, and those that its answer makes.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::charge::Asked;
use crate::config::Trouble;
use crate::ledger::Client;
use crate::limit::Clock;
use crate::request::shape;
use crate::response::objects::{Found, ObjectReader, Wanted};
use crate::routing::objects::{self, Named, Objects, Owner, Readers};
use crate::routing::pool::Pool;
use crate::routing::retry::Outcome;

/// What a request has to do with objects.
#[derive(Clone, Debug)]
pub struct AskedObjects {
    /// Whose they are.
    pub owner: Owner,
    /// True if it names any.
    pub names_any: bool,
    /// Those that it names.
    pub named: Named,
    /// What is looked for in its answer.
    pub wanted: Wanted,
    /// True if it deletes the one that it is about.
    pub deletes: bool,
    /// True if a 404 says that the one that it is about is no more.
    pub looks: bool,
    /// What is left out of the body at an endpoint that cannot read it.
    pub sealed: Option<Sealed>,
    /// The organisations whose things it names.
    pub organizations: Vec<Arc<str>>,
}

/// Reasoning that was sealed for an organisation.
#[derive(Clone, Debug)]
pub struct Sealed {
    /// Who can read it.
    pub readers: Readers,
    /// Where it stands in the body.
    pub ranges: Vec<Range<usize>>,
}

/// The same for one attempt.
#[derive(Debug)]
pub struct AttemptObjects {
    asked: AskedObjects,
    reader: Option<ObjectReader>,
    memory: Arc<Objects>,
    ledger: Client,
    /// When what is noted now is forgotten.
    until: i64,
}

/// True if an endpoint says that it does not have an object that the request names.
pub fn is_object_missing(outcome: &Outcome) -> bool {
    let Some(meaning) = outcome.meaning() else { return false };
    let may_be_path = meaning.status == 404 && !matches!(meaning.trouble, Trouble::ModelMissing | Trouble::Key);
    meaning.trouble == Trouble::ObjectMissing || may_be_path
}

impl AttemptObjects {
    /// The objects of an attempt that begins.
    pub fn new(asked: &AskedObjects, pool: &Pool, clock: &Clock) -> Self {
        Self {
            asked: asked.clone(),
            reader: None,
            memory: Arc::clone(&pool.objects),
            ledger: pool.ledger.clone(),
            until: objects::remembered_until(pool, clock),
        }
    }

    /// True if the request names any.
    pub fn names_any(&self) -> bool {
        self.asked.names_any
    }

    /// Notes that the endpoint answers well: it has what the request names.
    pub fn answered(&self, at: &Asked) {
        self.asked.named.note_answered((&at.endpoint, at.lane), self.asked.deletes, self.until, &self.ledger);
    }

    /// Notes that the endpoint does not have it. `is_last`: no other one is asked.
    pub fn missing(&self, is_last: bool, clock: &Clock) {
        if self.asked.named.is_searched {
            if is_last {
                self.memory.note_absent(&self.asked.named, clock.now);
            }
        } else if self.asked.looks {
            self.asked.named.forget_subject(&self.ledger);
        }
    }

    /// Notes the object that an answer's `Location` names.
    pub fn made_at(&self, location: &str, at: &Asked) {
        if self.asked.wanted.objects
            && let Some(id) = shape::ids(location).last()
        {
            objects::note_found(
                vec![Found::Object(id.into())],
                (&at.endpoint, at.lane),
                &self.asked.owner,
                self.until,
                &self.ledger,
            );
        }
    }

    /// Reads a piece of a good answer.
    pub fn read(&mut self, piece: &Bytes, is_stream: bool, ends: bool, at: &Asked) {
        if self.asked.wanted == Wanted::default() {
            return;
        }
        let reader = self.reader.get_or_insert_with(|| ObjectReader::new(self.asked.wanted, is_stream));
        reader.piece(piece);
        if ends {
            reader.end();
        }
        let found = reader.take_found();
        objects::note_found(found, (&at.endpoint, at.lane), &self.asked.owner, self.until, &self.ledger);
    }
}
