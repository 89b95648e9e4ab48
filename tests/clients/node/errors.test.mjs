// The error class that the SDK makes of each of the proxy's errors.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";

import OpenAI, * as sdk from "openai";

import { CLIENT_KEY, startAll, waitUntil } from "./servers.mjs";

const messages = [{ role: "user", content: "Hello" }];

function connect(servers, options = {}) {
  return new OpenAI({ baseURL: `${servers.url}/v1`, apiKey: CLIENT_KEY, maxRetries: 0, timeout: 10_000, ...options });
}

const chat = (client, model, stream = false) => client.chat.completions.create({ model, messages, stream });

/** The error, which must be of exactly that class and have that status and code, and a message for people. */
async function raises(promise, kind, status, code) {
  const error = await promise.then(
    () => assert.fail(`${kind.name} was not raised`),
    (raised) => raised,
  );
  assert.equal(error.constructor, kind, String(error));
  assert.equal(error.status, status);
  assert.equal(error.code, code);
  assert.ok(error.error.message);
  assert.ok(error.requestID);
  return error;
}

describe("with several endpoints", () => {
  let servers;
  let client;
  before(async () => {
    servers = await startAll("apis.json");
    client = connect(servers);
  });
  after(() => servers?.stop());

  test("wrong key", async () => {
    const wrong = connect(servers, { apiKey: "sk-wrong" });
    await raises(chat(wrong, "gpt-mapped"), sdk.AuthenticationError, 401, "invalid_api_key");
    await raises(wrong.models.list(), sdk.AuthenticationError, 401, "invalid_api_key");
  });

  test("unknown model", async () => {
    const error = await raises(chat(client, "no-such-model"), sdk.NotFoundError, 404, "model_not_found");
    assert.equal(error.param, "model");
    await raises(chat(client, "no-such-model", true), sdk.NotFoundError, 404, "model_not_found");
    await raises(client.models.retrieve("no-such-model"), sdk.NotFoundError, 404, "model_not_found");
  });

  test("broken request", async () => {
    const body = new TextEncoder().encode('{"model":"gpt-mapped","messages":[');
    const headers = { "Content-Type": "application/json" };
    await raises(client.post("/chat/completions", { body, headers }), sdk.BadRequestError, 400, null);
  });

  test("body too large", async () => {
    const large = [{ role: "user", content: "x".repeat(70_000) }];
    const asked = client.chat.completions.create({ model: "gpt-mapped", messages: large });
    await raises(asked, sdk.APIError, 413, "request_too_large");
  });

  test("all resting", async () => {
    // The first answer is the endpoint's own; from then on it is left alone, and the proxy answers.
    await assert.rejects(chat(client, "only-rests"), sdk.RateLimitError);
    const error = await raises(chat(client, "only-rests"), sdk.RateLimitError, 429, "rate_limit_exceeded");
    const wait = Number(error.headers.get("retry-after"));
    assert.ok(wait >= 25 && wait <= 30, String(wait));
  });

  test("unreachable", async () => {
    await raises(chat(client, "only-refuses"), sdk.InternalServerError, 502, "endpoint_unreachable");
    await raises(chat(client, "only-refuses", true), sdk.InternalServerError, 502, "endpoint_unreachable");
  });

  test("empty", async () => {
    await raises(chat(client, "only-empty"), sdk.InternalServerError, 502, "endpoint_empty_answer");
  });

  test("timeout", async () => {
    await raises(chat(client, "only-stalls"), sdk.InternalServerError, 504, "endpoint_timeout");
    await raises(chat(client, "only-stalls", true), sdk.InternalServerError, 504, "endpoint_timeout");
  });

  test("a stream that breaks midway is an error, not a quiet end", async () => {
    const seen = [];
    const read = async () => {
      for await (const chunk of await chat(client, "breaks-midway", true)) seen.push(chunk);
    };
    const error = await read().then(
      () => assert.fail("the stream ended quietly"),
      (raised) => raised,
    );
    assert.equal(error.constructor, sdk.APIError, String(error));
    assert.equal(error.code, "stream_broken");
    assert.match(error.message, /broke off/);
    assert.ok(seen.length > 0 && seen.length < 50, String(seen.length));
  });
});

test("the last endpoint is asked although it cools down", async () => {
  const servers = await startAll("strict.json");
  try {
    const client = connect(servers);
    const endpoint = async () => (await client.get("/status")).apis[0];
    // One failure starts the cool-down.
    await assert.rejects(chat(client, "slow-to-fail"), sdk.InternalServerError);
    assert.ok((await endpoint()).temporarilyDisabled);
    // With nobody else to ask, it gets as many requests as come, and what the clients see is its own answer.
    const asked = [1, 2, 3].map(() =>
      raises(chat(client, "slow-to-fail"), sdk.InternalServerError, 500, null),
    );
    assert.ok(await waitUntil(async () => (await endpoint()).inFlight === 3));
    await Promise.all(asked);
  } finally {
    await servers.stop();
  }
});
