//! The webhook: those who run the gateway are told of what wants their hands.

use std::time::Duration;

use api_together::simulator::{Behaviour, Simulator};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::Method;
use serde_json::{Value, json};

use crate::harness::{KEY, Reply, behaving, chat, client, config_text, endpoint_with, simulator, within};
use crate::program::Running;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const ADA: &str = "sk-ada-0f6c1d93be5a7724";

/// What has arrived at a receiver so far, each checked for its signature.
fn told(receiver: &Simulator) -> Vec<Value> {
    let key = BASE64_STANDARD.decode(SECRET.trim_start_matches("whsec_")).unwrap();
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
    let mut told = Vec::new();
    for request in receiver.requests() {
        let header =
            |name: &str| request.headers.get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default();
        let body = std::str::from_utf8(&request.body).unwrap();
        let signed = format!("{}.{}.{body}", header("webhook-id"), header("webhook-timestamp"));
        let signature = header("webhook-signature");
        let signature = BASE64_STANDARD.decode(signature.strip_prefix("v1,").unwrap()).unwrap();
        ring::hmac::verify(&key, signed.as_bytes(), &signature).unwrap();
        told.push(serde_json::from_str(body).unwrap());
    }
    told
}

async fn until_told(receiver: &Simulator, kind: &str) -> Value {
    for _ in 0..250 {
        if let Some(event) = told(receiver).into_iter().find(|event| event["type"] == kind) {
            return event;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{kind} is not told: {:?}", told(receiver));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_wants_hands_is_told_signed_once_and_never_with_a_secret() {
    within(async {
        let receiver = behaving(Behaviour { body: Some("{}".into()), ..Behaviour::default() }).await;
        let refusing = behaving(Behaviour {
            status: 401,
            body: Some(r#"{"error":{"message":"Incorrect API key provided","type":"invalid_request_error","code":"invalid_api_key"}}"#.into()),
            ..Behaviour::default()
        })
        .await;
        let working = simulator().await;
        let budget = json!([{ "tokens": 200, "per": "day", "warnAt": 0.1 }]);
        let server = json!({
            "webhook": { "url": format!("{}/hook-path-that-is-secret", receiver.base_url()), "secret": SECRET },
            "keys": [{ "name": "ada", "key": ADA, "budget": budget }],
        });
        let apis = [
            endpoint_with("bad", &refusing.base_url(), json!({ "models": ["m"] })),
            endpoint_with("good", &working.base_url(), json!({ "models": ["m"], "priority": 1 })),
        ];
        let running = Running::start(&config_text(server, &apis), "info");
        running.ready().await;
        let client = client(|builder| builder);
        let ask = async |key: &str| {
            let mut body = chat("m");
            body["max_tokens"] = json!(1);
            let request = client.request(Method::POST, running.url("/v1/chat/completions")).bearer_auth(key);
            Reply::of(request.json(&body)).await.status
        };
        for _ in 0..3 {
            assert_eq!(ask(KEY).await, 200);
        }
        let event = until_told(&receiver, "key_refused").await;
        assert_eq!((&event["data"]["subject"], &event["data"]["count"]), (&json!("bad"), &json!(1)));
        while ask(ADA).await == 200 {}
        assert_eq!(until_told(&receiver, "budget_warning").await["data"]["subject"], "ada");
        std::fs::write(running.folder.path().join("apis.json"), "{ broken").unwrap();
        let event = until_told(&receiver, "config_refused").await;
        assert!(event["data"]["message"].as_str().unwrap().contains("not applied"), "{event}");
        let all = told(&receiver);
        let of = |kind: &str| all.iter().filter(|event| event["type"] == kind).count();
        assert_eq!((of("key_refused"), of("budget_warning"), of("config_refused")), (1, 1, 1), "{all:?}");
        let log = running.killed();
        for secret in [KEY, ADA, "hook-path-that-is-secret", "MfKQ9r8G"] {
            assert!(!format!("{all:?}{log}").contains(secret), "{secret}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_fails_is_told_again_and_no_redirect_is_followed() {
    within(async {
        let elsewhere = simulator().await;
        let receiver = simulator().await;
        let redirect = vec![("location".to_owned(), format!("{}/stolen", elsewhere.base_url()))];
        receiver.set_default(Behaviour { status: 307, headers: redirect, ..Behaviour::default() });
        let working = simulator().await;
        let server = json!({
            "webhook": { "url": format!("{}/hook", receiver.base_url()), "secret": SECRET, "events": ["config_refused"] },
        });
        let running = Running::start(&config_text(server, &[endpoint_with("a", &working.base_url(), json!({}))]), "info");
        running.ready().await;
        std::fs::write(running.folder.path().join("apis.json"), "{ broken").unwrap();
        running.logs("webhook: config_refused: it answered 307; tried again in 1 s").await;
        receiver.set_default(Behaviour { body: Some("{}".into()), ..Behaviour::default() });
        for _ in 0..150 {
            if receiver.requests().len() > 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let all = told(&receiver);
        assert_eq!((all.len(), &all[0]), (2, &all[1]), "the same, so that the receiver may know it");
        assert!(elsewhere.requests().is_empty());
    })
    .await;
}
