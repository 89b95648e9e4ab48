// Anthropic's SDK, with an endpoint behind the proxy that speaks Anthropic's format.

import assert from "node:assert/strict";
import { afterEach, beforeEach, test } from "node:test";

import Anthropic from "@anthropic-ai/sdk";

import { CLIENT_KEY, SCRIPTED_KEY, scriptedRequests, startAll, waitUntil } from "./servers.mjs";

const TEXT = "Hello from the scripted endpoint, grüß dich.";
const INPUT_TOKENS = 11;
const OUTPUT_TOKENS = 7;
const messages = [{ role: "user", content: "Hello" }];
const ask = { model: "claude-asked", max_tokens: 100, messages };

let servers;
let client;

const connect = (options) =>
  new Anthropic({ baseURL: servers.url, apiKey: CLIENT_KEY, maxRetries: 0, timeout: 10_000, ...options });

// Each test has servers of its own, as an endpoint whose key is refused is left alone for minutes, and counts begin at 0.
beforeEach(async () => {
  servers = await startAll("scripted.json");
  client = connect();
});
afterEach(() => servers?.stop());

function checkMessage(message) {
  assert.deepEqual(
    message.content.map((block) => block.text),
    [TEXT],
  );
  assert.equal(message.stop_reason, "end_turn");
  assert.equal(message.usage.input_tokens, INPUT_TOKENS);
  assert.equal(message.usage.output_tokens, OUTPUT_TOKENS);
}

/** The endpoint was asked for the mapped name, with its own key, and learned nothing of the client's. */
async function checkRequest(path) {
  const [request, ...more] = await scriptedRequests(servers.scriptedUrl);
  assert.deepEqual(more, []);
  assert.equal(request.path, path);
  assert.equal(request.headers["x-api-key"], SCRIPTED_KEY);
  assert.match(request.headers["anthropic-version"], /^\d{4}-\d\d-\d\d$/);
  assert.equal(JSON.parse(request.body).model, "scripted");
  assert.ok(!JSON.stringify(request).includes(CLIENT_KEY));
}

/** Exactly one answer was counted, of the endpoint that answered, with its reported tokens. */
async function checkCounts() {
  const counted = async () => {
    const answer = await fetch(`${servers.url}/v1/token/stats`, { headers: { authorization: `Bearer ${CLIENT_KEY}` } });
    const { detailedStats } = await answer.json();
    assert.ok(Object.keys(detailedStats).every((id) => id === "messages"));
    return detailedStats.messages;
  };
  assert.ok(await waitUntil(async () => (await counted())?.requests === 1));
  const { promptTokens, completionTokens, estimated } = (await counted()).models.scripted;
  assert.deepEqual([promptTokens, completionTokens, estimated.requests], [INPUT_TOKENS, OUTPUT_TOKENS, 0]);
}

test("create", async () => {
  checkMessage(await client.messages.create(ask));
  await checkRequest("/v1/messages");
  await checkCounts();
});

test("stream", async () => {
  const stream = client.messages.stream(ask);
  const pieces = [];
  stream.on("text", (piece) => pieces.push(piece));
  checkMessage(await stream.finalMessage());
  assert.equal(pieces.length, OUTPUT_TOKENS);
  assert.equal(pieces.join(""), TEXT);
  await checkRequest("/v1/messages");
  await checkCounts();
});

test("count of tokens", async () => {
  const { input_tokens: counted } = await client.messages.countTokens({ model: ask.model, messages });
  assert.equal(counted, INPUT_TOKENS);
  await checkRequest("/v1/messages/count_tokens");
  // No model has read them, so nothing but the answer that follows is counted.
  await client.messages.create(ask);
  await checkCounts();
});

test("key as a bearer token, as ANTHROPIC_AUTH_TOKEN has it sent", async () => {
  checkMessage(await connect({ apiKey: null, authToken: CLIENT_KEY }).messages.create(ask));
  await checkRequest("/v1/messages");
});

for (const stream of [false, true]) {
  test(`endpoint whose key is refused is passed over${stream ? ", streamed" : ""}`, async () => {
    const both = { ...ask, model: "claude-of-both" };
    checkMessage(await (stream ? client.messages.stream(both).finalMessage() : client.messages.create(both)));
    const keys = (await scriptedRequests(servers.scriptedUrl)).map((request) => request.headers["x-api-key"]);
    assert.deepEqual(keys, ["sk-refused", SCRIPTED_KEY]);
    await checkCounts();
  });
}

test("wrong key", async () => {
  await assert.rejects(connect({ apiKey: "sk-wrong" }).messages.create(ask), Anthropic.AuthenticationError);
  assert.deepEqual(await scriptedRequests(servers.scriptedUrl), []);
});
