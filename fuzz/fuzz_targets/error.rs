//! Any bytes for an error: classifying it never panics, and a fault of the request, quoting whatever the caller wrote, never
//! becomes one of the key, the account or the endpoint.

#![no_main]

use api_together::config::Trouble;
use api_together::response::classify;
use libfuzzer_sys::fuzz_target;

/// Statuses by which a vendor blames the request.
const REQUEST: [u16; 7] = [400, 404, 405, 409, 413, 415, 422];

fuzz_target!(|input: &[u8]| {
    let Some(([status, shape], bytes)) = input.split_first_chunk() else { return };
    let status = REQUEST[usize::from(*status) % REQUEST.len()];
    classify::of_answer(status, bytes, None, &[]);
    classify::of_answer(u16::from(*shape) + 345, bytes, None, &[]);
    // What a caller wrote stands in a text of the vendor's.
    let text = String::from_utf8_lossy(bytes);
    let quoted = format!("Invalid value: {text}").replace(['\\', '"'], "'").replace(|c: char| c.is_control(), " ");
    let body = match shape % 4 {
        0 => format!(r#"{{"error":{{"message":"{quoted}","type":"invalid_request_error","code":null}}}}"#),
        1 => format!(r#"{{"detail":[{{"msg":"{quoted}","input":"{quoted}"}}]}}"#),
        2 => format!(r#"{{"object":"error","message":"{quoted}","code":{status}}}"#),
        _ => format!(r#"{{"error":"{quoted}"}}"#),
    };
    let meaning = classify::of_answer(status, body.as_bytes(), None, &[]);
    assert!(!matches!(meaning.trouble, Trouble::Key | Trouble::AccountLimit | Trouble::Endpoint), "{body}: {meaning:?}");
});
