// An endpoint that says the same to everybody, in three dialects: OpenAI's chat and responses, and Anthropic's messages.
// It shares no code with the proxy, takes one key only, and shows at /control/requests what has arrived.
//
// The model `scripted-tool` first asks the agent to run a command, and gives the text once the command's output has come.

import { createServer } from "node:http";

const KEY = "sk-scripted";
const PIECES = ["Hello ", "from ", "the ", "scripted ", "endpoint, ", "grüß ", "dich."];
const TEXT = PIECES.join("");
const [INPUT_TOKENS, OUTPUT_TOKENS] = [11, PIECES.length];
const CREATED = 1_700_000_000;
const COMMAND = "echo $((6 * 7))-from-the-agent";

const arrived = [];

/** Server-sent events: OpenAI's and Anthropic's event names are the `type` of what they carry. */
const named = (events) => events.map((event) => `event: ${event.type}\ndata: ${JSON.stringify(event)}\n\n`).join("");
const unnamed = (chunks) => chunks.map((chunk) => `data: ${JSON.stringify(chunk)}\n\n`).join("");

/** Whether the command that is to be run has not been run yet. */
const wantsTool = (model, input, isOutput) => model === "scripted-tool" && !input.some(isOutput);

/** JSON as a stream brings it: in two pieces, neither of which is JSON. */
const halves = (text) => [text.slice(0, 9), text.slice(9)];

function chat({ model, stream, stream_options: options, messages }) {
  const usage = {
    prompt_tokens: INPUT_TOKENS,
    completion_tokens: OUTPUT_TOKENS,
    total_tokens: INPUT_TOKENS + OUTPUT_TOKENS,
  };
  const common = { id: "chatcmpl-scripted", created: CREATED, model };
  if (!stream) {
    const message = { role: "assistant", content: TEXT };
    return { ...common, object: "chat.completion", choices: [{ index: 0, message, finish_reason: "stop" }], usage };
  }
  const chunk = (choices, more) => ({ ...common, object: "chat.completion.chunk", choices, ...more });
  const piece = (delta, finish_reason = null) => chunk([{ index: 0, delta, finish_reason }]);
  const chunks = [piece({ role: "assistant", content: "" })];
  if (wantsTool(model, messages, ({ role }) => role === "tool")) {
    const call = (more) => piece({ tool_calls: [{ index: 0, ...more }] });
    const given = JSON.stringify({ command: COMMAND, description: "Prints a number" });
    chunks.push(call({ id: "call_scripted", type: "function", function: { name: "bash", arguments: "" } }));
    chunks.push(...halves(given).map((half) => call({ function: { arguments: half } })), piece({}, "tool_calls"));
  } else {
    chunks.push(...PIECES.map((content) => piece({ content })), piece({}, "stop"));
  }
  if (options?.include_usage) chunks.push(chunk([], { usage }));
  return `${unnamed(chunks)}data: [DONE]\n\n`;
}

function responses({ model, stream, input }) {
  const usage = {
    input_tokens: INPUT_TOKENS,
    input_tokens_details: { cached_tokens: 0 },
    output_tokens: OUTPUT_TOKENS,
    output_tokens_details: { reasoning_tokens: 0 },
    total_tokens: INPUT_TOKENS + OUTPUT_TOKENS,
  };
  const response = (status, output) => ({
    id: "resp_scripted",
    object: "response",
    created_at: CREATED,
    model,
    status,
    output,
    ...(status === "completed" ? { usage } : {}),
  });
  const whole = ({ events, item }) => {
    const at = { output_index: 0 };
    const added = { ...item, status: "in_progress", ...(item.content ? { content: [] } : { arguments: "" }) };
    return named([
      { type: "response.created", response: response("in_progress", []) },
      { type: "response.output_item.added", ...at, item: added },
      ...events.map((event) => ({ ...event, ...at, item_id: item.id })),
      { type: "response.output_item.done", ...at, item },
      { type: "response.completed", response: response("completed", [item]) },
    ]);
  };
  const wants = wantsTool(model, input, ({ type }) => type === "function_call_output");
  const answer = wants ? toolCall() : message();
  return stream ? whole(answer) : response("completed", [answer.item]);
}

function message() {
  const part = (text) => ({ type: "output_text", text, annotations: [] });
  const at = { content_index: 0 };
  return {
    item: { id: "msg_scripted", type: "message", role: "assistant", status: "completed", content: [part(TEXT)] },
    events: [
      { type: "response.content_part.added", ...at, part: part("") },
      ...PIECES.map((delta) => ({ type: "response.output_text.delta", ...at, delta })),
      { type: "response.output_text.done", ...at, text: TEXT },
      { type: "response.content_part.done", ...at, part: part(TEXT) },
    ],
  };
}

function toolCall() {
  const call = { name: "exec_command", arguments: JSON.stringify({ cmd: COMMAND }) };
  return {
    item: { id: "fc_scripted", type: "function_call", call_id: "call_scripted", status: "completed", ...call },
    events: [
      ...halves(call.arguments).map((delta) => ({ type: "response.function_call_arguments.delta", delta })),
      { type: "response.function_call_arguments.done", arguments: call.arguments },
    ],
  };
}

function messages({ model, stream }) {
  const message = (content, stop_reason, output_tokens) => ({
    id: "msg_scripted",
    type: "message",
    role: "assistant",
    model,
    content,
    stop_reason,
    stop_sequence: null,
    usage: {
      input_tokens: INPUT_TOKENS,
      cache_creation_input_tokens: 0,
      cache_read_input_tokens: 0,
      output_tokens,
    },
  });
  if (!stream) return message([{ type: "text", text: TEXT }], "end_turn", OUTPUT_TOKENS);
  const at = { index: 0 };
  return named([
    { type: "message_start", message: message([], null, 1) },
    { type: "content_block_start", ...at, content_block: { type: "text", text: "" } },
    { type: "ping" },
    ...PIECES.map((text) => ({ type: "content_block_delta", ...at, delta: { type: "text_delta", text } })),
    { type: "content_block_stop", ...at },
    {
      type: "message_delta",
      delta: { stop_reason: "end_turn", stop_sequence: null },
      usage: { output_tokens: OUTPUT_TOKENS },
    },
    { type: "message_stop" },
  ]);
}

const bearer = ({ authorization }) => authorization === `Bearer ${KEY}`;
const openaiRefusal = {
  error: {
    message: "Incorrect API key provided.",
    type: "invalid_request_error",
    param: null,
    code: "invalid_api_key",
  },
};
/** Anthropic's API takes no call without the version of its format. */
const anthropicKey = (headers) => headers["x-api-key"] === KEY && headers["anthropic-version"] !== undefined;
const anthropicRefusal = { type: "error", error: { type: "authentication_error", message: "invalid x-api-key" } };

const CALLS = {
  "/v1/chat/completions": { answer: chat, knows: bearer, refusal: openaiRefusal },
  "/v1/responses": { answer: responses, knows: bearer, refusal: openaiRefusal },
  "/v1/messages": { answer: messages, knows: anthropicKey, refusal: anthropicRefusal },
  "/v1/messages/count_tokens": {
    answer: () => ({ input_tokens: INPUT_TOKENS }),
    knows: anthropicKey,
    refusal: anthropicRefusal,
  },
};

/** The status and the body: text is a stream of events, anything else JSON. */
function answerTo({ method, path, headers, body }) {
  const call = CALLS[path.split("?")[0]];
  if (method !== "POST" || !call) return [404, { error: { message: `no ${method} ${path}`, code: "unknown_url" } }];
  if (!call.knows(headers)) return [401, call.refusal];
  return [200, call.answer(JSON.parse(body))];
}

function control(method) {
  if (method === "DELETE") arrived.length = 0;
  return [200, arrived];
}

const server = createServer(async (request, response) => {
  const chunks = await request.toArray();
  const { method, url: path, headers } = request;
  const one = { method, path, headers, body: Buffer.concat(chunks).toString() };
  const controls = path === "/control/requests";
  if (!controls) arrived.push(one);
  const [status, answer] = controls ? control(method) : answerTo(one);
  const events = typeof answer === "string";
  response.writeHead(status, { "content-type": events ? "text/event-stream" : "application/json" });
  response.end(events ? answer : JSON.stringify(answer));
});
server.listen(0, "127.0.0.1", () => console.log(`listening on http://127.0.0.1:${server.address().port}`));
