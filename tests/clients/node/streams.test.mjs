// What the SDK's stream helpers tell of a stream through the proxy, event by event, is what they tell of it directly.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";

import OpenAI from "openai";

import { CLIENT_KEY, startAll } from "./servers.mjs";

const messages = [{ role: "user", content: "hello" }];
const VOLATILE = new Set(["id", "item_id", "created", "created_at", "completed_at"]);
let servers;
let proxied;
let direct;

before(async () => {
  servers = await startAll("apis.json");
  const options = { maxRetries: 0, timeout: 10_000 };
  proxied = new OpenAI({ baseURL: `${servers.url}/v1`, apiKey: CLIENT_KEY, ...options });
  direct = {
    "sim:events=9": new OpenAI({ baseURL: `${servers.simulatorUrl}/v1`, apiKey: "sk-endpoint", ...options }),
    "gpt-4o-mini": new OpenAI({ baseURL: `${servers.thirdPartyUrl}/v1`, apiKey: "sk-third-party", ...options }),
  };
});
after(() => servers?.stop());

/** The events as plain data, without what differs from one answer to the next. */
const plain = (events) => JSON.parse(JSON.stringify(events, (key, value) => (VOLATILE.has(key) ? undefined : value)));

async function collect(stream) {
  const all = [];
  for await (const one of stream) all.push(one);
  return plain(all);
}

const calls = {
  "chat, by the helper": async (client, model, options) => {
    const stream = client.chat.completions.stream({ model, messages, ...options });
    const events = await collect(stream);
    return [...events, plain(await stream.finalChatCompletion())];
  },
  chat: async (client, model, options) =>
    collect(await client.chat.completions.create({ model, messages, stream: true, ...options })),
  completions: async (client, model, options) =>
    collect(await client.completions.create({ model, prompt: "hello", stream: true, ...options })),
  responses: async (client, model) => collect(client.responses.stream({ model, input: "hello" })),
};

for (const model of ["sim:events=9", "gpt-4o-mini"]) {
  describe(model, () => {
    for (const [name, call] of Object.entries(calls)) {
      // The third party has no such call.
      if (name === "completions" && !model.startsWith("sim:")) continue;
      for (const options of [{}, { stream_options: { include_usage: true } }]) {
        test(`${name}, ${options.stream_options ? "with" : "without"} usage`, async () => {
          const expected = await call(direct[model], model, options);
          assert.ok(expected.length > 3);
          assert.deepEqual(await call(proxied, model, options), expected);
        });
      }
    }
  });
}
