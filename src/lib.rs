//! One self-hosted process in front of many OpenAI-format endpoints.
//!
//! The modules in the order in which a request passes through them:
//!
//! | stage | module | takes → gives |
//! |---|---|---|
//! | listen | [`server`] | config → a serving process |
//! | order of the stages | [`proxy`] | Pingora's hooks → calls of the stages below |
//! | who may call | [`auth`] | key → caller |
//! | our own answers | [`admin`] | path → health, status, models |
//! | what is asked for | [`request`], [`json_walk`], [`memory`] | body → model, stream |
//! | who serves it | [`route`] | model → candidates |
//! | which of them | [`balance`], [`health`] | candidates → one |
//! | may it be asked | [`admission`], [`limit`], [`ledger`] | one → one with a permit, or another |
//! | where it is | [`upstream`], [`tunnel`] | endpoint → peer |
//! | what it is sent | [`rewrite`], [`cork`] | the client's bytes → the endpoint's |
//! | what comes back | [`replay`], [`respond`], [`blot`], [`rates`], [`rate_headers`] | answer → hold, commit or drop |
//! | what of a stream goes on | [`relay`], [`sse`], [`shape`], [`json_scan`] | pieces → whole events |
//! | what it cost | [`usage`], [`decode`], [`billing`], [`estimate`] | answer → tokens |
//! | what follows a failure | [`retry`] | outcome → next attempt or not |
//! | what is told | [`error`], [`record`], [`metrics`] | fault → error object; request → log line, metrics |
//!
//! Beside the way: [`config`] (file → what is meant), [`reload`], [`certificate`], [`upgrade`], [`notify`], [`secret`], [`pool`] (the endpoints of one config, and the live state
//! behind them), [`process`] (what may be asked of the process), [`context`] (one request's state), [`exchange`] (one request at one endpoint), [`scheduling`] (who goes first), [`cli`], [`banner`], [`log_output`], [`demo`], [`simulator`].

pub mod admin;
pub mod admission;
pub mod auth;
pub mod balance;
pub mod banner;
pub mod billing;
pub mod blot;
pub mod certificate;
pub mod cli;
pub mod config;
pub mod context;
pub mod cork;
pub mod decode;
pub mod demo;
pub mod error;
pub mod estimate;
pub mod exchange;
pub mod health;
pub mod json_scan;
pub mod json_walk;
pub mod ledger;
pub mod limit;
pub mod log_output;
pub mod memory;
pub mod metrics;
pub mod notify;
pub mod pool;
pub mod process;
pub mod proxy;
pub mod rate_headers;
pub mod rates;
pub mod record;
pub mod relay;
pub mod reload;
pub mod replay;
pub mod request;
pub mod respond;
pub mod retry;
pub mod rewrite;
pub mod route;
pub mod scheduling;
pub mod secret;
pub mod server;
pub mod shape;
pub mod simulator;
pub mod sse;
pub mod tunnel;
pub mod upgrade;
pub mod upstream;
pub mod usage;
