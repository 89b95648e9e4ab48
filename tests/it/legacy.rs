//! Files of the old program, and where a base URL leads.

use serde_json::json;

use crate::harness::{Proxy, Reply, chat, endpoint, simulator, within};

/// The files as they are, and the names that they serve.
const FILES: [(&str, &str, &[&str]); 3] = [
    ("manual", include_str!("../fixtures/config/legacy/manual.json"), &["claude-2", "gpt-3.5", "gpt-4"]),
    ("comment_key", include_str!("../fixtures/config/legacy/comment_key.json"), &["claude-2", "gpt-3.5", "gpt-4"]),
    ("variants", include_str!("../fixtures/config/legacy/variants.json"), &["gpt-3.5", "gpt-4"]),
];

#[tokio::test(flavor = "multi_thread")]
async fn files_of_the_old_program_serve_as_they_are() {
    within(async {
        for (name, text, models) in FILES {
            let proxy = Proxy::of_text(text, &[("PORT", "0")]).await;
            let health = Reply::of(proxy.request_without_key(http::Method::GET, "/health")).await;
            assert_eq!((health.status, &health.json()["status"]), (200, &json!("ok")), "{name}");
            let list = proxy.request_without_key(http::Method::GET, "/v1/models").bearer_auth("sk-123");
            let list = Reply::of(list).await.json();
            let names: Vec<_> =
                list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
            for model in models {
                assert!(names.contains(model), "{name}: {model} is not in {names:?}");
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_the_old_program_leads_to_its_endpoints() {
    within(async {
        for (name, text, _) in FILES {
            let endpoint = simulator().await;
            let text = text.replace("https://api.openai.com", &endpoint.base_url());
            let proxy = Proxy::of_text(&text, &[("PORT", "0")]).await;
            let request = proxy.request_without_key(http::Method::POST, "/v1/chat/completions");
            let reply = Reply::of(request.bearer_auth("sk-123").json(&chat("gpt-3.5"))).await;
            reply.assert_from("api1", 1);
            let arrived = endpoint.requests();
            assert_eq!(arrived[0].path_and_query, "/v1/chat/completions", "{name}");
            assert_eq!(arrived[0].header("authorization"), Some("Bearer sk-your-real-openai-key-here"), "{name}");
            let body: serde_json::Value = serde_json::from_slice(&arrived[0].body).unwrap();
            assert_eq!(body["model"], "gpt-3.5-turbo", "{name}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn base_urls_are_joined_with_the_clients_path() {
    within(async {
        for (path, asked, arrives) in [
            ("", "/v1/chat/completions", "/v1/chat/completions"),
            ("/", "/v1/chat/completions", "/v1/chat/completions"),
            ("/v1", "/v1/chat/completions", "/v1/chat/completions"),
            ("/v1/", "/v1/chat/completions", "/v1/chat/completions"),
            ("/api/v3", "/v1/chat/completions", "/api/v3/chat/completions"),
            ("/v1beta/openai/", "/v1/chat/completions", "/v1beta/openai/chat/completions"),
            ("/api/v3", "/v1/chat/completions?a=1&b=/v1/x", "/api/v3/chat/completions?a=1&b=/v1/x"),
            ("/api/v3", "/v1/files/file%2F1/content", "/api/v3/files/file%2F1/content"),
            ("", "/v1/files?limit=2", "/v1/files?limit=2"),
        ] {
            let simulator = simulator().await;
            let url = format!("{}{path}", simulator.base_url());
            let proxy = Proxy::start(json!({}), &[endpoint("a", &url)]).await;
            proxy.post(asked, &chat("m")).await;
            let arrived: Vec<_> = simulator.requests().into_iter().map(|request| request.path_and_query).collect();
            assert_eq!(arrived, [arrives], "{path} and {asked}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_header_is_the_endpoints() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        proxy.chat("m").await.assert_from("a", 1);
        assert_eq!(simulator.requests()[0].header("host"), Some(simulator.addr().to_string().as_str()));
    })
    .await;
}
