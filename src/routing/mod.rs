//! Choice of an endpoint: candidates for a model, strategies, health, and retries.

pub mod accounts;
pub mod admission;
pub mod balance;
pub mod budgets;
pub mod caller_accounts;
pub mod callers;
pub mod discovered;
pub mod generated_key;
pub mod health;
pub mod health_record;
mod kept_sessions;
mod lane_choice;
pub mod lanes;
pub mod live;
pub mod objects;
pub(crate) mod path_memory;
pub mod pool;
pub(crate) mod rate_headers;
pub(crate) mod rates;
pub mod refusals;
pub mod retry;
pub mod router;
pub mod sessions;
pub mod shared_health;
pub(crate) mod survey;
pub(crate) mod usage_injection;
