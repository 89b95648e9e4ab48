//! The table of operations of the admin API: what can be asked for, and by which paths.

use http::Method;
use percent_encoding::percent_decode_str;

use crate::fault::{Fault, excerpt};

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    SignIn,
    SignOut,
    Session,
    Endpoints,
    EnableEndpoint,
    DisableEndpoint,
    ClearEndpoint,
    TestEndpoint,
    Keys,
    AddKey,
    RotateKey,
    RaiseKey,
    RevokeKey,
    Requests,
    Request,
    Running,
    Cancel,
    Usage,
    Config,
    CheckConfig,
    ApplyConfig,
    Versions,
    Version,
    RestoreVersion,
    Reload,
    Audit,
    Live,
    OpenApi,
}

/// A row of the table.
pub(super) struct Row {
    pub(super) operation: Operation,
    pub(super) method: Method,
    /// Path below `/v1/admin`; `{}` stands for an id or a name.
    pub(super) path: &'static str,
}

const fn row(operation: Operation, method: Method, path: &'static str) -> Row {
    Row { operation, method, path }
}

#[rustfmt::skip]
pub(super) static OPERATIONS: [Row; 28] = [
    row(Operation::Session,         Method::GET,    "/session"),
    row(Operation::SignIn,          Method::POST,   "/session"),
    row(Operation::SignOut,         Method::DELETE, "/session"),
    row(Operation::Endpoints,       Method::GET,    "/endpoints"),
    row(Operation::EnableEndpoint,  Method::POST,   "/endpoints/{}/enable"),
    row(Operation::DisableEndpoint, Method::POST,   "/endpoints/{}/disable"),
    row(Operation::ClearEndpoint,   Method::POST,   "/endpoints/{}/clear"),
    row(Operation::TestEndpoint,    Method::POST,   "/endpoints/{}/test"),
    row(Operation::Keys,            Method::GET,    "/keys"),
    row(Operation::AddKey,          Method::POST,   "/keys"),
    row(Operation::RotateKey,       Method::POST,   "/keys/{}/rotate"),
    row(Operation::RaiseKey,        Method::POST,   "/keys/{}/raise"),
    row(Operation::RevokeKey,       Method::DELETE, "/keys/{}"),
    row(Operation::Requests,        Method::GET,    "/requests"),
    row(Operation::Request,         Method::GET,    "/requests/{}"),
    row(Operation::Running,         Method::GET,    "/running"),
    row(Operation::Cancel,          Method::DELETE, "/running/{}"),
    row(Operation::Usage,           Method::GET,    "/usage"),
    row(Operation::Config,          Method::GET,    "/config"),
    row(Operation::ApplyConfig,     Method::PUT,    "/config"),
    row(Operation::CheckConfig,     Method::POST,   "/config/check"),
    row(Operation::Versions,        Method::GET,    "/config/versions"),
    row(Operation::Version,         Method::GET,    "/config/versions/{}"),
    row(Operation::RestoreVersion,  Method::POST,   "/config/versions/{}/restore"),
    row(Operation::Reload,          Method::POST,   "/reload"),
    row(Operation::Audit,           Method::GET,    "/audit"),
    row(Operation::Live,            Method::GET,    "/live"),
    row(Operation::OpenApi,         Method::GET,    "/openapi.json"),
];

/// What a call asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) operation: Operation,
    /// The id or the name in its path.
    pub(super) name: Option<String>,
}

/// Finds the operation of a method and a path.
pub(super) fn find(method: &Method, path: &str) -> Result<Wanted, Fault> {
    let below = path.strip_prefix("/v1/admin").unwrap_or_default();
    let asked = if *method == Method::HEAD { &Method::GET } else { method };
    let (mut is_there, mut found) = (false, None);
    for row in &OPERATIONS {
        let Some(name) = matches(row.path, below) else { continue };
        is_there = true;
        if row.method == *asked {
            found = Some(Wanted { operation: row.operation, name });
        }
    }
    found.ok_or_else(|| if is_there { Fault::MethodNotAllowed { allowed: allowed(below) } } else { unknown(path) })
}

fn unknown(path: &str) -> Fault {
    Fault::AdminNotFound { what: format!("operation at {}", excerpt(path)) }
}

/// The methods of a path, as a header names them.
fn allowed(below: &str) -> &'static str {
    let of_path: Vec<_> =
        OPERATIONS.iter().filter(|row| matches(row.path, below).is_some()).map(|row| row.method.as_str()).collect();
    match of_path[..] {
        ["GET", "POST", "DELETE"] => "GET, HEAD, POST, DELETE",
        ["GET", "POST"] => "GET, HEAD, POST",
        ["GET", "PUT"] => "GET, HEAD, PUT",
        ["GET"] => "GET, HEAD",
        ["DELETE"] => "DELETE",
        _ => "POST",
    }
}

/// The name in a path of this form, if it has one; none if it is of another form.
#[expect(clippy::option_option, reason = "a path without a name matches as well")]
fn matches(form: &str, path: &str) -> Option<Option<String>> {
    let (mut form, mut path) = (form.split('/'), path.split('/'));
    let mut name = None;
    loop {
        match (form.next(), path.next()) {
            (None, None) => return Some(name),
            (Some("{}"), Some(part)) if !part.is_empty() => {
                name = Some(percent_decode_str(part).decode_utf8().ok()?.into_owned());
            }
            (Some(one), Some(other)) if one == other => {}
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_found_by_method_and_path() {
        let find = |method, path: &str| find(&method, &format!("/v1/admin{path}"));
        let named = |operation, name: &str| Ok(Wanted { operation, name: Some(name.into()) });
        assert_eq!(find(Method::GET, "/endpoints"), Ok(Wanted { operation: Operation::Endpoints, name: None }));
        assert_eq!(find(Method::HEAD, "/keys"), Ok(Wanted { operation: Operation::Keys, name: None }));
        assert_eq!(find(Method::POST, "/endpoints/a%2Fb%20c/test"), named(Operation::TestEndpoint, "a/b c"));
        assert_eq!(find(Method::DELETE, "/keys/ada"), named(Operation::RevokeKey, "ada"));
        assert_eq!(find(Method::GET, "/keys/ada"), Err(Fault::MethodNotAllowed { allowed: "DELETE" }));
        assert_eq!(find(Method::PUT, "/session"), Err(Fault::MethodNotAllowed { allowed: "GET, HEAD, POST, DELETE" }));
        for path in ["", "/", "/endpoints/", "/endpoints//test", "/endpoints/a/b", "/nothing", "/keys/%ff"] {
            assert!(matches!(find(Method::GET, path), Err(Fault::AdminNotFound { .. })), "{path}");
        }
    }
}
