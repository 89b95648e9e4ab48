//! `/v1/embeddings`: vectors that depend on the input only, as numbers or in base64.

use serde_json::{Value, json};

use super::shapes::{AskedFor, Text};

/// Length of a vector when the request names none; short, so that answers stay readable.
const DEFAULT_DIMENSIONS: usize = 8;

/// Longest vector; the longest of the usual models.
const MAX_DIMENSIONS: usize = 4_096;

/// Inputs in one request, `OpenAI`'s own limit.
const MAX_INPUTS: usize = 2_048;

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// The answer, or why the request is refused.
pub(super) fn embeddings(ask: &AskedFor, text: &Text) -> Result<String, String> {
    let inputs = inputs(ask.input.as_ref().ok_or("you must provide an input parameter")?);
    if inputs.is_empty() || inputs.len() > MAX_INPUTS {
        return Err(format!("'input' must have 1 to {MAX_INPUTS} items."));
    }
    let dimensions = ask.dimensions.unwrap_or(DEFAULT_DIMENSIONS);
    if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
        return Err(format!("'dimensions' must be 1 to {MAX_DIMENSIONS}."));
    }
    let as_base64 = ask.encoding_format.as_deref() == Some("base64");
    let data: Vec<_> =
        inputs.iter().enumerate().map(|(index, input)| object(index, &vector(input, dimensions), as_base64)).collect();
    let (tokens, model) = (text.prompt_tokens, &text.model);
    let usage = format!(r#","usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}}"#);
    let usage = if text.usage { usage } else { String::new() };
    Ok(format!(r#"{{"object":"list","data":[{}],"model":{model}{usage}}}"#, data.join(",")))
}

/// A string or a list of token ids is one input; a list of either is many.
fn inputs(input: &Value) -> Vec<String> {
    match input {
        Value::Array(list) if !list.iter().all(Value::is_number) => list.iter().map(Value::to_string).collect(),
        Value::Array(list) if list.is_empty() => Vec::new(),
        one => vec![one.to_string()],
    }
}

/// Numbers from -1 to 1 out of a simple hash (FNV-1a, then a linear generator).
fn vector(input: &str, dimensions: usize) -> Vec<f32> {
    let mut state =
        input.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let high = u16::try_from(state >> 16).unwrap_or_default();
        f32::from(high) / 32_768.0 - 1.0
    };
    (0..dimensions).map(|_| next()).collect()
}

fn object(index: usize, vector: &[f32], as_base64: bool) -> String {
    let embedding = if as_base64 {
        let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
        json!(base64(&bytes))
    } else {
        json!(vector)
    };
    format!(r#"{{"object":"embedding","index":{index},"embedding":{embedding}}}"#)
}

pub(super) fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |at: usize| u32::from(group.get(at).copied().unwrap_or_default());
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for at in 0..4 {
            // Three bytes fill four letters, two fill three, one fills two.
            let index = (bits >> (18 - 6 * at)) & 63;
            let letter = BASE64.get(index as usize).filter(|_| at <= group.len());
            text.push(char::from(letter.copied().unwrap_or(b'=')));
        }
    }
    text
}
