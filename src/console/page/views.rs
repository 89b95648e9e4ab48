//! Which view an address asks for, and what it is made of: the answers that the admin API gives as well.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use maud::Markup;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::live::{INTERVAL, View};
use super::requests::Filters;
use super::words::Language;
use super::{config, connect, endpoint as endpoint_page, keys as of_keys, now, requests, usage};
use crate::admin;
use crate::console::{Request, config_file, endpoints, keys, requests as logged, usage as counted};
use crate::fault::{Fault, excerpt};

/// Endpoints whose keys are listed at once, and the number of keys up to which all are without being asked for.
const OPEN_MAX: usize = 20;
const KEYS_SHOWN_UNASKED: usize = 40;
const KEYS_INTERVAL: Duration = Duration::from_secs(5);

/// A view, by the path of its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Now,
    Endpoint(String),
    Requests,
    Request(String),
    Keys,
    Usage,
    Config,
    Connect,
}

impl Place {
    /// The view of a path.
    pub(super) fn of(path: &str) -> Option<Self> {
        let below = path.strip_prefix("/dashboard").filter(|below| below.is_empty() || below.starts_with('/'))?;
        let mut parts = below.split('/').skip(1);
        let name = |part: &str| percent_decode_str(part).decode_utf8().ok().map(std::borrow::Cow::into_owned);
        match (parts.next(), parts.next(), parts.next()) {
            (None | Some(""), None, None) => Some(Self::Now),
            (Some("endpoints"), Some(id), None) if !id.is_empty() => name(id).map(Self::Endpoint),
            (Some("requests"), None, None) => Some(Self::Requests),
            (Some("requests"), Some(id), None) if !id.is_empty() => name(id).map(Self::Request),
            (Some("keys"), None, None) => Some(Self::Keys),
            (Some("usage"), None, None) => Some(Self::Usage),
            (Some("config"), None, None) => Some(Self::Config),
            (Some("connect"), None, None) => Some(Self::Connect),
            _ => None,
        }
    }

    /// The name under which its changes can be watched.
    pub(super) fn live(&self) -> Option<&'static str> {
        match self {
            Self::Now => Some("now"),
            Self::Endpoint(_) => Some("endpoint"),
            Self::Requests => Some("requests"),
            Self::Keys => Some("keys"),
            Self::Request(_) | Self::Usage | Self::Config | Self::Connect => None,
        }
    }

    /// Its name in titles of the browser's tabs.
    pub(super) fn title(&self, w: Language) -> &'static str {
        match self {
            Self::Now | Self::Endpoint(_) => w.t("Now"),
            Self::Requests | Self::Request(_) => w.t("Requests"),
            Self::Keys => w.t("Keys"),
            Self::Usage => w.t("Usage"),
            Self::Config => w.t("Config"),
            Self::Connect => w.t("Connect"),
        }
    }

    /// Its entry of the navigation.
    pub(super) fn entry(&self) -> &'static str {
        match self {
            Self::Now | Self::Endpoint(_) => "/dashboard",
            Self::Requests | Self::Request(_) => "/dashboard/requests",
            Self::Keys => "/dashboard/keys",
            Self::Usage => "/dashboard/usage",
            Self::Config => "/dashboard/config",
            Self::Connect => "/dashboard/connect",
        }
    }
}

/// A view that is watched.
pub(super) enum Watched {
    Now(Option<Vec<String>>),
    Endpoint(String),
    /// With the number of requests that had been written at the last look.
    Requests(Filters, Option<u64>),
    Keys,
}

impl Watched {
    /// The one that a query names.
    pub(super) fn of(query: Option<&str>) -> Result<Self, Fault> {
        let parameters = || url::form_urlencoded::parse(query.unwrap_or_default().as_bytes());
        let get = |wanted: &str| parameters().find(|(name, _)| name == wanted).map(|(_, value)| value.into_owned());
        match get("view").as_deref() {
            Some("now") => Ok(Self::Now(open(query))),
            Some("endpoint") => Ok(Self::Endpoint(get("name").unwrap_or_default())),
            Some("requests") => Ok(Self::Requests(Filters::of(query), None)),
            Some("keys") => Ok(Self::Keys),
            _ => Err(Fault::RequestInvalid {
                problem: "The parameter view has to be now, endpoint, requests or keys.".to_owned(),
            }),
        }
    }
}

impl Watched {
    /// Time between two looks. Last uses and budgets of keys are read from the ledger.
    pub(super) fn interval(&self) -> Duration {
        if matches!(self, Self::Keys) { KEYS_INTERVAL } else { INTERVAL }
    }
}

/// Requests under way, as many as are shown and one more.
fn running(request: &Request<'_>) -> Result<Value, Fault> {
    logged::first_running(request, now::RUNNING_MAX)
}

/// Endpoints whose keys are to be listed; none if that is left open.
fn open(query: Option<&str>) -> Option<Vec<String>> {
    let parameters = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes());
    let mut named = parameters.filter(|(name, _)| name == "open").map(|(_, value)| value.into_owned()).peekable();
    named.peek()?;
    Some(named.filter(|name| !name.is_empty()).take(OPEN_MAX).collect())
}

/// A call of the admin API by the page itself.
fn asking<'a>(request: &Request<'a>, query: Option<&'a str>, name: &'a str) -> Request<'a> {
    Request { from: request.from, author: request.author, query, name, body: &EMPTY }
}

static EMPTY: Bytes = Bytes::new();

/// The status, and the endpoints whose keys are listed in it: those that are asked for, or all if they have few.
async fn status(request: &Request<'_>, open: Option<&[String]>) -> Result<(Value, Vec<String>), Fault> {
    let pools = || request.from.pool.endpoints.iter().filter(|endpoint| endpoint.lanes.is_pool());
    let open = match open {
        Some(open) => open.to_vec(),
        None if pools().map(|endpoint| endpoint.lanes.list().len()).sum::<usize>() > KEYS_SHOWN_UNASKED => Vec::new(),
        None => pools().map(|endpoint| endpoint.config.id.to_string()).collect(),
    };
    let listed = open.clone();
    let status = endpoints::shown(request, move |id| listed.iter().any(|one| one == id)).await?;
    Ok((status, open))
}

/// Looks at a view that is watched.
pub(super) async fn watch(request: &Request<'_>, w: Language, watched: &mut Watched) -> Result<View, Fault> {
    match watched {
        Watched::Now(open) => {
            let (status, open) = status(request, open.as_deref()).await?;
            let running = running(request)?;
            aside(move || now::view(w, &status, &running, &open)).await
        }
        Watched::Endpoint(id) => Ok(endpoint_page::view(w, &endpoint(request, id).await?)),
        Watched::Requests(filters, written) => {
            let running = running(request)?;
            let now = request.from.process.request_log.state().map(|state| state.written);
            // The file is read only when it has something new.
            let page = if filters.is_live() && now != *written {
                let query = filters.for_api();
                Some(logged::search(&asking(request, Some(&query), "")).await?)
            } else {
                None
            };
            *written = now;
            let filters = filters.clone();
            aside(move || requests::view(w, page.as_ref(), &running, &filters)).await
        }
        Watched::Keys => {
            let keys = keys::list(request).await?;
            aside(move || of_keys::view(w, &keys)).await
        }
    }
}

/// Names that requests can be searched for.
fn known(request: &Request<'_>) -> requests::Known {
    let (pool, callers) = (request.from.pool, request.from.process.keyring.load());
    requests::Known {
        endpoints: pool.endpoints.iter().map(|endpoint| endpoint.config.id.to_string()).collect(),
        keys: callers.all().map(|caller| caller.name().to_string()).collect(),
        models: pool.router.names().map(ToOwned::to_owned).collect(),
    }
}

async fn endpoint(request: &Request<'_>, id: &str) -> Result<Value, Fault> {
    let wanted = id.to_owned();
    let mut status = endpoints::shown(request, move |id| id == wanted).await?;
    let apis = status.get_mut("apis").and_then(Value::as_array_mut);
    let found = apis.and_then(|apis| apis.iter_mut().find(|api| api.get("id").is_some_and(|one| one == id)));
    found.map(Value::take).ok_or_else(|| Fault::AdminNotFound { what: format!("endpoint {}", excerpt(id)) })
}

/// Makes what may be long aside from the threads that serve.
async fn aside<T: Send + 'static>(make: impl FnOnce() -> T + Send + 'static) -> Result<T, Fault> {
    tokio::task::spawn_blocking(make).await.map_err(|_| Fault::Internal)
}

/// The document of a view. `base` is the address of clients, if it is the page's.
pub(super) async fn document(
    request: &Request<'_>,
    w: Language,
    (place, query, base): (&Place, Option<&str>, Option<&str>),
) -> Result<Markup, Fault> {
    match place {
        Place::Now => {
            let view = watch(request, w, &mut Watched::Now(open(query))).await?;
            aside(move || now::document(w, &view)).await
        }
        Place::Endpoint(id) => {
            let api = endpoint(request, id).await?;
            Ok(endpoint_page::document(w, &api, &endpoint_page::view(w, &api)))
        }
        Place::Requests => {
            let filters = Filters::of(query);
            let api_query = filters.for_api();
            let page = logged::search(&asking(request, Some(&api_query), "")).await?;
            let view = requests::view(w, Some(&page), &running(request)?, &filters);
            Ok(requests::document(w, &view, &filters, &known(request)))
        }
        Place::Request(id) => Ok(requests::one(w, &logged::one(&asking(request, query, id)).await?)),
        Place::Keys => {
            let keys = keys::list(request).await?;
            Ok(of_keys::document(w, &of_keys::view(w, &keys)))
        }
        Place::Usage => {
            let (shown, now) = (usage::Shown::of(query), Timestamp::now());
            let api_query = shown.for_api(now);
            let counted = counted::series(&asking(request, Some(&api_query), "")).await?;
            Ok(usage::document(w, &counted, shown, &now.to_zoned_datetime(request.from.pool.server.timezone.clone())))
        }
        Place::Config => {
            let versions = config_file::versions(request).await.unwrap_or(json!({ "data": [] }));
            Ok(config::document(w, &config_file::show(request).await?, &versions))
        }
        Place::Connect => {
            let models =
                serde_json::from_str(&admin::models::list(request.from.pool, None)).map_err(|_| Fault::Internal)?;
            Ok(connect::document(w, base, &models))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_have_addresses() {
        assert_eq!(Place::of("/dashboard"), Some(Place::Now));
        assert_eq!(Place::of("/dashboard/endpoints/a%2Fb"), Some(Place::Endpoint("a/b".into())));
        assert_eq!(Place::of("/dashboard/requests/x"), Some(Place::Request("x".into())));
        assert_eq!(Place::of("/dashboard/"), Some(Place::Now));
        for none in ["/dashboard/keys/", "/dashboard/nothing", "/dashboard/requests/a/b", "/dashboards"] {
            assert_eq!(Place::of(none), None, "{none}");
        }
    }

    #[test]
    fn what_is_watched_stands_in_the_query() {
        assert!(
            matches!(Watched::of(Some("view=now&open=a&open=b")), Ok(Watched::Now(Some(open))) if open == ["a", "b"])
        );
        assert!(matches!(Watched::of(Some("view=x")), Err(Fault::RequestInvalid { .. })));
        assert!(Watched::of(None).is_err());
        assert_eq!(open(Some(&"open=a&".repeat(100))).unwrap().len(), OPEN_MAX);
        assert_eq!((open(Some("x=1")), open(Some("open="))), (None, Some(Vec::new())));
    }
}
