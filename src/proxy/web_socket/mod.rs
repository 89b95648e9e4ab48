//! `WebSocket`s, whose messages are read as they pass: a client's that ask for a response take a permit and name the model as the endpoint
//! does, and those of the endpoint report tokens.

mod accept;
mod stream;

use std::mem;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::{StatusCode, header};
use jiff::Timestamp;
use memchr::memmem;
use pingora::http::ResponseHeader;
use pingora::protocols::http::HttpTask;
use pingora::{Error, ErrorType, Result};
use pingora_proxy::Session;
use tokio::task::AbortHandle;

pub(super) use accept::accept;

use super::context::Context;
use super::outgoing::other_model;
use super::{attempts, drawing};
use crate::billing;
use crate::config::{CallKind, WebSocketPermits};
use crate::exchange::{Ask, Attempt, AttemptBudget};
use crate::fault::{ErrorShape, Fault};
use crate::json::members;
use crate::ledger::{AccountSet, Client, Drawn, Otherwise, OwnDraw, Permit, Refusal, Wanted};
use crate::limit::Stamp;
use crate::request::body_memory::{FREE_BYTES, Memory, Reserved};
use crate::request::connections::{OnConnection, Reason};
use crate::request::fields::{self, Model, ModelPlace};
use crate::request::plain_spelling;
use crate::request::websocket::{self, Message, MessageReader};
use crate::response::websocket::FrameReader;
use crate::routing::admission;
use crate::routing::callers::Ending;
use crate::usage::{Reported, Tokens, mentions_usage};

/// Close of a connection because the gateway, or the endpoint behind it, cannot go on (RFC 6455, 7.4.1 and its registry).
const TRY_AGAIN_LATER: u16 = 1013;
/// Close of a connection because of what the client asked for.
const POLICY_VIOLATION: u16 = 1008;
/// Text of our own that waits for the end of an endpoint's frame. A client that asks for more meanwhile is disconnected.
const WAITING_BYTES_MAX: usize = 64 * 1024;

/// Events that end a response, and report what it took.
const RESPONSE_ENDS: [&[u8]; 4] = [b"response.done", b"response.completed", b"response.incomplete", b"response.failed"];

/// One WebSocket.
#[derive(Debug)]
pub struct WebSocket {
    /// True if the client's side was accepted before an endpoint was chosen.
    is_accepted: bool,
    /// Messages of the client; none once they cannot be read, and pass as they come.
    messages: Option<MessageReader>,
    /// Messages of the endpoint.
    frames: FrameReader,
    /// Tokens that its responses have reported.
    pub tokens: Option<Tokens>,
    responses: Responses,
    /// Text of our own that waits for the end of an endpoint's frame.
    waiting: Vec<u8>,
    /// Room for the messages.
    room: Option<Reserved>,
    /// Cuts it off once its caller's key does.
    cutter: Option<Cutter>,
}

/// A task that ends with what it watches.
#[derive(Debug)]
struct Cutter(AbortHandle);

impl Drop for Cutter {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Responses that have been asked for, and those that have begun.
#[derive(Debug)]
struct Responses {
    /// True while the permit of the session itself has not been used for a response.
    has_first: bool,
    /// Responses that took a permit and have not begun.
    paid: u32,
}

impl WebSocket {
    /// True if the client's side was accepted before an endpoint was chosen.
    pub fn is_accepted(&self) -> bool {
        self.is_accepted
    }

    /// A WebSocket whose client's messages have at most this many bytes.
    pub fn new(is_accepted: bool, bytes_max: usize) -> Self {
        Self {
            is_accepted,
            messages: Some(MessageReader::new(bytes_max)),
            frames: FrameReader::default(),
            tokens: None,
            responses: Responses { has_first: true, paid: 0 },
            waiting: Vec::new(),
            room: None,
            cutter: None,
        }
    }

    /// Has it end when its caller's key is revoked with all that runs.
    pub(super) fn ends_with(&mut self, ending: Arc<Ending>, connection: &OnConnection) {
        let connection = connection.handle();
        let task = tokio::spawn(async move {
            ending.cut().await;
            connection.end(Reason::Revoked);
        });
        self.cutter = Some(Cutter(task.abort_handle()));
    }
}

/// Reads what the client sends, before the endpoint gets it.
pub(super) async fn from_client(
    session: &mut Session,
    body: &mut Option<Bytes>,
    context: &mut Context,
    memory: &Memory,
) -> Result<()> {
    let Some(piece) = body.as_ref() else { return Ok(()) };
    let is_judged = counts_responses(context) || context.arrival.named.is_some();
    let Some(socket) = &mut context.web_socket else { return Ok(()) };
    let is_read = socket.is_accepted || is_judged;
    let Some(messages) = socket.messages.as_mut().filter(|_| is_read) else { return Ok(()) };
    messages.push(piece);
    make_room(socket, memory).await?;
    let mut out = BytesMut::new();
    while let Some(message) = next_message(context, &mut out)? {
        if let Some(frames) = checked(session, context, message).await? {
            out.extend_from_slice(&frames);
        }
    }
    // None would be taken for the client's end.
    *body = Some(out.freeze());
    Ok(())
}

/// True if the endpoint counts each response.
fn counts_responses(context: &Context) -> bool {
    let state = context.exchange.state();
    state.attempt.as_ref().is_some_and(|one| one.asked.endpoint.config.web_socket_permits == WebSocketPermits::Response)
}

/// The next message of the client that is whole. One that cannot be read ends a WebSocket whose messages have to be; any other passes as
/// it comes, from there on.
fn next_message(context: &mut Context, out: &mut BytesMut) -> Result<Option<Message>> {
    let is_judged = context.arrival.named.is_some();
    let Some(socket) = &mut context.web_socket else { return Ok(None) };
    let Some(messages) = &mut socket.messages else { return Ok(None) };
    match messages.next() {
        Ok(message) => Ok(message),
        Err(error) if socket.is_accepted || is_judged => {
            context.tries.cause = Some(format!("a message of the client cannot be read: {error:?}"));
            Error::err_down(ErrorType::InvalidHTTPHeader)
        }
        Err(_) => {
            out.extend_from_slice(&messages.take_rest());
            socket.messages = None;
            Ok(None)
        }
    }
}

/// Makes room for what has come of a message, as for any request's body.
async fn make_room(socket: &mut WebSocket, memory: &Memory) -> Result<()> {
    let held = socket.messages.as_ref().map_or(0, MessageReader::bytes);
    if held <= FREE_BYTES {
        socket.room = None;
        return Ok(());
    }
    if socket.room.is_none() {
        socket.room = memory.room(held).await;
    }
    let has_room = match &mut socket.room {
        Some(room) => room.reach(held).await,
        None => false,
    };
    if has_room { Ok(()) } else { Error::e_explain(ErrorType::InternalError, "no memory for a message of a WebSocket") }
}

/// A client's message as the endpoint gets it; none if it does not.
async fn checked(session: &mut Session, context: &mut Context, message: Message) -> Result<Option<Bytes>> {
    let Some(text) = &message.text else { return Ok(Some(message.frames)) };
    let judged = match judge(context, text) {
        Ok(true) => take_permit(context).await,
        other => other.map(drop),
    };
    if let Err(fault) = judged {
        say(session, context, event(&fault)).await?;
        return Ok(None);
    }
    Ok(Some(mapped(context, &message).unwrap_or(message.frames)))
}

/// True if a message asks for a response that takes a permit. A fault if its caller may not send it.
fn judge(context: &Context, message: &[u8]) -> Result<bool, Fault> {
    let Some(named) = &context.arrival.named else {
        return Ok(counts_responses(context) && is_of_type(message, b"response.create"));
    };
    // Of a caller's own key nothing is let through that the endpoint may read in another way.
    plain_spelling::check_json(message)?;
    let fields = fields::scan(message)?;
    plain_spelling::check_names(&fields)?;
    let has_budget = context.ask.as_ref().is_some_and(|ask| ask.budget.is_some());
    if has_budget && drawing::is_in_background(message) {
        let name = named.caller.name().to_string();
        return Err(Fault::CallWithoutPrice { name, call: CallKind::Responses.name() });
    }
    let is_create = is_of_type(message, b"response.create");
    if is_create {
        named.caller.check_still_open(Timestamp::now())?;
    }
    match fields.model {
        Some(model) => named.caller.check_model(&model.name)?,
        None if is_create && context.ask.as_ref().is_some_and(|ask| ask.model.is_none()) => {
            named.caller.check_without_model()?;
        }
        None => {}
    }
    Ok(is_create && is_counted(context))
}

/// True if each response takes a permit: of the endpoint, or of the caller's own key.
fn is_counted(context: &Context) -> bool {
    let ask = context.ask.as_ref();
    counts_responses(context) || ask.is_some_and(|ask| ask.own_permit.is_some() || ask.budget.is_some())
}

/// The message with the model's name at the endpoint, if it is another one.
fn mapped(context: &Context, message: &Message) -> Option<Bytes> {
    let ask = context.ask.as_ref()?;
    let state = context.exchange.state();
    let other = other_model(ask, state.attempt.as_ref()?)?;
    let fields = fields::scan(message.text.as_deref()?).ok()?;
    let Model { name, place: ModelPlace::Json(range) } = fields.model? else { return None };
    // Of another model it is not known what it is called there.
    let is_asked = ask.model.as_deref() == Some(&*name);
    is_asked.then(|| message.with(range, serde_json::json!(other).to_string().as_bytes()))
}

/// Takes permits for a response, of the endpoint and of the caller's own key; the first one has those of the session.
async fn take_permit(context: &mut Context) -> Result<(), Fault> {
    let counts = counts_responses(context);
    let (Some(socket), Some(ask)) = (&mut context.web_socket, &mut context.ask) else { return Err(Fault::Internal) };
    if !mem::take(&mut socket.responses.has_first) {
        let ledger = ask.pool.ledger.clone();
        let Some(mut attempt) = context.exchange.state().attempt.take() else { return Err(Fault::Internal) };
        // The endpoint's is spent only once there is the caller's as well; until then it is there for the next response.
        let taken = if counts { attempt.take_another_permit(&ledger).await } else { Ok(()) };
        let own = match (&taken, &mut ask.own_permit) {
            (Ok(()), Some(own)) => take_own_permit(own, &ledger).await,
            _ => Ok(()),
        };
        let own = match own {
            Ok(()) => reserve_again(ask, &mut attempt).await,
            Err(fault) => Err(fault),
        };
        if counts && taken.is_ok() && own.is_ok() {
            attempt.spend_another_permit();
        }
        let endpoint = Arc::clone(&attempt.asked.endpoint);
        context.exchange.state().attempt = Some(attempt);
        if let Err(drawn) = taken {
            return Err(attempts::limit_reached(context, &endpoint, drawn));
        }
        own?;
    }
    if let Some(socket) = &mut context.web_socket {
        socket.responses.paid = socket.responses.paid.saturating_add(1);
    }
    Ok(())
}

/// Takes another permit of the caller's own limits, which count a response as a request.
async fn take_own_permit(own: &mut Permit, ledger: &Client) -> Result<(), Fault> {
    match ledger.swap(own).await {
        Drawn::Granted(_, mut permit) => {
            permit.spend();
            *own = permit;
            Ok(())
        }
        Drawn::Refused(refusal) => Err(admission::own_limits_reached(refusal)),
        Drawn::Unavailable => Err(Fault::LedgerUnavailable),
    }
}

/// Reserves what another response may take of the caller's budgets, unless the last one has not settled its own.
async fn reserve_again(ask: &Ask, attempt: &mut Attempt) -> Result<(), Fault> {
    let Some(budget) = ask.budget.as_ref().filter(|_| attempt.budget.is_none()) else { return Ok(()) };
    let (model, ledger) = (attempt.model.name().name, &ask.pool.ledger);
    let wall = ledger.clock().wall;
    let spends = budget.spends(&attempt.asked.endpoint, model, wall).unwrap_or_default();
    let accounts = Arc::new(AccountSet::new(Vec::new()));
    let wanted = vec![Wanted { accounts, not_before: Stamp::default(), spends }];
    let own = OwnDraw { caller: None, budgets: Some(Arc::clone(&budget.set)) };
    match ledger.draw_for(ledger.ticket(), wanted, own, Otherwise::LookElsewhere).await {
        Drawn::Granted(_, mut permit) => {
            let step = budget.step(&attempt.asked.endpoint, model, wall);
            let taken = permit.take_budgets();
            attempt.budget = taken.map(|hold| {
                let mut reserved = Box::new(AttemptBudget::new(hold, spends.known, step, budget.on_overrun));
                reserved.set_sent(true);
                reserved
            });
            Ok(())
        }
        Drawn::Refused(Refusal { budget: Some(held), .. }) => Err(admission::budget_exhausted(&held)),
        Drawn::Refused(_) => Err(Fault::Internal),
        Drawn::Unavailable => Err(Fault::LedgerUnavailable),
    }
}

/// Sends the client an event of ours, between the frames of the endpoint.
async fn say(session: &mut Session, context: &mut Context, event: Vec<u8>) -> Result<()> {
    let Some(socket) = &mut context.web_socket else { return Ok(()) };
    if socket.frames.is_between_messages() && socket.waiting.is_empty() {
        let task = HttpTask::UpgradedBody(Some(event.into()), false);
        return session.downstream_session.response_duplex_vec(vec![task]).await.map(drop);
    }
    socket.waiting.extend(event);
    if socket.waiting.len() > WAITING_BYTES_MAX {
        return Error::err_down(ErrorType::WriteTimedout);
    }
    Ok(())
}

/// Reads what the endpoint sends, and adds what of ours has waited for the end of its frame.
pub(super) fn from_endpoint(body: &mut Option<Bytes>, context: &mut Context) {
    let Context { web_socket: Some(socket), exchange, ask: Some(ask), .. } = context else { return };
    let Some(piece) = body else { return };
    let WebSocket { frames, tokens, responses, .. } = &mut **socket;
    let mut state = exchange.state();
    let Some(attempt) = &mut state.attempt else { return };
    let counts = attempt.asked.endpoint.config.web_socket_permits == WebSocketPermits::Response;
    let own = ask.own.as_ref().map(|own| &own.accounts);
    frames.feed(piece, |message| {
        if (counts || own.is_some() || ask.budget.is_some()) && is_of_type(message, b"response.created") {
            if responses.paid > 0 {
                responses.paid -= 1;
            } else if !mem::take(&mut responses.has_first) {
                // It has begun by itself, so that nothing is left but to count it.
                if counts {
                    attempt.count_another(&ask.pool.ledger);
                }
                if let Some(own) = own {
                    ask.pool.ledger.unlimited(own).spend();
                }
            }
        }
        let Some(reported) = Some(message).filter(|message| mentions_usage(message)).and_then(Reported::from_json)
        else {
            return;
        };
        // Transcriptions of what was said report theirs as well.
        let ends = RESPONSE_ENDS.iter().any(|wanted| is_of_type(message, wanted));
        billing::bill_response(attempt, ask, &reported.usage, ends);
        tokens.get_or_insert_default().merge(&reported.usage.tokens());
    });
    if !socket.waiting.is_empty() && socket.frames.is_between_messages() {
        *body = Some([&piece[..], &mem::take(&mut socket.waiting)].concat().into());
    }
}

/// True if an event is of this type.
fn is_of_type(message: &[u8], wanted: &[u8]) -> bool {
    if memmem::find(message, wanted).is_none() {
        return false;
    }
    let mut is_wanted = false;
    let whole = members::members(message, |key, range| {
        if key == b"type" {
            let range = range.start + 1..range.end.saturating_sub(1).max(range.start + 1);
            is_wanted = message.get(range) == Some(wanted);
        }
    });
    if whole.is_some() {
        return is_wanted;
    }
    // It has an unusual name of a member. What is not JSON is for the other side to judge.
    let read = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(message);
    read.is_ok_and(|read| read.get("type").and_then(|of| of.as_str()).map(str::as_bytes) == Some(wanted))
}

/// A fault as an event, of the shape that the clients of both APIs read.
fn event(fault: &Fault) -> Vec<u8> {
    let error = fault.json(ErrorShape::OpenAi);
    let members = error.strip_prefix('{').unwrap_or(&error);
    let event = format!(r#"{{"type":"error","status":{},{members}"#, fault.status());
    websocket::text_frame(event.as_bytes(), None)
}

/// Ends a WebSocket that was accepted and that no endpoint takes: with the fault, and a close.
pub(super) async fn refuse(session: &mut Session, context: &Context) -> Result<()> {
    let fault = context.fault.as_ref().unwrap_or(&Fault::Internal);
    let is_clients = fault.status() < 500 && fault.status() != 429;
    let close = websocket::close_frame(if is_clients { POLICY_VIOLATION } else { TRY_AGAIN_LATER });
    // The client has had this header already; with it Pingora's session goes over to frames.
    let mut header = ResponseHeader::build(StatusCode::SWITCHING_PROTOCOLS, Some(2))?;
    header.insert_header(header::UPGRADE, "websocket")?;
    header.insert_header(header::CONNECTION, "Upgrade")?;
    session.write_response_header(Box::new(header), false).await?;
    session.write_response_body(Some([event(fault), close].concat().into()), true).await
}
