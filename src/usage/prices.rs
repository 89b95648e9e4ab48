//! What tokens cost: by the config's prices, or else by those of the table that the crate `genai-prices` comes with. Neither asks
//! anybody on the network.
//!
//! What has no price has none: it is never taken for free.

use std::collections::HashMap;
use std::fmt;
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use genai_prices::{Calculator, PriceRequest, Usage as PricedUsage, UsageKey};

use super::Usage;
use crate::config::{PriceEntry, Rates};
use crate::request::fields::ServiceTier;

/// The table, and its version, which dates it.
pub const TABLE: &str = "genai-prices 0.2.1";
/// Models whose prices are kept, by endpoint: clients may invent names. Those of others are looked up each time.
const MODELS_KEPT_MAX: usize = 256;
/// Time for which a price is kept. Some change with the time of the day, and begin on quarters of an hour.
const KEPT: Duration = Duration::from_mins(15);
/// Tokens that a rate is of.
const RATE_TOKENS: u64 = 1_000_000;
const NANO: f64 = 1e9;

/// An amount of money, in 1e-9 US dollars.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct NanoUsd(pub u64);

impl fmt::Display for NanoUsd {
    /// Dollars, exactly, with no more places than it needs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dollars, rest) = (self.0 / 1_000_000_000, self.0 % 1_000_000_000);
        if rest == 0 {
            return write!(f, "{dollars}");
        }
        let places = format!("{rest:09}");
        write!(f, "{dollars}.{}", places.trim_end_matches('0'))
    }
}

impl NanoUsd {
    /// Dollars, as JSON has them: exact up to some millions.
    pub fn dollars(self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53, which is nine million dollars")]
        let nano = self.0 as f64;
        nano / NANO
    }
}

/// Tokens of an answer by their prices. Parts are counted in their wholes as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PricedTokens {
    /// Of the prompt.
    pub input: u64,
    /// Part of it that came from a cache.
    pub cached: u64,
    /// Part of it that was written to a cache.
    pub cache_written: u64,
    /// Part of it that is audio.
    pub audio_input: u64,
    /// Of the answer.
    pub output: u64,
    /// Part of it that is reasoning.
    pub reasoning: u64,
    /// Part of it that is audio.
    pub audio_output: u64,
}

impl PricedTokens {
    /// Tokens of which no more is known.
    pub fn plain(input: u64, output: u64) -> Self {
        Self { input, output, ..Self::default() }
    }

    /// The parts of a reported usage.
    pub fn of(usage: &Usage) -> Self {
        let tokens = usage.tokens();
        // Some count reasoning in the total only, and bill it like the rest of the answer.
        let hidden = tokens.total.saturating_sub(tokens.prompt).saturating_sub(tokens.completion);
        let part = |part: Option<u64>, whole: u64| part.unwrap_or_default().min(whole);
        let output = tokens.completion.saturating_add(hidden);
        let cached = tokens.cached.min(tokens.prompt);
        let cache_written = part(usage.cache_written, tokens.prompt - cached);
        // Audio that was cached is in both, and costs what is cached.
        let of_audio = part(usage.audio_in, tokens.prompt);
        let audio_input =
            of_audio.saturating_sub(part(usage.cached_audio, cached)).min(tokens.prompt - cached - cache_written);
        Self {
            input: tokens.prompt,
            cached,
            cache_written,
            audio_input,
            output,
            reasoning: tokens.reasoning.min(output),
            audio_output: part(usage.audio_out, output),
        }
    }

    /// What they cost at these rates, rounded up.
    pub fn cost(&self, rates: &Rates) -> NanoUsd {
        let special = self.cached.saturating_add(self.cache_written).saturating_add(self.audio_input);
        let parts = [
            (self.input.saturating_sub(special), rates.input),
            (self.cached, rates.cached),
            (self.cache_written, rates.cache_written),
            (self.audio_input, rates.audio_input),
            (self.output.saturating_sub(self.reasoning).saturating_sub(self.audio_output), rates.output),
            (self.reasoning, rates.reasoning),
            (self.audio_output, rates.audio_output),
        ];
        let sum: u128 = parts.iter().map(|(tokens, rate)| u128::from(*tokens) * u128::from(*rate)).sum();
        NanoUsd(u64::try_from(sum.div_ceil(RATE_TOKENS.into())).unwrap_or(u64::MAX))
    }
}

/// Prices of an endpoint's models.
#[derive(Debug)]
pub struct PriceList {
    /// The config's, the closest one first: the endpoint's own, then those of all.
    entries: Vec<PriceEntry>,
    /// The table's name of the provider, if the config names one.
    provider: Option<String>,
    url: String,
    kept: RwLock<HashMap<Box<str>, (SystemTime, Known)>>,
}

/// What is known of a model's price.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// It has none.
    Nothing,
    /// Each token costs the same.
    Flat(Rates),
    /// It depends on the length of the prompt.
    Tiered,
}

/// A price, and where it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Priced {
    /// Rates; of a price that depends on the prompt's length, those of a short one.
    pub rates: Rates,
    /// True if a longer prompt has other rates.
    pub is_tiered: bool,
    /// Source of the prices and, if it is known, their day.
    pub source: String,
}

impl PriceList {
    /// Prices of an endpoint with this address.
    pub fn new(own: &[PriceEntry], of_all: &[PriceEntry], provider: Option<&str>, url: String) -> Self {
        let entries = own.iter().chain(of_all).cloned().collect();
        Self { entries, provider: provider.map(str::to_owned), url, kept: RwLock::default() }
    }

    /// What these tokens of a model cost; none if it has no price.
    pub fn cost(
        &self,
        model: &str,
        tokens: &PricedTokens,
        tier: Option<ServiceTier>,
        at: SystemTime,
    ) -> Option<NanoUsd> {
        let of_table = || self.of_table(model, tokens, tier, at).map(|dollars| NanoUsd(nano(dollars)));
        match self.known(model, at) {
            Known::Nothing => None,
            // The config's prices are for whatever tier.
            Known::Flat(_) if tier.is_some() && self.entry(model).is_none() => of_table(),
            Known::Flat(rates) => Some(tokens.cost(&rates)),
            Known::Tiered => of_table(),
        }
    }

    /// The price of a model, for people.
    pub fn of(&self, model: &str, at: SystemTime) -> Option<Priced> {
        if let Some(entry) = self.entry(model) {
            let day = entry.as_of.map(|day| format!(", of {day}")).unwrap_or_default();
            return Some(Priced { rates: entry.rates, is_tiered: false, source: format!("config{day}") });
        }
        let is_tiered = match self.known(model, at) {
            Known::Nothing => return None,
            Known::Flat(_) => false,
            Known::Tiered => true,
        };
        Some(Priced { rates: self.table_rates(model, 1, at)?, is_tiered, source: TABLE.to_owned() })
    }

    fn entry(&self, model: &str) -> Option<&PriceEntry> {
        self.entries.iter().find(|entry| entry.matches(model))
    }

    fn known(&self, model: &str, at: SystemTime) -> Known {
        if let Some(entry) = self.entry(model) {
            return Known::Flat(entry.rates);
        }
        let kept = self.kept.read().unwrap_or_else(PoisonError::into_inner);
        if let Some((until, known)) = kept.get(model)
            && at < *until
            && at + KEPT >= *until
        {
            return *known;
        }
        drop(kept);
        let known = self.look_up(model, at);
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < MODELS_KEPT_MAX || kept.contains_key(model) {
            kept.insert(model.into(), (next_quarter(at), known));
        }
        known
    }

    fn look_up(&self, model: &str, at: SystemTime) -> Known {
        /// More tokens than the last of the table's tiers begins with.
        const LONG: u64 = 100_000_000;
        match (self.table_rates(model, 1, at), self.table_rates(model, LONG, at)) {
            (Some(short), Some(long)) if short == long => Known::Flat(short),
            (Some(_), Some(_)) => Known::Tiered,
            _ => Known::Nothing,
        }
    }

    /// The rates that the table has for a prompt of this length. It has none of a model whose tokens cost nothing: that is priced by
    /// something else, such as minutes.
    fn table_rates(&self, model: &str, prompt: u64, at: SystemTime) -> Option<Rates> {
        let of = |tokens: PricedTokens| self.of_table(model, &tokens, None, at);
        // All of a kind that is a part of another is that part.
        let base = PricedTokens::plain(prompt, 0);
        let with = |part: PricedTokens| Some(nano(of(part)? * real(RATE_TOKENS) / real(prompt)));
        let answer = |part: PricedTokens| Some(nano(of(part)? - of(base)?));
        let input = with(base)?;
        let output = answer(PricedTokens { output: RATE_TOKENS, ..base })?;
        if input == 0 && output == 0 {
            return None;
        }
        Some(Rates {
            input,
            cached: with(PricedTokens { cached: prompt, ..base })?,
            cache_written: with(PricedTokens { cache_written: prompt, ..base })?,
            audio_input: with(PricedTokens { audio_input: prompt, ..base })?,
            output,
            reasoning: answer(PricedTokens { output: RATE_TOKENS, reasoning: RATE_TOKENS, ..base })?,
            audio_output: answer(PricedTokens { output: RATE_TOKENS, audio_output: RATE_TOKENS, ..base })?,
        })
    }

    /// The table's price of these tokens, in dollars.
    fn of_table(&self, model: &str, tokens: &PricedTokens, tier: Option<ServiceTier>, at: SystemTime) -> Option<f64> {
        let PricedTokens { input, cached, cache_written, audio_input, output, reasoning, audio_output } = *tokens;
        let usage: PricedUsage = [
            (UsageKey::INPUT_TOKENS, input),
            (UsageKey::OUTPUT_TOKENS, output),
            (UsageKey::CACHE_READ_TOKENS, cached),
            (UsageKey::CACHE_WRITE_TOKENS, cache_written),
            (UsageKey::INPUT_AUDIO_TOKENS, audio_input),
            (UsageKey::OUTPUT_REASONING_TOKENS, reasoning),
            (UsageKey::OUTPUT_AUDIO_TOKENS, audio_output),
        ]
        .into_iter()
        .filter(|(_, tokens)| *tokens > 0)
        .map(|(key, tokens)| (key, real(tokens)))
        .collect();
        let mut request = PriceRequest::new(model, &usage).with_timestamp(at);
        if let Some(tier) = tier {
            request = request.with_price_context("service_tier", tier.word());
        }
        let request = match &self.provider {
            Some(provider) => request.with_provider_id(provider),
            None => request.with_provider_api_url(&self.url),
        };
        Calculator::bundled().calculate(&request).ok().map(|price| price.total_price)
    }
}

/// Reads the table on a thread of its own, which takes tens of milliseconds, so that the first answer does not wait for it.
pub fn read_table_ahead() {
    let thread = std::thread::Builder::new().name("prices".into()).spawn(Calculator::bundled);
    if let Err(error) = thread {
        log::warn!("no thread to read the prices ahead: {error}; the first answer waits for them");
    }
}

fn next_quarter(at: SystemTime) -> SystemTime {
    let quarter = KEPT.as_secs();
    let seconds = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    UNIX_EPOCH + Duration::from_secs((seconds / quarter + 1) * quarter)
}

fn real(tokens: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "nobody counts that many")]
    let real = tokens as f64;
    real
}

fn nano(dollars: f64) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast of a float saturates")]
    let nano = (dollars * NANO).round() as u64;
    nano
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::test_support::config_of;
    use serde_json::{Value, json};

    /// 2026-11-25, 12:00 UTC.
    fn noon() -> SystemTime {
        UNIX_EPOCH + Duration::from_hours(498_780)
    }

    fn list(url: &str, provider: Option<&str>) -> PriceList {
        PriceList::new(&[], &[], provider, url.to_owned())
    }

    fn rates(input: u64, cached: u64, output: u64) -> Rates {
        let [input, cached, output] = [input, cached, output].map(|cents| cents * 10_000_000);
        Rates {
            input,
            cached,
            cache_written: input,
            audio_input: input,
            output,
            reasoning: output,
            audio_output: output,
        }
    }

    #[test]
    fn dollars_are_shown_exactly() {
        for (nano, shown) in
            [(0, "0"), (1, "0.000000001"), (1_500_000_000, "1.5"), (20_000_000_000, "20"), (1_010, "0.00000101")]
        {
            assert_eq!(NanoUsd(nano).to_string(), shown);
        }
    }

    #[test]
    fn each_kind_of_tokens_has_its_price() {
        let rates = Rates {
            input: 1_000_000_000,
            cached: 100_000_000,
            cache_written: 1_250_000_000,
            audio_input: 40_000_000_000,
            output: 4_000_000_000,
            reasoning: 5_000_000_000,
            audio_output: 80_000_000_000,
        };
        let tokens = PricedTokens {
            input: 1000,
            cached: 600,
            cache_written: 100,
            audio_input: 50,
            output: 300,
            reasoning: 200,
            audio_output: 30,
        };
        let nano = 250 * 1000 + 600 * 100 + 100 * 1250 + 50 * 40_000 + 70 * 4000 + 200 * 5000 + 30 * 80_000;
        assert_eq!(tokens.cost(&rates), NanoUsd(nano));
        let least = Rates { input: 1, ..rates };
        assert_eq!(PricedTokens::plain(1, 0).cost(&least), NanoUsd(1), "rounded up, never to nothing");
        let odd = PricedTokens { cached: 9, ..PricedTokens::plain(3, 0) };
        assert_eq!(odd.cost(&rates), NanoUsd(900), "parts that are more than the whole count alone");
    }

    #[test]
    fn the_table_knows_providers_by_their_addresses() {
        let openai = list("https://api.openai.com/v1", None);
        let tokens = PricedTokens { cached: 500_000, ..PricedTokens::plain(1_000_000, 100_000) };
        assert_eq!(openai.cost("gpt-4o", &tokens, None, noon()), Some(NanoUsd(2_875_000_000)));
        assert_eq!(openai.of("gpt-4o", noon()).unwrap().rates.cached, 1_250_000_000);
        assert_eq!(openai.cost("gpt-4o-2024-08-06", &tokens, None, noon()), Some(NanoUsd(2_875_000_000)));
        assert_eq!(openai.cost("no-such-model", &tokens, None, noon()), None);
        assert_eq!(openai.cost("whisper-1", &tokens, None, noon()), None, "it is priced by minutes");
        assert_eq!(list("http://localhost:8000/v1", None).cost("gpt-4o", &tokens, None, noon()), None);
        let named = list("http://localhost:8000/v1", Some("openai"));
        assert_eq!(named.cost("gpt-4o", &tokens, None, noon()), Some(NanoUsd(2_875_000_000)));
    }

    #[test]
    fn the_table_is_named_by_its_version() {
        let (name, version) = TABLE.split_once(' ').unwrap();
        assert!(include_str!("../../Cargo.toml").contains(&format!("{name} = \"={version}\"")));
    }

    #[test]
    fn a_long_prompt_may_cost_more() {
        let google = list("https://generativelanguage.googleapis.com/v1beta/openai", None);
        let of = |input: u64| google.cost("gemini-2.5-pro", &PricedTokens::plain(input, 0), None, noon()).unwrap().0;
        assert_eq!(of(100_000), 125_000_000);
        assert_eq!(of(300_000), 750_000_000, "all of it, not only what is above");
        assert!(google.of("gemini-2.5-pro", noon()).unwrap().is_tiered);
    }

    #[test]
    fn a_tier_of_service_has_prices_of_its_own() {
        let openai = list("https://api.openai.com/v1", None);
        let of = |tier| openai.cost("o3", &PricedTokens::plain(1_000_000, 1_000_000), tier, noon()).unwrap();
        let (usual, flex, priority) = (of(None), of(Some(ServiceTier::Flex)), of(Some(ServiceTier::Priority)));
        assert!(flex < usual && usual < priority, "{flex} {usual} {priority}");
    }

    #[test]
    fn a_price_changes_with_the_time_of_the_day() {
        let deepseek = list("https://api.deepseek.com", None);
        let of = |at| deepseek.cost("deepseek-chat", &PricedTokens::plain(1_000_000, 0), None, at).unwrap();
        let night = noon() + Duration::from_hours(6);
        assert!(of(noon()) > of(night), "{} {}", of(noon()), of(night));
        assert_eq!(of(noon()), of(noon()), "the clock may go back");
    }

    #[test]
    fn the_configs_prices_win_and_the_closest_counts() {
        let own = json!({ "input": 1, "output": 4, "cachedInput": 0.1, "asOf": "2026-11-01" });
        let prices =
            json!({ "gpt-4o*": own, "gpt-4o": { "input": 2, "output": 3 }, "local": { "input": 0, "output": 0 } });
        let config = config_of(&json!({ "prices": prices }), "[]");
        let list = PriceList::new(&[], &config.server.prices, None, "https://api.openai.com/v1".into());
        let of = |model: &str| list.of(model, noon());
        assert_eq!(of("gpt-4o-mini").unwrap().rates, rates(100, 10, 400));
        assert_eq!(of("gpt-4o-mini").unwrap().source, "config, of 2026-11-01");
        assert_eq!(of("gpt-4o").unwrap().rates, rates(200, 200, 300));
        assert_eq!(of("o3").unwrap().source, TABLE);
        assert_eq!(
            list.cost("local", &PricedTokens::plain(9, 9), None, noon()),
            Some(NanoUsd(0)),
            "the config may say 0"
        );
    }

    #[test]
    fn names_that_clients_invent_do_not_fill_the_memory() {
        let openai = list("https://api.openai.com/v1", None);
        for number in 0..2 * MODELS_KEPT_MAX {
            assert_eq!(openai.cost(&format!("x{number}"), &PricedTokens::plain(1, 1), None, noon()), None);
        }
        assert_eq!(openai.kept.read().unwrap().len(), MODELS_KEPT_MAX);
        assert!(openai.cost("gpt-4o", &PricedTokens::plain(1, 1), None, noon()).is_some());
    }

    #[test]
    fn a_reported_usage_is_priced_by_its_parts() {
        let of = |usage: Value| PricedTokens::of(&super::super::reported::usage(usage.to_string().as_bytes()).unwrap());
        let anthropic = json!({ "input_tokens": 5, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 1,
            "output_tokens": 2 });
        assert_eq!(of(anthropic), PricedTokens { cached: 7, cache_written: 1, ..PricedTokens::plain(13, 2) });
        let gemini = json!({ "prompt_tokens": 4, "completion_tokens": 10, "total_tokens": 114 });
        assert_eq!(of(gemini), PricedTokens::plain(4, 110), "its reasoning stands in the total only");
        let audio = json!({ "prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": { "audio_tokens": 3 },
            "completion_tokens_details": { "audio_tokens": 4, "reasoning_tokens": 1 } });
        let parts = PricedTokens { audio_input: 3, audio_output: 4, reasoning: 1, ..PricedTokens::plain(9, 5) };
        assert_eq!(of(audio), parts);
        // Audio that was cached costs what is cached, and nothing beside it.
        let mut cached = json!({ "input_tokens": 5000, "output_tokens": 0, "input_token_details": { "audio_tokens": 4500,
            "cached_tokens": 4000, "cached_tokens_details": { "text_tokens": 300, "audio_tokens": 3700 } } });
        let parts = PricedTokens { cached: 4000, audio_input: 800, ..PricedTokens::plain(5000, 0) };
        assert_eq!(of(cached.clone()), parts);
        cached["input_token_details"]["cached_tokens_details"] = Value::Null;
        let parts = PricedTokens { cached: 4000, audio_input: 1000, ..PricedTokens::plain(5000, 0) };
        assert_eq!(of(cached), parts, "no more than there is beside the cached ones");
    }
}
