//! What those who run the gateway see and do: the admin API under `/v1/admin/` and the page at `/dashboard`, for `server.adminKey` only.
//!
//! | module | owns |
//! |---|---|
//! | `access` | who may: the admin key, or a session of the page |
//! | `sessions` | sessions of the page |
//! | `openapi` | their description |
//! | `operations` | the table of operations: paths, methods, what each is for |
//! | `config_file` | the config: shown masked, checked, applied, put back |
//! | `endpoints`, `keys`, `requests`, `usage` | what is shown and done, by subject |
//! | `page` | the page at `/dashboard` |

mod access;
mod config_file;
mod endpoints;
mod keys;
mod openapi;
mod operations;
mod page;
mod requests;
pub(crate) mod sessions;
mod usage;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use bytes::Bytes;
use http::{HeaderMap, Method, header};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::admin::{Answer, Sources};
use crate::config::without_keys;
use crate::fault::{Fault, excerpt};
use crate::process::Actions;
use crate::request::auth::Auth;
use crate::routing::pool::Pool;
use crate::telemetry::audit::AuditLine;
pub(crate) use access::Author;
use operations::{Operation, Wanted};
pub(crate) use page::live::{Live, Next};
use sessions::Sessions;

/// Longest body of a call: a config may be long.
const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;
/// The same of one that signs in, and that anybody may send.
const SIGN_IN_BYTES_MAX: usize = 4 * 1024;

/// The admin API, and the sessions of its page.
#[derive(Debug, Default)]
pub(crate) struct Console {
    pub(crate) sessions: Sessions,
    /// Pages that are kept up to date now.
    viewers: Arc<AtomicUsize>,
}

/// A call of the admin API.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<'a> {
    /// Method.
    pub(crate) method: &'a Method,
    /// Path, as it came.
    pub(crate) path: &'a str,
    /// Query.
    pub(crate) query: Option<&'a str>,
    /// Headers.
    pub(crate) headers: &'a HeaderMap,
    /// Host and port that the client called.
    pub(crate) authority: &'a str,
    /// The client's address.
    pub(crate) address: Option<IpAddr>,
    /// True if the client speaks TLS, with us or with a reverse proxy that says so.
    pub(crate) is_secure: bool,
}

impl Call<'_> {
    /// True if a body belongs to it.
    pub(crate) fn takes_body(&self) -> bool {
        matches!(*self.method, Method::POST | Method::PUT)
    }
}

/// True for paths of the console, however they were typed.
pub(crate) fn is_ours(path: &str) -> bool {
    let is_below =
        |folder: &str| path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    is_below("/v1/admin") || page::is_ours(path)
}

/// The document at `/`, if a browser asks for it and the page is here; it also says what others are answered there.
pub(crate) fn root(pool: &Pool, call: &Call<'_>, said: &str) -> Option<Answer> {
    let accepted = call.headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let is_browser = accepted.contains("text/html") && matches!(*call.method, Method::GET | Method::HEAD);
    (is_browser && pool.server.admin_key.is_some()).then(|| page::root(call, said))
}

/// True for those of them that are the page's.
pub(crate) fn is_page(path: &str) -> bool {
    page::is_ours(path)
}

/// A call that may be made, and by whom.
#[derive(Debug)]
pub(crate) struct Admitted {
    author: Author,
    wanted: Wanted,
}

impl Admitted {
    /// True if it comes with the key, or with a session.
    pub(crate) fn is_by_key(&self) -> bool {
        !self.author.is_nobody()
    }

    /// The one who watches a view, if that is what it asks for.
    pub(crate) fn watcher(self) -> Result<Author, Self> {
        if self.wanted.operation == Operation::Live { Ok(self.author) } else { Err(self) }
    }

    /// Longest body that is read for it.
    pub(crate) fn body_bytes_max(&self) -> usize {
        if self.wanted.operation == Operation::SignIn { SIGN_IN_BYTES_MAX } else { BODY_BYTES_MAX }
    }
}

impl Console {
    /// Finds out what a call asks for, and whether it may. Behind too many wrong keys the answer is late.
    pub(crate) async fn admit(&self, auth: &Auth, from: Sources<'_>, call: &Call<'_>) -> Result<Admitted, Fault> {
        let server = &from.pool.server;
        let Some(key) = &server.admin_key else { return Err(Fault::AdminOff) };
        let wanted = operations::find(call.method, call.path);
        let author = match &wanted {
            // It brings the key with it.
            Ok(wanted) if wanted.operation == Operation::SignIn => {
                auth.check_admin_address(server.failed_keys_per_minute, call.address).map(|()| Author::nobody(call))
            }
            // Watching a view does not count as using the session, which would never end otherwise.
            _ => {
                let is_use = !matches!(&wanted, Ok(wanted) if wanted.operation == Operation::Live);
                self.author(auth, (key, server.failed_keys_per_minute), (call, is_use))
            }
        };
        if matches!(author, Err(Fault::KeysFailedTooOften)) {
            auth.admin_guesses.keep_waiting().await;
        }
        // One who may not hears nothing of what there is.
        let author = author?;
        Ok(Admitted { author, wanted: wanted? })
    }

    /// Answers a call.
    pub(crate) async fn answer(
        &self,
        auth: &Auth,
        from: Sources<'_>,
        (call, body): (&Call<'_>, &Bytes),
        Admitted { author, wanted }: Admitted,
    ) -> Result<Answer, Fault> {
        let Wanted { operation, name } = wanted;
        let request =
            Request { from, author: &author, query: call.query, name: name.as_deref().unwrap_or_default(), body };
        let value = match operation {
            Operation::SignIn => return self.sign_in(auth, &request, call).await,
            Operation::Usage if usage::is_csv(&request) => return usage::csv(&request).await,
            Operation::SignOut => return Ok(self.sign_out(call)),
            Operation::Session => self.session(call),
            Operation::Endpoints => endpoints::list(&request).await,
            Operation::EnableEndpoint => endpoints::switch_on(&request).await,
            Operation::DisableEndpoint => endpoints::switch_off(&request).await,
            Operation::ClearEndpoint => endpoints::clear(&request).await,
            Operation::TestEndpoint => endpoints::test(&request).await,
            Operation::Keys => keys::list(&request).await,
            Operation::AddKey => keys::add(&request).await,
            Operation::RotateKey => keys::rotate(&request).await,
            Operation::RaiseKey => keys::raise(&request).await,
            Operation::RevokeKey => keys::revoke(&request).await,
            Operation::Requests => requests::search(&request).await,
            Operation::Request => requests::one(&request).await,
            Operation::Running => requests::running(&request),
            Operation::Cancel => requests::cancel(&request).await,
            Operation::Usage => usage::series(&request).await,
            Operation::Config => config_file::show(&request).await,
            Operation::CheckConfig => config_file::check(&request).await,
            Operation::ApplyConfig => config_file::apply(&request).await,
            Operation::Versions => config_file::versions(&request).await,
            Operation::Version => config_file::version(&request).await,
            Operation::RestoreVersion => config_file::restore(&request).await,
            Operation::Reload => reload(&request).await,
            Operation::Audit => audit(&request).await,
            // It is a stream, which begins elsewhere.
            Operation::Live => Err(Fault::Internal),
            Operation::OpenApi => Ok(openapi::document()),
        };
        value.map(|value| Answer::json(200, value.to_string()))
    }
}

/// A call of an operation.
pub(crate) struct Request<'a> {
    from: Sources<'a>,
    author: &'a Author,
    query: Option<&'a str>,
    /// The id or the name that stands in its path.
    name: &'a str,
    body: &'a Bytes,
}

impl Request<'_> {
    /// Its body.
    fn body<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        let body: &[u8] = if self.body.is_empty() { b"{}" } else { self.body };
        serde_json::from_slice(body)
            .map_err(|error| invalid(&format!("The body is not what this call takes: {error}.")))
    }

    /// A parameter of its query.
    fn parameter(&self, name: &str) -> Option<String> {
        let pairs = url::form_urlencoded::parse(self.query.unwrap_or_default().as_bytes());
        pairs.into_iter().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
    }

    /// The same as a value of a type.
    fn parsed<T: std::str::FromStr>(&self, name: &str, what: &str) -> Result<Option<T>, Fault> {
        let Some(text) = self.parameter(name).filter(|text| !text.is_empty()) else { return Ok(None) };
        let wrong = || invalid(&format!("The parameter {name} is {:?}, and has to be {what}.", excerpt(&text)));
        text.parse().map(Some).map_err(|_| wrong())
    }

    fn actions(&self) -> Result<&dyn Actions, Fault> {
        self.from.process.actions.get().map(AsRef::as_ref).ok_or(Fault::Internal)
    }

    /// Notes a change, or an attempt at one, in the audit log. Returns what came of it.
    async fn done(&self, action: &str, subject: &str, result: Result<String, String>) -> Result<Value, Fault> {
        self.from.process.audit.add(&self.author.to_string(), action, subject, &result).await;
        match result {
            Ok(message) => shown(&Message { message }),
            Err(problem) => Err(Fault::AdminConflict { code: "not_done", problem }),
        }
    }
}

fn invalid(problem: &str) -> Fault {
    Fault::RequestInvalid { problem: without_keys(problem) }
}

async fn reload(request: &Request<'_>) -> Result<Value, Fault> {
    let reloaded = request.actions()?.reload().await;
    request.done("reload", "", reloaded).await
}

async fn audit(request: &Request<'_>) -> Result<Value, Fault> {
    const LINES_DEFAULT: usize = 100;
    let count = request.parsed("limit", "a number")?.unwrap_or(LINES_DEFAULT);
    let lines = request.from.process.audit.newest(count).await;
    let lines = lines.map_err(|error| Fault::AdminConflict {
        code: "audit_log_unreadable",
        problem: format!("The audit log cannot be read: {error}."),
    })?;
    shown(&AuditList { data: lines })
}

/// What came of a change, in words.
#[derive(Serialize, JsonSchema)]
struct Message {
    message: String,
}

/// Changes that were made.
#[derive(Serialize, JsonSchema)]
struct AuditList {
    data: Vec<AuditLine>,
}

/// An answer as JSON.
fn shown(answer: &impl Serialize) -> Result<Value, Fault> {
    serde_json::to_value(answer).map_err(|_| Fault::Internal)
}
