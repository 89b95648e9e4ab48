// The page in front of a thousand endpoints with ten keys each: no update may block its main thread for longer than 50 ms.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { startWith, waitUntil } from "../node/servers.mjs";
import { ADMIN_KEY, CLIENT_KEY, close, launch, open } from "./browser.mjs";

const ENDPOINTS = 1_000;
const LANES = 10;

const configOf = (rpm) => (simulatorUrl) => ({
  server: { apiKey: CLIENT_KEY, adminKey: ADMIN_KEY },
  apis: Array.from({ length: ENDPOINTS }, (_, n) => ({
    id: `endpoint-${n}`, baseUrl: simulatorUrl, models: ["m", `m-${n}`], rpm, rpd: 100_000, tpm: 1_000_000,
    apiKeys: Array.from({ length: LANES }, (_, k) => ({ name: `key-${k}`, key: `sk-${n}-0123456789abcdef-${k}`, rpm: 100 })),
  })),
});

let browser, servers;
before(async () => {
  [browser, servers] = await Promise.all([launch(), startWith(configOf(1_000))]);
});
after(async () => {
  await servers?.stop();
  await browser?.close();
});

const chat = (model) =>
  fetch(`${servers.url}/v1/chat/completions`, {
    method: "POST",
    headers: { authorization: `Bearer ${CLIENT_KEY}`, "content-type": "application/json" },
    body: JSON.stringify({ model, messages: [{ role: "user", content: "Hello" }] }),
  }).then((answer) => answer.text());

/** The longest time for which the page was blocked while something was done, in milliseconds; the browser tells of none below 50. */
async function blockedFor(page, work) {
  await page.evaluate(() => {
    globalThis.blocked = 0;
    globalThis.observer?.disconnect();
    globalThis.observer = new PerformanceObserver((list) => {
      for (const { duration } of list.getEntries()) globalThis.blocked = Math.max(globalThis.blocked, duration);
    });
    globalThis.observer.observe({ type: "longtask" });
  });
  await work();
  return page.evaluate(() => globalThis.blocked);
}

test("no update blocks the page for longer than 50 ms", { timeout: 240_000 }, async () => {
  const page = await open(browser, servers.url);
  page.setDefaultTimeout(60_000);
  await page.goto(`${servers.url}/dashboard?open=endpoint-1&open=endpoint-2`);
  await page.locator("#endpoints > li").nth(ENDPOINTS - 1).waitFor({ state: "attached" });
  assert.equal(await page.locator("#endpoints > li .keys > li").count(), 2 * LANES, "keys are listed where they were opened");
  // Everything that comes with the first look.
  await page.waitForTimeout(6_000);

  // Machines that tests run on are shared: of some tries the best one counts.
  const least = async (work) => {
    let least = Infinity;
    for (let i = 0; i < 4 && least > 50; i += 1) least = Math.min(least, await blockedFor(page, () => work(i)));
    return least;
  };
  const some = await least(async () => {
    for (let i = 0; i < 100; i += 1) await chat(`m-${i * 7}`);
    await page.waitForTimeout(4_000);
  });
  const used = page.locator("#endpoints > li").first().locator("[data-limit=rpm] .figures");
  const all = await least(async (i) => {
    await servers.write(configOf(2_000 + i)(servers.simulatorUrl));
    const shown = `/ ${(2_000 + i).toLocaleString("en")}`;
    assert.ok(await waitUntil(async () => (await used.innerText()).endsWith(shown), 40_000), await used.innerText());
    await page.waitForTimeout(3_000);
  });
  console.log(`longest block: ${some} ms with some rows changed, ${all} ms with all of them`);
  assert.ok(some <= 50, `${some} ms`);
  assert.ok(all <= 50, `${all} ms`);
  await close(page);
});
