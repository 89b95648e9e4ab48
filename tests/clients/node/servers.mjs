// Starts and stops the programs that the tests talk to: the proxy, the simulated endpoint, a third party's server, and the
// scripted one.

import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { rmSync } from "node:fs";
import { copyFile, mkdtemp, readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

const run = promisify(execFile);

const HERE = join(dirname(fileURLToPath(import.meta.url)), "..");
const BINARY = process.env.API_TOGETHER_BIN ?? join(HERE, "../../target/debug/api-together");
const START_MS_MAX = 10_000;
const STOP_MS_MAX = 5_000;
const THIRD_PARTY_KEY = "sk-third-party";

export const CLIENT_KEY = "sk-client";
export const SCRIPTED_KEY = "sk-scripted";

const running = new Set();
const folders = new Set();

// Whatever ends this process, nothing that it made outlives it.
process.on("exit", () => {
  running.forEach((child) => child.kill("SIGKILL"));
  folders.forEach((folder) => rmSync(folder, { recursive: true, force: true }));
});
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => process.exit(1));

/** Starts a program; it has started once what it prints matches `ready`, whose group is `found`. */
async function start(command, args, ready, cwd, environment = {}) {
  const { PORT, RUST_LOG, ...inherited } = process.env;
  const child = spawn(command, args, { cwd, env: { ...inherited, ...environment }, stdio: ["ignore", "pipe", "pipe"] });
  running.add(child);
  const ended = new Promise((resolve) => child.once("close", resolve));
  let text = "";
  const found = new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`nothing matches ${ready} in:\n${text}`)), START_MS_MAX);
    const read = (piece) => {
      text += piece;
      const match = ready.exec(text);
      if (match) {
        clearTimeout(timer);
        resolve(match[1]);
      }
    };
    child.stdout.setEncoding("utf8").on("data", read);
    child.stderr.setEncoding("utf8").on("data", read);
    child.once("error", reject);
    ended.then(() => {
      running.delete(child);
      clearTimeout(timer);
      reject(new Error(`${command} ended:\n${text}`));
    });
  });
  const stop = async () => {
    child.kill("SIGTERM");
    const timer = setTimeout(() => child.kill("SIGKILL"), STOP_MS_MAX);
    await ended;
    clearTimeout(timer);
  };
  try {
    return { found: await found, stop };
  } catch (error) {
    await stop();
    throw error;
  }
}

/** The demo's first endpoint, which can be told by the model's name how to answer. */
const simulator = (folder) => start(BINARY, ["demo"], /^\s+steady\s.*?(http:\/\/\S+)\s/m, folder, { PORT: "0" });

/** `aimock`, which has no code in common with the proxy. It refuses every key but the one of the config. */
function thirdParty(folder) {
  const command = join(HERE, "node_modules/@copilotkit/aimock/dist/cli.js");
  const args = [command, "--port", "0", "--fixtures", join(HERE, "third-party.json"), "--chunk-size", "8", "--strict"];
  return start(process.execPath, args, /listening on (http:\/\/\S+)\s/, folder, { AIMOCK_API_KEYS: THIRD_PARTY_KEY });
}

/** An endpoint in the dialects of coding agents and of Anthropic; what it says stands in scripted.mjs. */
const scripted = (folder) =>
  start(process.execPath, [join(HERE, "scripted.mjs")], /listening on (http:\/\/\S+)\s/, folder);

/** What has arrived at the scripted endpoint. */
export const scriptedRequests = async (url) => (await fetch(`${url}/control/requests`)).json();

/** An endpoint that keeps what its clients make. */
const keeping = (folder, key) =>
  start(process.execPath, [join(HERE, "keeping.mjs"), key], /listening on (http:\/\/\S+)\s/, folder);

/** Prism, which nobody here wrote, as an endpoint that answers each call of resources.json and knows its own ids alone. */
const described = (folder, letter) =>
  start(process.execPath, [join(HERE, "described.mjs"), letter], /Prism is listening on (http:\/\/\S+)\s/, folder);

/** Runs `make`, which starts programs in a folder of their own and adds them to a list; stops them all if it fails. */
async function together(make) {
  const folder = await mkdtemp(join(tmpdir(), "api-together-clients-"));
  folders.add(folder);
  const started = [];
  const stop = () => Promise.all(started.map((program) => program.stop()));
  try {
    return { ...(await make(folder, started)), stop };
  } catch (error) {
    await stop();
    throw error;
  }
}

/** The proxy on a copy of one of the config files beside these tests. */
async function startProxy(folder, config, urls, started) {
  const path = join(folder, config);
  await copyFile(join(HERE, config), path);
  started.push(await start(BINARY, ["--config", path], /^listening\s+(http:\/\/\S+)\s/m, folder, urls));
  const url = started.at(-1).found;
  // The address is printed just before connections are taken.
  assert.ok(await waitUntil(() => isHealthy(url)), `${url}/health does not answer`);
  return url;
}

/** The endpoints, and the proxy in front of them. */
export const startAll = (config) =>
  together(async (folder, started) => {
    started.push(await simulator(folder));
    started.push(await thirdParty(folder));
    started.push(await scripted(folder));
    const [simulatorUrl, thirdPartyUrl, scriptedUrl] = started.map((program) => program.found);
    const urls = { SIMULATOR_URL: simulatorUrl, THIRD_PARTY_URL: thirdPartyUrl, SCRIPTED_URL: scriptedUrl };
    return { url: await startProxy(folder, config, urls, started), simulatorUrl, thirdPartyUrl, scriptedUrl };
  });

/** Three endpoints that each know only what was made there, the proxy in front of them, and a fourth one to be asked directly. */
export const startKeeping = () =>
  together(async (folder, started) => {
    for (const key of ["sk-a", "sk-b", "sk-c", "sk-one"]) started.push(await keeping(folder, key));
    const [a, b, c, directUrl] = started.map((program) => program.found);
    return { url: await startProxy(folder, "keeping.json", { A_URL: a, B_URL: b, C_URL: c }, started), directUrl };
  });

/** Three endpoints that each answer each call of resources.json and know their own ids alone, and the proxy in front of them. */
export const startDescribed = () =>
  together(async (folder, started) => {
    for (const letter of ["a", "b", "c"]) started.push(await described(folder, letter));
    const [a, b, c] = started.map((program) => program.found);
    return { url: await startProxy(folder, "keeping.json", { A_URL: a, B_URL: b, C_URL: c }, started), directUrl: a };
  });

/** The demo's first endpoint, and the proxy on a config that is made for its address; it can be stopped, started and replaced. */
export const startWith = (configOf) =>
  together(async (folder, started) => {
    started.push(await simulator(folder));
    const simulatorUrl = started[0].found;
    const port = await freePort();
    const [url, path] = [`http://127.0.0.1:${port}`, join(folder, "apis.json")];
    const write = (config) => writeFile(path, JSON.stringify({ ...config, server: { port, host: "127.0.0.1", ...config.server } }, null, 2));
    const serve = async () => {
      started[1] = await start(BINARY, ["--config", path], /^listening\s+(http:\/\/\S+)\s/m, folder);
      assert.ok(await waitUntil(() => isHealthy(url)), `${url}/health does not answer`);
    };
    await write(configOf(simulatorUrl));
    await serve();
    const upgrade = () => run(BINARY, ["upgrade", "--config", path], { cwd: folder });
    // The successor is a process of its own.
    const halt = () => run(BINARY, ["stop", "--config", path], { cwd: folder });
    const read = async () => JSON.parse(await readFile(path, "utf8"));
    return { url, simulatorUrl, write, read, serve, upgrade, halt };
  });

/** A port that was free a moment ago. */
async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  return port;
}

const isHealthy = (url) => fetch(`${url}/health`).then((answer) => answer.ok, () => false);

/** Whether the condition comes true in time. */
export async function waitUntil(condition, milliseconds = 2_000) {
  const deadline = Date.now() + milliseconds;
  while (!(await condition())) {
    if (Date.now() > deadline) return false;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return true;
}
