// The page's script. Documents come from the server; this swaps what changes, says moments in the reader's time zone, sends forms to
// the admin API, checks the config while it is typed, and streams an answer in the box of Connect. Nothing from outside becomes markup
// here: what is shown is set as text, or is the server's own, in which it is escaped.
"use strict";

const words = JSON.parse(document.body.dataset.words);
const say = (text, value) => words[text].replace("{}", value);
let csrf = document.querySelector("meta[name=csrf]")?.content;
const byId = (id) => document.getElementById(id);

// --- one change after another, a few milliseconds at a time, so that a thousand rows never block the page ---

const SLICE_MS = 8;
const queue = new Map();
let isRunning = false;

/** Has work done soon. Work of the same name that still waits is replaced. */
function later(name, work) {
  queue.delete(name);
  queue.set(name, work);
  if (!isRunning) {
    isRunning = true;
    setTimeout(runSlice);
  }
}

function runSlice() {
  const ends = performance.now() + SLICE_MS;
  for (const [name, work] of queue) {
    queue.delete(name);
    try {
      work();
    } catch (error) {
      // One part that cannot be swapped is no reason to stop; the next look brings all parts again.
      console.error(error);
      restart();
    }
    if (performance.now() >= ends) break;
  }
  isRunning = queue.size > 0;
  if (isRunning) setTimeout(runSlice);
}

// --- moments ---

const today = new Intl.DateTimeFormat(document.documentElement.lang, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const otherDay = new Intl.DateTimeFormat(document.documentElement.lang, {
  year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit",
});

function span(seconds) {
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

/** The server's clock over the reader's, in milliseconds. */
let ahead = 0;

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Says a moment as it is now: a time, how long ago it began, or how long until it comes. */
function sayMoment(node) {
  const moment = new Date(node.dateTime);
  if (Number.isNaN(moment.getTime())) return;
  const now = Date.now() + ahead;
  if (node.dataset.since) {
    setText(node, span(Math.max(0, Math.round((now - moment) / 1000))));
    return;
  }
  const isToday = moment.toDateString() === new Date(now).toDateString();
  const said = (isToday ? today : otherDay).format(moment);
  const left = Math.ceil((moment - now) / 1000);
  setText(node, left > 0 && left < 86400 ? `${said} (${say("in", span(left))})` : said);
  node.title = moment.toISOString();
}

const isOnScreen = new WeakMap();
const onScreen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    isOnScreen.set(target, isIntersecting);
    if (isIntersecting) sayMoment(target);
  }
});

function sayMoments(root) {
  const all = root.matches?.("time") ? [root] : root.querySelectorAll("time");
  for (const node of all) {
    sayMoment(node);
    if (!isOnScreen.has(node)) {
      isOnScreen.set(node, false);
      onScreen.observe(node);
    }
  }
}

setInterval(() => {
  if (document.hidden) return;
  for (const node of document.querySelectorAll("time")) {
    if (isOnScreen.get(node)) sayMoment(node);
  }
}, 1000);

// --- swapping ---

/** Attributes that are the reader's, or this script's. */
const KEPT = { DETAILS: "open", DIALOG: "open", TIME: "title", BUTTON: "disabled" };

/** Makes an element like another one, and keeps what need not change: focus, selection, what somebody typed or opened. */
function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  const kept = KEPT[old.nodeName];
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value && name !== kept) old.setAttribute(name, value);
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && name !== kept) old.removeAttribute(name);
  }
  // Its text is said anew below, in the reader's time zone.
  if (old.nodeName === "TIME") {
    sayMoment(old);
    return;
  }
  if (old.nodeName !== "TEXTAREA") morphChildren(old, fresh);
}

function morphChildren(old, fresh) {
  // What is gone goes first, so that what stays need not move, which would cost it its focus.
  const ids = new Set([...fresh.children].map((child) => child.id));
  for (const child of [...old.children]) {
    if (child.id && !ids.has(child.id)) child.remove();
  }
  let at = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    let match = at;
    if (child.id) {
      const same = old.querySelector(`:scope > #${CSS.escape(child.id)}`);
      if (same && same !== at) {
        old.insertBefore(same, at);
        match = same;
      } else if (!same) {
        old.insertBefore(child, at);
        continue;
      }
    } else if (at?.id) {
      match = null;
    }
    if (!match) {
      old.insertBefore(child, at);
      continue;
    }
    const next = match === at ? at.nextSibling : at;
    morph(match, child);
    at = next;
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function parse(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  return template.content.firstElementChild;
}

/** True while somebody marks text in an element, which a change would undo. */
function isMarked(node) {
  const selection = getSelection();
  if (!selection || selection.isCollapsed) return false;
  return node.contains(selection.anchorNode) || node.contains(selection.focusNode);
}

/** The newest HTML of each part by its id, with the number of the message that brought it. */
const newest = new Map();
/** Parts that were not swapped since somebody marks text in them. */
const waiting = new Set();
let messages = 0;

function swap(id, html) {
  newest.set(id, { html, number: messages });
  later(id, () => swapNow(id));
}

function swapNow(id) {
  const old = byId(id);
  const part = newest.get(id);
  if (!old || !part) return;
  if (isMarked(old)) {
    waiting.add(id);
    return;
  }
  const fresh = parse(part.html);
  if (!fresh) return;
  if (old.children.length > LONG && fresh.children.length > LONG) {
    swapLong(old, fresh, part.number);
    return;
  }
  morph(old, fresh);
  const now = byId(id);
  if (now) sayMoments(now);
}

document.addEventListener("selectionchange", () => {
  for (const id of waiting) {
    const node = byId(id);
    if (node && isMarked(node)) continue;
    waiting.delete(id);
    later(id, () => swapNow(id));
  }
});

/** Rows from which on a list is swapped row by row. */
const LONG = 100;

/** Makes a long list like another one, which came with the message of this number. Rows may have come after it. */
function swapLong(old, fresh, number) {
  const rows = [...fresh.children];
  const wanted = new Set(rows.map((row) => row.id));
  for (const row of [...old.children]) {
    if (wanted.has(row.id)) continue;
    row.remove();
    newest.delete(row.id);
  }
  rows.forEach((row, place) => {
    later(`${old.id} ${row.id}`, () => {
      const since = newest.get(row.id);
      const html = since && since.number > number ? parse(since.html) : row;
      // A row before it may not be there yet.
      let before = place - 1;
      while (before >= 0 && !byId(rows[before].id)) before -= 1;
      const next = before >= 0 ? byId(rows[before].id).nextSibling : old.firstChild;
      const known = byId(row.id);
      if (!known) {
        old.insertBefore(html, next);
        sayMoments(html);
        return;
      }
      if (known !== next) old.insertBefore(known, next);
      morph(known, html);
      sayMoments(known);
    });
  });
}

// --- the stream of changes, while somebody looks ---

let stream = null;
let retries = 0;
let retryTimer = 0;
let heard = 0;

const SILENCE_MAX_MS = 40_000;
const RETRY_MAX_MS = 30_000;

function address() {
  const view = document.body.dataset.live;
  const isBefore = new URLSearchParams(location.search).has("before");
  return view && !isBefore ? `/v1/admin/live?view=${view}${location.search.replace("?", "&")}` : null;
}

function connect() {
  clearTimeout(retryTimer);
  const from = address();
  if (!from || stream || document.hidden) return;
  heard = Date.now();
  stream = new EventSource(from);
  const on = (name, act) =>
    stream.addEventListener(name, (event) => {
      heard = Date.now();
      act(JSON.parse(event.data));
    });
  on("hello", ({ build, now }) => {
    retries = 0;
    ahead = now - Date.now();
    isCurrent();
    // After an upgrade the page is another one. Between two builds behind one address it is loaded once.
    if (build !== document.querySelector("meta[name=build]").content && sessionStorage.build !== build) {
      sessionStorage.build = build;
      location.reload();
    }
  });
  on("change", (changes) => {
    isCurrent();
    messages += 1;
    for (const [id, html] of changes) swap(id, html);
  });
  on("tick", isCurrent);
  on("problem", isStale);
  on("over", (why) => {
    disconnect();
    if (why === "signed_out") signedOut();
    else tryAgain();
  });
  stream.onerror = () => {
    disconnect();
    tryAgain();
  };
}

function disconnect() {
  stream?.close();
  stream = null;
}

/** What is shown is how it is. */
function isCurrent() {
  setText(byId("link"), "");
  document.querySelector("main").classList.remove("stale");
}

/** What is shown is how it was. */
function isStale(why) {
  setText(byId("link"), why);
  document.querySelector("main").classList.add("stale");
}

/** Connects anew, which brings every part again. */
function restart() {
  if (!stream) return;
  disconnect();
  tryAgain();
}

// A connection may be gone without a word.
setInterval(() => {
  if (stream && Date.now() - heard > SILENCE_MAX_MS) restart();
}, 5_000);

/** Connects again after a while, or says why that cannot be. */
function tryAgain() {
  if (document.hidden) return;
  isStale(words.lost);
  clearTimeout(retryTimer);
  const wait = Math.min(RETRY_MAX_MS, 500 * 2 ** retries) * (0.5 + Math.random());
  retries += 1;
  retryTimer = setTimeout(async () => {
    try {
      // A stream's own error cannot be read.
      const asked = new AbortController();
      const answer = await fetch(address(), { signal: asked.signal });
      if (answer.status === 401) {
        signedOut();
        return;
      }
      if (!answer.ok) {
        const { error } = await answer.json();
        tryAgain();
        isStale(error.message);
        return;
      }
      asked.abort();
    } catch {
      tryAgain();
      return;
    }
    connect();
  }, wait);
}

function signedOut() {
  disconnect();
  clearTimeout(retryTimer);
  isStale("");
  const said = byId("said");
  said.replaceChildren();
  const link = document.createElement("a");
  link.href = location.href;
  link.textContent = words.signedOut;
  said.append(link);
  said.className = "bad";
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    disconnect();
    clearTimeout(retryTimer);
  } else {
    retries = 0;
    connect();
  }
});
addEventListener("pagehide", disconnect);
addEventListener("pageshow", connect);
addEventListener("online", () => {
  retries = 0;
  connect();
});

// A session ends half an hour after its last use. Looking on is none; keys and clicks are.
const USE_MS = 5 * 60_000;
let used = Date.now();
function use() {
  if (!csrf || Date.now() - used < USE_MS) return;
  used = Date.now();
  fetch("/v1/admin/session").catch(() => {});
}
addEventListener("pointerdown", use);
addEventListener("keydown", use);

// --- calls of the admin API ---

/** Makes a call. Returns its answer, or throws what its error says. */
async function call(method, path, body, isAgain) {
  const headers = { "x-csrf-token": csrf ?? "" };
  if (body !== undefined) headers["content-type"] = "application/json";
  const response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401 && csrf) signedOut();
  if (response.status === 403 && csrf && !isAgain) {
    // Somebody signed in again in another tab.
    const session = await fetch("/v1/admin/session").then((found) => (found.ok ? found.json() : null), () => null);
    if (session && session.csrfToken !== csrf) {
      csrf = session.csrfToken;
      return call(method, path, body, true);
    }
  }
  if (!response.ok) throw new Error(answer.error?.message ?? `${response.status}`);
  return answer;
}

const GOOD_NEWS_MS = 8_000;
let fading = 0;

/** Says what came of something. Good news goes by itself, and is kept over a reload; bad news stays. */
function tell(text, isBad) {
  const said = byId("said");
  said.className = isBad ? "bad" : "good";
  said.textContent = text;
  clearTimeout(fading);
  delete sessionStorage.said;
  if (isBad) return;
  sessionStorage.said = text;
  fading = setTimeout(() => {
    said.replaceChildren();
    delete sessionStorage.said;
  }, GOOD_NEWS_MS);
}

let asked = Promise.resolve();

/** Asks for a yes, or shows a secret. Returns whether it was a yes. One dialog waits for the one before. */
function ask(text, secret) {
  asked = asked.then(() => show(text, secret));
  return asked;
}

function show(text, secret) {
  const dialog = byId("ask");
  byId("ask-text").textContent = text;
  const pre = byId("ask-secret");
  pre.hidden = !secret;
  pre.textContent = secret ?? "";
  const [yes, no] = dialog.querySelectorAll("button[value]");
  no.hidden = Boolean(secret);
  byId("ask-copy").hidden = !secret;
  yes.textContent = secret ? words.close : words.yes;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      pre.textContent = "";
      resolve(dialog.returnValue === "yes");
    }, { once: true });
  });
}

/** The value of a field as the API takes it; undefined where nothing was typed. */
function valueOf(field) {
  const text = field.value.trim();
  if (!text) return undefined;
  switch (field.dataset.kind) {
    case "number": return Number(text);
    case "list": return text.split(",").map((item) => item.trim()).filter(Boolean);
    case "moment": return new Date(text).toISOString();
    default: return text;
  }
}

/** The body of a form: `budget.0.usd` is a member of the first entry of a list. */
function bodyOf(form) {
  const body = {};
  for (const field of form.querySelectorAll("[data-kind]")) {
    const value = valueOf(field);
    const needs = field.dataset.with;
    if (value === undefined || (needs && !form.querySelector(`[name="${needs}"]`).value.trim())) continue;
    let place = body;
    const path = field.name.split(".");
    path.slice(0, -1).forEach((part, index) => {
      place[part] ??= /^\d+$/.test(path[index + 1]) ? [] : {};
      place = place[part];
    });
    if (field.dataset.kind === "budget") [place.unit, place.per] = value.split(" ");
    else place[path.at(-1)] = value;
  }
  return body;
}

/** Takes the view from the server again. */
async function refresh() {
  const response = await fetch(location.href, { headers: { accept: "text/html" } });
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  const main = fresh.querySelector("main");
  if (!main || main.classList.contains("sign-in")) {
    signedOut();
    return;
  }
  morph(document.querySelector("main"), document.importNode(main, true));
  sayMoments(document.querySelector("main"));
}

/** What a call says: words, or the steps of a test. */
function shownResult({ message, steps = [] }) {
  const isBad = steps.some((step) => step.result === "failed");
  const line = ({ name, result, what, way_out: wayOut }) =>
    `${result === "failed" ? "✗" : "✓"} ${name}: ${result}${what ? `, ${what}` : ""}${wayOut ? ` (${wayOut})` : ""}`;
  return [message ?? steps.map(line).join("\n"), isBad];
}

// A key that is shown once is not to be lost by a key that was hit.
byId("ask")?.addEventListener("cancel", (event) => {
  if (!byId("ask-secret").hidden) event.preventDefault();
});

async function submitCall(form) {
  if (form.dataset.confirm && !(await ask(form.dataset.confirm))) return;
  const button = form.querySelector("button[type=submit]");
  button.disabled = true;
  try {
    const { method, path } = form.dataset;
    const answer = await call(method, path, method === "DELETE" ? undefined : bodyOf(form));
    tell(...shownResult(answer));
    form.reset();
    if (answer.key) await ask(`${answer.message} ${words.once}`, answer.key);
    // The text of the config and what it was made out of belong together.
    if (document.querySelector("form.config")) reloadConfig();
    // What was done shows by the next look, if not by this one.
    else await refresh().catch(() => {});
  } catch (error) {
    tell(`${words.failed} ${error.message}`, true);
  } finally {
    button.disabled = false;
  }
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (form.method === "dialog") return;
  if (form.classList.contains("filters")) {
    // What is empty need not stand in the address.
    for (const field of form.querySelectorAll("input, select")) field.disabled = !field.value;
    return;
  }
  event.preventDefault();
  if (form.id === "sign-in") signIn(form);
  else if (form.classList.contains("call")) submitCall(form);
  else if (form.classList.contains("config")) applyConfig(form);
  else if (form.classList.contains("try")) tryIt(form);
});
addEventListener("pageshow", () => {
  for (const field of document.querySelectorAll(".filters :disabled")) field.disabled = false;
});

// --- signing in and out, language, colors ---

async function signIn(form) {
  const field = form.elements.key;
  try {
    await call("POST", "/v1/admin/session", { key: field.value });
    location.reload();
  } catch (error) {
    tell(error.message, true);
    field.select();
  }
  field.value = "";
}

const YEAR_S = 31_536_000;
function choose(name, value) {
  document.cookie = `api-together-${name}=${value}; Path=/; Max-Age=${YEAR_S}; SameSite=Strict`;
}

byId("language")?.addEventListener("click", (event) => {
  choose("language", event.currentTarget.dataset.language);
  location.reload();
});
byId("theme")?.addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  choose("theme", root.dataset.theme);
});
byId("sign-out")?.addEventListener("click", async () => {
  await call("DELETE", "/v1/admin/session").catch(() => {});
  location.reload();
});

// --- the config ---

const CHECK_AFTER_MS = 400;
let checkTimer = 0;
let checked = 0;
let loaded = null;

/** The place of a line in a text. */
function goToLine(field, line) {
  const lines = field.value.split("\n");
  const start = lines.slice(0, line - 1).reduce((sum, text) => sum + text.length + 1, 0);
  field.focus();
  field.setSelectionRange(start, start + (lines[line - 1]?.length ?? 0));
  field.scrollTop = (field.scrollHeight / lines.length) * Math.max(0, line - 4);
}

function listOf(title, items) {
  const list = document.createElement("ul");
  for (const item of items) {
    const row = document.createElement("li");
    row.append(item);
    list.append(row);
  }
  const heading = document.createElement("p");
  heading.textContent = title;
  return [heading, list];
}

function problemShown(field, problem) {
  const row = document.createElement("span");
  row.className = problem.kind === "error" ? "bad" : "near";
  if (problem.line) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = say("line", problem.line);
    button.addEventListener("click", () => goToLine(field, problem.line));
    row.append(button, " ");
  }
  const place = [problem.endpoint, problem.path].filter(Boolean).join(", ");
  row.append(`${place ? `${place}: ` : ""}${problem.message}${problem.hint ? ` (${problem.hint})` : ""}`);
  return row;
}

async function checkConfig(form) {
  const field = form.elements.text;
  const number = ++checked;
  const shown = byId("config-check");
  const button = form.querySelector("button[type=submit]");
  try {
    const result = await call("POST", "/v1/admin/config/check", { text: field.value });
    if (number !== checked) return;
    const parts = result.problems.length ? listOf("", result.problems.map((problem) => problemShown(field, problem))) : [];
    if (result.ok) {
      parts.push(...(result.changes.length ? listOf(words.changes, result.changes) : [words.nothingChanges]));
      if (result.needsUpgrade.length) parts.push(...listOf(words.waits, result.needsUpgrade));
    }
    shown.className = result.ok ? "good" : "bad";
    shown.replaceChildren(result.ok ? `${words.good} ` : "", ...parts);
    if (button) button.disabled = !result.ok || field.value === loaded;
  } catch (error) {
    if (number !== checked) return;
    shown.className = "bad";
    shown.textContent = error.message;
    if (button) button.disabled = true;
  }
}

/** Loads the file anew, whatever is typed. */
function reloadConfig() {
  loaded = null;
  location.reload();
}

async function applyConfig(form) {
  const changes = [...byId("config-check").querySelectorAll("li")].map((line) => `· ${line.textContent}`);
  if (!(await ask([words.apply, ...changes].join("\n")))) return;
  try {
    const answer = await call("PUT", "/v1/admin/config", { text: form.elements.text.value, tag: form.dataset.tag });
    tell(answer.message);
    reloadConfig();
  } catch (error) {
    tell(`${words.failed} ${error.message}`, true);
  }
}

/** Shows a text that was in use, in the place of the file's: what would change is said below it. */
async function showVersion(name) {
  try {
    const { text } = await call("GET", `/v1/admin/config/versions/${name}`);
    const form = document.querySelector("form.config");
    if (form.elements.text.value !== loaded && !(await ask(words.dirty))) return;
    form.elements.text.value = text;
    await checkConfig(form);
    form.scrollIntoView();
  } catch (error) {
    tell(error.message, true);
  }
}

function showConfig() {
  const form = document.querySelector("form.config");
  if (!form) return;
  loaded = form.elements.text.value;
  checkConfig(form);
  form.elements.text.addEventListener("input", () => {
    clearTimeout(checkTimer);
    form.querySelector("button[type=submit]").disabled = true;
    checkTimer = setTimeout(() => checkConfig(form), CHECK_AFTER_MS);
  });
}

addEventListener("beforeunload", (event) => {
  const field = document.querySelector("form.config")?.elements.text;
  if (field && loaded !== null && field.value !== loaded) event.preventDefault();
});

// --- copying, and the box that streams an answer ---

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("button.copy, button.show");
  if (!button) return;
  if (button.classList.contains("show")) {
    showVersion(button.dataset.version);
    return;
  }
  const source = byId(button.dataset.from);
  const range = document.createRange();
  range.selectNodeContents(source);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  // Without TLS a browser keeps its clipboard to itself; the text is marked, and can be copied by hand.
  navigator.clipboard?.writeText(source.textContent).then(() => tell(words.copied), () => {});
});

/** The texts of a stream's events. */
async function* deltas(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: {")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event.choices?.[0]?.delta?.content ?? "";
    }
  }
}

async function tryIt(form) {
  const { key, model, question } = form.elements;
  const answer = byId("answer");
  answer.className = "";
  answer.textContent = "";
  const button = form.querySelector("button[type=submit]");
  button.disabled = true;
  try {
    if (!key.value) throw new Error(words.noKey);
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      credentials: "omit",
      headers: { authorization: `Bearer ${key.value}`, "content-type": "application/json" },
      body: JSON.stringify({ model: model.value, stream: true, messages: [{ role: "user", content: question.value }] }),
    });
    if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error?.message ?? `${response.status}`);
    for await (const text of deltas(response.body)) answer.append(text);
  } catch (error) {
    answer.className = "bad";
    answer.append(error.message);
  } finally {
    button.disabled = false;
  }
}

// --- the beginning ---

if (sessionStorage.said) tell(sessionStorage.said);
if (location.pathname === "/dashboard/requests") sessionStorage.search = location.search;
// Back to what was searched for.
const back = byId("back-to-requests");
if (back) back.href += sessionStorage.search ?? "";
sayMoments(document.body);
showConfig();
connect();
if (byId("sign-in")?.hasAttribute("data-elsewhere")) {
  // A link from elsewhere brings no cookie with it, though there may be a session.
  fetch("/v1/admin/session").then((session) => {
    if (!session.ok || sessionStorage.elsewhere === location.href) return;
    sessionStorage.elsewhere = location.href;
    // Not a reload, which would come from elsewhere as well.
    location.replace(location.href);
  }, () => {});
}
