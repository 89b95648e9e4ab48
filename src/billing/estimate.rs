//! Estimates the tokens of answers whose endpoint does not report them, or that broke off before it could: on a thread of its
//! own, never on a request's way, and never mixed with reported tokens.
//!
//! An estimate counts text, as OpenAI's own tokenizers would; pictures and audio are left out. For models of other vendors it
//! is a rough estimate.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use tiktoken_rs::CoreBPE;

use crate::exchange::AttemptBudget;
use crate::ledger::budgets::Amount;
use crate::ledger::{AccountSet, Reservation, Spent};
use crate::request::call::Call;
use crate::request::fields::ServiceTier;
use crate::routing::callers::Caller;
use crate::routing::pool::{Endpoint, Pool};
use crate::routing::router::Candidates;
use crate::telemetry::metrics::metrics;
use crate::usage::prices::PricedTokens;
use crate::usage::{AnswerText, Cost, answer_texts};

/// Answers that may wait for their estimate, and the bytes that they may hold. More are dropped and counted.
const JOBS_MAX: usize = 1000;
const BYTES_MAX: usize = 64 * 1024 * 1024;
/// Longest time that a process waits at its end for the estimates that are due.
const CLOSE_MAX: Duration = Duration::from_secs(2);
/// A tokenizer's time may grow with the square of a word's length, so a text is given to it in parts of this size.
const PART_BYTES: usize = 1024;

/// An answer to be estimated.
#[derive(Debug)]
pub struct Job {
    /// The request's id, for the log.
    pub id: String,
    /// The config it ran under.
    pub pool: Arc<Pool>,
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// Accounts that the tokens are charged to.
    pub accounts: Arc<AccountSet>,
    /// The caller, if it has a key of its own.
    pub caller: Option<Arc<Caller>>,
    /// Accounts of that key, if it has limits.
    pub caller_accounts: Option<Arc<AccountSet>>,
    /// Tokens that are reserved of those until then.
    pub reservation: Option<Reservation>,
    /// What is reserved of the caller's budgets until then.
    pub budget: Option<Box<AttemptBudget>>,
    /// The model that answered, cut to a sane length.
    pub model: String,
    /// Tier of service that the request asked for.
    pub tier: Option<ServiceTier>,
    /// Candidates of the client's request.
    pub candidates: Arc<Candidates>,
    /// Call of the API.
    pub call: Call,
    /// The request's body; empty if it is too long to be estimated.
    pub prompt: Bytes,
    /// The prompt's tokens, if at least those were reported.
    pub prompt_reported: Option<u64>,
    /// Text of the answer.
    pub answer: AnswerText,
}

impl Job {
    fn bytes(&self) -> usize {
        let answer = match &self.answer {
            AnswerText::None => 0,
            AnswerText::Sample { sample, .. } => sample.capacity(),
            AnswerText::Json { kept, .. } => *kept,
        };
        self.prompt.len() + answer
    }
}

/// Estimates, one after the other. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Estimator(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<JobQueue>,
    changed: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct JobQueue {
    jobs: VecDeque<Job>,
    bytes: usize,
    /// True while the thread runs. It is started for the first job, since its vocabularies take some tens of megabytes.
    runs: bool,
    /// True while the thread works on a job.
    works: bool,
    closing: bool,
}

impl Estimator {
    /// Takes a job, if there is room for it.
    pub fn submit(&self, job: Job) {
        let mut queue = self.lock();
        let bytes = job.bytes();
        let has_room = queue.jobs.len() < JOBS_MAX && queue.bytes + bytes <= BYTES_MAX && !queue.closing;
        if !has_room || !self.has_thread(&mut queue) {
            drop(queue);
            self.drop_one();
            return;
        }
        queue.bytes += bytes;
        queue.jobs.push_back(job);
        self.0.changed.notify_all();
    }

    /// Answers that wait for their estimate.
    pub fn waiting(&self) -> usize {
        let queue = self.lock();
        queue.jobs.len() + usize::from(queue.works)
    }

    /// Answers that were not estimated, or not whole: there was no room, no time before the end, or the prompt was too long.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Takes no more jobs, and waits, within bounds, until those it has are done. Before the ledger is closed.
    pub fn close(&self) {
        let mut queue = self.lock();
        queue.closing = true;
        self.0.changed.notify_all();
        let busy = |queue: &mut JobQueue| queue.works || !queue.jobs.is_empty();
        let waited = self.0.changed.wait_timeout_while(queue, CLOSE_MAX, busy);
        let (mut queue, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let left = queue.jobs.len();
        queue.jobs.clear();
        drop(queue);
        (0..left).for_each(|_| self.drop_one());
    }

    fn drop_one(&self) {
        let dropped = self.0.dropped.fetch_add(1, Ordering::Relaxed) + 1;
        if dropped.is_power_of_two() {
            log::warn!(
                "the tokens of {dropped} answers were neither reported by their endpoints nor estimated completely: too many at once, or \
                 too long a prompt"
            );
        }
    }

    fn has_thread(&self, queue: &mut JobQueue) -> bool {
        if !queue.runs {
            let estimator = self.clone();
            let thread = std::thread::Builder::new().name("estimates".into()).spawn(move || estimator.work());
            match thread {
                Ok(_) => queue.runs = true,
                Err(error) => log::error!("no thread for estimates of tokens: {error}"),
            }
        }
        queue.runs
    }

    fn work(&self) {
        loop {
            let mut queue = self.lock();
            queue.works = false;
            self.0.changed.notify_all();
            let idle = |queue: &mut JobQueue| queue.jobs.is_empty() && !queue.closing;
            let mut queue = self.0.changed.wait_while(queue, idle).unwrap_or_else(PoisonError::into_inner);
            let Some(job) = queue.jobs.pop_front() else { return };
            queue.bytes -= job.bytes();
            queue.works = true;
            drop(queue);
            // The tokenizer panics on a text that its expressions give up on.
            if catch_unwind(AssertUnwindSafe(|| settle(job))).unwrap_or(Estimated::Partly) == Estimated::Partly {
                self.drop_one();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, JobQueue> {
        // Nothing panics while it is held.
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Result of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Estimated {
    /// The whole text was estimated.
    Whole,
    /// Not all: the prompt was too long.
    Partly,
}

/// Estimates an answer and counts it.
fn settle(job: Job) -> Estimated {
    let Job {
        id,
        pool,
        endpoint,
        accounts,
        caller,
        caller_accounts,
        reservation,
        budget,
        tier,
        model,
        candidates,
        call,
        prompt,
        prompt_reported,
        answer,
    } = job;
    let tokenizer = tokenizer(&model);
    let completion = completion_tokens(tokenizer, call, &answer);
    // No tokens to estimate: an error with a status of success, or a response that is made in the background later.
    if completion == 0 && prompt_reported.is_none() && call != Call::Embeddings {
        return Estimated::Whole;
    }
    let is_known = prompt_reported.is_some() || !prompt.is_empty();
    let prompt = prompt_reported.unwrap_or_else(|| prompt_tokens(tokenizer, &prompt));
    let shown = if is_known { prompt.to_string() } else { "unknown".to_owned() };
    let endpoint_id = &endpoint.config.id;
    log::info!(
        "request {id}: endpoint {endpoint_id} reported no tokens; estimated prompt_tokens={shown} completion_tokens={completion}",
    );
    let clock = pool.clock();
    let price = endpoint.prices.cost(&model, &PricedTokens::plain(prompt, completion), tier, clock.wall);
    let cost = Cost::estimated(prompt, completion).priced(price);
    if let Some(metrics) = metrics() {
        metrics.spent(endpoint_id, candidates.label(), &cost, None);
        if let Some(caller) = &caller {
            metrics.spent_with(&caller.counters, &cost);
        }
    }
    let key = caller.as_ref().map(|caller| caller.name());
    let spent = Spent::now(endpoint_id, &model, cost, &pool.server.timezone, clock.wall).by(key);
    pool.ledger.spend_tokens(&accounts, caller_accounts.as_ref(), spent, clock.boot);
    // Of a prompt that was too long to be kept, what was foreseen stands.
    if let Some(budget) = budget.filter(|_| is_known) {
        budget.settle(Amount { tokens: cost.tokens(), nano_usd: price.unwrap_or_default().0 });
    }
    // Only now, so that the tokens are always counted, in one way or the other.
    drop(reservation);
    if is_known { Estimated::Whole } else { Estimated::Partly }
}

/// OpenAI's for its models, its latest for all others.
fn tokenizer(model: &str) -> &'static CoreBPE {
    tiktoken_rs::bpe_for_model(model).unwrap_or_else(|_| tiktoken_rs::o200k_base_singleton())
}

fn count(tokenizer: &CoreBPE, text: &str) -> u64 {
    let mut rest = text;
    let mut tokens = 0;
    while !rest.is_empty() {
        let (part, after) = rest.split_at(part_end(rest));
        tokens += tokenizer.count_ordinary(part);
        rest = after;
    }
    u64::try_from(tokens).unwrap_or(u64::MAX)
}

/// Length of the first part of a text: it ends between two words if it can.
fn part_end(text: &str) -> usize {
    if text.len() <= PART_BYTES {
        return text.len();
    }
    let limit = (0..=PART_BYTES).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(text.len());
    let word = text.get(..limit).and_then(|part| part.rfind(char::is_whitespace));
    word.filter(|at| *at > 0).unwrap_or(limit)
}

/// The tokens of a request's body.
fn prompt_tokens(tokenizer: &CoreBPE, body: &[u8]) -> u64 {
    /// Tokens around each message of a chat, and at the beginning of its answer.
    const MESSAGE_TOKENS: u64 = 3;
    let Ok(body) = serde_json::from_slice::<Value>(body) else { return 0 };
    let mut tokens = 0;
    for key in ["messages", "prompt", "input", "instructions", "system"] {
        if let Some(value) = body.get(key) {
            tokens += text_tokens(tokenizer, value);
        }
    }
    if let Some(messages) = body.get("messages").and_then(Value::as_array) {
        let count = u64::try_from(messages.len()).unwrap_or_default();
        tokens += (count + 1) * MESSAGE_TOKENS;
    }
    if let Some(tools) = body.get("tools").filter(|tools| !tools.is_null()) {
        tokens += count(tokenizer, &tools.to_string());
    }
    tokens
}

/// The tokens of the texts within a value. A number is a token, as in a prompt that is tokenized already.
fn text_tokens(tokenizer: &CoreBPE, value: &Value) -> u64 {
    const TEXTS: [&str; 9] =
        ["role", "content", "text", "name", "arguments", "output", "tool_calls", "function", "reasoning_content"];
    match value {
        Value::String(text) => count(tokenizer, text),
        Value::Array(items) => items.iter().map(|item| text_tokens(tokenizer, item)).sum(),
        Value::Object(fields) => {
            TEXTS.iter().filter_map(|key| fields.get(*key)).map(|value| text_tokens(tokenizer, value)).sum()
        }
        Value::Number(_) => 1,
        Value::Null | Value::Bool(_) => 0,
    }
}

/// The tokens of the part of an answer that was received.
fn completion_tokens(tokenizer: &CoreBPE, call: Call, answer: &AnswerText) -> u64 {
    match answer {
        AnswerText::None => 0,
        AnswerText::Sample { sample, bytes } => scaled(count(tokenizer, &unescaped(sample)), sample.len(), *bytes),
        AnswerText::Json { pieces, kept, bytes } => {
            let mut tokens = 0;
            answer_texts(call, &pieces.concat(), |text| tokens += count(tokenizer, &unescaped(text)));
            if tokens == 0 { 0 } else { scaled(tokens, *kept, *bytes) }
        }
    }
}

/// Extrapolates from the part of a text that was kept.
fn scaled(tokens: u64, kept: usize, bytes: u64) -> u64 {
    /// Bytes of a token of ordinary text, used if nothing could be kept.
    const TOKEN_BYTES: u64 = 4;
    match u128::try_from(kept) {
        Ok(kept) if kept > 0 => u64::try_from(u128::from(tokens) * u128::from(bytes) / kept).unwrap_or(u64::MAX),
        _ => bytes / TOKEN_BYTES,
    }
}

/// A text as it stands in JSON, read.
fn unescaped(raw: &[u8]) -> Cow<'_, str> {
    let text = String::from_utf8_lossy(raw);
    match serde_json::from_str::<String>(&format!("\"{text}\"")) {
        Ok(text) => Cow::Owned(text),
        // The text was cut somewhere; the rest is near enough.
        Err(_) => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exchange::PROMPT_BYTES_MAX;
    use serde_json::json;

    fn tokens(text: &str) -> u64 {
        count(tokenizer("gpt-4o"), text)
    }

    #[test]
    fn texts_are_counted_as_openais_tokenizers_do() {
        assert_eq!(tokens("hello world"), 2);
        assert_eq!(tokens(""), 0);
        // In parts as in one, but for a word that is cut.
        let text = "The quick brown fox jumps over the lazy dog. ".repeat(500);
        let whole = u64::try_from(tokenizer("gpt-4o").count_ordinary(&text)).unwrap();
        assert!(tokens(&text).abs_diff(whole) <= 25, "{} against {whole}", tokens(&text));
    }

    #[test]
    fn no_text_takes_long() {
        let begun = std::time::Instant::now();
        for text in ["a".repeat(PROMPT_BYTES_MAX), " ".repeat(PROMPT_BYTES_MAX), "é".repeat(PROMPT_BYTES_MAX / 2)] {
            assert!(tokens(&text) > 1000);
        }
        // Without the parts it would be minutes.
        assert!(begun.elapsed() < Duration::from_mins(1), "{:?}", begun.elapsed());
    }

    #[test]
    fn prompts_of_every_call_are_read() {
        let of = |body: Value| prompt_tokens(tokenizer("gpt-4o"), body.to_string().as_bytes());
        let chat = json!({ "messages": [
            { "role": "system", "content": "hello world" },
            { "role": "user", "content": [{ "type": "text", "text": "hello world" },
                { "type": "image_url", "image_url": { "url": "data:image/png;base64,AAAA" } }] },
        ] });
        // Two messages and the answer's beginning, two roles, two texts.
        assert_eq!(of(chat), 3 * 3 + 2 + 4);
        assert_eq!(of(json!({ "prompt": "hello world" })), 2);
        assert_eq!(of(json!({ "prompt": [1, 2, 3] })), 3);
        assert_eq!(of(json!({ "input": ["hello world", "hello"] })), 3);
        assert_eq!(
            of(json!({ "input": [{ "role": "user", "content": [{ "text": "hello world" }] }],
            "instructions": "hello" })),
            4
        );
        assert!(of(json!({ "messages": [], "tools": [{ "name": "f" }] })) > 3);
        assert_eq!(of(json!([])), 0);
        assert_eq!(prompt_tokens(tokenizer("x"), b"not json"), 0);
    }

    #[test]
    fn answers_are_read_whole_sampled_or_cut() {
        let of = |answer: &AnswerText| completion_tokens(tokenizer("gpt-4o"), Call::Completion, answer);
        let sample = |text: &str, times: u64| AnswerText::Sample {
            sample: text.as_bytes().to_vec(),
            bytes: times * u64::try_from(text.len()).unwrap(),
        };
        assert_eq!(of(&sample("hello world", 1)), 2);
        assert_eq!(of(&sample("hello world", 10)), 20, "the rest is like it");
        assert_eq!(of(&sample(r"hello\u0020world", 1)), 2);
        assert_eq!(of(&AnswerText::None), 0);
        assert_eq!(of(&AnswerText::Sample { sample: Vec::new(), bytes: 400 }), 100, "nothing of it could be kept");
        let json = |text: &'static str| AnswerText::Json {
            pieces: vec![Bytes::from_static(text.as_bytes())],
            kept: text.len(),
            bytes: u64::try_from(text.len()).unwrap(),
        };
        assert_eq!(of(&json(r#"{"id":"x","choices":[{"message":{"role":"assistant","content":"hello world"}}]}"#)), 2);
        assert_eq!(of(&json(r#"{"id":"x","choices":[{"message":{"content":"hello world"},"fini"#)), 2, "cut");
    }
}
