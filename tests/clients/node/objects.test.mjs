// What is made through the proxy is found again, over three endpoints that each know nothing of the others', as it is at one
// endpoint asked directly.

import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { after, before, describe, test } from "node:test";

import OpenAI, { BadRequestError, NotFoundError, toFile } from "openai";

import { CLIENT_KEY, startKeeping } from "./servers.mjs";

const TIMES = 7;
let servers;
const clients = {};

before(async () => {
  servers = await startKeeping();
  const options = { maxRetries: 0, timeout: 10_000 };
  clients["over three endpoints"] = new OpenAI({ baseURL: `${servers.url}/v1`, apiKey: CLIENT_KEY, ...options });
  clients.directly = new OpenAI({ baseURL: `${servers.directUrl}/v1`, apiKey: "sk-one", ...options });
});
after(() => servers?.stop());

async function idsOf(list) {
  const ids = [];
  for await (const one of list) ids.push(one.id);
  assert.equal(new Set(ids).size, ids.length, "none comes twice");
  return ids;
}

for (const way of ["directly", "over three endpoints"]) {
  describe(way, () => {
    test("files", async () => {
      const { files } = clients[way];
      const contents = [0, 1, 100, 70_000, 1_000_000, 3, 5].map((size) => randomBytes(size));
      const earlier = await idsOf(files.list());
      const made = [];
      for (const content of contents) made.push(await files.create({ file: await toFile(content, "f"), purpose: "batch" }));
      for (const [at, file] of made.entries()) {
        assert.equal(file.bytes, contents[at].length);
        assert.deepEqual(await files.retrieve(file.id), file);
        const content = await files.content(file.id);
        assert.ok(contents[at].equals(Buffer.from(await content.arrayBuffer())));
      }
      for (const limit of [1, 3, 100]) {
        const listed = new Set(await idsOf(files.list({ limit })));
        assert.deepEqual(listed, new Set([...earlier, ...made.map(({ id }) => id)]));
      }
      for (const file of made) {
        assert.ok((await files.delete(file.id)).deleted);
        await assert.rejects(files.retrieve(file.id), NotFoundError);
      }
      assert.deepEqual(new Set(await idsOf(files.list())), new Set(earlier));
    });

    test("batches go where their files are", async () => {
      const { batches, files } = clients[way];
      for (let time = 0; time < TIMES; time += 1) {
        const file = await files.create({ file: await toFile(Buffer.from("{}"), "f"), purpose: "batch" });
        const batch = await batches.create({
          input_file_id: file.id,
          endpoint: "/v1/chat/completions",
          completion_window: "24h",
        });
        assert.equal((await batches.retrieve(batch.id)).input_file_id, file.id);
        assert.equal(await (await files.content(batch.output_file_id)).text(), "the batch's output");
      }
    });

    test("conversations and responses", async () => {
      const { conversations, responses } = clients[way];
      for (let time = 0; time < TIMES; time += 1) {
        const conversation = await conversations.create();
        assert.equal((await conversations.retrieve(conversation.id)).id, conversation.id);
        await responses.create({ model: "m", input: "hello", conversation: conversation.id });
        let answer = await responses.create({ model: "m", input: "hello" });
        for (let turn = 0; turn < 4; turn += 1) {
          const earlier = answer.id;
          answer = await responses.create({ model: "m", input: "and?", previous_response_id: earlier });
          assert.equal(answer.output_text, earlier);
        }
        assert.equal((await responses.retrieve(answer.id)).id, answer.id);
        await responses.delete(answer.id);
        const next = responses.create({ model: "m", input: "and?", previous_response_id: answer.id });
        await assert.rejects(next, BadRequestError);
      }
    });
  });
}

test("all endpoints are used", async () => {
  // Where a new conversation goes is chosen at random: sixty times are missed by one of three
  // endpoints once in ten thousand million.
  const used = new Set();
  for (let time = 0; time < 60 && used.size < 3; time += 1) {
    const { response } = await clients["over three endpoints"].conversations.create().withResponse();
    used.add(response.headers.get("x-api-together-endpoint"));
  }
  assert.deepEqual([...used].sort(), ["a", "b", "c"]);
});
