//! The text that the program prints at its start.

use std::fmt::Write as _;
use std::net::SocketAddr;

use anstyle::{AnsiColor, Style};

use crate::config::{Config, Endpoint};
use crate::server::callable;

const TITLE: Style = AnsiColor::Green.on_default().bold();
const NAME: Style = AnsiColor::Cyan.on_default();
const OFF: Style = AnsiColor::Yellow.on_default();

/// The text, but for the address, which is known only later.
#[derive(Debug)]
pub(super) struct Banner {
    scheme: &'static str,
    key: String,
    /// True if there is a page.
    has_page: bool,
    /// Listener of its own, if the page has one.
    page_listener: Option<SocketAddr>,
    /// Key of the page, if it may be shown.
    admin_key: Option<String>,
    endpoints: String,
}

impl Banner {
    /// Returns the banner of a config.
    pub(super) fn new(config: &Config) -> Self {
        let usable = config.endpoints.iter().filter(|endpoint| endpoint.usable()).count();
        let mut endpoints = format!("{usable} of {} in use\n", config.endpoints.len());
        for endpoint in &config.endpoints {
            line(&mut endpoints, endpoint);
        }
        let scheme = if config.server.tls.is_some() { "https" } else { "http" };
        let has_page = config.server.admin_key.is_some();
        let page_listener = config.server.admin_listen;
        Self { scheme, key: shown_key(config), has_page, page_listener, admin_key: None, endpoints }
    }

    /// Shows the client key and the admin key as they are: those of the demo, which open nothing but simulated endpoints.
    pub(super) fn with_keys_shown(self, key: &str, admin_key: &str) -> Self {
        Self { key: key.to_owned(), admin_key: Some(admin_key.to_owned()), ..self }
    }

    /// Returns the whole text. The printer leaves colours out if its output is not a terminal.
    pub(super) fn text(&self, address: SocketAddr) -> String {
        let Self { scheme, key, has_page, page_listener, admin_key, endpoints } = self;
        let page = if *has_page {
            let key = admin_key.as_ref().map_or_else(String::new, |key| format!(" (admin key {key})"));
            let at = callable(page_listener.unwrap_or(address));
            format!("{NAME}dashboard{NAME:#}   {scheme}://{at}/dashboard{key}\n")
        } else {
            String::new()
        };
        let local = callable(address);
        let version = env!("CARGO_PKG_VERSION");
        format!(
            "{TITLE}api-together {version}{TITLE:#}\n\
             {NAME}listening{NAME:#}   {scheme}://{address} (HTTP/1.1 and HTTP/2)\n\
             {NAME}base URL{NAME:#}    {scheme}://{local}/v1\n\
             {NAME}client key{NAME:#}  {key}\n\
             {page}\
             {NAME}status{NAME:#}      {scheme}://{local}/v1/status\n\
             {NAME}health{NAME:#}      {scheme}://{local}/health\n\
             {NAME}endpoints{NAME:#}   {endpoints}"
        )
    }
}

/// The key that opens everything, masked, or that each caller has one.
fn shown_key(config: &Config) -> String {
    match &config.server.api_key {
        Some(key) => key.to_string(),
        None => "one for each caller (server.keys)".to_owned(),
    }
}

fn line(text: &mut String, endpoint: &Endpoint) {
    let limit = |number: i64| if number < 0 { "no limit".into() } else { number.to_string() };
    let models = match endpoint.models.len() + endpoint.model_mapping.len() {
        1 => "1 model".into(),
        count => format!("{count} models"),
    };
    let state = if endpoint.usable() { String::new() } else { format!("  {OFF}off{OFF:#}") };
    let (id, name, url) = (&endpoint.id, &endpoint.name, &endpoint.base_url);
    let (rpm, rpd) = (limit(endpoint.limits.rpm.as_number()), limit(endpoint.limits.rpd.as_number()));
    // Writing to a string cannot fail.
    writeln!(text, "  {NAME}{id}{NAME:#}  {name}  {url}  rpm {rpm}, rpd {rpd}, {models}{state}").unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config;

    #[test]
    fn what_is_printed() {
        let config = config(
            r#"[{"id":"api1","name":"OpenAI官方API","baseUrl":"https://api.openai.com","rpm":60,"models":["a","b"]},
                {"id":"off","enabled":false,"models":["c"]}]"#,
        );
        let text = Banner::new(&config).text("0.0.0.0:3001".parse().unwrap());
        let plain = anstream::adapter::strip_str(&text).to_string();
        assert!(plain.contains("listening   http://0.0.0.0:3001"), "{plain}");
        assert!(plain.contains("status      http://127.0.0.1:3001/v1/status"), "{plain}");
        assert!(plain.contains("1 of 2 in use"), "{plain}");
        assert!(
            plain.contains("  api1  OpenAI官方API  https://api.openai.com  rpm 60, rpd no limit, 2 models\n"),
            "{plain}"
        );
        assert!(plain.contains("1 model  off\n"), "{plain}");
        assert!(!plain.contains("sk-client-key") && !plain.contains("dashboard"), "{plain}");
        let with_page = Banner { has_page: true, ..Banner::new(&config) }.with_keys_shown("sk-a", "sk-b");
        let plain = anstream::adapter::strip_str(&with_page.text("0.0.0.0:3001".parse().unwrap())).to_string();
        assert!(plain.contains("dashboard   http://127.0.0.1:3001/dashboard (admin key sk-b)\n"), "{plain}");
    }
}
