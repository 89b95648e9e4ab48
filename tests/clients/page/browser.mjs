// A browser for the tests of the page: the Chromium that CHROMIUM names, and what every page in it is held to.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

import { chromium } from "playwright-core";

export const ADMIN_KEY = "sk-admin-9b1e7c40d2f8a653";
export const CLIENT_KEY = "sk-client-7d1f93a8c05e42b6";
const AXE = createRequire(import.meta.url).resolve("axe-core/axe.min.js");

/** The views, by their addresses. */
export const VIEWS = ["", "/requests", "/keys", "/usage", "/config", "/connect"].map((view) => `/dashboard${view}`);

/** Starts the browser. */
export const launch = () =>
  chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });

/**
 * Opens a page, signed in. Whatever it loads has to come from its own origin, and nothing may go wrong in it: `wrong` has what did.
 */
export async function open(browser, url, { signIn = true, ...options } = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, timezoneId: "UTC", ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(20_000);
  page.wrong = [];
  page.sent = [];
  context.on("request", (request) => {
    page.sent.push(request.url());
    if (!request.url().startsWith(`${url}/`)) page.wrong.push(`it asked for ${request.url()}`);
  });
  page.on("pageerror", (error) => page.wrong.push(error.message));
  page.on("console", (message) => {
    // Answers that are errors are the tests' own, and stand in the page.
    if (message.type() === "error" && !message.text().startsWith("Failed to load resource")) page.wrong.push(message.text());
  });
  if (signIn) {
    await page.goto(`${url}/dashboard`);
    await page.getByLabel("Admin key").fill(ADMIN_KEY);
    await page.keyboard.press("Enter");
    await page.waitForSelector("nav");
  }
  return page;
}

/** Ends a page, in which nothing may have gone wrong. */
export async function close(page) {
  await page.context().close();
  assert.deepEqual(page.wrong, []);
}

/** What axe finds wrong. */
export async function findings(page) {
  // The page's policy lets no script in but its own; this one comes by the browser's debugger.
  await page.evaluate(`${await axe()};0`);
  const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  return violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html).slice(0, 3).join(" ")}`);
}

let text;
async function axe() {
  text ??= await (await import("node:fs/promises")).readFile(AXE, "utf8");
  return text;
}

/** The number that a text shows, such as 1,234. */
export const numberIn = (shown) => Number(shown.replace(/[^\d.]/g, ""));
