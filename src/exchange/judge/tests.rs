use super::*;
use crate::config::test_support::config;

const JSON: Option<&str> = Some("application/json");
const SSE: Option<&str> = Some("text/event-stream; charset=utf-8");
const ROLE: &str =
    "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";
const TEXT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n\n";
const STOP: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
const DONE: &str = "data: [DONE]\n\n";
const ERROR: &str = "data: {\"error\":{\"message\":\"x\",\"code\":429}}\n\n";
const ANSWER: &str = r#"{"choices":[{"message":{"content":"Hi"},"finish_reason":"stop"}]}"#;
const EMPTY: &str = r#"{"choices":[{"message":{"content":""},"finish_reason":"stop"}]}"#;

/// A judge and the rules that it goes by.
struct Court {
    judge: Judge,
    retry: Retry,
    now: Instant,
}

impl Court {
    fn new(terms: Terms) -> Self {
        Self { judge: Judge::new(terms), retry: config("[]").server.retry, now: Instant::now() }
    }

    /// A chat, while another endpoint could take over or not.
    fn chat(more: bool) -> Self {
        Self::new(terms(more))
    }

    fn header(&mut self, status: u16, content_type: Option<&str>) -> Verdict {
        let head = Head { status, content_type, wait: None, end: false, ends_with_connection: false };
        self.judge.header(head, &Rules { retry: &self.retry, errors: &[] })
    }

    fn body(&mut self, text: &str, end: bool) -> Verdict {
        let rules = Rules { retry: &self.retry, errors: &[] };
        self.judge.body(&Bytes::copy_from_slice(text.as_bytes()), end, &rules, self.now)
    }

    /// The verdict on a whole answer, which must come at its end.
    fn whole(mut self, content_type: Option<&str>, text: &str) -> (Verdict, Self) {
        assert_eq!(self.header(200, content_type), Verdict::Hold, "{text}");
        let verdict = self.body(text, true);
        (verdict, self)
    }
}

fn terms(more: bool) -> Terms {
    Terms {
        call: Call::Completion,
        streams: false,
        expects_body: true,
        more,
        more_keys: false,
        more_if_empty: true,
        searches: false,
        usage: UsageTerms::default(),
    }
}

fn stream(first: &str) -> Verdict {
    let mut court = Court::new(Terms { streams: true, ..terms(true) });
    assert_eq!(court.header(200, SSE), Verdict::Hold);
    court.body(first, false)
}

fn error_of(verdict: Verdict) -> (u16, Trouble, Place) {
    match verdict {
        Verdict::Drop(Outcome::Error { meaning, place }) => (meaning.status, meaning.trouble, place),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_stream_is_held_until_it_says_something() {
    for held in [ROLE, ": ping\n\n", &TEXT[..20], STOP, "\n\n", "data:\n\n"] {
        assert_eq!(stream(held), Verdict::Hold, "{held}");
    }
    assert_eq!(stream(&format!("{ROLE}{TEXT}")), Verdict::Commit);
    assert_eq!(stream(&format!(": ping\n\n{TEXT}")), Verdict::Commit);
}

#[test]
fn a_stream_that_begins_with_an_error_or_is_empty_is_dropped() {
    assert_eq!(error_of(stream(ERROR)), (429, Trouble::ModelLimit, Place::Event));
    assert_eq!(error_of(stream(&format!("{ROLE}{ERROR}"))).0, 429);
    assert_eq!(stream("data: upstream went away\n\n"), Verdict::Drop(Outcome::Unrecognised));
    for empty in [DONE, &format!("{ROLE}{STOP}{DONE}"), &format!("{STOP}{DONE}")] {
        assert_eq!(stream(empty), Verdict::Drop(Outcome::Empty), "{empty}");
    }
    for end in [ROLE, "", STOP, ": ping\n\n"] {
        let (verdict, _) = Court::new(Terms { streams: true, ..terms(true) }).whole(SSE, end);
        assert_eq!(verdict, Verdict::Drop(Outcome::Empty), "{end}");
    }
    let cut = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"length\"}]}\n\n";
    assert_eq!(stream(cut), Verdict::Commit, "what was cut by its length is an answer");
}

#[test]
fn where_nobody_could_take_over_a_stream_is_committed_at_its_header() {
    assert_eq!(Court::chat(false).header(200, SSE), Verdict::Commit);
}

#[test]
fn a_stream_is_known_by_what_it_is() {
    for label in [JSON, None, Some("text/plain"), SSE] {
        for streams in [false, true] {
            let mut court = Court::new(Terms { streams, ..terms(true) });
            court.header(200, label);
            assert_eq!(court.body(&format!("\n{ROLE}"), false), Verdict::Hold, "{label:?}");
            assert_eq!(court.judge.form(), Some(Form::Stream));
            assert_eq!(court.body(TEXT, false), Verdict::Commit);
            let mut court = Court::new(Terms { streams, ..terms(true) });
            court.header(200, label);
            assert_eq!(court.body(ANSWER, true), Verdict::Commit);
            assert_eq!(court.judge.form(), Some(Form::Json), "{label:?}");
        }
    }
    // However it is cut.
    let mut court = Court::new(Terms { streams: true, ..terms(true) });
    court.header(200, JSON);
    for piece in ["d", "at", "a: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n"] {
        assert_eq!(court.body(piece, false), Verdict::Hold, "{piece}");
    }
    assert_eq!(court.body("\n", false), Verdict::Commit);
}

#[test]
fn a_200_is_read_before_it_is_believed() {
    for more in [false, true] {
        assert_eq!(Court::chat(more).whole(JSON, ANSWER).0, Verdict::Commit);
        let (verdict, mut court) = Court::chat(more).whole(JSON, r#"{"error":{"message":"x","code":402}}"#);
        assert_eq!(error_of(verdict), (402, Trouble::Key, Place::Body));
        assert_eq!(court.judge.take_error_body().unwrap(), r#"{"error":{"message":"x","code":402}}"#);
        for page in ["<!DOCTYPE html>", "OK", r#"{"status":"ok"}"#, "[]"] {
            let (verdict, _) = Court::chat(more).whole(Some("text/html"), page);
            assert_eq!(verdict, Verdict::Drop(Outcome::Unrecognised), "{page}");
        }
        for blank in ["", " { }\n", "{}"] {
            assert_eq!(Court::chat(more).whole(JSON, blank).0, Verdict::Drop(Outcome::Empty), "{blank}");
        }
    }
    assert_eq!(Court::chat(true).whole(JSON, EMPTY).0, Verdict::Drop(Outcome::Empty));
    assert_eq!(Court::chat(false).whole(JSON, EMPTY).0, Verdict::Commit, "nobody else is left");
    let enough = Terms { more_if_empty: false, ..terms(true) };
    assert_eq!(Court::new(enough).whole(JSON, EMPTY).0, Verdict::Commit, "two have taken over already");
}

#[test]
fn blank_lines_before_an_answer_are_waited_through() {
    let mut court = Court::chat(true);
    assert_eq!(court.header(200, JSON), Verdict::Hold);
    assert_eq!(court.body("\n\n", false), Verdict::Hold);
    assert_eq!(court.body("\n", false), Verdict::Hold);
    assert_eq!(court.body(ANSWER, true), Verdict::Commit);
}

#[test]
fn once_nobody_can_take_over_everything_is_let_through() {
    for (status, text) in [(200, EMPTY), (503, "{}")] {
        let mut court = Court::chat(true);
        assert_eq!(court.header(status, JSON), Verdict::Hold);
        court.judge.no_more();
        assert_eq!(court.body(text, true), Verdict::Commit, "{status}");
    }
}

#[test]
fn long_answers_are_committed_at_64_kib_if_they_look_like_one() {
    let mut court = Court::chat(true);
    court.header(200, JSON);
    let long = format!(r#"{{"choices":[{{"message":{{"content":"{}"#, "x".repeat(HOLD_BYTES_MAX));
    assert_eq!(court.body(&long, false), Verdict::Commit);
    let mut page = Court::chat(true);
    page.header(200, JSON);
    let long = format!("<html>{}", "x".repeat(HOLD_BYTES_MAX));
    assert_eq!(page.body(&long, false), Verdict::Drop(Outcome::Unrecognised));
}

#[test]
fn errors_are_held_whole_and_mean_what_they_say() {
    let mut retried = Court::chat(true);
    assert_eq!(retried.header(503, JSON), Verdict::Hold);
    assert_eq!(retried.body("{", false), Verdict::Hold);
    assert_eq!(error_of(retried.body("}", true)), (503, Trouble::ModelFailure, Place::Status));
    let mut fault = Court::chat(true);
    assert_eq!(fault.header(400, JSON), Verdict::Hold);
    assert_eq!(fault.body("{}", true), Verdict::Commit);
    assert_eq!(fault.judge.take_outcome().and_then(|o| o.meaning().map(|m| m.trouble)), Some(Trouble::Request));
    // A dead key, whatever the status.
    let mut key = Court::chat(true);
    key.header(400, JSON);
    let body = r#"[{"error":{"code":400,"message":"API key not valid. Please pass a valid API key."}}]"#;
    assert_eq!(error_of(key.body(body, true)), (400, Trouble::Key, Place::Status));
    // One that is not to be tried elsewhere, whatever the status.
    let mut flagged = Court::chat(true);
    flagged.header(403, JSON);
    let body = r#"{"error":{"code":403,"message":"x","metadata":{"flagged_input":"…"}}}"#;
    assert_eq!(flagged.body(body, true), Verdict::Commit);
    let mut last = Court::chat(false);
    assert_eq!(last.header(503, None), Verdict::Hold);
    assert_eq!(last.body("{}", true), Verdict::Commit);
    let mut large = Court::chat(true);
    large.header(503, JSON);
    assert_eq!(error_of(large.body(&"x".repeat(HOLD_BYTES_MAX), false)).0, 503);
}

#[test]
fn an_endpoints_complaint_about_its_key_is_not_the_clients_to_see() {
    for (status, body, hidden) in [
        (401, "{}", true),
        (403, "<html>", true),
        (400, r#"{"error":{"message":"API key not valid. Please pass a valid API key."}}"#, true),
        (403, r#"{"error":{"message":"x","metadata":{"flagged_input":"…"}}}"#, false),
        (404, "{}", false),
    ] {
        let mut court = Court::chat(false);
        court.header(status, JSON);
        assert_eq!(court.body(body, true) != Verdict::Commit, hidden, "{status} {body}");
        let mut shown = Court::chat(false);
        shown.retry.show_endpoint_key_errors = true;
        shown.header(status, JSON);
        assert_eq!(shown.body(body, true), Verdict::Commit, "{status} {body}");
    }
}

#[test]
fn a_refusal_may_be_about_the_stream_options_that_were_added() {
    let refused = |injected, is_proven, status, body: &str| {
        let mut court = Court::new(Terms { usage: UsageTerms { injected, is_proven }, ..terms(true) });
        court.header(status, JSON);
        court.body(body, true) == Verdict::Drop(Outcome::UsageRefused)
    };
    let named = r#"{"detail":"stream_options: extra fields not permitted"}"#;
    let other = r#"{"error":{"message":"Unrecognized request argument"}}"#;
    for status in [400, 422] {
        assert!(refused(true, false, status, other), "whether or not it names them");
        assert!(refused(true, true, status, named), "another model may not know them");
        assert!(!refused(true, true, status, other), "it has taken them within the hour");
        assert!(!refused(false, false, status, named), "they are the client's own");
    }
    assert!(!refused(true, false, 503, named));
    assert!(!refused(true, false, 400, r#"{"error":{"message":"x","code":"invalid_api_key"}}"#));
    let mut event = Court::new(Terms { usage: UsageTerms { injected: true, is_proven: false }, ..terms(true) });
    event.header(200, SSE);
    let body = "data: {\"object\":\"error\",\"message\":\"x\",\"code\":400}\n\n";
    assert_eq!(event.body(body, false), Verdict::Drop(Outcome::UsageRefused));
}

#[test]
fn a_stream_below_the_lowest_pace_goes_elsewhere() {
    let paced = |events: usize, millis: u64| {
        let mut court = Court::new(Terms { streams: true, ..terms(true) });
        court.retry.tokens_per_second_min = Some(5);
        court.header(200, SSE);
        let mut verdict = Verdict::Hold;
        for _ in 0..events {
            if verdict == Verdict::Hold {
                verdict = court.body(TEXT, false);
            }
            court.now += Duration::from_millis(millis);
        }
        verdict
    };
    assert_eq!(paced(9, 100), Verdict::Hold);
    assert_eq!(paced(10, 100), Verdict::Commit, "ten in two seconds are enough");
    assert_eq!(paced(4, 700), Verdict::Drop(Outcome::TooSlow));
    let mut short = Court::new(Terms { streams: true, ..terms(true) });
    short.retry.tokens_per_second_min = Some(5);
    short.header(200, SSE);
    assert_eq!(short.body(&format!("{TEXT}{DONE}"), false), Verdict::Commit, "a short answer is not slow");
}

#[test]
fn other_answers_are_never_held() {
    let other = || Court::new(Terms { call: Call::Other, ..terms(true) });
    assert_eq!(other().header(200, Some("audio/mpeg")), Verdict::Commit);
    assert_eq!(other().whole(JSON, r#"{"text":"anything"}"#).0, Verdict::Commit);
    assert_eq!(other().whole(JSON, "{}").0, Verdict::Drop(Outcome::Empty));
    assert_eq!(Court::chat(true).header(302, None), Verdict::Commit);
    let mut head = Court::new(Terms { call: Call::Other, expects_body: false, ..terms(true) });
    let end = Head { status: 200, content_type: None, wait: None, end: true, ends_with_connection: false };
    assert_eq!(head.judge.header(end, &Rules { retry: &head.retry, errors: &[] }), Verdict::Commit);
}
