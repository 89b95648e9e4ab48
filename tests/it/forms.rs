//! Multipart forms: recordings and pictures go to the endpoint of their model, as JSON does.

use api_together::simulator::Behaviour;
use http::Method;
use serde_json::{Value, json};

use crate::harness::{Proxy, Reply, behaving, endpoint_with, in_order, simulator, within};

const LABEL: &str = "multipart/form-data; boundary=------------------------d74496d66958873e";
const BOUNDARY: &str = "--------------------------d74496d66958873e";

/// A form of text fields and one file.
fn form(fields: &[(&str, &str)], file: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    for (number, (name, value)) in fields.iter().enumerate() {
        if number == fields.len() / 2 {
            let head =
                "Content-Disposition: form-data; name=\"file\"; filename=\"model.mp3\"\r\nContent-Type: audio/mpeg\r\n";
            body.extend([format!("{BOUNDARY}\r\n{head}\r\n").as_bytes(), file, b"\r\n"].concat());
        }
        let head = format!("{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n");
        body.extend(format!("{head}\r\n{value}\r\n").into_bytes());
    }
    body.extend(format!("{BOUNDARY}--\r\n").into_bytes());
    body
}

/// Bytes as a recording has them, with what a careless reader would take for a delimiter.
fn recording(length: usize) -> Vec<u8> {
    let trap =
        format!("\r\n{BOUNDARY}x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nother\r\n--\r\n\0\u{ff}");
    trap.bytes().cycle().take(length).collect()
}

async fn send(proxy: &Proxy, path: &str, label: &str, body: Vec<u8>) -> Reply {
    Reply::of(proxy.request(Method::POST, path).header("content-type", label).body(body)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forms_model_decides_where_it_goes_and_nothing_else_of_it_changes() {
    within(async {
        let answer = Behaviour { body: Some(r#"{"text":"one two"}"#.into()), ..Behaviour::default() };
        let [speech, pictures] = [behaving(answer.clone()).await, behaving(answer).await];
        let speech_models = json!({ "models": ["whisper-1"], "modelMapping": { "ears": "whisper/large v3" } });
        let picture_models = json!({ "models": ["gpt-image-1"], "modelMapping": { "eyes": "g" } });
        let apis = [
            endpoint_with("speech", &speech.base_url(), speech_models),
            endpoint_with("pictures", &pictures.base_url(), picture_models),
        ];
        let proxy = Proxy::start(json!({}), &apis).await;
        for (path, asked, sent, serves, id) in [
            ("/v1/audio/transcriptions", "whisper-1", "whisper-1", &speech, "speech"),
            ("/v1/audio/translations", "ears", "whisper/large v3", &speech, "speech"),
            ("/v1/images/edits", "gpt-image-1", "gpt-image-1", &pictures, "pictures"),
            ("/v1/images/variations", "eyes", "g", &pictures, "pictures"),
            ("/v1/videos", "eyes", "g", &pictures, "pictures"),
        ] {
            for length in [0, 700, 3_000_000] {
                for place in 0..3 {
                    let body = |model: &str| {
                        let mut fields = vec![("prompt", "m\u{f6}del"), ("user", "model")];
                        fields.insert(place, ("model", model));
                        form(&fields, &recording(length))
                    };
                    serves.clear();
                    let reply = send(&proxy, path, LABEL, body(asked)).await;
                    reply.assert_from(id, 1);
                    let arrived = &serves.requests()[0];
                    assert!(arrived.body == body(sent), "{path} {asked} {length} {place}");
                    assert_eq!(arrived.header("content-type"), Some(LABEL));
                    assert_eq!(arrived.header("content-length"), Some(body(sent).len().to_string().as_str()));
                }
            }
        }
        let reply = send(&proxy, "/v1/audio/transcriptions", LABEL, form(&[("model", "nobodys")], b"x")).await;
        reply.assert_error(404, "invalid_request_error", "model_not_found");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_is_retried_as_json_is() {
    within(async {
        let [full, down, good] = [simulator().await, simulator().await, simulator().await];
        full.script("*", vec![Behaviour::status(429)]);
        down.script("*", vec![Behaviour::status(500)]);
        good.script("*", vec![Behaviour { body: Some("WEBVTT\n\n00:00 one".into()), ..Behaviour::default() }]);
        let mut apis = in_order([&full, &down, &good].map(|one| one.base_url()).iter().map(String::as_str));
        for (number, api) in apis.iter_mut().enumerate() {
            api["models"] = json!([]);
            api["modelMapping"] = json!({ "ears": format!("ears-{number}") });
        }
        let proxy = Proxy::start(json!({}), &apis).await;
        let body = |model: &str| form(&[("response_format", "vtt"), ("model", model)], &recording(200_000));
        let reply = send(&proxy, "/v1/audio/transcriptions", LABEL, body("ears")).await;
        reply.assert_from("c", 3);
        assert_eq!(reply.text(), "WEBVTT\n\n00:00 one");
        for (number, simulator) in [&full, &down, &good].into_iter().enumerate() {
            assert!(simulator.requests()[0].body == body(&format!("ears-{number}")), "{number}");
        }
        // The trouble is this model's alone, as the model is known.
        let status = proxy.status_of("a").await;
        assert!(status["models"]["ears-0"].is_object(), "{status}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tokens_of_a_streamed_transcription_are_counted() {
    within(async {
        let simulator = simulator().await;
        let usage = json!({ "type": "tokens", "input_tokens": 14, "output_tokens": 45, "total_tokens": 59,
            "input_token_details": { "text_tokens": 0, "audio_tokens": 14 } });
        let delta = json!({ "type": "transcript.text.delta", "delta": "one" });
        let done = json!({ "type": "transcript.text.done", "text": "one two", "usage": usage });
        let body = format!("data: {delta}\n\ndata: {done}\n\n");
        let content_type = Some("text/event-stream".to_owned());
        simulator.script("*", vec![Behaviour { body: Some(body.clone()), content_type, ..Behaviour::default() }]);
        let proxy = Proxy::before([&simulator]).await;
        let fields = [("model", "gpt-4o-transcribe"), ("stream", "true")];
        let reply = send(&proxy, "/v1/audio/transcriptions", LABEL, form(&fields, b"x")).await;
        assert_eq!(reply.text(), body);
        let of_model = |stats: &Value| stats["detailedStats"]["a"]["totalTokens"].clone();
        let begun = std::time::Instant::now();
        while of_model(&proxy.get("/v1/token/stats").await.json()) != 59 {
            assert!(begun.elapsed().as_secs() < 10, "{:?}", proxy.get("/v1/token/stats").await);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_of_a_forms_model_holds() {
    within(async {
        let speech = behaving(Behaviour { body: Some(r#"{"text":"a"}"#.into()), ..Behaviour::default() }).await;
        let limits = json!({ "models": ["*"], "modelLimits": { "whisper-1": { "rpm": 2 } } });
        let proxy = Proxy::start(json!({}), &[endpoint_with("a", &speech.base_url(), limits)]).await;
        for (model, status) in [("whisper-1", 200), ("whisper-1", 200), ("whisper-1", 429), ("other", 200)] {
            let reply = send(&proxy, "/v1/audio/transcriptions", LABEL, form(&[("model", model)], b"x")).await;
            assert_eq!(reply.status, status, "{model}: {reply:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_that_no_endpoint_could_read_is_refused() {
    within(async {
        let simulator = simulator().await;
        let proxy = Proxy::before([&simulator]).await;
        let good = form(&[("model", "m")], b"x");
        for (label, body, says) in [
            ("multipart/form-data", good.clone(), "without a boundary"),
            ("multipart/form-data; boundary=other", good, "No part of it begins with the boundary"),
            (LABEL, form(&[("model", "m"), ("model", "n")], b"x"), "two fields named `model`"),
            (LABEL, b"{\"model\":\"m\"}".to_vec(), "No part of it begins with the boundary"),
        ] {
            let reply = send(&proxy, "/v1/audio/transcriptions", label, body).await;
            let message = reply.assert_error(400, "invalid_request_error", None);
            assert!(message.contains("is not a valid form") && message.contains(says), "{message}");
        }
        assert!(simulator.requests().is_empty());
    })
    .await;
}
