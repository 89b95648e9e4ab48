//! Requests that belong together go to one endpoint.

use api_together::simulator::{Behaviour, Simulator};
use http::Method;
use serde_json::{Value, json};

use crate::harness::{Proxy, Reply, chat, endpoint_with, merged, simulator, within};

const AFFINITY: &str = "x-api-together-affinity";

/// A request of a session, and how it was served: by whom, and how its session was followed.
async fn turn(proxy: &Proxy, session: &str) -> (String, String) {
    let reply = ask(proxy, &[("x-session-id", session)], json!({})).await;
    (reply.endpoint().unwrap_or_default().to_owned(), reply.header(AFFINITY).unwrap_or("none").to_owned())
}

async fn ask(proxy: &Proxy, headers: &[(&str, &str)], more: Value) -> Reply {
    let mut request = proxy.request(Method::POST, "/v1/chat/completions");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    Reply::of(request.json(&merged(chat("m"), more))).await
}

/// A proxy before some endpoints, `a` and so on.
async fn proxy(simulators: &[&Simulator], server: Value, each: Value) -> Proxy {
    let apis: Vec<_> = simulators
        .iter()
        .zip('a'..)
        .map(|(simulator, id)| endpoint_with(&id.to_string(), &simulator.base_url(), each.clone()))
        .collect();
    Proxy::start(server, &apis).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_stays_at_the_endpoint_that_answered_it_first() {
    within(async {
        let simulators = [simulator().await, simulator().await, simulator().await];
        let proxy = proxy(&simulators.each_ref(), json!({}), json!({})).await;
        let mut used = std::collections::BTreeSet::new();
        for number in 0..20 {
            let session = format!("s{number}");
            let (first, how) = turn(&proxy, &session).await;
            assert_eq!(how, "new");
            for _ in 0..3 {
                assert_eq!(turn(&proxy, &session).await, (first.clone(), "followed".to_owned()));
            }
            used.insert(first);
        }
        assert!(used.len() > 1, "sessions are spread: {used:?}");
        let reply = ask(&proxy, &[], json!({})).await;
        assert_eq!(reply.header(AFFINITY), None, "a request without a session");
        let metrics = proxy.get("/metrics").await;
        assert!(metrics.text().contains("api_together_affinity_total{result=\"followed\"}"), "{}", metrics.text());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_name_their_session_in_many_ways() {
    within(async {
        let simulators = [simulator().await, simulator().await, simulator().await, simulator().await];
        let proxy = proxy(&simulators.each_ref(), json!({ "affinity": { "prefix": true } }), json!({})).await;
        let user = json!([{ "role": "system", "content": "s" }, { "role": "user", "content": "u" }]);
        for (headers, body) in [
            (&[("session_id", "codex")][..], json!({})),
            (&[("x-session-affinity", "opencode")], json!({})),
            (&[], json!({ "prompt_cache_key": "key" })),
            (&[], json!({ "metadata": { "user_id": "user_account_session" } })),
            (&[], json!({ "conversation": "a talk" })),
            (&[], json!({ "messages": user })),
        ] {
            let first = ask(&proxy, headers, body.clone()).await;
            assert_eq!(first.header(AFFINITY), Some("new"), "{headers:?} {body}");
            for _ in 0..4 {
                let next = ask(&proxy, headers, body.clone()).await;
                assert_eq!((next.header(AFFINITY), next.endpoint()), (Some("followed"), first.endpoint()), "{body}");
            }
        }
        // It may be a single request's name, until it comes again.
        let maybe = [("x-client-request-id", "r"), ("x-unrelated", "u")];
        let without = json!({ "messages": [] });
        let first = ask(&proxy, &maybe, without.clone()).await;
        assert_eq!(first.header(AFFINITY), None);
        for _ in 0..4 {
            let next = ask(&proxy, &maybe, without.clone()).await;
            assert_eq!((next.header(AFFINITY), next.endpoint()), (Some("followed"), first.endpoint()));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_served_elsewhere_while_its_endpoint_cannot_and_comes_back() {
    within(async {
        let simulators = [simulator().await, simulator().await];
        let retry = json!({ "breaker": { "failures": 100 } });
        let proxy = proxy(&simulators.each_ref(), retry, json!({})).await;
        let (first, _) = turn(&proxy, "s").await;
        let (own, other) = if first == "a" { (&simulators[0], "b") } else { (&simulators[1], "a") };
        let spilled = (other.to_owned(), "spilled".to_owned());
        let followed = (first.clone(), "followed".to_owned());
        for behaviour in [Behaviour::status(500), Behaviour::status(429).header("retry-after", "1")] {
            own.script("*", vec![behaviour, Behaviour::default()]);
            assert_eq!(turn(&proxy, "s").await, spilled);
            let begun = std::time::Instant::now();
            while turn(&proxy, "s").await != followed {
                assert!(begun.elapsed().as_secs() < 10, "it never comes back");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_endpoint_spills_and_is_followed_again_when_it_has_room() {
    within(async {
        let simulators = [simulator().await, simulator().await];
        let proxy = proxy(&simulators.each_ref(), json!({}), json!({ "rpm": 3 })).await;
        let (first, _) = turn(&proxy, "s").await;
        let mut how = Vec::new();
        for _ in 0..5 {
            how.push(turn(&proxy, "s").await);
        }
        let other = if first == "a" { "b" } else { "a" };
        let by = |id: &str, how: &str| (id.to_owned(), how.to_owned());
        let [followed, spilled] = [by(&first, "followed"), by(other, "spilled")];
        assert_eq!(how, [followed.clone(), followed, spilled.clone(), spilled.clone(), spilled]);
        assert_eq!(ask(&proxy, &[("x-session-id", "s")], json!({})).await.status, 429, "both are full");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_leaves_an_endpoint_that_refuses_its_key_or_has_no_such_model() {
    within(async {
        let missing = r#"{"error":{"message":"The model `m` does not exist","type":"invalid_request_error","code":"model_not_found"}}"#;
        let refused = r#"{"error":{"message":"Incorrect API key provided","type":"invalid_request_error","code":"invalid_api_key"}}"#;
        for (status, body) in [(401, refused), (404, missing)] {
            let simulators = [simulator().await, simulator().await];
            let proxy = proxy(&simulators.each_ref(), json!({}), json!({})).await;
            let (first, _) = turn(&proxy, "s").await;
            let (own, other) = if first == "a" { (&simulators[0], "b") } else { (&simulators[1], "a") };
            own.script("*", vec![Behaviour { status, body: Some(body.into()), ..Behaviour::default() }]);
            assert_eq!(turn(&proxy, "s").await, (other.to_owned(), "moved".to_owned()), "{status}");
            own.clear();
            assert_eq!(turn(&proxy, "s").await, (other.to_owned(), "followed".to_owned()), "{status}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn priorities_come_before_sessions() {
    within(async {
        let simulators = [simulator().await, simulator().await];
        let apis = [
            endpoint_with("first", &simulators[0].base_url(), json!({})),
            endpoint_with("second", &simulators[1].base_url(), json!({ "priority": 1 })),
        ];
        simulators[0].script("*", vec![Behaviour::status(500), Behaviour::default()]);
        let proxy = Proxy::start(json!({}), &apis).await;
        for expected in [("second", "new"), ("first", "moved"), ("first", "followed")] {
            assert_eq!(turn(&proxy, "s").await, (expected.0.to_owned(), expected.1.to_owned()));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_outlive_the_process_and_are_shared() {
    within(async {
        let simulators = [simulator().await, simulator().await, simulator().await, simulator().await];
        let folder = tempfile::tempdir().unwrap();
        let server = json!({ "ledger": folder.path().join("ledger.db") });
        let first = proxy(&simulators.each_ref(), server.clone(), json!({})).await;
        let mut at = Vec::new();
        for number in 0..8 {
            at.push(turn(&first, &format!("s{number}")).await.0);
        }
        // A look for a session that is not known writes what was noted before.
        turn(&first, "another").await;
        let second = proxy(&simulators.each_ref(), server, json!({})).await;
        for (number, at) in at.into_iter().enumerate() {
            assert_eq!(turn(&second, &format!("s{number}")).await, (at, "followed".to_owned()));
        }
    })
    .await;
}
