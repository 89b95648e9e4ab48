//! The real proxy on a port of its own, in front of scripted endpoints; by feature.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, in its helpers too"
)]

mod authority;
mod harness;
mod prices;
mod program;
mod redis;
mod webhook;
mod wire;

mod admin;
mod affinity;
mod agents_day;
mod auth;
mod azure;
mod body;
mod budgets;
mod by_model;
mod callers;
mod chaos;
mod cli;
mod cluster;
mod commands;
mod connections;
mod crash;
mod fallbacks;
mod first_message;
mod formats;
mod forms;
mod headers;
mod health;
mod isolation;
mod key_pools;
mod keys;
mod last_error;
mod ledger;
mod legacy;
mod limits;
mod meaning;
mod metrics;
mod model_limits;
mod night_shift;
mod objects;
mod odd_answers;
mod outbound;
mod own_answers;
mod readmes;
mod realtime;
mod reload;
mod request_log;
mod retry;
mod rooms;
mod routing;
mod silence;
mod sim;
mod strangers;
mod streams;
mod test_command;
mod tls;
mod tokens;
mod traces;
mod upgrade;
