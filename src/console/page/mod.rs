//! The page of those who run the gateway, at `/dashboard`: documents made on the server out of the admin API's own answers, and one
//! script that swaps what changes.
//!
//! | module | owns |
//! |---|---|
//! | `views` | which view an address asks for, and its data |
//! | `now`, `endpoint`, `requests`, `keys`, `usage`, `config`, `connect` | the views |
//! | `live` | changes of a view, as a stream of events |
//! | `parts`, `chart` | what several views show |
//! | `words` | English and Chinese |
//! | `assets` | style sheet, script and icon |

mod assets;
mod chart;
mod config;
mod connect;
mod endpoint;
mod keys;
pub(super) mod live;
mod now;
mod parts;
mod requests;
mod usage;
mod views;
mod words;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use maud::{DOCTYPE, Markup, html};

use super::access::{Author, COOKIE};
use super::sessions::csrf_token;
use super::{Call, Console, Request};
use crate::admin::{Answer, Sources};
use crate::fault::{Fault, excerpt};
use views::Place;
use words::Language;

/// Nothing is loaded but the page's own files, nothing runs that stands in a document, and no other page frames it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; \
                      base-uri 'none'; frame-ancestors 'none'";

/// True for paths of the page.
pub(super) fn is_ours(path: &str) -> bool {
    path.strip_prefix("/dashboard").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl Console {
    /// Answers a request for the page. A document shows nothing without a session but where to sign in.
    pub(crate) async fn page(&self, from: Sources<'_>, call: &Call<'_>, base: Option<&str>) -> Result<Answer, Fault> {
        let key = from.pool.server.admin_key.as_ref().ok_or(Fault::AdminOff)?;
        if !matches!(*call.method, Method::GET | Method::HEAD) {
            return Err(Fault::MethodNotAllowed { allowed: "GET, HEAD" });
        }
        if let Some(asset) = assets::find(call.path) {
            let body = if takes_gzip(call) {
                Body::Compressed(asset.compressed())
            } else {
                Body::Plain(Bytes::from_static(asset.text.as_bytes()))
            };
            let mut answer = answer(200, asset.content_type, body);
            // During an upgrade another build may be asked for this file.
            let is_it = call.query == Some(assets::BUILD.as_str());
            let cached = if is_it { "public, max-age=31536000, immutable" } else { "no-cache" };
            answer.headers.push((header::CACHE_CONTROL, HeaderValue::from_static(cached)));
            return Ok(answer);
        }
        let place = Place::of(call.path).ok_or_else(|| Fault::PathUnknown { path: excerpt(call.path) })?;
        let w = Language::of(call.headers);
        let token = cookie(call.headers, COOKIE).filter(|token| self.sessions.uses(token, key, call.authority));
        let Some(token) = token else {
            return Ok(document(200, Body::Plain(sign_in(w, call).into_string().into())));
        };
        let author = Author::session(call);
        let request = Request { from, author: &author, query: None, name: "", body: &Bytes::new() };
        let (status, main) = match views::document(&request, w, (&place, call.query, base)).await {
            Ok(main) => (200, main),
            Err(fault) => (
                fault.status(),
                html! { p class="alerts bad" { (fault.message()) } p { a href="/dashboard" { "← " (w.t("Now")) } } },
            ),
        };
        let live = place.live().map(|view| match &place {
            Place::Endpoint(id) => format!("{view}&name={}", parts::in_path(id)),
            _ => view.to_owned(),
        });
        let (title, body) = (place.title(w), frame(w, &place, &main));
        let shell = Shell { title, csrf: Some(&csrf_token(token)), live: live.as_deref(), body };
        let whole = layout(w, call, shell).into_string();
        if !takes_gzip(call) {
            return Ok(document(status, Body::Plain(whole.into())));
        }
        // Aside from the threads that serve: there may be a thousand endpoints in it.
        let compressed = tokio::task::spawn_blocking(move || assets::compressed(whole.as_bytes())).await;
        Ok(document(status, Body::Compressed(compressed.map_err(|_| Fault::Internal)?)))
    }
}

/// A view with what is around each of them.
fn frame(w: Language, place: &Place, main: &Markup) -> Markup {
    html! {
        a class="skip" href="#main" { (w.t("To the content")) }
        header { (navigation(w, place)) }
        main id="main" tabindex="-1" { (main) }
        div id="said" role="status" aria-live="polite" {}
        dialog id="ask" aria-labelledby="ask-text" {
            form method="dialog" {
                p id="ask-text" {}
                pre id="ask-secret" tabindex="0" hidden {}
                div class="actions" {
                    button type="button" id="ask-copy" class="copy" data-from="ask-secret" hidden { (w.t("Copy")) }
                    button value="yes" { (w.t("Yes")) }
                    button value="no" { (w.t("No")) }
                }
            }
        }
    }
}

/// The document at `/`, for browsers: what `GET /` says to everybody, and the way to the page.
pub(super) fn root(call: &Call<'_>, said: &str) -> Answer {
    let w = Language::of(call.headers);
    let body = html! {
        main id="main" class="sign-in" {
            h1 { "api-together" }
            p { (said) }
            p { a href="/dashboard" { (w.t("Dashboard")) } }
        }
    };
    let whole = layout(w, call, Shell { title: "", csrf: None, live: None, body }).into_string();
    document(200, Body::Plain(whole.into()))
}

/// What a document is made of beside its head.
struct Shell<'a> {
    title: &'a str,
    csrf: Option<&'a str>,
    /// The view that is watched, as a query.
    live: Option<&'a str>,
    body: Markup,
}

fn layout(w: Language, call: &Call<'_>, Shell { title, csrf, live, body }: Shell<'_>) -> Markup {
    let build = assets::BUILD.as_str();
    let theme = cookie(call.headers, "api-together-theme").filter(|theme| matches!(*theme, "dark" | "light"));
    html! {
        (DOCTYPE)
        html lang=(w.tag()) data-theme=[theme] {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta name="build" content=(build);
                @if let Some(csrf) = csrf { meta name="csrf" content=(csrf); }
                title { @if !title.is_empty() { (title) " · " } "api-together" }
                link rel="icon" href="/dashboard/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href={ "/dashboard/page.css?" (build) };
                script src={ "/dashboard/page.js?" (build) } defer {}
            }
            body data-live=[live] data-words=(words(w)) { (body) }
        }
    }
}

/// Texts that the script says.
fn words(w: Language) -> String {
    serde_json::json!({
        "lost": w.t("The connection is lost; trying again."),
        "signedOut": w.t("You are signed out. Sign in to go on."),
        "copied": w.t("Copied."),
        "close": w.t("Close"),
        "yes": w.t("Yes"),
        "once": w.t("The key is shown this once:"),
        "in": w.t("in {}"),
        "good": w.t("The text is right."),
        "nothingChanges": w.t("Nothing would change."),
        "changes": w.t("What would change:"),
        "waits": w.t("Waits for an upgrade or a restart:"),
        "line": w.t("line {}"),
        "noKey": w.t("Give a client's key first."),
        "failed": w.t("It failed:"),
        "apply": w.t("Put this text in the place of the file's?"),
        "dirty": w.t("The text was changed and is not applied. Leave it?"),
    })
    .to_string()
}

fn navigation(w: Language, place: &Place) -> Markup {
    let entries = [
        ("/dashboard", w.t("Now")),
        ("/dashboard/requests", w.t("Requests")),
        ("/dashboard/keys", w.t("Keys")),
        ("/dashboard/usage", w.t("Usage")),
        ("/dashboard/config", w.t("Config")),
        ("/dashboard/connect", w.t("Connect")),
    ];
    html! {
        nav aria-label=(w.t("Views")) {
            @for (path, name) in entries {
                a href=(path) aria-current=[(place.entry() == path).then_some("page")] { (name) }
            }
        }
        div class="settings" {
            span id="link" class="label" role="status" {}
            (choices(w))
            button type="button" id="sign-out" { (w.t("Sign out")) }
        }
    }
}

/// Language and colors.
fn choices(w: Language) -> Markup {
    html! {
        button type="button" id="language" data-language=(if w == Language::English { "zh" } else { "en" }) {
            @if w == Language::English { span lang="zh-CN" { "中文" } } @else { span lang="en" { "English" } }
        }
        button type="button" id="theme" { (w.t("Light or dark")) }
    }
}

fn sign_in(w: Language, call: &Call<'_>) -> Markup {
    // A link from elsewhere brings no cookie with it, though there may be a session.
    let comes_from_elsewhere =
        call.headers.get("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none");
    let body = html! {
        main id="main" class="sign-in" {
            h1 { "api-together" }
            form id="sign-in" method="post" data-elsewhere[comes_from_elsewhere] {
                label class="field" {
                    span { (w.t("Admin key")) }
                    input type="password" name="key" required autocomplete="current-password" autofocus;
                }
                button type="submit" { (w.t("Sign in")) }
            }
            p class="label" { (w.t("It is server.adminKey of the config.")) }
            noscript { p class="alerts bad" { (w.t("The page needs JavaScript.")) } }
            div id="said" role="status" aria-live="polite" {}
            div class="settings" { (choices(w)) }
        }
    };
    layout(w, call, Shell { title: w.t("Sign in"), csrf: None, live: None, body })
}

/// A body, as it is sent.
enum Body {
    Plain(Bytes),
    Compressed(Bytes),
}

fn document(status: u16, body: Body) -> Answer {
    let mut answer = answer(status, "text/html; charset=utf-8", body);
    let more = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    answer.headers.extend(more.map(|(name, value)| (name, HeaderValue::from_static(value))));
    answer
}

fn answer(status: u16, content_type: &'static str, body: Body) -> Answer {
    let mut headers = vec![
        (header::CONTENT_TYPE, HeaderValue::from_static(content_type)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
        (header::VARY, HeaderValue::from_static("accept-encoding")),
    ];
    let body = match body {
        Body::Plain(body) => body,
        Body::Compressed(body) => {
            headers.push((header::CONTENT_ENCODING, HeaderValue::from_static("gzip")));
            body
        }
    };
    Answer { status, headers, body }
}

/// True if an answer may be compressed.
fn takes_gzip(call: &Call<'_>) -> bool {
    let accepted = call.headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok()).unwrap_or_default();
    accepted.split(',').any(|coding| coding.trim() == "gzip")
}

/// The value of a cookie; none if it is empty.
pub(super) fn cookie<'a>(headers: &'a HeaderMap, wanted: &str) -> Option<&'a str> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = all.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(name, value)| *name == wanted && !value.is_empty()).map(|(_, value)| value)
}
