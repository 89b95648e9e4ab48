// The pictures of the documentation. `SCREENSHOTS=docs/images`, from the top of the tree, renews them; it wants a Chinese font, such as
// Debian's fonts-wqy-microhei.

import assert from "node:assert/strict";
import { mkdtemp, stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { startWith, waitUntil } from "../node/servers.mjs";
import { ADMIN_KEY, CLIENT_KEY, close, launch, open } from "./browser.mjs";

/** An endpoint whose models answer after so many milliseconds. */
const endpoint = (id, name, baseUrl, models, more) => ({
  id, name, baseUrl, apiKey: `sk-of-${id}`,
  modelMapping: Object.fromEntries(Object.entries(models).map(([model, ms]) => [model, `sim:headerDelayMs=${ms}`])),
  prices: { "*": { input: 0.15, output: 0.6 } },
  ...more,
});

const configOf = (simulatorUrl) => ({
  server: {
    apiKey: CLIENT_KEY,
    adminKey: ADMIN_KEY,
    strategy: "fill_first",
    keys: [{ name: "ada", key: "sk-ada-51c0f3d9a4b7e862", rpm: 60, budget: [{ usd: 20, per: "month" }] }],
  },
  apis: [
    endpoint("unreachable", "Cheap but down", "http://127.0.0.1:9", { "qwen-max": 0 }),
    endpoint("groq", "Groq, free", simulatorUrl, { "llama-3.3-70b": 30, "gpt-4o-mini": 40 }, { rpm: 6, rpd: 1000, tpm: 30000 }),
    endpoint("openai", "OpenAI", simulatorUrl, { "gpt-4o-mini": 90, "gpt-4o": 140, "qwen-max": 60, long: 60000 }, {
      rpm: 500, tpm: 200000, apiKey: undefined,
      apiKeys: ["team", "research", "spare"].map((name, n) => ({ name, key: `sk-0123456789abcdef000${n}`, rpm: 200 })),
    }),
    endpoint("old", "Last year's", simulatorUrl, { "gpt-3.5": 0 }, { enabled: false }),
  ],
});

let browser, servers, folder;
before(async () => {
  folder = process.env.SCREENSHOTS ? join(import.meta.dirname, "../../..", process.env.SCREENSHOTS) : await mkdtemp(join(tmpdir(), "pictures-"));
  [browser, servers] = await Promise.all([launch(), startWith(configOf)]);
});
after(async () => {
  await servers?.stop();
  await browser?.close();
});

const chat = (model, key = CLIENT_KEY) =>
  fetch(`${servers.url}/v1/chat/completions`, {
    method: "POST",
    headers: { authorization: `Bearer ${key}`, "content-type": "application/json" },
    body: JSON.stringify({ model, messages: [{ role: "user", content: "Hello" }] }),
  }).then((answer) => answer.text());

async function requests(query) {
  const answer = await fetch(`${servers.url}/v1/admin/requests?${query}`, { headers: { authorization: `Bearer ${ADMIN_KEY}` } });
  return (await answer.json()).data;
}

test("pictures of the page", async () => {
  const models = ["gpt-4o-mini", "gpt-4o-mini", "qwen-max", "llama-3.3-70b", "gpt-4o", "gpt-4o-mini", "gpt-4o"];
  for (let i = 0; i < 42; i += 1) await chat(models[i % models.length], i % 3 ? CLIENT_KEY : "sk-ada-51c0f3d9a4b7e862");
  const long = chat("long");
  assert.ok(await waitUntil(async () => (await requests("limit=100")).length === 42, 5_000));
  const moved = (await requests("model=qwen-max&limit=100")).find((request) => request.attempts.length > 1);
  for (const [name, view, options] of [
    ["now", "/dashboard", {}],
    ["request", `/dashboard/requests/${moved.id}`, {}],
    ["usage-dark", "/dashboard/usage?range=24h&by=endpoint", { colorScheme: "dark" }],
    ["phone", "/dashboard", { viewport: { width: 360, height: 740 } }],
  ]) {
    const page = await open(browser, servers.url, options);
    await page.goto(servers.url + view);
    await page.waitForTimeout(1_500);
    const path = join(folder, `${name}.png`);
    await page.screenshot({ path, fullPage: !options.viewport });
    assert.ok((await stat(path)).size < 200_000, `${name} is too large`);
    await close(page);
  }
  await fetch(`${servers.url}/v1/admin/running`, { headers: { authorization: `Bearer ${ADMIN_KEY}` } })
    .then((answer) => answer.json())
    .then(({ data }) => fetch(`${servers.url}/v1/admin/running/${data[0].id}`, { method: "DELETE", headers: { authorization: `Bearer ${ADMIN_KEY}` } }));
  assert.match(await long, /request_cancelled/);
});
