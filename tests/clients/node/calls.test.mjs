// What clients call, and what the SDK makes of the answers.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";

import OpenAI, { APIUserAbortError } from "openai";

import { CLIENT_KEY, startAll, waitUntil } from "./servers.mjs";

const messages = [{ role: "user", content: "Hello" }];
let servers;
let client;

before(async () => {
  servers = await startAll("apis.json");
  client = new OpenAI({ baseURL: `${servers.url}/v1`, apiKey: CLIENT_KEY, maxRetries: 0, timeout: 10_000 });
});
after(() => servers?.stop());

async function collect(stream) {
  const all = [];
  for await (const one of stream) all.push(one);
  return all;
}

const pieces = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta.content).filter(Boolean);

test("chat, with a mapped model", async () => {
  const answer = await client.chat.completions.create({ model: "gpt-mapped", messages });
  assert.equal(answer.model, "sim:events=7");
  assert.equal(answer.usage.completion_tokens, 7);
  assert.equal(answer.choices[0].message.content.split(" ").length, 7);
});

test("stream", async () => {
  const stream = await client.chat.completions.create({
    model: "sim:events=6",
    messages,
    stream: true,
    stream_options: { include_usage: true },
  });
  const chunks = await collect(stream);
  assert.equal(pieces(chunks).length, 6);
  assert.equal(chunks.at(-1).usage.completion_tokens, 6);
});

test("abort of a stream ends the endpoint's work", async () => {
  const inFlight = async () => (await client.get("/status")).apis.find((api) => api.id === "simulated").inFlight;
  // Left alone, the endpoint would stream for 50 s.
  const stream = await client.chat.completions.create({ model: "sim:events=1000,chunkDelayMs=50", messages, stream: true });
  let read = 0;
  for await (const chunk of stream) {
    read += pieces([chunk]).length;
    if (read === 3) {
      assert.equal(await inFlight(), 1);
      stream.controller.abort();
    }
  }
  assert.equal(read, 3);
  assert.ok(await waitUntil(async () => (await inFlight()) === 0));
});

test("abort of an answer that is not there yet", async () => {
  const inFlight = async () => (await client.get("/status")).apis.find((api) => api.id === "simulated").inFlight;
  const controller = new AbortController();
  const asked = client.chat.completions.create({ model: "sim:stall=header", messages }, { signal: controller.signal });
  const refused = assert.rejects(asked, APIUserAbortError);
  assert.ok(await waitUntil(async () => (await inFlight()) === 1));
  controller.abort();
  await refused;
  assert.ok(await waitUntil(async () => (await inFlight()) === 0));
});

test("embeddings as the SDK asks by default (base64) and as numbers", async () => {
  const ask = { model: "text-embedding-3-small", input: ["one", "two"] };
  const decoded = await client.embeddings.create(ask);
  const plain = await client.embeddings.create({ ...ask, encoding_format: "float" });
  assert.equal(decoded.data.length, 2);
  decoded.data.forEach(({ embedding }, index) => {
    assert.equal(embedding.length, 8);
    embedding.forEach((number, at) => assert.ok(Math.abs(number - plain.data[index].embedding[at]) < 1e-6));
  });
});

test("models", async () => {
  const names = (await collect(client.models.list())).map((model) => model.id);
  for (const name of ["text-embedding-3-small", "gpt-mapped", "gpt-4o-mini"]) assert.ok(names.includes(name), name);
  assert.equal((await client.models.retrieve("gpt-mapped")).id, "gpt-mapped");
});

test("responses", async () => {
  const answer = await client.responses.create({ model: "sim:events=5", input: "Hello" });
  assert.equal(answer.output_text.split(" ").length, 5);
  const events = await collect(await client.responses.create({ model: "sim:events=5", input: "Hello", stream: true }));
  assert.equal(events[0].type, "response.created");
  assert.equal(events.at(-1).type, "response.completed");
  assert.equal(events.filter((event) => event.type === "response.output_text.delta").length, 5);
});

test("headers by withResponse and asResponse", async () => {
  const asked = client.chat.completions.create({ model: "sim:events=1", messages });
  const { data, response, request_id } = await asked.withResponse();
  assert.equal(data.usage.completion_tokens, 1);
  assert.ok(request_id);
  assert.equal(response.headers.get("x-request-id"), request_id);
  assert.equal(response.headers.get("x-api-together-endpoint"), "simulated");
  assert.equal(response.headers.get("x-api-together-attempts"), "1");
  const raw = await client.chat.completions.create({ model: "sim:events=2", messages, stream: true }).asResponse();
  assert.match(raw.headers.get("content-type"), /^text\/event-stream/);
  assert.match(await raw.text(), /data: \[DONE\]\n\n$/);
});

describe("an endpoint that fails is passed over", () => {
  for (const model of ["refuses-then-answers", "fails-then-answers", "stalls-then-answers", "empty-then-answers"]) {
    for (const stream of [false, true]) {
      test(`${model}${stream ? ", streamed" : ""}`, async () => {
        const { data, response } = await client.chat.completions.create({ model, messages, stream }).withResponse();
        assert.equal(response.headers.get("x-api-together-endpoint"), "spare");
        assert.equal(response.headers.get("x-api-together-attempts"), "2");
        const count = stream ? pieces(await collect(data)).length : data.usage.completion_tokens;
        assert.equal(count, 5);
      });
    }
  }
});

describe("a third party's server as the endpoint", () => {
  const ask = { model: "gpt-4o-mini", messages: [{ role: "user", content: "hello" }] };
  const text = "Hello from a third party, in several pieces.";

  test("chat", async () => {
    const answer = await client.chat.completions.create(ask);
    assert.equal(answer.choices[0].message.content, text);
  });

  test("stream", async () => {
    const read = pieces(await collect(await client.chat.completions.create({ ...ask, stream: true })));
    assert.ok(read.length > 3);
    assert.equal(read.join(""), text);
  });

  test("embeddings", async () => {
    const { data } = await client.embeddings.create({ model: ask.model, input: "hello" });
    assert.deepEqual(data[0].embedding, [0.25, -0.5, 0.75, 1]);
  });
});
