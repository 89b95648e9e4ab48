//! The reference of all faults, `docs/errors.md`: what each means, what its client sees, what to do.

use std::fmt::Write as _;
use std::time::Duration;

use super::{BudgetShortage, ErrorShape, Fault, Row};
use crate::config::LimitKind;
use crate::limit::LimitReason;

/// Label in the log and the metrics of a request whose client disconnected. It is no fault, so it has no row of its own.
pub const CLIENT_GONE: &str = "client_gone";

/// What a fault means, and what to do about it.
struct Entry {
    meaning: &'static str,
    way_out: &'static str,
}

impl Fault {
    #[rustfmt::skip]
    fn entry(&self) -> Entry {
        let (meaning, way_out) = match self {
            Self::KeyMissing => ("the request carries no key", "put the value of `server.apiKey` into the client as its API key"),
            Self::KeyEnded { .. } => ("the request's key has expired, was revoked, was replaced or is switched off", "use another one, or give the caller one"),
            Self::AddressNotAllowed { .. } => ("the request's key may not be used from the client's address", "use it from another address, or add this one to its `allowFrom`"),
            Self::CallNotAllowed { .. } => ("the request's key may not make calls of this kind", "use another key, or add the kind to its `calls`"),
            Self::PathNotAllowed => ("the path is for `server.apiKey`, and the request has a caller's key", "use `server.apiKey`"),
            Self::KeyLimitsReached { .. } => ("a limit of the request's own key is reached; no endpoint was asked", "wait as `Retry-After` says; `GET /v1/key` with that key shows its limits, what is used of them and when they free; or raise the limit"),
            Self::BudgetExhausted(_) => ("a budget of the request's own key has no room for what the request may take; no endpoint was asked", "`GET /v1/key` with that key shows the budget and when it begins anew; ask for a shorter answer (`max_tokens`), or raise the budget: `api-together keys raise`"),
            Self::BudgetReserved(_) => ("a budget of the request's own key has room for what the request may take only once requests under way have ended; no endpoint was asked", "try again in a second; ask for a shorter answer (`max_tokens`), of which less is reserved"),
            Self::BudgetOverrun { .. } => ("a stream took more than could be foreseen, a budget of the request's own key had no room for that, and the key's `onOverrun` is `cut`", "raise the budget, or bound the answer (`max_tokens`)"),
            Self::ModelWithoutPrice { .. } => ("the request's key has a budget in dollars, and the model has no price", "give it one in `server.prices` or `apis[].prices`, 0 if it is free"),
            Self::CallWithoutPrice { .. } => ("the request's key has a budget, and what such a call costs is not known when it is answered: it is billed later or elsewhere, or names no model that has a price", "name a model; name batches, fine-tuning, evals, threads, containers or vector stores in the key's `calls`, if they may be made all the same and take nothing of the budget; all else needs a key without a budget"),
            Self::ModelNotAllowed { .. } => ("the request's key may not ask for the model", "`GET /v1/models` with that key lists those that it may ask for; or add it to its `models`"),
            Self::KeyWrong => ("the request's key is not `server.apiKey`", "correct the client's key; an endpoint's key does not open the gateway"),
            Self::KeysFailedTooOften => ("more than `server.failedKeysPerMinute` different wrong keys came from the client's address; right ones are refused too", "correct the client that guesses, and wait a minute; behind a reverse proxy set `server.trustedProxies`"),
            Self::AdminOff => ("the admin API or the page was asked for, and the config has no `server.adminKey`", "add one"),
            Self::AdminKeyMissing => ("a path for those who run the gateway was asked for without a key", "send `server.adminKey`, or sign in at `/dashboard`"),
            Self::AdminKeyWrong => ("the key is not `server.adminKey`", "send that one; no client's key opens the admin API"),
            Self::AdminUntrusted { .. } => ("a browser sent the request for a page of somebody else, or without the page's token", "use the page at `/dashboard`, under the name or address at which it was signed in"),
            Self::AdminNotFound { .. } => ("a call of the admin API names something that is not there", "the list of its kind has what is there"),
            Self::AdminConflict { .. } => ("a call of the admin API asks for a change that cannot be made as things are", "the message says what is in the way"),
            Self::PathUnknown { .. } => ("the path is not the API's", "let the client's base URL end in `/v1`"),
            Self::CallUnknown => ("every endpoint of the model has said within the last minutes that it does not have the call", "ask another model, or add an endpoint that has the call"),
            Self::MethodNotAllowed { .. } => ("one of the gateway's own paths was asked by another method", "use the method that the `Allow` header names"),
            Self::RequestInvalid { .. } => ("the request is broken: its framing, a header, or its JSON", "the message names the place; correct the client"),
            Self::PathTooLong { .. } => ("path and query have more than 16 KiB", "shorten the URL"),
            Self::HeaderTooLong { .. } => ("the header is longer than `server.connections.headerBytesMax`", "send fewer or shorter headers, or raise it"),
            Self::BodyTooLarge { .. } => ("the body is longer than `server.bodyBytesMax`", "send less, or raise it"),
            Self::EncodingUnknown => ("the body is compressed in a way that is not known", "send it plain, or as gzip, deflate, br or zstd"),
            Self::WebSocketModelUnknown => ("a WebSocket names no model before it is opened", "name it in the URL (`?model=NAME`), or send the call as a POST"),
            Self::WebSocketUnavailable { .. } => ("a WebSocket's first message names a model none of whose endpoints has the call among its `apis[].webSockets`", "send the call as a POST, or name the call there if the endpoint takes it"),
            Self::BodyTimeout => ("the body did not arrive in time", "is the client's connection slow, or does it send less than it announced?"),
            Self::NoRoom => ("request bodies take all of `server.memoryBytesMax`", "try again; if it lasts, raise it, or send fewer large requests at once"),
            Self::ModelUnknown { .. } => ("no enabled endpoint serves or maps the model", "`api-together models` lists what is served; correct the name, or add it to `models` or `modelMapping`"),
            Self::ObjectUnknown { .. } => ("no endpoint that was asked has a file, response or other object that the request names, or another caller made it", "correct the id; one that was nowhere is looked for again after a minute"),
            Self::ObjectsApart { .. } => ("the request names two objects that were made at different endpoints", "make one of them anew together with the other; endpoints of one account can share an `organization`"),
            Self::ObjectGone { .. } => ("the request names an object of an endpoint that the config does not have any more", "put the endpoint back, or make the object anew"),
            Self::ObjectDisabled { .. } => ("the request names an object of an endpoint that is switched off", "switch it on, or make the object anew"),
            Self::SealedApart => ("the request holds sealed reasoning of an organisation that is not in the config any more, is switched off, or does not serve the model", "begin the conversation anew, or set `server.affinity.dropSealed`"),
            Self::ModelApart { .. } => ("the request names an object of an endpoint that does not serve its model", "ask for a model of that endpoint, or add the model to its `models`"),
            Self::EndpointUnknown { .. } => ("a call of the gateway's own names an endpoint that the config does not have", "`GET /v1/status` lists them"),
            Self::StatsUnavailable => ("the statistics cannot be read or written", "see the ledger in `api-together status`, and the log"),
            Self::NoEndpoint => ("no endpoint is enabled", "enable one in the config"),
            Self::LimitsReached { .. } => ("every endpoint of the model is at a limit, rests or cools down", "`held` in the log names each with its reason; wait as `Retry-After` says, raise the limits, add endpoints, or let requests wait (`server.queue`)"),
            Self::LedgerUnavailable => ("the ledger cannot be written, so endpoints with limits take no requests", "`cause` in the log names the file and what is wrong with it: a full disk, a lock, rights"),
            Self::NoneAvailable => ("every endpoint of the model cools down, and each is being tried out by another request", "`api-together status` shows until when and the last errors; `api-together test` asks them"),
            Self::EndpointUnreachable => ("no endpoint could be connected to, or the last one broke off before its answer", "`api-together test` says which step fails"),
            Self::EndpointTimeout => ("the last endpoint did not begin its answer in time", "raise `timeouts.firstByteMs` if the model is slow"),
            Self::EndpointEmpty => ("every endpoint tried gave an answer with nothing in it", "try again; look at the model's safety settings"),
            Self::EndpointUnrecognised => ("the last endpoint answered 200 with something that is no answer, such as a web page", "correct its `baseUrl`"),
            Self::EndpointKeyRefused => ("the last endpoint refused the gateway's key or account there", "correct its `apiKey`, or pay the account up; the log has the vendor's words"),
            Self::EndpointError { .. } => ("the last endpoint answered an error that did not come whole", "see `cause` in the log"),
            Self::StreamBroken => ("a stream broke after its client had seen a part of it", "ask again; `cause` in the log says how it broke"),
            Self::Cancelled => ("somebody ended the request at the gateway's page, or by its admin API", "the audit log says who"),
            Self::Internal => ("a fault of the gateway", "report it with the ERROR line of the log"),
        };
        Entry { meaning, way_out }
    }

    /// One of each kind.
    fn samples() -> Vec<Self> {
        let bytes_max = 65_536;
        let name = || "NAME".to_owned();
        vec![
            Self::KeyMissing,
            Self::KeyWrong,
            Self::KeyEnded { name: name(), why: "has expired" },
            Self::AddressNotAllowed { name: name() },
            Self::CallNotAllowed { name: name(), call: "images" },
            Self::PathNotAllowed,
            Self::KeyLimitsReached {
                name: name(),
                models: None,
                reason: LimitReason::Full(LimitKind::Rpm, 60),
                wait: Duration::from_secs(12),
            },
            Self::BudgetExhausted(shortage("$9.98", "$0")),
            Self::BudgetReserved(shortage("$2", "$7.98")),
            Self::BudgetOverrun { name: name() },
            Self::ModelWithoutPrice { name: name(), model: "MODEL".to_owned() },
            Self::CallWithoutPrice { name: name(), call: "batches" },
            Self::ModelNotAllowed { name: name(), model: "MODEL".to_owned() },
            Self::KeysFailedTooOften,
            Self::AdminOff,
            Self::AdminKeyMissing,
            Self::AdminKeyWrong,
            Self::AdminUntrusted { problem: "What is wrong with it." },
            Self::AdminNotFound { what: "endpoint NAME".to_owned() },
            Self::AdminConflict { code: "config_read_only", problem: "What is in the way.".to_owned() },
            Self::PathUnknown { path: "/PATH".to_owned() },
            Self::CallUnknown,
            Self::MethodNotAllowed { allowed: "POST" },
            Self::RequestInvalid { problem: "What is wrong, and where.".to_owned() },
            Self::PathTooLong { bytes_max: 16_384 },
            Self::HeaderTooLong { bytes_max },
            Self::BodyTooLarge { bytes_max },
            Self::EncodingUnknown,
            Self::WebSocketModelUnknown,
            Self::WebSocketUnavailable { model: name() },
            Self::ObjectUnknown { id: name() },
            Self::ObjectsApart { ids: [name(), "OTHER".to_owned()] },
            Self::ObjectGone { id: name(), endpoint: Some(name()) },
            Self::ObjectDisabled { id: name(), endpoint: Some(name()) },
            Self::ModelApart { id: name(), endpoint: Some(name()) },
            Self::SealedApart,
            Self::BodyTimeout,
            Self::NoRoom,
            Self::ModelUnknown { model: name() },
            Self::EndpointUnknown { id: name() },
            Self::StatsUnavailable,
            Self::NoEndpoint,
            Self::LimitsReached { wait: Duration::from_secs(12), held: Vec::new() },
            Self::LedgerUnavailable,
            Self::NoneAvailable,
            Self::EndpointUnreachable,
            Self::EndpointTimeout,
            Self::EndpointEmpty,
            Self::EndpointUnrecognised,
            Self::EndpointKeyRefused,
            Self::EndpointError { status: 500 },
            Self::StreamBroken,
            Self::Cancelled,
            Self::Internal,
        ]
    }
}

/// Returns the table as Markdown.
pub fn markdown() -> String {
    let mut text = "| log fault | status | code | what happened | what the client reads | what to do |\n|---|---|---|---|---|---|\n".to_owned();
    for fault in Fault::samples() {
        let Row { status, code, label, .. } = fault.row();
        let status = match fault {
            Fault::EndpointError { .. } => "the endpoint's".to_owned(),
            Fault::StreamBroken => "200, then an event".to_owned(),
            _ => status.to_string(),
        };
        let code = code.map_or_else(|| "`null`".to_owned(), |code| format!("`{code}`"));
        let Entry { meaning, way_out } = fault.entry();
        let message = fault.message().replace('|', "\\|");
        // Writing to a string cannot fail.
        writeln!(text, "| `{label}` | {status} | {code} | {meaning} | {message} | {way_out} |").unwrap_or_default();
    }
    text
}

fn shortage(spent: &str, reserved: &str) -> Box<BudgetShortage> {
    Box::new(BudgetShortage {
        name: "NAME".to_owned(),
        budget: "$10 (month)".to_owned(),
        spent: spent.to_owned(),
        reserved: reserved.to_owned(),
        wanted: "$0.05".to_owned(),
        is_too_large: false,
        ends: Some("2026-12-01T00:00:00Z".to_owned()),
    })
}

/// Returns an error as each API's clients read it, as Markdown.
pub fn shapes() -> String {
    let fault = Fault::ModelUnknown { model: "NAME".to_owned() };
    format!("```json\n{}\n```\n\n```json\n{}\n```\n", fault.json(ErrorShape::OpenAi), fault.json(ErrorShape::Anthropic))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_fault_is_in_the_table() {
        let labels: BTreeSet<&str> = Fault::samples().iter().map(Fault::label).collect();
        assert_eq!(labels.len(), Fault::samples().len());
        let rows = include_str!("mod.rs").lines().filter(|line| line.contains("=> (") && line.contains("Self::"));
        assert_eq!(rows.count(), labels.len(), "a fault has no sample");
        let table = markdown();
        for label in labels {
            let row = format!("| `{label}` |");
            assert_eq!(table.lines().filter(|line| line.starts_with(&row)).count(), 1, "{label}");
        }
    }
}
