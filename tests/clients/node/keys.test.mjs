// What the SDK makes of the answers to callers' own keys, and that it does not try again what will fail again.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import OpenAI, * as sdk from "openai";

import { startAll } from "./servers.mjs";

const messages = [{ role: "user", content: "Hello" }];

let servers;
before(async () => {
  servers = await startAll("callers.json");
});
after(() => servers?.stop());

/** A client that tries again as often as it does by itself, and counts what it sends. */
function connect(apiKey) {
  const sent = { count: 0 };
  const counting = (...request) => {
    sent.count += 1;
    return fetch(...request);
  };
  const client = new OpenAI({ baseURL: `${servers.url}/v1`, apiKey, timeout: 10_000, fetch: counting });
  return { client, sent };
}

// Key, model, class of the error, status, and code.
for (const [key, model, kind, status, code] of [
  ["sk-small-budget-1f93a8", "priced", sdk.RateLimitError, 429, "insufficient_quota"],
  ["sk-small-budget-1f93a8", "unpriced", sdk.PermissionDeniedError, 403, "model_has_no_price"],
  ["sk-some-models-a8c05e", "unpriced", sdk.NotFoundError, 404, "model_not_found"],
  ["sk-expired-c05e42", "priced", sdk.AuthenticationError, 401, "invalid_api_key"],
  ["sk-elsewhere-5e42b6", "priced", sdk.PermissionDeniedError, 403, "address_not_allowed"],
]) {
  test(`${code} for ${key}`, async () => {
    const { client, sent } = connect(key);
    const error = await client.chat.completions
      .create({ model, messages })
      .then(
        () => assert.fail(`${kind.name} was not raised`),
        (raised) => raised,
      );
    assert.equal(error.constructor, kind, String(error));
    assert.deepEqual([error.status, error.code], [status, code]);
    assert.equal(sent.count, 1, "it was tried again");
  });
}

test("a limit of the day is not waited for", async () => {
  const { client, sent } = connect("sk-one-a-day-93a8c0");
  await client.chat.completions.create({ model: "unpriced", messages });
  await assert.rejects(client.chat.completions.create({ model: "unpriced", messages }), sdk.RateLimitError);
  assert.equal(sent.count, 2, "it was tried again");
});
