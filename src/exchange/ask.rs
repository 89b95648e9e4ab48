//! A request as the exchange needs it.

use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::uri::PathAndQuery;

use super::{AskedModel, AskedObjects};
use crate::config::{CallKind, Trouble};
use crate::ledger::{AccountSet, CallerDraw, CallerId, Permit, QueuedBy};
use crate::request::call::Call;
use crate::request::fields::{ModelPlace, ServiceTier, UsageEdit};
use crate::request::shape::CallShape;
use crate::request_log::KeptBody;
use crate::routing::admission::FallbackDraw;
use crate::routing::balance::{KeyWish, Options};
use crate::routing::budgets::BudgetAsk;
use crate::routing::callers::Named;
use crate::routing::pool::{Endpoint, Pool};
use crate::routing::retry::Outcome;
use crate::routing::router::{Candidate, Candidates, ModelName, Tried};
use crate::routing::sessions::{Affinity, Session};

/// Prompts of more than 256 KiB are not kept, and not estimated.
pub(crate) const PROMPT_BYTES_MAX: usize = 256 * 1024;

/// Place of the model's name in a body.
#[derive(Clone, Debug)]
pub struct BodyModel {
    /// Place.
    pub place: ModelPlace,
    /// True if the name there is another one, or none: it is written whether it is mapped or not.
    pub is_other: bool,
}

/// A request as the exchange needs it.
#[derive(Debug)]
pub struct Ask {
    /// The config it runs under, whatever is loaded meanwhile.
    pub pool: Arc<Pool>,
    /// The endpoints that can take it.
    pub candidates: Arc<Candidates>,
    /// Call of the API.
    pub call: Call,
    /// Its kind, which an endpoint may have an address of its own for.
    pub kind: CallKind,
    /// Path, as it is meant, and query, as far as it is forwarded.
    pub target: PathAndQuery,
    /// Shape of the call, if no id stands in its path.
    pub shape: Option<CallShape>,
    /// The caller, which is promised a time if the request is refused.
    pub caller: CallerId,
    /// The same, if it has a key of its own.
    pub named: Option<Arc<Named>>,
    /// The model that the attempt under way serves in place of the one that was asked for.
    pub fallback: Option<Arc<str>>,
    /// What it draws of that key's limits, if any are set.
    pub own: Option<CallerDraw>,
    /// The same where another model serves, if the key has limits by model.
    pub own_fallbacks: Vec<FallbackDraw>,
    /// What it may take of that key's budgets, which each attempt reserves.
    pub budget: Option<BudgetAsk>,
    /// What it has drawn of them, for as long as it lasts.
    pub own_permit: Option<Permit>,
    /// True if the body is JSON, whatever its content type says.
    pub is_json: bool,
    /// The model's name as the client sent it.
    pub model: Option<Arc<str>>,
    /// Place of that name in the body.
    pub body_model: Option<BodyModel>,
    /// True if the answer is to be streamed.
    pub stream: bool,
    /// Tier of service that it asks for, if that has prices of its own.
    pub tier: Option<ServiceTier>,
    /// Edit of the body that asks a stream for its usage, if the client did not.
    pub usage_edit: Option<UsageEdit>,
    /// The body as it came, until the answer is committed.
    pub body: Bytes,
    /// Its length.
    pub body_bytes: usize,
    /// The beginning of it, if the request log keeps it.
    pub(crate) logged: Option<Box<KeptBody>>,
    /// The body from then on, if the tokens may have to be estimated.
    pub prompt: Bytes,
    /// When the body had been read.
    pub read_at: Instant,
    /// Objects that it names, or that its answer may make.
    pub objects: Option<Box<AskedObjects>>,
    /// Its session, if it has one.
    pub session: Option<Session>,
    /// Place of its session's endpoint among the candidates.
    pub preferred: Option<usize>,
    /// True if the request switches protocols (WebSocket), so that no body is replayed and nothing is held.
    pub switches_protocol: bool,
}

impl Ask {
    /// The choices that are left after these endpoints.
    pub fn options<'a>(&'a self, tried: &'a [Tried]) -> Options<'a> {
        Options {
            pool: &self.pool,
            candidates: &self.candidates,
            model: self.model.as_deref(),
            shape: self.shape,
            tried,
            preferred: self.preferred,
            keys: self.key_wish(),
        }
    }

    /// What it wants of the keys of an endpoint that has several.
    pub fn key_wish(&self) -> KeyWish<'_> {
        let organizations = self.objects.as_ref().map_or(&[][..], |objects| &objects.organizations);
        KeyWish { session: self.session.as_ref().map(Session::number), organizations }
    }

    /// The model that a candidate is asked for.
    pub fn model_for(&self, candidate: &Candidate) -> AskedModel {
        let ModelName { in_config, .. } = self.candidates.model_of(candidate, self.model.as_deref());
        AskedModel { mapped: candidate.model.clone(), named: self.model.clone(), in_config }
    }

    /// True if it names objects that nobody knows, so that some endpoints are asked for them.
    pub fn is_search(&self) -> bool {
        self.objects.as_ref().is_some_and(|objects| objects.named.is_searched)
    }

    /// What is left out of the body of this attempt.
    pub fn left_out(&self, tried: Option<&Tried>) -> &[Range<usize>] {
        let sealed = self.objects.as_ref().and_then(|objects| objects.sealed.as_ref());
        let (Some(sealed), Some(Tried { endpoint, lane, .. })) = (sealed, tried) else { return &[] };
        let asked = self.pool.endpoints.get(*endpoint);
        let reads = asked.is_some_and(|asked| sealed.readers.include((*endpoint, asked), *lane));
        if reads { &[] } else { &sealed.ranges }
    }

    /// How its session is served by a candidate; none if it has no session.
    pub fn affinity(&self, candidate: &Candidate) -> Option<Affinity> {
        let session = self.session.as_ref()?;
        let endpoint = self.pool.endpoints.get(candidate.endpoint)?;
        let place = self.preferred.and_then(|place| self.candidates.list().get(place));
        session.affinity(&endpoint.config.id, candidate.tier, place.map(|place| place.tier))
    }

    /// Forgets that its session is at an endpoint that has refused its own key, or does not have the model.
    pub fn leave_if_refused(&mut self, endpoint: &Endpoint, outcome: &Outcome) {
        let trouble = outcome.meaning().map(|meaning| meaning.trouble);
        if let Some(session) = &mut self.session
            && session.at() == Some(&endpoint.config.id)
            // Another of several keys may still do.
            && (trouble == Some(Trouble::ModelMissing) || trouble == Some(Trouble::Key) && !endpoint.lanes.is_pool())
        {
            session.drop_place();
            self.pool.sessions.forget(session, &self.pool.ledger);
        }
    }

    /// Who it is in the queue.
    pub fn queued_by(&self) -> QueuedBy {
        let named = self.named.as_ref();
        named.map_or_else(QueuedBy::default, |named| QueuedBy {
            caller: named.caller.queue_number,
            weight: named.caller.key.weight,
        })
    }

    /// Accounts of its caller's own key, if that has limits: those that were drawn from.
    pub fn own_accounts(&self) -> Option<&Arc<AccountSet>> {
        if let Some(own) = &self.own_permit {
            return Some(own.accounts());
        }
        self.named.as_ref()?.caller.accounts.of_model(self.fallback.as_ref().or(self.model.as_ref()).map(AsRef::as_ref))
    }

    /// True if its tokens are estimated when the endpoint reports none.
    pub fn is_estimated(&self) -> bool {
        self.pool.server.estimate_tokens && (self.call.is_text() || self.call == Call::Embeddings)
    }

    /// No other attempt follows: the body is needed for an estimate, or not at all.
    pub fn keep_for_estimate(&mut self) {
        let body = mem::take(&mut self.body);
        if !body.is_empty() && self.is_estimated() && body.len() <= PROMPT_BYTES_MAX {
            self.prompt = body;
        }
    }
}
