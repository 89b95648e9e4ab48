//! A list of objects as a client asks for it, and as each endpoint is asked for its part.

use std::fmt::Write as _;

use http::Method;

/// Objects of a page where the client does not say, and the most that a page may have (platform.openai.com/docs/api-reference).
const PAGE: (usize, usize) = (20, 100);
const PAGE_OF_FILES: (usize, usize) = (10_000, 10_000);

/// A list that a client asks for.
#[derive(Debug)]
pub(crate) struct ListCall<'a> {
    pub(super) path: &'a str,
    /// Name of the parameter that holds the cursor.
    pub(super) cursor: &'static str,
    pub(super) after: Option<&'a str>,
    limit: Option<usize>,
    pub(super) is_ascending: bool,
    /// The other parameters, which each endpoint gets as they came.
    filters: Vec<&'a str>,
    pub(super) pages_back: bool,
}

impl<'a> ListCall<'a> {
    /// The list that a request asks for; none if it asks for something else.
    pub(crate) fn new(method: &Method, path: &'a str, query: Option<&'a str>) -> Option<Self> {
        const LISTS: [&str; 33] = [
            "/v1/agents",
            "/v1/agents/automations",
            "/v1/agents/environments",
            "/v1/agents/environments/templates",
            "/v1/agents/sessions",
            "/v1/assistants",
            "/v1/audio/voice_consents",
            "/v1/batches",
            "/v1/chat/completions",
            "/v1/chatkit/threads",
            "/v1/containers",
            "/v1/evals",
            "/v1/files",
            "/v1/fine_tuning/jobs",
            "/v1/messages/batches",
            "/v1/organization/admin_api_keys",
            "/v1/organization/audit_logs",
            "/v1/organization/certificates",
            "/v1/organization/external_keys",
            "/v1/organization/external_storage",
            "/v1/organization/groups",
            "/v1/organization/invites",
            "/v1/organization/projects",
            "/v1/organization/roles",
            "/v1/organization/spend_alerts",
            "/v1/organization/users",
            "/v1/organization/workload_identity_providers",
            "/v1/skills",
            "/v1/vaults",
            "/v1/vector_stores",
            "/v1/videos",
            "/v1/webhook_endpoints",
            "/v1/conversations",
        ];
        /// Those that begin with the oldest, unless the client says otherwise (platform.openai.com/docs/api-reference).
        const ASCENDING: [&str; 2] = ["/v1/chat/completions", "/v1/evals"];
        if *method != Method::GET || !LISTS.contains(&path) {
            return None;
        }
        let is_anthropic = path.starts_with("/v1/messages/") || query.is_some_and(|query| query.contains("after_id="));
        let cursor = if is_anthropic { "after_id" } else { "after" };
        let mut list = Self {
            path,
            cursor,
            after: None,
            limit: None,
            is_ascending: ASCENDING.contains(&path),
            filters: Vec::new(),
            pages_back: false,
        };
        for pair in query.into_iter().flat_map(|query| query.split('&')).filter(|pair| !pair.is_empty()) {
            match pair.split_once('=').unwrap_or((pair, "")) {
                (name, id) if name == cursor => list.after = Some(id).filter(|id| !id.is_empty()),
                ("limit", number) => list.limit = number.parse().ok(),
                ("before" | "before_id", _) => list.pages_back = true,
                (name, value) => {
                    if name == "order" {
                        list.is_ascending = value == "asc";
                    }
                    list.filters.push(pair);
                }
            }
        }
        Some(list)
    }

    /// The target of a page at an endpoint.
    pub(super) fn target(&self, after: Option<&str>, limit: usize) -> String {
        let mut target = format!("{}?limit={limit}", self.path);
        if let Some(after) = after {
            // A text is always written.
            write!(target, "&{}={after}", self.cursor).unwrap_or_default();
        }
        for filter in &self.filters {
            target.push('&');
            target.push_str(filter);
        }
        target
    }

    pub(super) fn key(&self, last: &str) -> String {
        format!("{} {} {last}", self.path, self.filters.join("&"))
    }

    pub(super) fn page_size(&self) -> usize {
        let (usual, most) = self.page_sizes();
        self.limit.unwrap_or(usual).clamp(1, most)
    }

    /// The usual size of a page, and the largest.
    pub(super) fn page_sizes(&self) -> (usize, usize) {
        if self.path == "/v1/files" && self.cursor == "after" { PAGE_OF_FILES } else { PAGE }
    }
}
