//! Who takes a request: endpoints that serve its model, the strategy's choice among them, their health, and what follows a failure.

pub mod admission;
pub mod balance;
pub mod health;
pub mod pool;
pub mod rate_headers;
pub mod rates;
pub mod retry;
pub mod router;
pub mod usage_injection;
