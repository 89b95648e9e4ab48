//! Who may: the admin key itself, as programs send it, or a session of the page, which has a cookie in its place.

use std::fmt;
use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;

use super::sessions::{IDLE_MAX, csrf_token};
use super::{Call, Console, Request, shown};
use crate::admin::Answer;
use crate::config::Secret;
use crate::fault::Fault;
use crate::request::auth::Auth;
use crate::routing::pool::Pool;

/// The cookie of a session.
pub(super) const COOKIE: &str = "api-together-session";
/// The header in which the page sends its token with each change.
const CSRF: HeaderName = HeaderName::from_static("x-csrf-token");

/// Who makes a call.
#[derive(Debug)]
pub(crate) struct Author {
    by: By,
    address: Option<IpAddr>,
}

#[derive(Debug)]
enum By {
    Nobody,
    Key,
    Session,
}

impl Author {
    /// Somebody who is about to show the key.
    pub(super) fn nobody(call: &Call<'_>) -> Self {
        Self { by: By::Nobody, address: call.address }
    }

    /// A session of the page.
    pub(super) fn session(call: &Call<'_>) -> Self {
        Self { by: By::Session, address: call.address }
    }

    pub(super) fn is_nobody(&self) -> bool {
        matches!(self.by, By::Nobody)
    }

    pub(super) fn is_session(&self) -> bool {
        matches!(self.by, By::Session)
    }
}

impl fmt::Display for Author {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.by {
            By::Nobody => "somebody",
            By::Key => "the admin key",
            By::Session => "the page",
        })?;
        match self.address {
            Some(address) => write!(f, ", from {address}"),
            None => Ok(()),
        }
    }
}

/// What signs in.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SignIn {
    /// `server.adminKey`.
    key: Secret,
}

/// What the page needs to know of its session.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct SessionShown {
    /// The token that stands in `x-csrf-token` of each change.
    csrf_token: String,
    /// Seconds after its last use for which it lasts.
    idle_seconds: u64,
}

impl SessionShown {
    fn of(token: &str) -> Self {
        Self { csrf_token: csrf_token(token), idle_seconds: IDLE_MAX.as_secs() }
    }
}

impl Console {
    /// Finds out who makes a call.
    pub(super) fn author(
        &self,
        auth: &Auth,
        key: (&Secret, u32),
        (call, is_use): (&Call<'_>, bool),
    ) -> Result<Author, Fault> {
        check_browser(call)?;
        let by_key = auth.check_admin(key, call.headers, call.address);
        if !matches!(by_key, Err(Fault::AdminKeyMissing)) {
            return by_key.map(|()| Author { by: By::Key, address: call.address });
        }
        let token = cookie(call.headers).ok_or(Fault::AdminKeyMissing)?;
        let sessions = &self.sessions;
        let is_open = if is_use {
            sessions.uses(token, key.0, call.authority)
        } else {
            sessions.is_open(token, key.0, call.authority)
        };
        if !is_open {
            return Err(Fault::AdminKeyMissing);
        }
        let reads = matches!(*call.method, Method::GET | Method::HEAD);
        let given = call.headers.get(CSRF).map_or(&b""[..], HeaderValue::as_bytes);
        if !reads && !bool::from(csrf_token(token).as_bytes().ct_eq(given)) {
            let problem = "The request has no x-csrf-token, or not that of its session. GET /v1/admin/session has it.";
            return Err(Fault::AdminUntrusted { problem });
        }
        Ok(Author::session(call))
    }

    /// True if a browser has a session. Nothing is used by that.
    pub(crate) fn is_signed_in(&self, pool: &Pool, call: &Call<'_>) -> bool {
        let key = pool.server.admin_key.as_ref();
        key.zip(cookie(call.headers)).is_some_and(|(key, token)| self.sessions.is_open(token, key, call.authority))
    }

    /// Opens a session for somebody who has the key.
    pub(super) async fn sign_in(&self, auth: &Auth, request: &Request<'_>, call: &Call<'_>) -> Result<Answer, Fault> {
        check_browser(call)?;
        let server = &request.from.pool.server;
        let key = server.admin_key.as_ref().ok_or(Fault::AdminOff)?;
        let given: SignIn = request.body()?;
        let checked =
            auth.check_admin_key((key, server.failed_keys_per_minute), given.key.expose().as_bytes(), call.address);
        let (audit, author) = (&request.from.process.audit, request.author.to_string());
        if let Err(fault) = checked {
            if matches!(fault, Fault::KeysFailedTooOften) {
                auth.admin_guesses.keep_waiting().await;
            }
            // Not in the file, where a stranger's attempts would push out what matters.
            log::warn!("audit: {author}: session.open: refused");
            return Err(fault);
        }
        audit.add(&author, "session.open", "", &Ok("signed in".to_owned())).await;
        let token = self.sessions.open(key, call.authority).ok_or(Fault::Internal)?;
        let mut answer = Answer::json(200, shown(&SessionShown::of(&token))?.to_string());
        answer.headers.extend(cookie_header(&token, call.is_secure, IDLE_MAX.as_secs()));
        Ok(answer)
    }

    /// Ends the session of a call.
    pub(super) fn sign_out(&self, call: &Call<'_>) -> Answer {
        if let Some(token) = cookie(call.headers) {
            self.sessions.close(token);
        }
        let mut answer = Answer::json(200, json!({ "message": "signed out" }).to_string());
        answer.headers.extend(cookie_header("", call.is_secure, 0));
        answer
    }

    /// What the page needs to know of its session.
    #[expect(clippy::unused_self, reason = "it stands beside its kind")]
    pub(super) fn session(&self, call: &Call<'_>) -> Result<Value, Fault> {
        shown(&SessionShown::of(cookie(call.headers).ok_or(Fault::AdminKeyMissing)?))
    }
}

fn cookie_header(token: &str, is_secure: bool, seconds: u64) -> Option<(HeaderName, HeaderValue)> {
    let secure = if is_secure { "; Secure" } else { "" };
    let text = format!("{COOKIE}={token}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}");
    Some((header::SET_COOKIE, HeaderValue::from_str(&text).ok()?))
}

/// Refuses what a browser sends for a page that is not ours.
fn check_browser(call: &Call<'_>) -> Result<(), Fault> {
    let text = |name: &HeaderName| call.headers.get(name).and_then(|value| value.to_str().ok());
    let site = text(&HeaderName::from_static("sec-fetch-site"));
    if site.is_some_and(|site| !matches!(site, "same-origin" | "none")) {
        let problem =
            "A page of somebody else sent this request (Sec-Fetch-Site). The admin API is for its own page only.";
        return Err(Fault::AdminUntrusted { problem });
    }
    let Some(origin) = text(&header::ORIGIN) else { return Ok(()) };
    let of_origin = origin.split_once("://").map_or(origin, |(_, host)| host);
    if !of_origin.eq_ignore_ascii_case(call.authority) {
        let problem = "The request's Origin is not its Host. The admin API is for its own page only; a reverse proxy has to \
                       pass the Host on.";
        return Err(Fault::AdminUntrusted { problem });
    }
    Ok(())
}

/// The value of a session's cookie.
fn cookie(headers: &HeaderMap) -> Option<&str> {
    super::page::cookie(headers, COOKIE)
}
