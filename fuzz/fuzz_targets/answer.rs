//! Any bytes for an answer, cut anywhere: whatever reads them for their tokens must neither panic nor change one of them.

#![no_main]

use api_together::response::redact::Secrets;
use api_together::response::relay::Relay;
use api_together::request::call::Call;
use api_together::usage::{Finder, Meter};
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some(([call, size, flags], answer)) = input.split_first_chunk() else { return };
    let calls = [Call::Completion, Call::Responses, Call::Messages, Call::Embeddings, Call::Other, Call::Unmetered];
    let call = calls[usize::from(*call) % calls.len()];
    let pieces: Vec<Bytes> = answer.chunks(usize::from(*size).max(1)).map(Bytes::copy_from_slice).collect();
    let estimates = flags & 1 == 1;

    let (mut plain, mut meter) = (Relay::new(false, Secrets::default()), Meter::new(call, estimates));
    let mut out = Vec::new();
    pieces.iter().for_each(|piece| plain.piece(piece, &mut meter, &mut out));
    plain.end(&mut meter, &mut out);
    assert!(out.concat() == answer, "an answer that nothing is taken out of is changed");
    meter.reported().map(|usage| usage.tokens());

    // What is taken out leaves the rest in its order.
    let (mut strips, mut meter) = (Relay::new(true, Secrets::default()), Meter::new(call, estimates));
    let mut out = Vec::new();
    pieces.iter().for_each(|piece| strips.piece(piece, &mut meter, &mut out));
    strips.end(&mut meter, &mut out);
    let mut rest = answer.iter();
    assert!(out.concat().iter().all(|byte| rest.any(|given| given == byte)), "something is added");

    let mut meter = Meter::new(call, estimates);
    pieces.iter().for_each(|piece| meter.json(piece));
    meter.json_ended();
    let mut finder = Finder::default();
    pieces.iter().for_each(|piece| finder.feed(piece));
    // Of what only resembles JSON, either may read more.
    let is_json = serde_json::from_slice::<serde_json::Value>(answer).is_ok();
    let reads_alike = call == Call::Unmetered || meter.reported() == finder.usage();
    assert!(!is_json || reads_alike, "the meter reads what the finder finds");
});
