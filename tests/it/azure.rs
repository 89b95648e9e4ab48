//! Clients of Azure's SDKs: the deployment in the path is the model.

use api_together::simulator::Behaviour;
use http::Method;
use serde_json::json;

use crate::harness::{KEY, Proxy, Reply, behaving, endpoint_with, simulator, within};

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_is_served_and_mapped_as_a_model() {
    within(async {
        let simulator = simulator().await;
        let mapping = json!({ "models": ["gpt-4o"], "modelMapping": { "fast": "gpt-4o-mini" } });
        let proxy = Proxy::start(json!({}), &[endpoint_with("a", &simulator.base_url(), mapping)]).await;
        let messages = r#""messages":[{"role":"user","content":"hi"}]"#;
        for (deployment, body, sent) in [
            ("gpt-4o", format!("{{{messages}}}"), format!(r#"{{"model":"gpt-4o",{messages}}}"#)),
            ("fast", format!("{{{messages}}}"), format!(r#"{{"model":"gpt-4o-mini",{messages}}}"#)),
            ("fast", format!(r#"{{{messages},"model":"any"}}"#), format!(r#"{{{messages},"model":"gpt-4o-mini"}}"#)),
            ("gpt-4o", format!(r#"{{{messages},"model":"any"}}"#), format!(r#"{{{messages},"model":"gpt-4o"}}"#)),
            ("gpt-4o", format!(r#"{{{messages},"model":null}}"#), format!(r#"{{{messages},"model":"gpt-4o"}}"#)),
            ("fast", format!(r#"{{{messages},"model":""}}"#), format!(r#"{{{messages},"model":"gpt-4o-mini"}}"#)),
        ] {
            simulator.clear();
            let path = format!("//openai/deployments/{deployment}/chat/completions?api-version=2024-10-21");
            let request = proxy.request_without_key(Method::POST, &path).header("api-key", KEY);
            let reply = Reply::of(request.header("content-type", "application/json").body(body)).await;
            reply.assert_from("a", 1);
            let arrived = &simulator.requests()[0];
            assert_eq!(arrived.path_and_query, "/v1/chat/completions");
            assert_eq!(std::str::from_utf8(&arrived.body).unwrap(), sent);
            assert_eq!(arrived.header("api-key"), None);
        }
        let list = Reply::of(proxy.request(Method::GET, "/openai/models?api-version=2024-10-21")).await;
        assert_eq!(list.json()["object"], "list");
        let path = "/openai/deployments/nobodys/chat/completions?api-version=1";
        let unknown = proxy.post_text(path, format!("{{{messages}}}")).await;
        unknown.assert_error(404, "invalid_request_error", "model_not_found");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_gets_its_deployments_name() {
    within(async {
        let speech = behaving(Behaviour { body: Some(r#"{"text":"a"}"#.into()), ..Behaviour::default() }).await;
        let mapping = json!({ "models": [], "modelMapping": { "ears": "whisper-1" } });
        let proxy = Proxy::start(json!({}), &[endpoint_with("a", &speech.base_url(), mapping)]).await;
        let file = "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nsound\r\n--b--\r\n";
        let path = "/openai/deployments/ears/audio/transcriptions?api-version=1&x=2";
        let request = proxy.request(Method::POST, path).header("content-type", "multipart/form-data; boundary=b");
        Reply::of(request.body(file)).await.assert_from("a", 1);
        let arrived = &speech.requests()[0];
        assert_eq!(arrived.path_and_query, "/v1/audio/transcriptions?x=2");
        let model = "--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwhisper-1\r\n";
        assert_eq!(std::str::from_utf8(&arrived.body).unwrap(), format!("{model}{file}"));
    })
    .await;
}
