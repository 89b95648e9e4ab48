//! Endpoints with several doors: a key where each vendor wants it, an address for each format, and calls that some do not have.

use api_together::simulator::{Behaviour, Simulator};
use http::Method;
use serde_json::{Value, json};

use crate::harness::{Proxy, Reply, behaving, chat, endpoint_with, key_of, simulator, within};

fn anthropic() -> Behaviour {
    let message = json!({ "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
        "content": [{ "type": "text", "text": "hi" }], "usage": { "input_tokens": 3, "output_tokens": 2 } });
    Behaviour { body: Some(message.to_string()), ..Behaviour::default() }
}

async fn messages(proxy: &Proxy, path: &str, headers: &[(&str, &str)]) -> Reply {
    let body = json!({ "model": "m", "max_tokens": 9, "messages": [{ "role": "user", "content": "hello" }] });
    let mut request = proxy.request(Method::POST, path).json(&body);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    Reply::of(request).await
}

/// What of a request to a simulator may hold a key.
fn key_places(simulator: &Simulator) -> (Vec<(String, String)>, String) {
    let arrived = simulator.requests().pop().unwrap();
    let names = ["authorization", "api-key", "x-api-key", "x-goog-api-key"];
    let headers = names.iter().filter_map(|name| Some(((*name).to_owned(), arrived.header(name)?.to_owned())));
    (headers.collect(), arrived.path_and_query)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_stands_where_the_endpoint_wants_it_and_nowhere_else() {
    within(async {
        let key = key_of("a");
        for (place, header, target) in [
            ("authorization", Some(("authorization", format!("Bearer {key}"))), "/v1/chat/completions?a=1".to_owned()),
            ("api-key", Some(("api-key", key.clone())), "/v1/chat/completions?a=1".to_owned()),
            ("x-api-key", Some(("x-api-key", key.clone())), "/v1/chat/completions?a=1".to_owned()),
            ("x-goog-api-key", Some(("x-goog-api-key", key.clone())), "/v1/chat/completions?a=1".to_owned()),
            ("query:key", None, format!("/v1/chat/completions?a=1&key={key}")),
        ] {
            let simulator = simulator().await;
            let api = endpoint_with("a", &simulator.base_url(), json!({ "authHeader": place }));
            let proxy = Proxy::start(json!({}), &[api]).await;
            // Clients put their own key in any of these places.
            let request = proxy.request(Method::POST, "/v1/chat/completions?a=1&key=client").json(&chat("m"));
            let request = request.header("api-key", "sk-other").header("x-api-key", "sk-another");
            assert_eq!(Reply::of(request).await.status, 200, "{place}");
            let header: Vec<_> = header.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            assert_eq!(key_places(&simulator), (header, target), "{place}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_format_has_a_door_of_its_own_and_the_same_limits() {
    within(async {
        let (openai, native) = (simulator().await, behaving(anthropic()).await);
        let format = json!({ "baseUrl": format!("{}/anthropic/v1", native.base_url()), "authHeader": "x-api-key" });
        let more = json!({ "formats": { "messages": format }, "rpm": 3 });
        let proxy = Proxy::start(json!({}), &[endpoint_with("a", &openai.base_url(), more)]).await;
        assert_eq!(proxy.chat("m").await.status, 200);
        let version =
            [("anthropic-version", "2023-06-01"), ("anthropic-beta", "fine-grained-tool-streaming-2025-05-14")];
        let reply = messages(&proxy, "/v1/messages?beta=true", &version).await;
        reply.assert_from("a", 1);
        let arrived = native.requests().pop().unwrap();
        assert_eq!(arrived.path_and_query, "/anthropic/v1/messages?beta=true");
        for (name, value) in version {
            assert_eq!(arrived.header(name), Some(value));
        }
        assert_eq!(key_places(&native).0, [("x-api-key".to_owned(), key_of("a"))]);
        assert_eq!(messages(&proxy, "/v1/messages/count_tokens", &version).await.status, 200);
        assert_eq!(native.requests().pop().unwrap().path_and_query, "/anthropic/v1/messages/count_tokens");
        assert_eq!((openai.requests().len(), native.requests().len()), (1, 2));
        // One account for both doors, and Anthropic's shape at Anthropic's.
        let full = messages(&proxy, "/v1/messages", &version).await;
        assert_eq!(full.status, 429);
        assert_eq!(full.json()["type"], "error", "{full:?}");
        let stats = proxy.get("/v1/token/stats").await.json();
        assert_eq!(
            stats["detailedStats"]["a"]["requests"], 2,
            "a count of tokens took a permit, and no tokens: {stats}"
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_asked_for_at_its_door() {
    within(async {
        let (openai, native) = (simulator().await, simulator().await);
        let batches =
            json!({ "data": [{ "id": "msgbatch_1", "created_at": "2026-01-01T00:00:00Z" }], "has_more": false });
        native.script("*", vec![Behaviour { body: Some(batches.to_string()), ..Behaviour::default() }]);
        let format = json!({ "baseUrl": format!("{}/anthropic/v1", native.base_url()), "authHeader": "x-api-key" });
        let more = json!({ "formats": { "messages": format } });
        let apis = ["a", "b"].map(|id| endpoint_with(id, &openai.base_url(), more.clone()));
        let list = Proxy::start(json!({}), &apis).await.get("/v1/messages/batches").await;
        assert_eq!((list.status, list.header("x-api-together-partial")), (200, None), "{list:?}");
        assert_eq!(list.json()["data"].as_array().unwrap().len(), 2);
        assert_eq!((openai.requests().len(), native.requests().len()), (0, 2));
        assert!(
            key_places(&native).0[0].0 == "x-api-key"
                && key_places(&native).1.starts_with("/anthropic/v1/messages/batches?")
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_door_that_is_shut_fails_over() {
    within(async {
        let (openai, native) = (simulator().await, behaving(anthropic()).await);
        let shut = json!({ "formats": { "messages": { "baseUrl": crate::harness::closed_port() } } });
        let open = json!({ "formats": { "messages": { "baseUrl": native.base_url() } }, "priority": 1 });
        let apis = [endpoint_with("a", &openai.base_url(), shut), endpoint_with("b", &openai.base_url(), open)];
        let proxy = Proxy::start(json!({}), &apis).await;
        messages(&proxy, "/v1/messages", &[]).await.assert_from("b", 2);
        assert_eq!(native.requests().len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_goes_only_where_it_is() {
    within(async {
        let simulators = [simulator().await, simulator().await];
        let api = |id: &str, index: usize, calls: Value| {
            endpoint_with(id, &simulators[index].base_url(), json!({ "calls": calls }))
        };
        let apis = [api("chats", 0, json!(["chat", "responses"])), api("embeds", 1, json!(["embeddings", "files"]))];
        let proxy = Proxy::start(json!({}), &apis).await;
        let embedding = json!({ "model": "m", "input": "x" });
        for _ in 0..6 {
            proxy.chat("m").await.assert_from("chats", 1);
            proxy.post("/v1/embeddings", &embedding).await.assert_from("embeds", 1);
            proxy.post("/v1/responses", &embedding).await.assert_from("chats", 1);
        }
        assert_eq!(Reply::of(proxy.request(Method::GET, "/v1/files")).await.endpoint(), Some("embeds"));
        for path in ["/v1/moderations", "/v1/completions"] {
            let reply = proxy.post(path, &embedding).await;
            let message = reply.assert_error(404, "invalid_request_error", "call_not_found");
            assert!(message.contains("has this call"), "{message}");
        }
        let both = simulators.iter().map(|one| one.requests().len()).sum::<usize>();
        assert_eq!(both, 6 * 3 + 1, "none was asked in vain");
    })
    .await;
}
