//! What was made at one endpoint lives there: files, stored responses and others, over several endpoints.

use api_together::simulator::{Behaviour, Options, Simulator};
use http::Method;
use serde_json::{Value, json};

use crate::harness::{Proxy, Reply, chat_stream, endpoint_with, simulator_with, within};

async fn keeping(name: &str) -> Simulator {
    simulator_with(Options { name: name.to_owned(), objects: true, ..Options::default() }).await
}

/// Endpoints `a`, `b` and so on, each of which knows only its own objects.
struct Several {
    simulators: Vec<Simulator>,
    proxy: Proxy,
}

impl Several {
    async fn start(count: usize, server: Value, each: Value) -> Self {
        let mut simulators = Vec::new();
        for id in ('a'..).take(count) {
            simulators.push(keeping(&id.to_string()).await);
        }
        let apis: Vec<_> = simulators
            .iter()
            .zip('a'..)
            .map(|(simulator, id)| endpoint_with(&id.to_string(), &simulator.base_url(), each.clone()))
            .collect();
        Self { proxy: Proxy::start(server, &apis).await, simulators }
    }

    fn of(&self, id: &str) -> &Simulator {
        &self.simulators[usize::from(id.as_bytes()[0] - b'a')]
    }

    /// Makes an object, and returns its id and its endpoint's.
    async fn make(&self, path: &str, body: Value) -> (String, String) {
        let reply = self.proxy.post(path, &body).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        (reply.json()["id"].as_str().unwrap().to_owned(), reply.endpoint().unwrap().to_owned())
    }

    async fn call(&self, method: Method, path: &str) -> Reply {
        Reply::of(self.proxy.request(method, path)).await
    }
}

fn respond(more: Value) -> Value {
    crate::harness::merged(json!({ "model": "m", "input": "hello" }), more)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_is_found_where_it_was_made() {
    within(async {
        let several = Several::start(4, json!({}), json!({})).await;
        let mut used = std::collections::BTreeSet::new();
        for path in
            ["/v1/files", "/v1/batches", "/v1/conversations", "/v1/threads", "/v1/vector_stores", "/v1/containers"]
        {
            for _ in 0..4 {
                let (id, at) = several.make(path, json!({})).await;
                used.insert(at.clone());
                for suffix in ["", "/content"] {
                    several.call(Method::GET, &format!("{path}/{id}{suffix}")).await.assert_from(&at, 1);
                }
                let gone = several.call(Method::DELETE, &format!("{path}/{id}")).await;
                gone.assert_from(&at, 1);
                assert_eq!(several.call(Method::GET, &format!("{path}/{id}")).await.status, 404);
            }
        }
        assert!(used.len() > 1, "{used:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn turns_of_a_stored_conversation_stay_at_one_endpoint() {
    within(async {
        let several = Several::start(5, json!({}), json!({})).await;
        for stream in [false, true] {
            for _ in 0..5 {
                let first = several.proxy.post("/v1/responses", &respond(json!({ "stream": stream }))).await;
                let at = first.endpoint().unwrap().to_owned();
                let text = first.text();
                let begins = text.find("resp_sim").unwrap();
                let mut id = text[begins..].split('"').next().unwrap().to_owned();
                for _ in 0..4 {
                    let next =
                        several.proxy.post("/v1/responses", &respond(json!({ "previous_response_id": id }))).await;
                    next.assert_from(&at, 1);
                    next.json()["id"].as_str().unwrap().clone_into(&mut id);
                }
                several.call(Method::GET, &format!("/v1/responses/{id}")).await.assert_from(&at, 1);
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_binds_wherever_it_is_named() {
    within(async {
        let several = Several::start(4, json!({}), json!({})).await;
        for _ in 0..4 {
            let (file, at) = several.make("/v1/files", json!({})).await;
            let batch = several.proxy.post("/v1/batches", &json!({ "input_file_id": file })).await;
            batch.assert_from(&at, 1);
            // The batch's answer names what it will write.
            let output = batch.json()["output_file_id"].as_str().unwrap().to_owned();
            several.call(Method::GET, &format!("/v1/files/{output}/content")).await.assert_from(&at, 1);
            let (conversation, there) = several.make("/v1/conversations", json!({})).await;
            let reply = several.proxy.post("/v1/responses", &respond(json!({ "conversation": conversation }))).await;
            reply.assert_from(&there, 1);
            let content = json!([{ "role": "user", "content": [{ "type": "input_file", "file_id": file }] }]);
            several.proxy.post("/v1/responses", &respond(json!({ "input": content }))).await.assert_from(&at, 1);
            let part = json!([{ "role": "user", "content": [{ "type": "file", "file": { "file_id": file } }] }]);
            let chat = json!({ "model": "m", "messages": part });
            several.proxy.post("/v1/chat/completions", &chat).await.assert_from(&at, 1);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_an_objects_endpoint_cannot_take_it_the_answer_says_so() {
    within(async {
        let several = Several::start(3, json!({}), json!({ "rpm": 2 })).await;
        let (file, at) = several.make("/v1/files", json!({})).await;
        let path = format!("/v1/files/{file}");
        several.call(Method::GET, &path).await.assert_from(&at, 1);
        let full = several.call(Method::GET, &path).await;
        let message = full.assert_error(429, "requests", "rate_limit_exceeded");
        assert!(message.contains(&at) && full.header("retry-after").is_some(), "{message}");
        // A failure of that endpoint is its own as well.
        let several = Several::start(3, json!({}), json!({})).await;
        let (file, at) = several.make("/v1/files", json!({})).await;
        several.of(&at).script("*", vec![Behaviour::status(500)]);
        let reply = several.call(Method::GET, &format!("/v1/files/{file}")).await;
        assert_eq!((reply.status, reply.endpoint()), (500, Some(at.as_str())));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_nobody_knows_is_looked_for_and_then_known() {
    within(async {
        let several = Several::start(3, json!({}), json!({})).await;
        for stranger in &several.simulators {
            // Made without the gateway.
            let made = reqwest_post(&format!("{}/v1/files", stranger.base_url())).await;
            let path = format!("/v1/files/{made}");
            let found = several.call(Method::GET, &path).await;
            assert_eq!(found.status, 200, "{found:?}");
            let at = found.endpoint().unwrap().to_owned();
            for _ in 0..4 {
                several.call(Method::GET, &path).await.assert_from(&at, 1);
            }
            // The same for what a body names.
            let made = reqwest_post(&format!("{}/v1/conversations", stranger.base_url())).await;
            let body = respond(json!({ "conversation": made }));
            let found = several.proxy.post("/v1/responses", &body).await;
            assert_eq!(found.status, 200, "{found:?}");
            several.proxy.post("/v1/responses", &body).await.assert_from(&at, 1);
        }
    })
    .await;
}

async fn reqwest_post(url: &str) -> String {
    let reply = Reply::of(crate::harness::client(reqwest::ClientBuilder::http1_only).post(url).json(&json!({}))).await;
    reply.json()["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn at_most_three_are_asked_for_what_is_nowhere_and_none_again_for_a_while() {
    within(async {
        let several = Several::start(5, json!({}), json!({})).await;
        for (method, path) in [(Method::GET, "/v1/files/file-nowhere"), (Method::POST, "/v1/batches/batch_0/cancel")] {
            let asked = || several.simulators.iter().map(|one| one.requests().len()).sum::<usize>();
            let before = asked();
            let reply = several.call(method.clone(), path).await;
            assert_eq!((reply.status, reply.attempts()), (404, Some("3")), "{reply:?}");
            assert!(reply.text().contains("No such object"), "the endpoint's own words: {reply:?}");
            assert_eq!(asked(), before + 3);
            let again = several.call(method, path).await;
            again.assert_error(404, "invalid_request_error", "object_not_found");
            assert_eq!(asked(), before + 3, "it is remembered");
        }
        let body = respond(json!({ "previous_response_id": "resp_nowhere" }));
        let reply = several.proxy.post("/v1/responses", &body).await;
        assert_eq!((reply.status, reply.attempts()), (400, Some("3")), "{reply:?}");
        // Nobody is the worse for it.
        for id in ["a", "b", "c", "d", "e"] {
            assert_eq!(several.proxy.status_of(id).await["errorCount"], 0);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_at_different_endpoints_are_told_apart() {
    within(async {
        let several = Several::start(2, json!({}), json!({})).await;
        let (one, at) = several.make("/v1/files", json!({})).await;
        let (other, there) = loop {
            let made = several.make("/v1/conversations", json!({})).await;
            if made.1 != at {
                break made;
            }
        };
        assert_ne!(at, there);
        let content = json!([{ "role": "user", "content": [{ "type": "input_file", "file_id": one }] }]);
        let body = respond(json!({ "conversation": other, "input": content }));
        let message = several.proxy.post("/v1/responses", &body).await.assert_error(
            400,
            "invalid_request_error",
            "objects_apart",
        );
        assert!(message.contains(&one) && message.contains(&other), "{message}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_of_one_organization_have_the_same_objects() {
    within(async {
        let simulator = keeping("a").await;
        let other = keeping("other").await;
        let apis = [
            endpoint_with("one", &simulator.base_url(), json!({ "organization": "acme", "rpm": 2 })),
            endpoint_with("two", &simulator.base_url(), json!({ "organization": "acme", "rpm": 2 })),
            endpoint_with("other", &other.base_url(), json!({})),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        let file = loop {
            let made = proxy.post("/v1/files", &json!({})).await;
            if made.endpoint() != Some("other") {
                break made.json()["id"].as_str().unwrap().to_owned();
            }
        };
        let mut served = std::collections::BTreeMap::new();
        for _ in 0..3 {
            let reply = Reply::of(proxy.request(Method::GET, &format!("/v1/files/{file}"))).await;
            assert_eq!(reply.status, 200, "{reply:?}");
            *served.entry(reply.endpoint().unwrap().to_owned()).or_insert(0) += 1;
        }
        assert_eq!(served.keys().map(String::as_str).collect::<Vec<_>>(), ["one", "two"], "both have it");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_asked_of_an_endpoint_of_the_organization_that_is_well() {
    within(async {
        let (simulator, other) = (keeping("a").await, keeping("other").await);
        let apis = [
            endpoint_with("one", &crate::harness::closed_port(), json!({ "organization": "acme" })),
            endpoint_with("two", &simulator.base_url(), json!({ "organization": "acme" })),
            endpoint_with("other", &other.base_url(), json!({})),
        ];
        let proxy = Proxy::start(json!({ "breaker": { "failures": 1 } }), &apis).await;
        let mut made = 0;
        while proxy.status_of("one").await["errorCount"] == 0 || made == 0 {
            made += usize::from(proxy.post("/v1/files", &json!({})).await.endpoint() == Some("two"));
        }
        let list = proxy.get("/v1/files").await;
        assert_eq!((list.status, list.header("x-api-together-partial")), (200, None), "{list:?}");
        assert!(list.json()["data"].as_array().unwrap().len() >= made);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_outlives_the_process_and_its_endpoint_is_named_when_it_is_gone() {
    within(async {
        let simulators = [keeping("a").await, keeping("b").await];
        let folder = tempfile::tempdir().unwrap();
        let server = json!({ "ledger": folder.path().join("ledger.db") });
        let api = |id: &str, simulator: &Simulator, more: Value| endpoint_with(id, &simulator.base_url(), more);
        let both = [api("a", &simulators[0], json!({})), api("b", &simulators[1], json!({}))];
        let proxy = Proxy::start(server.clone(), &both).await;
        let made = loop {
            let made = proxy.post("/v1/files", &json!({})).await;
            if made.endpoint() == Some("b") {
                break made.json()["id"].as_str().unwrap().to_owned();
            }
        };
        let path = format!("/v1/files/{made}");
        // A look into the ledger writes what was noted before.
        assert_eq!(proxy.get(&path).await.endpoint(), Some("b"));
        let second = Proxy::start(server.clone(), &both).await;
        assert_eq!(second.get(&path).await.endpoint(), Some("b"));
        let third = keeping("c").await;
        let without = [api("a", &simulators[0], json!({})), api("c", &third, json!({}))];
        let message = Proxy::start(server.clone(), &without).await.get(&path).await.assert_error(
            404,
            "invalid_request_error",
            "object_gone",
        );
        assert!(message.contains("the endpoint b"), "{message}");
        let off = [without[0].clone(), api("b", &simulators[1], json!({ "enabled": false }))];
        let message = Proxy::start(server.clone(), &off).await.get(&path).await.assert_error(
            503,
            "server_error",
            "endpoint_disabled",
        );
        assert!(message.contains("the endpoint b"), "{message}");
        // A model that is not served there.
        let apart = [api("a", &simulators[0], json!({})), api("b", &simulators[1], json!({ "models": ["n"] }))];
        let proxy = Proxy::start(server, &apart).await;
        let content = json!([{ "role": "user", "content": [{ "type": "input_file", "file_id": made }] }]);
        let reply = proxy.post("/v1/responses", &respond(json!({ "input": content }))).await;
        let message = reply.assert_error(400, "invalid_request_error", "model_apart");
        assert!(message.contains("the endpoint b") && message.contains(&made), "{message}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chats_that_are_not_stored_bind_nothing() {
    within(async {
        let several = Several::start(3, json!({}), json!({})).await;
        let mut used = std::collections::BTreeSet::new();
        for _ in 0..20 {
            let reply = several.proxy.post("/v1/chat/completions", &chat_stream("m")).await;
            used.insert(reply.endpoint().unwrap().to_owned());
        }
        assert_eq!(used.len(), 3, "{used:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sealed_reasoning_goes_back_to_the_organization_that_wrote_it() {
    within(async {
        let several = Several::start(4, json!({}), json!({})).await;
        for (path, body) in [
            ("/v1/responses", json!({ "model": "m", "store": false, "input": "hello" })),
            ("/v1/messages", json!({ "model": "m", "max_tokens": 9, "messages": [] })),
        ] {
            for number in 0..4 {
                let seal = format!("gAAAAAB{number}{}", path.repeat(20));
                let (answer, back) = if path == "/v1/responses" {
                    let item = json!({ "type": "reasoning", "id": "rs_1", "encrypted_content": seal });
                    let said = json!({ "type": "message", "content": [{ "type": "output_text", "text": "hi" }] });
                    let answer = json!({ "id": "resp_1", "status": "completed", "output": [item, said] });
                    (answer, json!({ "model": "m", "store": false, "input": [item, { "role": "user" }] }))
                } else {
                    let thinking = json!({ "type": "thinking", "thinking": "so", "signature": seal });
                    let said = json!({ "type": "text", "text": "hi" });
                    let answer = json!({ "id": "msg_1", "type": "message", "role": "assistant",
                        "stop_reason": "end_turn", "content": [thinking, said] });
                    (answer, json!({ "model": "m", "messages": [{ "role": "assistant", "content": [thinking] }] }))
                };
                for one in &several.simulators {
                    let says = Behaviour { body: Some(answer.to_string()), ..Behaviour::default() };
                    one.script("*", vec![says.clone()]);
                    one.script("m", vec![says]);
                }
                let first = several.proxy.post(path, &body).await;
                assert_eq!(first.status, 200, "{first:?}");
                let at = first.endpoint().unwrap().to_owned();
                for _ in 0..3 {
                    several.proxy.post(path, &back).await.assert_from(&at, 1);
                }
            }
        }
    })
    .await;
}

/// Two endpoints, and a request whose reasoning `a` has sealed, with the words that it also holds.
async fn sealed_by_a(server: Value, each: Value) -> (Several, Value) {
    let several = Several::start(2, server, each).await;
    let item = json!({ "type": "reasoning", "id": "rs_1", "encrypted_content": "gAAAAAB".repeat(20) });
    let answer = json!({ "id": "resp_1", "status": "completed", "output": [item] });
    several.of("a").script("m", vec![Behaviour { body: Some(answer.to_string()), ..Behaviour::default() }]);
    let input = json!([{ "role": "user", "content": "why?" }, item, { "role": "user", "content": "and?" }]);
    let back = json!({ "model": "m", "store": false, "input": input });
    loop {
        let first = several.proxy.post("/v1/responses", &respond(json!({ "store": false }))).await;
        assert_eq!(first.status, 200, "{first:?}");
        if first.endpoint() == Some("a") {
            return (several, back);
        }
    }
}

/// The last body that an endpoint got.
fn last(several: &Several, id: &str) -> Value {
    serde_json::from_slice(&several.of(id).requests().last().unwrap().body).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn sealed_reasoning_is_left_out_for_another_organization_where_the_config_says_so() {
    within(async {
        let (several, back) = sealed_by_a(json!({ "affinity": { "dropSealed": true } }), json!({})).await;
        several.proxy.post("/v1/responses", &back).await.assert_from("a", 1);
        assert_eq!(last(&several, "a"), back, "whole where it can be read");
        // Without it for whom it is nothing but noise.
        several.of("a").script("m", vec![Behaviour::status(503)]);
        several.proxy.post("/v1/responses", &back).await.assert_from("b", 2);
        let sent = last(&several, "b");
        assert_eq!(sent, json!({ "model": "m", "store": false, "input": [back["input"][0], back["input"][2]] }));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sealed_reasoning_waits_for_its_organization_otherwise() {
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let server = json!({ "ledger": folder.path().join("ledger.db") });
        let (several, back) = sealed_by_a(server.clone(), json!({ "rpm": 2 })).await;
        several.proxy.post("/v1/responses", &back).await.assert_from("a", 1);
        let full = several.proxy.post("/v1/responses", &back).await;
        let message = full.assert_error(429, "requests", "rate_limit_exceeded");
        assert!(full.header("retry-after").is_some(), "{message}");
        let third = keeping("c").await;
        let without = [
            endpoint_with("b", &several.of("b").base_url(), json!({})),
            endpoint_with("c", &third.base_url(), json!({})),
        ];
        let apart = Proxy::start(server, &without).await.post("/v1/responses", &back).await;
        let message = apart.assert_error(400, "invalid_request_error", "sealed_apart");
        assert!(message.contains("server.affinity.dropSealed"), "{message}");
        let sent = several.of("b").requests().into_iter().chain(third.requests());
        assert!(sent.into_iter().all(|one| !String::from_utf8_lossy(&one.body).contains("gAAAAAB")));
    })
    .await;
}

/// All ids of a list, page by page.
async fn listed(proxy: &Proxy, path: &str, limit: usize, order: &str) -> Vec<String> {
    let mut ids: Vec<String> = Vec::new();
    loop {
        let after = ids.last().map(|id| format!("&after={id}")).unwrap_or_default();
        let reply = proxy.get(&format!("{path}?limit={limit}&order={order}{after}")).await;
        assert_eq!((reply.status, reply.header("x-api-together-partial")), (200, None), "{reply:?}");
        let page = reply.json();
        let data = page["data"].as_array().unwrap();
        assert!(data.len() <= limit);
        let of = |one: &Value| one["id"].as_str().unwrap().to_owned();
        assert_eq!(page["first_id"].as_str().map(str::to_owned), data.first().map(of));
        assert_eq!(page["last_id"].as_str().map(str::to_owned), data.last().map(of));
        ids.extend(data.iter().map(of));
        if page["has_more"] == false {
            return ids;
        }
        assert_eq!(data.len(), limit, "a page that is not the last one is full");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_the_union_of_the_endpoints_lists() {
    within(async {
        let several = Several::start(3, json!({}), json!({})).await;
        let mut made = Vec::new();
        for number in 0..60 {
            made.push(several.make("/v1/vector_stores", json!({})).await.0);
            if number % 20 == 19 {
                // Objects of other seconds.
                tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
            }
        }
        // What was made without the gateway is listed, too.
        made.push(reqwest_post(&format!("{}/v1/vector_stores", several.simulators[0].base_url())).await);
        let mut expected = made.clone();
        expected.sort();
        for limit in [1, 7, 20, 60, 61, 100] {
            for order in ["desc", "asc"] {
                let found = listed(&several.proxy, "/v1/vector_stores", limit, order).await;
                let mut sorted = found.clone();
                sorted.sort();
                assert_eq!(sorted, expected, "limit {limit}, {order}");
                let time = |id: &String| made.iter().position(|one| one == id).unwrap() / 20;
                let seconds: Vec<_> = found.iter().map(time).collect();
                let ordered = if order == "asc" { seconds.is_sorted() } else { seconds.iter().rev().is_sorted() };
                assert!(ordered, "limit {limit}, {order}: {seconds:?}");
            }
        }
        assert_eq!(listed(&several.proxy, "/v1/files", 5, "desc").await, Vec::<String>::new());
        // A cursor that another process has given.
        let first = several.proxy.get("/v1/vector_stores?limit=25").await.json();
        let (last, all) =
            (first["last_id"].as_str().unwrap(), listed(&several.proxy, "/v1/vector_stores", 100, "desc").await);
        let apis: Vec<_> = several
            .simulators
            .iter()
            .zip(["a", "b", "c"])
            .map(|(simulator, id)| endpoint_with(id, &simulator.base_url(), json!({})))
            .collect();
        let other = Proxy::start(json!({}), &apis).await;
        let page = other.get(&format!("/v1/vector_stores?limit=100&after={last}")).await.json();
        let rest: Vec<_> = page["data"].as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap()).collect();
        assert_eq!(rest, all[25..]);
        let nowhere = other.get("/v1/vector_stores?after=vs_nowhere").await;
        nowhere.assert_error(404, "invalid_request_error", "object_not_found");
        let asked = several.simulators.iter().map(|one| one.requests().len()).sum::<usize>();
        let again = other.get("/v1/vector_stores?after=vs_nowhere").await;
        again.assert_error(404, "invalid_request_error", "object_not_found");
        let now = several.simulators.iter().map(|one| one.requests().len()).sum::<usize>();
        assert_eq!(now, asked, "it is remembered");
        let back = other.get("/v1/vector_stores?before=vs_nowhere").await;
        back.assert_error(400, "invalid_request_error", None);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_goes_on_without_an_endpoint_that_cannot_be_asked_and_says_so() {
    within(async {
        let several = Several::start(3, json!({}), json!({ "rpm": 5 })).await;
        let (_, at) = several.make("/v1/files", json!({})).await;
        let whole = several.proxy.get("/v1/files").await;
        assert_eq!((whole.status, whole.header("x-api-together-partial")), (200, None));
        assert_eq!(whole.json()["data"].as_array().unwrap().len(), 1);
        several.of(&at).script("*", vec![Behaviour::status(500)]);
        let without = several.proxy.get("/v1/files").await;
        assert_eq!(without.header("x-api-together-partial"), Some(at.as_str()), "{without:?}");
        assert_eq!(without.json()["data"], json!([]));
        several.of(&at).clear();
        // A page that nobody gives is not the end of the list.
        let first = several.make("/v1/files", json!({})).await.0;
        for one in &several.simulators {
            one.script("*", vec![Behaviour::status(500)]);
        }
        let cut = several.proxy.get(&format!("/v1/files?limit=1&after={first}")).await;
        assert_eq!(cut.status, 500, "{cut:?}");
        for one in &several.simulators {
            one.clear();
        }
        // Each page takes a permit of each endpoint.
        for _ in 0..3 {
            several.proxy.get("/v1/files").await;
        }
        let full = several.proxy.get("/v1/files").await;
        full.assert_error(429, "requests", "rate_limit_exceeded");
        // An endpoint that has no such list is left out, and is not missed.
        let plain = crate::harness::simulator().await;
        let keeps = keeping("b").await;
        let apis = [endpoint_with("a", &plain.base_url(), json!({})), endpoint_with("b", &keeps.base_url(), json!({}))];
        let proxy = Proxy::start(json!({}), &apis).await;
        for _ in 0..3 {
            let list = proxy.get("/v1/files").await;
            assert_eq!((list.status, list.header("x-api-together-partial")), (200, None), "{list:?}");
        }
        assert_eq!(plain.requests().len(), 1, "it is asked once");
        // One that gives the same page for ever, and one that refuses its key.
        let same = Behaviour {
            body: Some(r#"{"data":[{"id":"file-same","created_at":1}],"has_more":true}"#.into()),
            ..Behaviour::default()
        };
        let (same, refuses) = (crate::harness::behaving(same).await, crate::harness::simulator().await);
        refuses.script("*", vec![Behaviour::status(401)]);
        let apis =
            [endpoint_with("a", &same.base_url(), json!({})), endpoint_with("b", &refuses.base_url(), json!({}))];
        let list = Proxy::start(json!({}), &apis).await.get("/v1/files").await;
        assert_eq!(list.header("x-api-together-partial"), Some("b"));
        assert_eq!(list.json()["data"].as_array().unwrap().len(), 1, "{list:?}");
        assert_eq!(same.requests().len(), 2, "the second page is the first one again");
        let apis =
            [endpoint_with("a", &refuses.base_url(), json!({})), endpoint_with("b", &refuses.base_url(), json!({}))];
        let none = Proxy::start(json!({}), &apis).await.get("/v1/files").await;
        none.assert_error(502, "server_error", "endpoint_key_refused");
        let none = [endpoint_with("a", &plain.base_url(), json!({})), endpoint_with("b", &plain.base_url(), json!({}))];
        let proxy = Proxy::start(json!({}), &none).await;
        proxy.get("/v1/files").await.assert_error(404, "invalid_request_error", "call_not_found");
    })
    .await;
}
