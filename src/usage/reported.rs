//! Reader of the tokens that JSON reports. Builds no tree of it.

use std::marker::PhantomData;
use std::sync::LazyLock;

use memchr::memmem::{Finder, FinderRev};
use serde::de::{IgnoredAny, MapAccess};
use serde::{Deserialize, Deserializer};

use super::lenient::{Any, First, Lenient, Members, Reads};
use super::plain::{Plain, Surprise};
use super::{TOKENS_MAX, Usage};
use crate::json::scan::ends_outermost;

/// Usage reported by an event of a stream, or by a whole JSON answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reported {
    /// The counts.
    pub usage: Usage,
    /// True for the first event of Anthropic's messages, which reports the prompt's tokens only.
    pub begins_message: bool,
    /// True if it has llama.cpp's `timings`.
    pub has_timings: bool,
}

impl Reported {
    /// Reads the usage from JSON; `None` if it reports none.
    pub fn from_json(json: &[u8]) -> Option<Self> {
        let Lenient(outer) = serde_json::from_slice::<Lenient<Outer>>(json).ok()?;
        let usage = outer.usage.usage();
        let held = [&outer.response, &outer.message, &outer.x_groq, &outer.choice];
        let usage = usage.or_else(|| held.into_iter().find_map(|holder| holder.usage.usage()));
        let has_timings = outer.timings.is_some();
        let usage = usage.or_else(|| outer.timings?.usage())?;
        Some(Self { usage, begins_message: outer.begins_message, has_timings })
    }
}

/// Reads the usage of a whole answer if it stands near the end, where nearly all answers have it; only that part is
/// read. `None` leaves open whether the answer reports a usage.
pub(super) fn near_the_end(json: &[u8]) -> Option<Usage> {
    let after_key = last_usage(json)? + KEY.len();
    let value = json.get(after_key..)?.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
    if !value.starts_with(b"{") || !json.trim_ascii_start().starts_with(b"{") {
        return None;
    }
    let (counts, rest) = UsageCounts::plain(value).ok().or_else(|| {
        let mut values = serde_json::Deserializer::from_slice(value).into_iter::<Lenient<UsageCounts>>();
        let Lenient(counts) = values.next()?.ok()?;
        Some((counts, value.get(values.byte_offset()..)?))
    })?;
    ends_outermost(rest).then(|| counts.usage())?
}

const KEY: &[u8] = b"\"usage\"";
static FROM_BEGIN: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(KEY));
static FROM_END: LazyLock<FinderRev<'static>> = LazyLock::new(|| FinderRev::new(KEY));

/// Returns the position of the last `usage`.
fn last_usage(json: &[u8]) -> Option<usize> {
    /// Bytes at the end that are searched first. The last `usage` is nearly always there, and a forward search is so
    /// much faster than a backward one that it pays.
    const END_BYTES: usize = 1024;
    let end = json.len().saturating_sub(END_BYTES);
    let in_end = FROM_BEGIN.find_iter(json.get(end..)?).last();
    in_end.map(|at| end + at).or_else(|| FROM_END.rfind(json))
}

/// Reads the value of a `usage`.
pub(super) fn usage(json: &[u8]) -> Option<Usage> {
    serde_json::from_slice::<Lenient<UsageCounts>>(json).ok()?.0.usage()
}

/// Reads the value of llama.cpp's `timings`.
pub(super) fn timings(json: &[u8]) -> Option<Usage> {
    serde_json::from_slice::<Lenient<Timings>>(json).ok()?.0.usage()
}

/// A count of tokens. Some endpoints write whole numbers as `12.0`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count(Option<u64>);

impl Count {
    fn new(number: Option<u64>) -> Self {
        Self(number.map(|number| number.min(TOKENS_MAX)))
    }
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsCount;
        impl Reads<'_> for AsCount {
            type Value = Count;

            fn whole(number: u64) -> Count {
                Count::new(Some(number))
            }

            fn number(number: f64) -> Count {
                let is_count = (0.0..=9e15).contains(&number) && number.fract() == 0.0;
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is in range and whole")]
                Count::new(is_count.then_some(number as u64))
            }
        }
        deserializer.deserialize_any(Any::<AsCount>(PhantomData))
    }
}

/// True for the text `message_start`.
struct BeginsMessage(bool);

impl<'de> Deserialize<'de> for BeginsMessage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsKind;
        impl Reads<'_> for AsKind {
            type Value = bool;

            fn text(text: &str) -> bool {
                text == "message_start"
            }
        }
        deserializer.deserialize_any(Any::<AsKind>(PhantomData)).map(BeginsMessage)
    }
}

/// The outermost object.
#[derive(Default)]
struct Outer {
    usage: UsageCounts,
    response: Holder,
    message: Holder,
    x_groq: Holder,
    /// First element of `choices`.
    choice: Holder,
    timings: Option<Timings>,
    begins_message: bool,
}

impl<'de> Members<'de> for Outer {
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "usage" => self.usage = map.next_value::<Lenient<_>>()?.0,
            "response" => self.response = map.next_value::<Lenient<_>>()?.0,
            "message" => self.message = map.next_value::<Lenient<_>>()?.0,
            "x_groq" => self.x_groq = map.next_value::<Lenient<_>>()?.0,
            "choices" => self.choice = map.next_value::<First<_>>()?.0,
            "timings" => self.timings = Some(map.next_value::<Lenient<_>>()?.0),
            "type" => self.begins_message = map.next_value::<BeginsMessage>()?.0,
            _ => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

/// An object that may contain a `usage`.
#[derive(Default)]
struct Holder {
    usage: UsageCounts,
}

impl<'de> Members<'de> for Holder {
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "usage" => self.usage = map.next_value::<Lenient<_>>()?.0,
            _ => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

/// A `usage`, in any dialect.
#[derive(Debug, Default, PartialEq, Eq)]
struct UsageCounts {
    prompt: Count,
    completion: Count,
    input: Count,
    output: Count,
    total: Count,
    cached: Count,
    cache_hit: Count,
    cache_read: Count,
    cache_written: Count,
    reasoning: Count,
    /// `prompt_tokens_details`, `input_tokens_details` of responses, `input_token_details` of transcriptions.
    of_prompt: [Details; 3],
    /// The same for the answer: `completion_tokens_details`, `output_tokens_details`, `output_token_details`.
    of_answer: [Details; 3],
}

impl<'de> Members<'de> for UsageCounts {
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        if let Some(details) = self.details(key.as_bytes()) {
            *details = map.next_value::<Lenient<_>>()?.0;
        } else if let Some(count) = self.count(key.as_bytes()) {
            *count = map.next_value()?;
        } else {
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

impl UsageCounts {
    /// Reads the counts of an object in the plain form. Returns them and the rest of the input.
    fn plain(json: &[u8]) -> Result<(Self, &[u8]), Surprise> {
        let mut counts = Self::default();
        let mut plain = Plain::new(json);
        plain.object(|plain, key| {
            if let Some(details) = counts.details(key) {
                *details = Details::default();
                if plain.is_at_object() {
                    return plain.object(|plain, key| read_count(plain, details.count(key)));
                }
            }
            read_count(plain, counts.count(key))
        })?;
        Ok((counts, plain.rest()))
    }

    fn details(&mut self, key: &[u8]) -> Option<&mut Details> {
        let [of_prompt, of_input, of_inputs] = &mut self.of_prompt;
        let [of_completion, of_output, of_outputs] = &mut self.of_answer;
        Some(match key {
            b"prompt_tokens_details" => of_prompt,
            b"input_tokens_details" => of_input,
            b"input_token_details" => of_inputs,
            b"completion_tokens_details" => of_completion,
            b"output_tokens_details" => of_output,
            b"output_token_details" => of_outputs,
            _ => return None,
        })
    }

    fn count(&mut self, key: &[u8]) -> Option<&mut Count> {
        Some(match key {
            b"prompt_tokens" => &mut self.prompt,
            b"completion_tokens" => &mut self.completion,
            b"input_tokens" => &mut self.input,
            b"output_tokens" => &mut self.output,
            b"total_tokens" => &mut self.total,
            b"cached_tokens" => &mut self.cached,
            b"prompt_cache_hit_tokens" => &mut self.cache_hit,
            b"cache_read_input_tokens" => &mut self.cache_read,
            b"cache_creation_input_tokens" => &mut self.cache_written,
            b"reasoning_tokens" => &mut self.reasoning,
            _ => return None,
        })
    }

    fn usage(&self) -> Option<Usage> {
        let detail = |details: &[Details], count: fn(&Details) -> Count| details.iter().find_map(|of| count(of).0);
        let cached = detail(&self.of_prompt, |details| details.cached);
        let usage = Usage {
            prompt: self.prompt.0,
            completion: self.completion.0,
            input: self.input.0,
            output: self.output.0,
            total: self.total.0,
            cached: cached.or(self.cached.0).or(self.cache_hit.0),
            cache_read: self.cache_read.0,
            cache_written: self.cache_written.0,
            reasoning: detail(&self.of_answer, |details| details.reasoning).or(self.reasoning.0),
            audio_in: detail(&self.of_prompt, |details| details.audio),
            cached_audio: detail(&self.of_prompt, |details| details.cached_audio),
            audio_out: detail(&self.of_answer, |details| details.audio),
        };
        let counts = [usage.prompt, usage.completion, usage.input, usage.output, usage.total];
        counts.iter().any(Option::is_some).then_some(usage)
    }
}

/// Reads a number, and stores it if it matters.
fn read_count(plain: &mut Plain<'_>, count: Option<&mut Count>) -> Result<(), Surprise> {
    let number = Count::new(plain.number()?);
    if let Some(count) = count {
        *count = number;
    }
    Ok(())
}

/// Parts of a prompt or an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Details {
    cached: Count,
    reasoning: Count,
    audio: Count,
    /// Part of the cached ones that is audio.
    cached_audio: Count,
}

impl<'de> Members<'de> for Details {
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        if key == "cached_tokens_details" {
            self.cached_audio = map.next_value::<Lenient<Self>>()?.0.audio;
            return Ok(());
        }
        match self.count(key.as_bytes()) {
            Some(count) => *count = map.next_value()?,
            None => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

impl Details {
    fn count(&mut self, key: &[u8]) -> Option<&mut Count> {
        Some(match key {
            b"cached_tokens" => &mut self.cached,
            b"reasoning_tokens" => &mut self.reasoning,
            b"audio_tokens" => &mut self.audio,
            _ => return None,
        })
    }
}

/// llama.cpp's `timings`. `prompt_n` does not include tokens from the cache.
#[derive(Default)]
struct Timings {
    prompt: Count,
    cached: Count,
    predicted: Count,
}

impl<'de> Members<'de> for Timings {
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "prompt_n" => self.prompt = map.next_value()?,
            "cache_n" => self.cached = map.next_value()?,
            "predicted_n" => self.predicted = map.next_value()?,
            _ => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

impl Timings {
    fn usage(&self) -> Option<Usage> {
        Some(Usage {
            prompt: Some(self.prompt.0? + self.cached.0.unwrap_or(0)),
            completion: Some(self.predicted.0?),
            cached: self.cached.0,
            ..Usage::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_last_usage_is_found_wherever_it_is() {
        let padding = "x".repeat(3000);
        for (before, after) in
            [("", ""), (&*padding, ""), ("", &*padding), (&padding, &padding), (&padding, &padding[..1020])]
        {
            let json = format!("{before}\"usage\"{before}\"usage\"{after}");
            assert_eq!(last_usage(json.as_bytes()), json.rfind("\"usage\""), "{} {}", before.len(), after.len());
        }
        assert_eq!(last_usage(padding.as_bytes()), None);
    }

    fn plain(json: &str) -> Option<UsageCounts> {
        let (counts, rest) = UsageCounts::plain(json.as_bytes()).ok()?;
        rest.is_empty().then_some(counts)
    }

    fn parsed(json: &str) -> Option<UsageCounts> {
        serde_json::from_str::<Lenient<UsageCounts>>(json).ok().map(|Lenient(counts)| counts)
    }

    #[test]
    fn what_endpoints_write_is_plain() {
        for json in [
            r#"{"prompt_tokens":12,"completion_tokens":0,"total_tokens":12}"#,
            r#"{ "prompt_tokens" : 1 ,"prompt_tokens_details":{"cached_tokens":7,"audio_tokens":0}, "other": null }"#,
            r#"{"completion_tokens_details":null,"output_tokens":5,"output_tokens":6}"#,
            r#"{"prompt_tokens_details":{"cached_tokens":1},"prompt_tokens_details":{},"total_tokens":999999999999999999}"#,
            "{}",
        ] {
            assert_eq!(plain(json), parsed(json), "{json}");
            assert!(plain(json).is_some(), "{json}");
        }
    }

    #[test]
    fn whatever_else_is_left_to_the_parser() {
        for json in [
            r#"{"prompt_tokens":12.0}"#,
            r#"{"prompt_tokens":1e2}"#,
            r#"{"prompt_tokens":-1}"#,
            r#"{"prompt_tokens":01}"#,
            r#"{"prompt_tokens":9999999999999999999}"#,
            r#"{"prompt_tokens":"12"}"#,
            r#"{"prompt_tokens":}"#,
            r#"{"cost_details":{"a":1}}"#,
            r#"{"prompt\u005ftokens":12}"#,
            r#"{"prompt_tokens":1,}"#,
            r#"{"prompt_tokens":1"#,
            r#"{"prompt_tokens":nul}"#,
            "[]",
            "",
        ] {
            assert_eq!(plain(json), None, "{json}");
        }
    }

    proptest! {
        #[test]
        fn what_is_plain_is_as_the_parser_reads_it(
            json in r#"\{("(prompt_tokens|output_tokens_details|x)" ?:(0|12|1\.0|1e1|null|\{\}|\{"(cached_tokens|y)":[0-9n]{1,2}\}),?){0,4} ?\}?"#
        ) {
            if let Some(counts) = plain(&json) {
                prop_assert_eq!(Some(counts), parsed(&json));
            }
        }
    }
}
