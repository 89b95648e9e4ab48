//! Faults that the gateway reports, in one table: status, OpenAI `type` and `code`, message and label of each.
//!
//! A client's SDK picks its exception class from the status and shows the message, so a message names the
//! thing, the place and the way out. `code` is a string or null, never a number: strict clients fail to parse
//! a number there.

pub mod reference;

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use crate::config::LimitKind;
use crate::limit::LimitReason;

/// Reason why an endpoint cannot be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldBy {
    /// Its id.
    pub endpoint: Arc<str>,
    /// True if clients may know its id, and its names of models.
    pub is_public: bool,
    /// The models whose limit it is, as `modelLimits` has them; `None` if it is the whole endpoint's.
    pub models: Option<Arc<str>>,
    /// What is shown of the key whose limit it is, if it is one of the endpoint's several.
    pub key: Option<Arc<str>>,
    /// Reason.
    pub reason: LimitReason,
    /// Time until it is over.
    pub wait: Duration,
}

impl HeldBy {
    /// The reason as its operator reads it.
    pub fn text(&self) -> String {
        let key = self.key.as_ref().map_or_else(String::new, |key| format!(", key {key}"));
        self.text_of(&format!("{}{key}", self.endpoint))
    }

    fn text_of(&self, whom: &str) -> String {
        let models = self.models.as_ref().map_or_else(String::new, |models| format!(" for {models}"));
        format!("{whom}: {}{models}, for {} s", self.reason, self.wait.as_secs_f64().ceil())
    }

    /// The reason as a client may read it, to whom keys of endpoints are nothing.
    fn public_text(&self) -> String {
        if self.is_public {
            self.text_of(&self.endpoint)
        } else {
            format!("{}, for {} s", self.reason, self.wait.as_secs_f64().ceil())
        }
    }
}

/// A budget, and a request that it has no room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BudgetShortage {
    /// Name of the key.
    pub name: String,
    /// The budget.
    pub budget: String,
    /// What is spent of it.
    pub spent: String,
    /// What is reserved of it for requests under way.
    pub reserved: String,
    /// What the request could take.
    pub wanted: String,
    /// True if the whole budget has no room for that.
    pub is_too_large: bool,
    /// When its period ends; none for all time.
    pub ends: Option<String>,
}

impl BudgetShortage {
    /// The message for the client. `has_room_soon`: once requests under way have ended.
    fn message(&self, has_room_soon: bool) -> String {
        let Self { name, budget, spent, reserved, wanted, is_too_large, ends } = self;
        let way_out = match ends {
            _ if has_room_soon => {
                " There is room for that once some of those have ended: try again in a second.".to_owned()
            }
            _ if *is_too_large => " Even the whole budget has no room for that.".to_owned(),
            Some(ends) => format!(" The budget begins anew at {ends}."),
            None => String::new(),
        };
        format!(
            "This API key ({name}) has a budget of {budget}, of which {spent} are spent and {reserved} reserved for requests under \
             way. This request may take up to {wanted}; a smaller max_tokens takes less. No endpoint was asked.{way_out} GET /v1/key \
             shows what is left."
        )
    }
}

/// A fault that the proxy itself reports to a client, as opposed to an error that an endpoint answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request carries no key at all.
    KeyMissing,
    /// The request's key is not the server's.
    KeyWrong,
    /// The request's key opened once, and does not any more.
    KeyEnded {
        /// Name of the key.
        name: String,
        /// What has become of it, such as "has expired".
        why: &'static str,
    },
    /// The request's key may not be used from its address.
    AddressNotAllowed {
        /// Name of the key.
        name: String,
    },
    /// The request's key may not make such calls.
    CallNotAllowed {
        /// Name of the key.
        name: String,
        /// Kind of the call.
        call: &'static str,
    },
    /// The path is one of our own that is not for the keys of callers.
    PathNotAllowed,
    /// A limit of the request's own key is reached.
    KeyLimitsReached {
        /// Name of the key.
        name: String,
        /// The models that the limit is for, if it is for some only.
        models: Option<String>,
        /// The limit.
        reason: LimitReason,
        /// Time until there is room.
        wait: Duration,
    },
    /// A budget of the request's own key has no room for it.
    BudgetExhausted(Box<BudgetShortage>),
    /// A budget of the request's own key has room for what the request may take once requests under way have ended.
    BudgetReserved(Box<BudgetShortage>),
    /// A budget of the request's own key had no room for the rest of an answer.
    BudgetOverrun {
        /// Name of the key.
        name: String,
    },
    /// The request's key has a budget in dollars, and the model has no price.
    ModelWithoutPrice {
        /// Name of the key.
        name: String,
        /// The model's name.
        model: String,
    },
    /// The request's key has a budget, and what such a call costs is not known when it is answered.
    CallWithoutPrice {
        /// Name of the key.
        name: String,
        /// Kind of the call.
        call: &'static str,
    },
    /// The request's key may not ask for the model.
    ModelNotAllowed {
        /// Name of the key.
        name: String,
        /// The model's name.
        model: String,
    },
    /// Too many wrong keys came from one address.
    KeysFailedTooOften,
    /// The path is for those who run the gateway, and the config has no key for them.
    AdminOff,
    /// The path is for those who run the gateway, and the request carries no key.
    AdminKeyMissing,
    /// The path is for those who run the gateway, and the request's key is not theirs.
    AdminKeyWrong,
    /// A browser sends the request for a page of somebody else, or without the token that our page has.
    AdminUntrusted {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A call of those who run the gateway names something that is not there.
    AdminNotFound {
        /// What it names.
        what: String,
    },
    /// A call of those who run the gateway asks for a change that cannot be made.
    AdminConflict {
        /// Code of the error.
        code: &'static str,
        /// What is in the way, and the way out.
        problem: String,
    },
    /// The path is not one that is served here.
    PathUnknown {
        /// The path as it came, cut to a sane length.
        path: String,
    },
    /// Every endpoint that could take the request has said that it does not have the call.
    CallUnknown,
    /// The path is one of our own, which takes other methods.
    MethodNotAllowed {
        /// Allowed methods, in the form of the `Allow` header.
        allowed: &'static str,
    },
    /// The request is broken: its framing, a header, or its JSON.
    RequestInvalid {
        /// Problem and its place.
        problem: String,
    },
    /// The path and query are longer than any call's.
    PathTooLong {
        /// The limit in bytes.
        bytes_max: usize,
    },
    /// The header is longer than `server.connections.headerBytesMax`.
    HeaderTooLong {
        /// The limit in bytes.
        bytes_max: usize,
    },
    /// The body is longer than `server.bodyBytesMax`.
    BodyTooLarge {
        /// The limit in bytes.
        bytes_max: usize,
    },
    /// The body is compressed in a way that is not known here.
    EncodingUnknown,
    /// A WebSocket that does not name its model before it is opened.
    WebSocketModelUnknown,
    /// A WebSocket whose first message names a model that no endpoint takes over one.
    WebSocketUnavailable {
        /// Its name.
        model: String,
    },
    /// The body did not arrive in time.
    BodyTimeout,
    /// There was no room for the body in time.
    NoRoom,
    /// No enabled endpoint serves the model.
    ModelUnknown {
        /// The model as the client named it, cut to a sane length.
        model: String,
    },
    /// No endpoint that was asked has an object that the request names, or it is another caller's.
    ObjectUnknown {
        /// Its id, cut to a sane length.
        id: String,
    },
    /// The request names objects that no one endpoint has both.
    ObjectsApart {
        /// Their ids, cut to a sane length.
        ids: [String; 2],
    },
    /// The request names an object of an endpoint that is not in the config any more.
    ObjectGone {
        /// Its id, cut to a sane length.
        id: String,
        /// The endpoint, if clients may know it.
        endpoint: Option<String>,
    },
    /// The request names an object of an endpoint that is switched off.
    ObjectDisabled {
        /// Its id, cut to a sane length.
        id: String,
        /// The endpoint, if clients may know it.
        endpoint: Option<String>,
    },
    /// The request holds reasoning that was sealed by an organisation which cannot be asked for its model any more.
    SealedApart,
    /// The model is not served where an object is that the request names.
    ModelApart {
        /// Its id, cut to a sane length.
        id: String,
        /// The endpoint, if clients may know it.
        endpoint: Option<String>,
    },
    /// No endpoint has the id that one of our own calls names.
    EndpointUnknown {
        /// The id as the client named it, cut to a sane length.
        id: String,
    },
    /// The statistics cannot be read or written.
    StatsUnavailable,
    /// No endpoint is enabled at all.
    NoEndpoint,
    /// Every endpoint that serves the model is at its limit: the one set here, or one that it answered 429 for.
    LimitsReached {
        /// Time until one of them may be asked again by this request.
        wait: Duration,
        /// Reason for each of them.
        held: Vec<HeldBy>,
    },
    /// The ledger cannot be written, and every endpoint that serves the model has limits that are kept there.
    LedgerUnavailable,
    /// Every endpoint that serves the model is cooling down, and the one allowed trial of each is under way.
    NoneAvailable,
    /// The last endpoint tried could not be reached, or broke off before it answered.
    EndpointUnreachable,
    /// The last endpoint tried did not answer in time.
    EndpointTimeout,
    /// The last endpoint tried answered with nothing in it.
    EndpointEmpty,
    /// The last endpoint tried answered 200 with something that is no answer.
    EndpointUnrecognised,
    /// The last endpoint tried refused the key or the account that the gateway has there.
    EndpointKeyRefused,
    /// The last endpoint tried answered an error that did not come whole or was too large to keep.
    EndpointError {
        /// The endpoint's status.
        status: u16,
    },
    /// A committed stream broke; the client has seen a part of it.
    StreamBroken,
    /// Somebody who runs the gateway ended the request.
    Cancelled,
    /// A fault of ours.
    Internal,
}

/// Shape of an error, by the API that the request is a call of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ErrorShape {
    /// `{"error": {"message", "type", "param", "code"}}`.
    #[default]
    OpenAi,
    /// `{"type": "error", "error": {"type", "message"}}`, where the type goes by the status.
    Anthropic,
}

impl ErrorShape {
    /// Returns the shape that clients of a call expect, by its path as it is meant.
    pub fn of_path(path: &str) -> Self {
        let is_messages =
            path.strip_prefix("/v1/messages").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if is_messages { Self::Anthropic } else { Self::OpenAi }
    }
}

/// An endpoint as a client may read of it.
fn named_endpoint(id: Option<&str>) -> String {
    id.map_or_else(|| "an endpoint".to_owned(), |id| format!("the endpoint {id}"))
}

/// Anthropic's `type` of an error of this status (docs.anthropic.com, "Errors").
fn anthropic_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 | 529 => "overloaded_error",
        504 => "timeout_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    }
}

/// One row of the table.
struct Row {
    status: u16,
    kind: &'static str,
    code: Option<&'static str>,
    label: &'static str,
}

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

impl Fault {
    #[rustfmt::skip]
    fn row(&self) -> Row {
        let (status, kind, code, label) = match self {
            Self::KeyMissing               => (401, INVALID, Some("invalid_api_key"), "key_missing"),
            Self::KeyWrong                 => (401, INVALID, Some("invalid_api_key"), "key_wrong"),
            Self::KeyEnded { .. }          => (401, INVALID, Some("invalid_api_key"), "key_ended"),
            Self::AddressNotAllowed { .. } => (403, INVALID, Some("address_not_allowed"), "address_not_allowed"),
            Self::CallNotAllowed { .. }    => (403, INVALID, Some("call_not_allowed"), "call_not_allowed"),
            Self::PathNotAllowed           => (403, INVALID, Some("call_not_allowed"), "path_not_allowed"),
            Self::KeyLimitsReached { reason: LimitReason::Full(LimitKind::Tpm | LimitKind::Tpd, _), .. } =>
                                              (429, "tokens", Some("key_rate_limited"), "key_limits_reached"),
            Self::KeyLimitsReached { .. }  => (429, "requests", Some("key_rate_limited"), "key_limits_reached"),
            Self::BudgetExhausted(_)       => (429, "insufficient_quota", Some("insufficient_quota"), "budget_exhausted"),
            Self::BudgetReserved(_)        => (429, "tokens", Some("key_rate_limited"), "budget_reserved"),
            Self::BudgetOverrun { .. }     => (429, "insufficient_quota", Some("insufficient_quota"), "budget_overrun"),
            Self::ModelWithoutPrice { .. } => (403, INVALID, Some("model_has_no_price"), "model_without_price"),
            Self::CallWithoutPrice { .. }  => (403, INVALID, Some("call_not_allowed"), "call_without_price"),
            Self::ModelNotAllowed { .. }   => (404, INVALID, Some("model_not_found"), "model_not_allowed"),
            Self::KeysFailedTooOften       => (429, "requests", Some("rate_limit_exceeded"), "keys_failed_too_often"),
            Self::AdminOff                 => (404, INVALID, Some("admin_off"), "admin_off"),
            Self::AdminKeyMissing          => (401, INVALID, Some("invalid_admin_key"), "admin_key_missing"),
            Self::AdminKeyWrong            => (401, INVALID, Some("invalid_admin_key"), "admin_key_wrong"),
            Self::AdminUntrusted { .. }    => (403, INVALID, Some("request_not_trusted"), "admin_untrusted"),
            Self::AdminNotFound { .. }     => (404, INVALID, Some("not_found"), "admin_not_found"),
            Self::AdminConflict { code, .. } => (409, INVALID, Some(*code), "admin_conflict"),
            Self::PathUnknown { .. }       => (404, INVALID, Some("unknown_url"), "path_unknown"),
            Self::CallUnknown              => (404, INVALID, Some("call_not_found"), "call_unknown"),
            Self::MethodNotAllowed { .. }  => (405, INVALID, Some("method_not_supported"), "method_not_allowed"),
            Self::RequestInvalid { .. }       => (400, INVALID, None, "request_invalid"),
            Self::PathTooLong { .. }       => (414, INVALID, Some("uri_too_long"), "path_too_long"),
            Self::HeaderTooLong { .. }     => (431, INVALID, Some("header_too_large"), "header_too_long"),
            Self::BodyTooLarge { .. }      => (413, INVALID, Some("request_too_large"), "body_too_large"),
            Self::EncodingUnknown          => (415, INVALID, Some("unsupported_encoding"), "encoding_unknown"),
            Self::WebSocketModelUnknown    => (426, INVALID, Some("websocket_model_unknown"), "websocket_model_unknown"),
            Self::WebSocketUnavailable { .. } => (426, INVALID, Some("websocket_unavailable"), "websocket_unavailable"),
            Self::BodyTimeout              => (408, INVALID, Some("request_timeout"), "body_timeout"),
            Self::NoRoom                   => (503, SERVER, Some("overloaded"), "no_room"),
            Self::ModelUnknown { .. }      => (404, INVALID, Some("model_not_found"), "model_unknown"),
            Self::ObjectUnknown { .. }     => (404, INVALID, Some("object_not_found"), "object_unknown"),
            Self::ObjectsApart { .. }      => (400, INVALID, Some("objects_apart"), "objects_apart"),
            Self::ObjectGone { .. }        => (404, INVALID, Some("object_gone"), "object_gone"),
            Self::ObjectDisabled { .. }    => (503, SERVER, Some("endpoint_disabled"), "object_disabled"),
            Self::SealedApart              => (400, INVALID, Some("sealed_apart"), "sealed_apart"),
            Self::ModelApart { .. }        => (400, INVALID, Some("model_apart"), "model_apart"),
            Self::EndpointUnknown { .. }   => (404, INVALID, Some("api_not_found"), "endpoint_unknown"),
            Self::StatsUnavailable         => (503, SERVER, Some("ledger_unavailable"), "stats_unavailable"),
            Self::NoEndpoint               => (503, SERVER, Some("no_endpoint"), "no_endpoint"),
            Self::LimitsReached { .. }        => (429, "requests", Some("rate_limit_exceeded"), "limits_reached"),
            Self::LedgerUnavailable        => (503, SERVER, Some("ledger_unavailable"), "ledger_unavailable"),
            Self::NoneAvailable            => (503, SERVER, Some("no_endpoint_available"), "none_available"),
            Self::EndpointUnreachable      => (502, SERVER, Some("endpoint_unreachable"), "endpoint_unreachable"),
            Self::EndpointTimeout          => (504, SERVER, Some("endpoint_timeout"), "endpoint_timeout"),
            Self::EndpointEmpty            => (502, SERVER, Some("endpoint_empty_answer"), "endpoint_empty"),
            Self::EndpointUnrecognised     => (502, SERVER, Some("endpoint_unrecognised_answer"), "endpoint_unrecognised"),
            Self::EndpointKeyRefused       => (502, SERVER, Some("endpoint_key_refused"), "endpoint_key_refused"),
            Self::EndpointError { status } => (*status, SERVER, Some("endpoint_error"), "endpoint_error"),
            Self::StreamBroken             => (502, SERVER, Some("stream_broken"), "stream_broken"),
            Self::Cancelled                => (403, INVALID, Some("request_cancelled"), "cancelled"),
            Self::Internal                 => (500, SERVER, Some("internal_error"), "internal"),
        };
        Row { status, kind, code, label }
    }

    /// The HTTP status a client gets.
    pub fn status(&self) -> u16 {
        self.row().status
    }

    /// A short stable name for logs and metrics.
    pub fn label(&self) -> &'static str {
        self.row().label
    }

    /// Returns the time that a client should wait before it tries again, if it is known.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::LimitsReached { wait, .. } | Self::KeyLimitsReached { wait, .. } => Some(*wait),
            Self::KeysFailedTooOften => Some(Duration::from_mins(1)),
            // Most answers take no longer than some seconds.
            Self::NoRoom | Self::BudgetReserved(_) => Some(Duration::from_secs(1)),
            // A trial takes seconds; it either reopens the endpoint or closes it for its whole cool-down. The ledger is tried
            // again several times a second.
            Self::NoneAvailable | Self::LedgerUnavailable => Some(Duration::from_secs(5)),
            _ => None,
        }
    }

    /// The model that the request asked for, where that is what is wrong.
    pub fn model(&self) -> Option<&str> {
        match self {
            Self::ModelUnknown { model }
            | Self::ModelNotAllowed { model, .. }
            | Self::ModelWithoutPrice { model, .. }
            | Self::WebSocketUnavailable { model } => Some(model),
            _ => None,
        }
    }

    /// Reasons why endpoints could not be asked, where that is what is wrong.
    pub fn held(&self) -> &[HeldBy] {
        match self {
            Self::LimitsReached { held, .. } => held,
            _ => &[],
        }
    }

    /// Returns the `Allow` header, if one is due.
    pub fn allow(&self) -> Option<&'static str> {
        match self {
            Self::MethodNotAllowed { allowed } => Some(allowed),
            _ => None,
        }
    }

    /// What clients read of it.
    pub fn message(&self) -> String {
        match self {
            Self::PathUnknown { path } => {
                format!("Unknown path {path}. API calls start with /v1: set your client's base URL to end in /v1.")
            }
            Self::MethodNotAllowed { allowed } => format!("This path takes {allowed} only."),
            Self::RequestInvalid { problem } | Self::AdminConflict { problem, .. } => problem.clone(),
            Self::AdminUntrusted { problem } => String::from(*problem),
            Self::AdminNotFound { what } => format!("There is no {what}."),
            Self::BodyTooLarge { bytes_max } => format!(
                "The request body is longer than the {bytes_max} bytes this gateway accepts (server.bodyBytesMax)."
            ),
            Self::HeaderTooLong { bytes_max } => {
                format!("The header is longer than {bytes_max} bytes (server.connections.headerBytesMax).")
            }
            Self::PathTooLong { bytes_max } => format!("The path and query are longer than {bytes_max} bytes."),
            Self::KeyEnded { name, why } => format!("This API key ({name}) {why}. Ask for another one."),
            Self::AddressNotAllowed { name } => {
                format!("This API key ({name}) may not be used from this address (allowFrom).")
            }
            Self::CallNotAllowed { name, call } => {
                format!("This API key ({name}) may not make calls of the kind `{call}` (calls).")
            }
            Self::KeyLimitsReached { name, models, reason, wait } => {
                let of_models = models.as_ref().map(|models| format!(" for {models}")).unwrap_or_default();
                let seconds = wait.as_millis().div_ceil(1000);
                format!(
                    "This API key ({name}) is at its own limit: {reason}{of_models}. No endpoint was asked. Try again in \
                     {seconds} s; GET /v1/key shows what is left."
                )
            }
            Self::BudgetExhausted(shortage) => shortage.message(false),
            Self::BudgetReserved(shortage) => shortage.message(true),
            Self::BudgetOverrun { name } => format!(
                "A budget of this API key ({name}) has no room for the rest of this answer, so it is cut off here. GET /v1/key shows \
                 what is left."
            ),
            Self::ModelWithoutPrice { name, model } => format!(
                "The model `{model}` has no price here, so this API key ({name}), which has a budget in dollars, cannot ask for \
                 it. server.prices or apis[].prices can give it one; apis[].priceProvider names the vendor whose prices an endpoint has."
            ),
            Self::CallWithoutPrice { name, call } => format!(
                "What this call of the kind `{call}` costs is not known when it is answered: it is billed later or elsewhere, or \
                 names no model that has a price. So this API key ({name}), which has a budget, cannot make it. Batches, fine-tuning, \
                 evals, runs of threads, containers and vector stores are open if the key's `calls` name them."
            ),
            Self::ModelNotAllowed { name, model } => format!(
                "The model `{model}` does not exist for this API key ({name}). GET /v1/models lists the models that it may \
                 ask for."
            ),
            Self::ModelUnknown { model } => format!(
                "The model `{model}` does not exist here: no enabled endpoint serves or maps it. GET /v1/models \
                 lists the models that are served."
            ),
            Self::WebSocketUnavailable { model } => format!(
                "No endpoint of the model `{model}` takes this call over a WebSocket whose first message names the model. Send the \
                 call as a POST."
            ),
            Self::EndpointUnknown { id } => {
                format!("No endpoint has the id `{id}`. GET /v1/status lists the endpoints.")
            }
            Self::ObjectUnknown { id } => {
                format!(
                    "`{id}` is not known here: no endpoint that was asked has it. Check the id, and whose key made it."
                )
            }
            Self::ObjectsApart { ids: [one, other] } => format!(
                "`{one}` and `{other}` are at different endpoints, and no endpoint has both. Make one of them anew together \
                 with the other."
            ),
            Self::ObjectGone { id, endpoint } => format!(
                "`{id}` was made at {}, which this gateway does not have any more. Make it anew.",
                named_endpoint(endpoint.as_deref())
            ),
            Self::ObjectDisabled { id, endpoint } => format!(
                "`{id}` is at {}, which is switched off at this gateway. Try again once it is back, or make it anew.",
                named_endpoint(endpoint.as_deref())
            ),
            Self::ModelApart { id, endpoint } => format!(
                "The model is not served by {}, where `{id}` is. Ask for a model that is served there, or leave `{id}` out.",
                named_endpoint(endpoint.as_deref())
            ),
            Self::LimitsReached { wait, held } => format!(
                "Every endpoint that serves this model is at a rate limit or out of service{}. Try again in {} s.",
                holds(held),
                wait.as_secs_f64().ceil()
            ),
            Self::EndpointError { status } => format!(
                "The last endpoint tried answered {status}, but its error was incomplete, or too large to keep."
            ),
            Self::AdminOff | Self::AdminKeyMissing | Self::AdminKeyWrong => self.admin_message().into(),
            plain => plain.plain_message().into(),
        }
    }

    /// Messages of those that only those who run the gateway see.
    fn admin_message(&self) -> &'static str {
        match self {
            Self::AdminOff => {
                "The admin API and the page are off: the gateway's config has no server.adminKey. Add one (`openssl rand -hex 24` \
                 makes one up); it is in use as soon as the file is saved."
            }
            Self::AdminKeyMissing => {
                "This path is for those who run the gateway. Send server.adminKey as 'Authorization: Bearer KEY', or sign in at \
                 /dashboard."
            }
            Self::AdminKeyWrong => {
                "Incorrect admin key. This path takes server.adminKey and no other: keys of clients and of endpoints do not open it."
            }
            _ => "",
        }
    }

    fn plain_message(&self) -> &'static str {
        match self {
            Self::KeyMissing => {
                "No API key provided. Send this gateway's key (server.apiKey in its config file) as \
                 'Authorization: Bearer KEY'."
            }
            Self::PathNotAllowed => "This path is for whoever runs the gateway, with its own key (server.apiKey).",
            Self::KeyWrong => {
                "Incorrect API key provided. This gateway expects a key of its own, which its operator gives you, \
                 not an endpoint's."
            }
            Self::KeysFailedTooOften => {
                "Too many wrong API keys came from your address, so no key is looked at for up to a minute. Correct the key, and \
                 try again after that."
            }
            Self::CallUnknown => {
                "No endpoint that serves this model has this call: each said so (by a 404, or a 501) within the last minutes."
            }
            Self::EncodingUnknown => {
                "The request body's Content-Encoding is not known here. Send it uncompressed, or as gzip, deflate, br or \
                 zstd."
            }
            Self::WebSocketModelUnknown => {
                "This WebSocket does not name its model, so no endpoint can be chosen. Name it in the URL (?model=NAME), or \
                 send the call as a POST."
            }
            Self::SealedApart => {
                "This request holds reasoning (encrypted_content, or signed thinking) that only an organisation can read which this \
                 gateway cannot ask for the model any more. Send it without, or let the gateway leave it out \
                 (server.affinity.dropSealed)."
            }
            Self::BodyTimeout => "The request body did not arrive in time.",
            Self::NoRoom => {
                "This gateway holds as many bytes of request bodies as it may (server.memoryBytesMax); try again in \
                 a moment."
            }
            Self::StatsUnavailable => {
                "The gateway's ledger cannot be used at the moment. Its log and GET /v1/status say why."
            }
            Self::NoEndpoint => "No endpoint is enabled in the gateway's config file.",
            Self::LedgerUnavailable => {
                "The gateway cannot write its ledger, so endpoints with limits take no requests. Its log and GET \
                 /v1/status say why."
            }
            Self::NoneAvailable => {
                "Every endpoint that serves this model failed repeatedly and is cooling down. GET /v1/status says \
                 until when."
            }
            Self::EndpointUnreachable => {
                "No endpoint could be reached for this request; the last one failed before it answered."
            }
            Self::EndpointTimeout => "No endpoint answered this request in time.",
            Self::EndpointEmpty => "Every endpoint tried gave an empty answer.",
            Self::EndpointUnrecognised => {
                "The last endpoint tried answered with something that is no answer to this call, such as a web page. Its \
                 baseUrl may be wrong; the gateway's log names it."
            }
            Self::EndpointKeyRefused => {
                "No endpoint took this request; the last one refused the key or account that this gateway has there. Your own \
                 key is right; the gateway's log has the endpoint's words."
            }
            Self::StreamBroken => "The endpoint broke off before the end of its answer.",
            Self::Cancelled => "Somebody who runs this gateway ended this request. Ask them before you send it again.",
            Self::Internal => "The gateway failed on this request; its log says why.",
            // They have messages with details.
            Self::PathUnknown { .. }
            | Self::AdminOff
            | Self::AdminKeyMissing
            | Self::AdminKeyWrong
            | Self::AdminUntrusted { .. }
            | Self::AdminNotFound { .. }
            | Self::AdminConflict { .. }
            | Self::MethodNotAllowed { .. }
            | Self::RequestInvalid { .. }
            | Self::HeaderTooLong { .. }
            | Self::BodyTooLarge { .. }
            | Self::PathTooLong { .. }
            | Self::ModelUnknown { .. }
            | Self::KeyEnded { .. }
            | Self::AddressNotAllowed { .. }
            | Self::CallNotAllowed { .. }
            | Self::KeyLimitsReached { .. }
            | Self::ModelNotAllowed { .. }
            | Self::BudgetExhausted(_)
            | Self::BudgetReserved(_)
            | Self::BudgetOverrun { .. }
            | Self::ModelWithoutPrice { .. }
            | Self::CallWithoutPrice { .. }
            | Self::WebSocketUnavailable { .. }
            | Self::ObjectUnknown { .. }
            | Self::ObjectsApart { .. }
            | Self::ObjectGone { .. }
            | Self::ObjectDisabled { .. }
            | Self::ModelApart { .. }
            | Self::EndpointUnknown { .. }
            | Self::LimitsReached { .. }
            | Self::EndpointError { .. } => "",
        }
    }

    /// The error object, as one line of JSON. `code` stands in both shapes.
    pub fn json(&self, shape: ErrorShape) -> String {
        let Row { status, kind, code, .. } = self.row();
        let message = self.message();
        let json = match shape {
            ErrorShape::OpenAi => serde_json::json!({
                "error": { "message": message, "type": kind, "param": self.param(), "code": code }
            }),
            ErrorShape::Anthropic => serde_json::json!({
                "type": "error",
                "error": { "type": anthropic_type(status), "message": message, "code": code }
            }),
        };
        json.to_string()
    }

    fn param(&self) -> Option<&'static str> {
        matches!(self, Self::ModelUnknown { .. }).then_some("model")
    }
}

/// Lists what holds the endpoints: ` (api1: 60 requests a minute, for 12 s; api2: it asked for a pause, for 3600 s)`.
fn holds(held: &[HeldBy]) -> String {
    const SHOWN_MAX: usize = 10;
    let mut shown: Vec<String> = Vec::new();
    for text in held.iter().map(HeldBy::public_text) {
        // Without ids they may well be the same.
        if !shown.contains(&text) && shown.len() <= SHOWN_MAX {
            shown.push(text);
        }
    }
    if shown.is_empty() {
        return String::new();
    }
    let more = shown.len() > SHOWN_MAX;
    shown.truncate(SHOWN_MAX);
    let mut text = format!(" ({}", shown.join("; "));
    // Writing to a String cannot fail.
    write!(text, "{})", if more { "; and others" } else { "" }).ok();
    text
}

/// A client's own word, cut so that an error that repeats it stays small.
pub fn excerpt(text: &str) -> String {
    const CHARS_MAX: usize = 100;
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shape_is_openais() {
        let fault = Fault::ModelUnknown { model: "nope \"quoted\"".into() };
        let json: serde_json::Value = serde_json::from_str(&fault.json(ErrorShape::OpenAi)).unwrap();
        let error = &json["error"];
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["code"], "model_not_found");
        assert_eq!(error["param"], "model");
        assert!(error["message"].as_str().unwrap().contains("`nope \"quoted\"`"));
    }

    #[test]
    fn code_is_a_string_or_null() {
        let fault = Fault::RequestInvalid { problem: String::new() };
        let json: serde_json::Value = serde_json::from_str(&fault.json(ErrorShape::OpenAi)).unwrap();
        assert!(json["error"]["code"].is_null());
    }

    #[test]
    fn clients_of_messages_get_anthropics_shape() {
        for (path, shape) in [
            ("/v1/messages", ErrorShape::Anthropic),
            ("/v1/messages/count_tokens", ErrorShape::Anthropic),
            ("/v1/messages-of-mine", ErrorShape::OpenAi),
            ("/v1/threads/t/messages", ErrorShape::OpenAi),
        ] {
            assert_eq!(ErrorShape::of_path(path), shape, "{path}");
        }
        for (fault, kind) in [
            (Fault::KeyWrong, "authentication_error"),
            (Fault::ModelUnknown { model: "m".into() }, "not_found_error"),
            (Fault::BodyTooLarge { bytes_max: 1 }, "request_too_large"),
            (Fault::LimitsReached { wait: Duration::ZERO, held: Vec::new() }, "rate_limit_error"),
            (Fault::NoneAvailable, "overloaded_error"),
            (Fault::EndpointTimeout, "timeout_error"),
            (Fault::EndpointUnreachable, "api_error"),
            (Fault::EncodingUnknown, "invalid_request_error"),
        ] {
            let json: serde_json::Value = serde_json::from_str(&fault.json(ErrorShape::Anthropic)).unwrap();
            assert_eq!((&json["type"], &json["error"]["type"]), (&"error".into(), &kind.into()), "{fault:?}");
            assert!(json["error"]["message"].as_str().is_some_and(|message| !message.is_empty()));
        }
    }

    #[test]
    fn excerpt_cuts_between_characters() {
        assert_eq!(excerpt("short"), "short");
        assert_eq!(excerpt(&"é".repeat(200)).chars().count(), 101);
    }
}
