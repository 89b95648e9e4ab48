//! A self-hosted, OpenAI-compatible LLM gateway: load balancing, failover, exact rate limits and token accounting over many
//! endpoints, in one process.
//!
//! The rooms of the house, from the top down. Each imports only rooms below it.
//!
//! | room | owns |
//! |---|---|
//! | `cli` | what a person types and sees |
//! | `server` | the process: listeners, services, drain, reload, handover to a successor |
//! | `proxy` | Pingora's hooks, and the order of a request's stages |
//! | `console` | what those who run the gateway see and do: the admin API and the page |
//! | `admin` | our own answers: health, status, models, tokens, metrics |
//! | `process` | what everybody may ask of the running process |
//! | `billing` | what an answer is charged as, reported or estimated |
//! | `exchange` | one request at one endpoint: hold, commit or drop its answer |
//! | `routing` | who takes a request: candidates, strategies, health, retries |
//! | `ledger` | every count on disk: permits and tokens |
//! | `request_log` | a row for every request and every attempt, in a file of its own |
//! | `telemetry` | metrics and the log |
//! | `response` | readers of answers, pure |
//! | `usage` | tokens of an answer, pure |
//! | `upstream` | the way to an endpoint |
//! | `request` | what is asked: key, body, fields, rewriting |
//! | `fault` | the errors that clients get |
//! | `limit` | rate limits and quotas, pure |
//! | `json` | readers of JSON that build no tree, pure |
//! | `config` | from the file's text to checked values |
//! | `database` | SQLite files of our own: making, migrating, moving aside |
//! | `simulator` | endpoints that behave as a test or a demo wants |

mod admin;
pub mod billing;
pub mod cli;
pub mod config;
mod console;
mod database;
pub mod exchange;
pub mod fault;
mod json;
pub mod ledger;
pub mod limit;
mod process;
pub mod proxy;
pub mod request;
pub mod request_log;
pub mod response;
pub mod routing;
pub mod server;
pub mod simulator;
mod telemetry;
mod upstream;
pub mod usage;
