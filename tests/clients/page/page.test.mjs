// The page at /dashboard in a browser: that it shows what the API says, works by keyboard and on a phone, never leaves its origin, and
// survives what happens to the program behind it.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { startWith, waitUntil } from "../node/servers.mjs";
import { ADMIN_KEY, CLIENT_KEY, VIEWS, close, findings, launch, numberIn, open } from "./browser.mjs";

const EVIL = `<img src=x onerror="window.evil=1">`;
const endpoint = (id, baseUrl, more) => ({ id, baseUrl, apiKey: `sk-of-${id}`, models: ["m"], ...more });

const configOf = (simulatorUrl) => ({
  server: {
    apiKey: CLIENT_KEY,
    adminKey: ADMIN_KEY,
    keys: [{ name: "ada", key: "sk-ada-51c0f3d9a4b7e862", rpm: 60, budget: [{ tokens: 100000, per: "day" }] }],
  },
  apis: [
    endpoint("simulated", simulatorUrl, { name: "Simulated", rpm: 600, rpd: 10000, tpm: 1000000, models: ["m", "sim:*", "*"], prices: { "*": { input: 1, output: 2 } } }),
    {
      id: "pool", name: "Pool of keys", baseUrl: simulatorUrl, models: ["pooled"], rpm: 100,
      apiKeys: [1, 2, 3].map((n) => ({ name: `key-${n}`, key: `sk-pool-0123456789abcdef000${n}`, rpm: 20 })),
    },
    endpoint("dead", "http://127.0.0.1:9", { name: EVIL, models: ["m", "dead"], priority: 1 }),
  ],
});

let browser, servers;
before(async () => {
  [browser, servers] = await Promise.all([launch(), startWith(configOf)]);
  for (let i = 0; i < 7; i += 1) await chat("m", { key: i % 2 ? CLIENT_KEY : "sk-ada-51c0f3d9a4b7e862" });
  for (let i = 0; i < 3; i += 1) await chat("pooled");
  await chat("dead");
  await chat("nowhere", { key: "sk-wrong-7d1f93a8c05e42b6" });
  await chat(EVIL);
  assert.ok(await waitUntil(async () => (await admin("/requests?limit=100")).data.length === 13), "the log does not have all");
});
after(async () => {
  await servers?.halt().catch(() => {});
  await servers?.stop();
  await browser?.close();
});

function chat(model, { key = CLIENT_KEY, stream = false } = {}) {
  return fetch(`${servers.url}/v1/chat/completions`, {
    method: "POST",
    headers: { authorization: `Bearer ${key}`, "content-type": "application/json" },
    body: JSON.stringify({ model, stream, messages: [{ role: "user", content: "Hello" }] }),
  }).then((answer) => answer.text());
}

async function get(path, key) {
  const answer = await fetch(servers.url + path, { headers: { authorization: `Bearer ${key}` } });
  return answer.json();
}

const admin = (path) => get(`/v1/admin${path}`, ADMIN_KEY);
const row = (page, name) => page.locator("#endpoints > li", { has: page.getByRole("link", { name, exact: true }) });

test("nobody sees anything without the admin key", async () => {
  const page = await open(browser, servers.url, { signIn: false });
  for (const view of VIEWS) {
    await page.goto(servers.url + view);
    assert.equal(await page.locator("nav").count(), 0, view);
    assert.doesNotMatch(await page.content(), /simulated|ada/i);
  }
  for (const wrong of [CLIENT_KEY, "sk-ada-51c0f3d9a4b7e862"]) {
    await page.getByLabel("Admin key").fill(wrong);
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.locator("#said.bad").waitFor();
  }
  await page.getByLabel("Admin key").fill(ADMIN_KEY);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.waitForSelector("nav");
  const [cookie, ...others] = await page.context().cookies();
  assert.deepEqual([cookie.httpOnly, cookie.sameSite, others.length], [true, "Strict", 0]);
  const kept = await page.evaluate(() => JSON.stringify([localStorage, sessionStorage, document.cookie, document.documentElement.outerHTML]));
  assert.ok(!kept.includes(ADMIN_KEY), "the page keeps the key");
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.getByLabel("Admin key").waitFor();
  assert.equal((await page.request.get(`${servers.url}/v1/admin/session`)).status(), 401);
  await close(page);
});

test("the first visit weighs at most 150 KB", async () => {
  const page = await open(browser, servers.url, { signIn: false });
  let bytes = 0;
  const read = [];
  page.on("requestfinished", (request) => {
    read.push(request.sizes().then((sizes) => (bytes += sizes.responseBodySize + sizes.responseHeadersSize)));
  });
  await page.goto(`${servers.url}/dashboard`);
  await page.getByLabel("Admin key").fill(ADMIN_KEY);
  await page.keyboard.press("Enter");
  await page.waitForSelector("nav");
  await Promise.all(read);
  console.log(`the first visit weighs ${bytes} bytes`);
  assert.ok(bytes > 5_000 && bytes <= 150_000, `${bytes} bytes`);
  await close(page);
});

test("now: each number is the API's", async () => {
  const page = await open(browser, servers.url);
  await page.locator("#alerts").waitFor();
  const status = await admin("/endpoints");
  for (const api of status.apis) {
    const shown = row(page, api.name);
    for (const [kind, quota] of Object.entries(api.quota)) {
      const figures = shown.locator(`> .bars [data-limit=${kind}] .figures`);
      if (quota.limit < 0) {
        assert.equal(await figures.count(), 0, `${api.id} ${kind}`);
        continue;
      }
      assert.deepEqual((await figures.innerText()).split("/").map(numberIn), [quota.used, quota.limit], `${api.id} ${kind}`);
      const resets = await shown.locator(`> .bars [data-limit=${kind}] time`).getAttribute("datetime").catch(() => null);
      // A sliding minute frees a little later with each look.
      assert.ok(quota.used === 0 || Math.abs(new Date(resets) - new Date(quota.resets)) < 3_000, `${api.id} ${kind}: ${resets}`);
    }
    assert.equal(numberIn(await shown.locator(".flight strong").innerText()), api.inFlight);
    const { attempts, failed } = api.lastHour;
    if (attempts > 0) {
      assert.match(await shown.locator(".trend").innerText(), new RegExp(`${(100 * failed / attempts).toFixed(1)} %.*${failed} of ${attempts}`, "s"));
    }
    for (const key of api.keys?.list ?? []) {
      const figures = shown.locator(".keys li", { hasText: key.key }).locator("[data-limit=rpm] .figures");
      assert.deepEqual((await figures.innerText()).split("/").map(numberIn), [key.quota.rpm.used, key.quota.rpm.limit], key.key);
    }
  }
  const able = status.apis.filter((api) => api.available).length;
  assert.match(await page.locator(".verdict").innerText(), new RegExp(`^${able} of ${status.apis.length} `));
  assert.match(await page.locator("#totals").innerText(), new RegExp(`${status.requestLog.written} written`));
  await close(page);
});

test("requests: each is as the API has it, by filters that stand in the address", async () => {
  const page = await open(browser, servers.url);
  await page.getByRole("link", { name: "Requests", exact: true }).click();
  await page.locator("#requests li").first().waitFor();
  const { data } = await admin("/requests?limit=50");
  assert.deepEqual(await page.locator("#requests > li").evaluateAll((rows) => rows.map((one) => one.id)), data.map((one) => `q-${one.row}`));
  for (const request of data) {
    const shown = await page.locator(`#q-${request.row}`).innerText();
    assert.ok(shown.includes(String(request.status)) && shown.includes(request.model ?? "–"), shown);
    if (request.totalTokens !== null) assert.ok(shown.includes(`${request.totalTokens} tokens`), shown);
  }
  await page.getByLabel("Key").fill("ada");
  await page.getByLabel("Status").selectOption("2xx");
  await page.getByRole("button", { name: "Search" }).click();
  await page.waitForURL(/\/dashboard\/requests\?key=ada&status=2xx$/);
  const ofAda = await admin("/requests?key=ada&status=2xx");
  assert.equal(await page.locator("#requests > li").count(), ofAda.data.length);
  await page.reload();
  assert.equal(await page.locator("#requests > li").count(), ofAda.data.length);

  // The decision: who was asked, and who was passed over and why.
  const refused = data.find((request) => request.model === "dead");
  await page.goto(`${servers.url}/dashboard/requests`);
  await page.locator(`#q-${refused.row} a`).click();
  await page.getByRole("heading", { name: "The decision" }).waitFor();
  const attempts = page.locator(".attempts > li");
  assert.equal(await attempts.count(), refused.attempts.length);
  assert.match(await attempts.first().innerText(), /dead.*connect failed/s);
  for (const { endpoint, words } of refused.attempts.flatMap((attempt) => attempt.passedOver)) {
    assert.ok((await attempts.allInnerTexts()).join().includes(`${endpoint}: ${words}`));
  }
  assert.ok((await page.locator("main").innerText()).includes(refused.outside[0].endpoint));
  await page.goto(`${servers.url}/dashboard/requests/${ofAda.data[0].id}`);
  const facts = await page.locator("dl").innerText();
  for (const key of ["promptTokens", "completionTokens"]) assert.ok(facts.includes(String(ofAda.data[0][key])), `${key} in ${facts}`);
  assert.ok(facts.includes(`$${ofAda.data[0].costUsd.toFixed(4)}`), facts);
  await close(page);
});

test("keys and usage: each number is the API's and that of the token statistics", async () => {
  const page = await open(browser, servers.url);
  await page.goto(`${servers.url}/dashboard/keys`);
  const ada = (await admin("/keys")).data.find((key) => key.name === "ada");
  const shown = await page.locator("#keys > li", { hasText: "ada" }).innerText();
  assert.ok(ada.limits.every((limit) => shown.includes(limit)) && shown.includes(`${ada.budgets[0].spent} of ${ada.budgets[0].limit}`), shown);

  const stats = await get("/v1/token/stats", CLIENT_KEY);
  for (const [range, by] of [["1h", "endpoint"], ["24h", "model"], ["7d", "endpoint"], ["90d", "key"]]) {
    await page.goto(`${servers.url}/dashboard/usage?range=${range}&by=${by}`);
    const numbers = async (line) => (await line.locator("td").allInnerTexts()).map(numberIn);
    const [requests, prompt, completion, total] = await numbers(page.locator("tfoot tr"));
    if (by === "key") {
      const { ada } = stats.keys;
      assert.deepEqual((await numbers(page.locator("tbody tr", { hasText: "ada" }))).slice(0, 4), [ada.requests, ada.promptTokens, ada.completionTokens, ada.totalTokens]);
      continue;
    }
    const { summary } = stats;
    assert.deepEqual([requests, prompt, completion, total], [summary.totalRequests, summary.totalPromptTokens, summary.totalCompletionTokens, summary.totalTokens]);
    if (by === "endpoint") {
      for (const [id, one] of Object.entries(stats.detailedStats)) {
        const line = page.locator("tbody tr", { has: page.getByRole("rowheader", { name: id, exact: true }) });
        assert.deepEqual((await numbers(line)).slice(0, 4), [one.requests, one.promptTokens, one.completionTokens, one.totalTokens], id);
      }
    }
    const csv = await (await page.request.get(servers.url + (await page.getByRole("link", { name: "Download as CSV" }).getAttribute("href")))).text();
    const [head, ...lines] = csv.trim().split("\n");
    const column = head.split(",").indexOf("totalTokens");
    assert.equal(lines.reduce((sum, line) => sum + Number(line.split(",").at(column - 12)), 0), total, csv);
  }
  await close(page);
});

test("it is live: what happens shows within seconds, and what is done happens", async () => {
  const page = await open(browser, servers.url);
  const before = (await admin("/endpoints")).apis[0].quota.rpd.used;
  await chat("m");
  const figures = row(page, "Simulated").locator("> .bars [data-limit=rpd] .figures");
  assert.ok(await waitUntil(async () => numberIn((await figures.innerText()).split("/")[0]) === before + 1, 5_000), await figures.innerText());

  // A request that is under way can be seen, and ended.
  const stopped = chat("sim:headerDelayMs=30000");
  const running = page.locator("#running li", { hasText: "sim:headerDelayMs=30000" });
  await running.waitFor();
  await running.getByRole("button", { name: "Cancel" }).click();
  assert.match(await page.locator("#ask-text").innerText(), /sim:headerDelayMs/);
  await page.getByRole("button", { name: "Yes" }).click();
  assert.match(await stopped, /request_cancelled/);
  await running.waitFor({ state: "detached" });

  // Switched off and on.
  await row(page, "Pool of keys").getByRole("link", { name: "Pool of keys" }).click();
  await page.getByRole("button", { name: "Switch off" }).click();
  await page.getByRole("button", { name: "Yes" }).click();
  await page.locator("#endpoint .badge.off").waitFor();
  assert.equal((await admin("/endpoints")).apis[1].available, false);
  await page.getByRole("button", { name: "Switch on" }).click();
  await page.locator("#endpoint .badge.good").first().waitFor();

  // A test says what went wrong, and looks like it.
  await page.goto(`${servers.url}/dashboard/endpoints/dead`);
  await page.getByRole("button", { name: "Test" }).click();
  await page.getByRole("button", { name: "Yes" }).click();
  await page.locator("#said.bad").waitFor();
  assert.match(await page.locator("#said").innerText(), /✗ connect: failed, .+/);
  await close(page);
});

test("a stream lasts, and what is marked stays until it is let go", async () => {
  const page = await open(browser, servers.url);
  await page.locator("#alerts").waitFor();
  const streams = () => page.sent.filter((url) => url.includes("/v1/admin/live")).length;
  const mark = (whether) =>
    page.evaluate((whether) => {
      const verdict = document.querySelector(".verdict");
      if (whether) getSelection().selectAllChildren(verdict);
      else getSelection().removeAllRanges();
    }, whether);
  await mark(true);
  const before = await page.locator(".verdict").innerText();
  const off = (action) =>
    fetch(`${servers.url}/v1/admin/endpoints/simulated/${action}`, { method: "POST", headers: { authorization: `Bearer ${ADMIN_KEY}` } });
  await off("disable");
  // Longer than a stranger's request may take.
  await page.waitForTimeout(14_000);
  assert.equal(streams(), 1, "it was cut off");
  assert.equal(await page.locator("#link").innerText(), "");
  assert.equal(await page.locator(".verdict").innerText(), before);
  await mark(false);
  assert.ok(await waitUntil(async () => (await page.locator(".verdict").innerText()) !== before, 3_000), "the change never comes");
  await page.locator("#alerts li", { hasText: "switched off" }).waitFor();
  await off("enable");
  await close(page);
});

test("what was signed in again in another tab works in this one", async () => {
  const page = await open(browser, servers.url);
  await page.request.delete(`${servers.url}/v1/admin/session`, { headers: { "x-csrf-token": await page.locator("meta[name=csrf]").getAttribute("content") } });
  const again = await page.context().newPage();
  await again.goto(`${servers.url}/dashboard`);
  await again.getByLabel("Admin key").fill(ADMIN_KEY);
  await again.keyboard.press("Enter");
  await again.waitForSelector("nav");
  await page.goto(`${servers.url}/dashboard/config`);
  await page.evaluate(() => {
    csrf = "that of the session before";
  });
  await Promise.all([page.waitForEvent("load"), page.getByRole("button", { name: "Read the file again" }).click()]);
  await close(page);
});

test("requests of one id are apart, and older ones follow on those that are shown", async () => {
  const id = "the-same-id";
  const ask = (model) =>
    fetch(`${servers.url}/v1/chat/completions`, {
      method: "POST",
      headers: { authorization: `Bearer ${CLIENT_KEY}`, "content-type": "application/json", "x-request-id": id },
      body: JSON.stringify({ model, messages: [] }),
    }).then((answer) => answer.text());
  const page = await open(browser, servers.url);
  await page.goto(`${servers.url}/dashboard/requests?id=${id}`);
  await page.getByText("The log has no such request.").waitFor();
  await ask("one-of-them");
  await ask("the-other");
  await page.locator("#requests li", { hasText: "the-other" }).waitFor();
  assert.equal(await page.getByText("The log has no such request.").count(), 0);
  await page.locator("#requests li", { hasText: "one-of-them" }).getByRole("link").click();
  await page.getByRole("heading", { name: id }).waitFor();
  assert.match(await page.locator("main").innerText(), /one-of-them/);
  for (let i = 0; i < 55; i += 1) await ask("many");
  await page.goto(`${servers.url}/dashboard/requests`);
  await page.locator("#requests li").nth(49).waitFor();
  for (let i = 0; i < 5; i += 1) await ask("newer");
  assert.ok(await waitUntil(async () => (await page.locator("#requests li", { hasText: "newer" }).count()) === 5, 5_000));
  const last = Number((await page.locator("#requests > li").last().getAttribute("id")).slice(2));
  await page.getByRole("link", { name: "Older ones" }).click();
  await page.waitForURL(/before=/);
  assert.equal(Number((await page.locator("#requests > li").first().getAttribute("id")).slice(2)), last - 1);
  await close(page);
});

test("keys are added, shown once, rotated, and revoked", async () => {
  const page = await open(browser, servers.url);
  await page.goto(`${servers.url}/dashboard/keys`);
  await page.getByText("Add a key").click();
  const add = page.locator("details.add");
  await add.getByLabel("Name").fill("grace");
  await add.getByLabel("Requests a minute").fill("30");
  await add.getByLabel("Dollars a month").fill("10");
  await add.getByLabel("Models").fill("m, pool*");
  await add.getByRole("button", { name: "Add" }).click();
  await page.locator("#ask-secret").waitFor();
  const secret = await page.locator("#ask-secret").innerText();
  assert.match(secret, /^sk-at-/);
  await page.keyboard.press("Escape");
  assert.ok(await page.locator("#ask-secret").isVisible(), "it is lost by a key that was hit");
  await page.locator("#ask-copy").click();
  await page.getByRole("button", { name: "Close" }).click();
  const grace = page.locator("#keys > li", { hasText: "grace" });
  assert.match(await grace.innerText(), /30 requests a minute.*\$10.*m, pool\*/s);
  assert.ok(!(await page.content()).includes(secret), "the key is still there");
  assert.match(await chat("m", { key: secret }), /"choices"/);

  await grace.getByText("Change").click();
  await grace.getByLabel("more of the budget").fill("5");
  await grace.getByLabel("until", { exact: true }).fill("2031-01-01T00:00");
  await grace.getByRole("button", { name: "Raise" }).click();
  await page.locator("#said.good").waitFor();
  assert.ok(await waitUntil(async () => /\$15/.test(await grace.innerText()), 5_000), await grace.innerText());

  // The list is live, and what is open in it stays open.
  await grace.getByRole("button", { name: "Revoke", exact: true }).click();
  await page.getByRole("button", { name: "Yes" }).click();
  await grace.getByText("revoked").waitFor();
  assert.match(await chat("m", { key: secret }), /invalid_api_key/);
  await close(page);
});

test("the config is checked while it is typed, applied, and put back", async () => {
  const page = await open(browser, servers.url);
  await page.goto(`${servers.url}/dashboard/config`);
  const text = page.locator("#config-text");
  await page.getByText("Nothing would change.").waitFor();
  const good = await text.inputValue();
  assert.ok(!good.includes(CLIENT_KEY) && good.includes("********"), "the keys are masked");
  await text.fill(good.replace(`"rpm": 600`, `"rpm": "many"`));
  const problem = page.locator("#config-check li").first();
  await problem.waitFor();
  const { problems } = await (await page.request.post(`${servers.url}/v1/admin/config/check`, {
    headers: { authorization: `Bearer ${ADMIN_KEY}` },
    data: { text: await text.inputValue() },
  })).json();
  assert.ok((await problem.innerText()).includes(problems[0].message), await problem.innerText());
  assert.ok(await page.getByRole("button", { name: "Apply" }).isDisabled());
  await problem.getByRole("button", { name: `line ${problems[0].line}` }).click();
  const marked = await text.evaluate((field) => field.value.slice(field.selectionStart, field.selectionEnd));
  assert.match(marked, /"rpm": "many"/);

  await text.fill(good.replace(`"rpm": 600`, `"rpm": 700`));
  await page.getByText("What would change:").waitFor();
  assert.match(await page.locator("#config-check").innerText(), /600.*700/s);
  await page.getByRole("button", { name: "Apply" }).click();
  assert.match(await page.locator("#ask-text").innerText(), /600.*700/s, "it asks, and says what would change");
  await Promise.all([page.waitForEvent("load"), page.getByRole("button", { name: "Yes" }).click()]);
  await page.locator("#said.good").waitFor();
  const written = await servers.read();
  assert.deepEqual([written.apis[0].rpm, written.server.apiKey], [700, CLIENT_KEY]);

  await page.getByRole("button", { name: "Go back to it" }).last().click();
  await page.getByRole("button", { name: "Yes" }).click();
  assert.ok(await waitUntil(async () => (await servers.read()).apis[0].rpm === 600, 5_000), "it was not put back");
  await page.waitForEvent("load");
  // The text and what it was made out of are those of the file.
  assert.equal(await text.inputValue(), good);
  await text.fill(good.replace(`"rpm": 600`, `"rpm": 650`));
  await page.getByRole("button", { name: "Show it, and what would change" }).first().click();
  await page.locator("#ask-text", { hasText: "not applied" }).waitFor();
  await page.getByRole("button", { name: "No", exact: true }).click();
  assert.match(await text.inputValue(), /"rpm": 650/);
  await close(page);
});

test("the box of Connect streams an answer with a client's key", async () => {
  const page = await open(browser, servers.url);
  await page.goto(`${servers.url}/dashboard/connect`);
  assert.ok((await page.locator("#c-0").innerText()).includes(`${servers.url}/v1`));
  await page.getByRole("button", { name: "Ask" }).click();
  await page.locator("#answer.bad").waitFor();
  await page.getByLabel("A client's key").fill(CLIENT_KEY);
  await page.getByLabel("Model").fill("m");
  await page.getByRole("button", { name: "Ask" }).click();
  assert.ok(await waitUntil(async () => (await page.locator("#answer").innerText()).length > 3, 5_000));
  await page.getByRole("button", { name: "Copy" }).first().click();
  assert.equal(await page.evaluate(() => getSelection().toString().trim()), (await page.locator("#c-0").innerText()).trim());
  await close(page);
});

test("what comes from outside is text, never markup", async () => {
  const page = await open(browser, servers.url);
  const seen = [];
  for (const view of [...VIEWS, "/dashboard/endpoints/dead", "/dashboard/usage?by=model&range=1h", `/dashboard/requests?model=${encodeURIComponent(EVIL)}`]) {
    await page.goto(servers.url + view);
    await page.waitForTimeout(1_200);
    assert.equal(await page.evaluate(() => window.evil), undefined, view);
    assert.equal(await page.locator("main img").count(), 0, view);
    if ((await page.locator("main").innerText()).includes(EVIL)) seen.push(view);
  }
  assert.ok(seen.includes("/dashboard") && seen.some((view) => view.includes("model=")), `it shows as text in ${seen}`);
  await close(page);
});

test("each view works by keyboard", async () => {
  const page = await open(browser, servers.url);
  for (const view of VIEWS) {
    await page.goto(`${servers.url}/dashboard`);
    const name = { "": "Now" }[view.slice(10)] ?? view.slice(11)[0].toUpperCase() + view.slice(12);
    await tabTo(page, "nav a", name);
    await page.keyboard.press("Enter");
    await page.waitForURL(servers.url + view);
    await page.locator("h1", { hasText: name }).waitFor();
    // Everything that can be used is reached, and shows that it is.
    const usable = await page.locator("a[href], button:enabled, input:enabled:not([type=hidden]), select:enabled, textarea:enabled, summary").evaluateAll(
      (all) => all.filter((one) => one.checkVisibility({ contentVisibilityAuto: false })).length,
    );
    await page.locator(".skip").focus();
    const reached = new Set();
    for (let i = 0; i < usable * 2 + 20; i += 1) {
      const now = await page.evaluate(() => {
        const one = document.activeElement;
        if (one === document.body) return null;
        globalThis.numbers ??= new WeakMap();
        if (!globalThis.numbers.has(one)) globalThis.numbers.set(one, (globalThis.count = (globalThis.count ?? 0) + 1));
        return { number: globalThis.numbers.get(one), outline: getComputedStyle(one).outlineStyle, html: one.outerHTML.slice(0, 80) };
      });
      if (now === null || (reached.has(now.number) && now.number === 1)) break;
      assert.notEqual(now.outline, "none", now.html);
      reached.add(now.number);
      await page.keyboard.press("Tab");
    }
    assert.ok(reached.size >= usable, `${view}: ${reached.size} of ${usable}`);
  }
  await close(page);
});

/** Goes on with the Tab key to an element of a name. */
async function tabTo(page, selector, name) {
  for (let i = 0; i < 40; i += 1) {
    await page.keyboard.press("Tab");
    const is = await page.evaluate(([selector, name]) => document.activeElement.matches(selector) && document.activeElement.textContent === name, [selector, name]);
    if (is) return;
  }
  assert.fail(`${name} is not reached`);
}

test("axe finds nothing, in light and dark, in English and Chinese", async () => {
  for (const [colorScheme, locale] of [["light", "en"], ["dark", "en"], ["light", "zh-CN"]]) {
    const page = await open(browser, servers.url, { colorScheme });
    if (locale !== "en") {
      await page.locator("#language").click();
      await page.locator("html[lang=zh-CN]").waitFor();
    }
    for (const view of [...VIEWS, "/dashboard/endpoints/pool", `/dashboard/requests/${(await admin("/requests")).data[0].id}`]) {
      await page.goto(servers.url + view);
      await page.locator("h1").waitFor();
      for (const summary of await page.locator("summary").all()) await summary.click();
      assert.deepEqual(await findings(page), [], `${view}, ${colorScheme}, ${locale}`);
    }
    await close(page);
  }
  const page = await open(browser, servers.url, { signIn: false });
  await page.goto(`${servers.url}/dashboard`);
  assert.deepEqual(await findings(page), []);
  await page.goto(servers.url);
  await page.getByRole("link", { name: "Dashboard" }).click();
  await page.getByLabel("Admin key").waitFor();
  await close(page);
});

test("a phone of 320 points needs no scrolling to the side", async () => {
  const page = await open(browser, servers.url, { viewport: { width: 320, height: 640 } });
  for (const view of [...VIEWS, "/dashboard/endpoints/pool", `/dashboard/requests/${(await admin("/requests")).data[0].id}`]) {
    await page.goto(servers.url + view);
    for (const summary of await page.locator("summary").all()) await summary.click();
    const wide = await page.evaluate(() => document.documentElement.scrollWidth);
    assert.ok(wide <= 320, `${view} is ${wide} wide`);
  }
  await close(page);
});

test("nothing is asked for while nobody looks", async () => {
  const page = await open(browser, servers.url);
  await page.locator("#alerts").waitFor();
  const streams = () => page.sent.filter((url) => url.includes("/v1/admin/live")).length;
  assert.ok(await waitUntil(() => streams() === 1));
  await setHidden(page, true);
  const before = page.sent.length;
  await page.waitForTimeout(2_500);
  assert.equal(page.sent.length, before);
  assert.ok(await waitUntil(async () => (await admin("/endpoints")).openRequests === 1, 5_000), "the stream is still open");
  await setHidden(page, false);
  assert.ok(await waitUntil(() => streams() === 2));
  await close(page);
});

/** Has the page believe that its tab is in the background: a browser without a window shows all of them. */
const setHidden = (page, hidden) =>
  page.evaluate((hidden) => {
    Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
  }, hidden);

test("it survives a reload of the config, a lost connection, and a night", async () => {
  const page = await open(browser, servers.url);
  await row(page, "Simulated").waitFor();
  const config = await servers.read();
  await servers.write({ ...config, apis: [...config.apis, endpoint("fourth", "http://127.0.0.1:9", { models: ["fourth"] })] });
  await page.locator("#endpoints > li", { hasText: "fourth" }).waitFor();
  await servers.write(config);
  await page.locator("#endpoints > li", { hasText: "fourth" }).waitFor({ state: "detached" });
  await servers.write({ ...config, apis: [] });
  await page.getByText("The config file is not in use:").waitFor();
  await servers.write(config);
  await page.getByText("The config file is not in use:").waitFor({ state: "detached" });

  await servers.halt();
  await page.getByText("The connection is lost; trying again.").waitFor();
  await servers.serve();
  // Sessions are of the process; a page that is behind says so, and leads back to where it was.
  await page.getByText("You are signed out. Sign in to go on.").waitFor({ timeout: 40_000 });
  await page.getByText("You are signed out. Sign in to go on.").click();
  await page.getByLabel("Admin key").fill(ADMIN_KEY);
  await page.keyboard.press("Enter");
  await row(page, "Simulated").waitFor();
  await close(page);
});

test("a page that slept through a night goes on", async () => {
  const page = await open(browser, servers.url, { signIn: false });
  await page.clock.install();
  await page.goto(`${servers.url}/dashboard/requests`);
  await page.getByLabel("Admin key").fill(ADMIN_KEY);
  await page.keyboard.press("Enter");
  await page.locator("#requests li").first().waitFor();
  await setHidden(page, true);
  await page.clock.fastForward("09:00:00");
  await setHidden(page, false);
  await chat("after-the-night");
  await page.locator("#requests li", { hasText: "after-the-night" }).waitFor();
  await close(page);
});

test("it survives an upgrade without being signed out", async () => {
  const page = await open(browser, servers.url);
  await row(page, "Simulated").waitFor();
  await page.locator("#totals time").first().waitFor();
  const started = await page.locator("#totals time").first().getAttribute("datetime");
  await servers.upgrade();
  assert.ok(
    await waitUntil(async () => (await page.locator("#totals time").first().getAttribute("datetime")) !== started, 20_000),
    "it still shows the process before",
  );
  assert.equal(await page.locator("#said.bad").count(), 0);
  await close(page);
});
