//! Either side of an HTTP/1 connection, byte by byte, and an endpoint that a test plays itself.

use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;

use bytes::Bytes;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufStream};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::KEY;

/// What a connection consists of: TCP, or TLS over it.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A connection.
pub(crate) struct Wire(BufStream<Box<dyn Stream>>);

/// A request's or a response's header.
#[derive(Debug)]
pub(crate) struct Head {
    /// The request line or the status line.
    pub line: String,
    pub headers: Vec<(String, String)>,
}

impl Head {
    pub(crate) fn status(&self) -> u16 {
        self.line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{self:?}"))
    }

    /// All values of a header, joined.
    pub(crate) fn header(&self, name: &str) -> Option<String> {
        let values: Vec<_> = self
            .headers
            .iter()
            .filter(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
            .collect();
        (!values.is_empty()).then(|| values.join(", "))
    }

    fn is_chunked(&self) -> bool {
        self.header("transfer-encoding").is_some_and(|value| value.contains("chunked"))
    }

    fn length(&self) -> usize {
        self.header("content-length").map_or(0, |value| value.parse().unwrap())
    }
}

impl Wire {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self::over(TcpStream::connect(address).await.unwrap())
    }

    fn over(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self::of(stream)
    }

    pub(crate) fn of(stream: impl Stream + 'static) -> Self {
        Self(BufStream::new(Box::new(stream)))
    }

    /// What one read of the system gives: all of a packet.
    pub(crate) async fn one_read(&mut self) -> Vec<u8> {
        let bytes = self.0.fill_buf().await.unwrap().to_vec();
        self.0.consume(bytes.len());
        bytes
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).await.unwrap();
    }

    pub(crate) async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.0.write_all(bytes.as_ref()).await?;
        self.0.flush().await
    }

    /// The next header. None if the connection ends before it.
    pub(crate) async fn head(&mut self) -> Option<Head> {
        let line = self.line().await?;
        let mut headers = Vec::new();
        loop {
            let line = self.line().await?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        Some(Head { line, headers })
    }

    async fn line(&mut self) -> Option<String> {
        let mut line = Vec::new();
        // A reset ends the connection as a close does.
        let read = self.0.read_until(b'\n', &mut line).await.unwrap_or(0);
        (read > 0).then(|| String::from_utf8_lossy(line.trim_ascii_end()).into_owned())
    }

    /// One chunk of a chunked body; the last one is empty. None if the connection ends before it.
    pub(crate) async fn chunk(&mut self) -> Option<Bytes> {
        let size = self.line().await?;
        let size = usize::from_str_radix(&size, 16).unwrap_or_else(|_| panic!("no chunk: {size}"));
        let bytes = self.exactly(size + 2).await?;
        Some(bytes.slice(..size))
    }

    /// The next so many bytes. None if the connection ends before them.
    pub(crate) async fn exactly(&mut self, size: usize) -> Option<Bytes> {
        let mut bytes = vec![0; size];
        self.0.read_exact(&mut bytes).await.ok()?;
        Some(bytes.into())
    }

    /// The body that follows a header which says how it is framed.
    pub(crate) async fn body(&mut self, head: &Head) -> Bytes {
        if !head.is_chunked() {
            return self.exactly(head.length()).await.expect("the body is cut");
        }
        let mut body = Vec::new();
        loop {
            let chunk = self.chunk().await.expect("the last chunk is missing");
            if chunk.is_empty() {
                return body.into();
            }
            body.extend_from_slice(&chunk);
        }
    }

    /// A whole message.
    pub(crate) async fn message(&mut self) -> (Head, Bytes) {
        let head = self.head().await.expect("the connection ended before a header");
        let body = self.body(&head).await;
        (head, body)
    }

    /// Everything up to the connection's end.
    pub(crate) async fn rest(&mut self) -> String {
        let mut bytes = Vec::new();
        // How it ends is not asked here: a reset after the answer is an end as well.
        self.0.read_to_end(&mut bytes).await.unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// A request with the right key, as text. `headers` are whole lines without their ends.
pub(crate) fn request(method: &str, path: &str, headers: &[&str], body: &str) -> String {
    let mut text = format!("{method} {path} HTTP/1.1\r\nhost: proxy\r\nauthorization: Bearer {KEY}\r\n");
    for header in headers {
        write!(text, "{header}\r\n").unwrap();
    }
    if !body.is_empty() {
        write!(text, "content-length: {}\r\n", body.len()).unwrap();
    }
    text + "\r\n" + body
}

/// A POST of JSON to the chat call.
pub(crate) fn post_chat(body: &serde_json::Value) -> String {
    request("POST", "/v1/chat/completions", &["content-type: application/json"], &body.to_string())
}

/// An endpoint that a test plays itself.
pub(crate) struct ByHand(TcpListener);

impl ByHand {
    pub(crate) async fn bind() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    pub(crate) fn base_url(&self) -> String {
        format!("http://{}", self.0.local_addr().unwrap())
    }

    /// The next connection.
    pub(crate) async fn accept(&self) -> Wire {
        Wire::over(self.0.accept().await.unwrap().0)
    }

    /// The next connection and the first request on it.
    pub(crate) async fn call(&self) -> (Wire, Head, Bytes) {
        let mut wire = self.accept().await;
        let (head, body) = wire.message().await;
        (wire, head, body)
    }
}

/// The header of an event stream, and one event in a chunk.
pub(crate) const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// An event with text in it, as its stream has it.
pub(crate) fn event(text: &str) -> String {
    format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
}

/// The same as a chunk.
pub(crate) fn chunked(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}
