//! Who takes a request: endpoints that serve its model, the strategy's choice among them, their health, and what follows a failure.

pub mod admission;
pub mod balance;
pub(crate) mod health;
pub mod pool;
pub(crate) mod rate_headers;
pub(crate) mod rates;
pub mod retry;
pub mod router;
pub(crate) mod usage_injection;
