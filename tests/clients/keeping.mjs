// An endpoint that keeps what its clients make, and knows nothing of what was made elsewhere. It shares no code with the proxy.
//
//   node keeping.mjs KEY

import { randomBytes } from "node:crypto";
import { createServer } from "node:http";

const KEY = process.argv[2];
const PAGE = 20;

/** What begins a path, and how the ids of what is made there begin. */
const COLLECTIONS = {
  files: "file-",
  uploads: "upload_",
  batches: "batch_",
  vector_stores: "vs_",
  conversations: "conv_",
  containers: "cntr_",
  responses: "resp_",
  assistants: "asst_",
  threads: "thread_",
};
/** Members of a body that name an object of this endpoint. */
const NAMES = ["previous_response_id", "conversation", "input_file_id", "file_id"];

/** By id, in the order in which they were made. */
const kept = new Map();
let clock = Math.floor(Date.now() / 1000) - 1_000_000;

const newId = (prefix) => prefix + randomBytes(24).toString("hex");
const failure = (status, message, code = null) => [status, { error: { message, type: "invalid_request_error", param: null, code } }];
const missing = (id) => failure(404, `No such object: ${id}`);

/** The first object that a body names and that is not here. */
function unknown(body) {
  for (const name of NAMES) {
    if (typeof body[name] === "string" && !kept.has(body[name])) {
      const isResponse = name === "previous_response_id";
      return isResponse
        ? failure(400, `Previous response with id '${body[name]}' not found.`, "previous_response_not_found")
        : missing(body[name]);
    }
  }
}

/** The bytes of a form's file. */
function fileOf(type, bytes) {
  const boundary = `--${/boundary=("?)([^";]+)\1/.exec(type)[2]}`;
  const begins = bytes.indexOf("\r\n\r\n", bytes.indexOf("filename=")) + 4;
  return bytes.subarray(begins, bytes.indexOf(`\r\n${boundary}`, begins));
}

function make(collection, type, bytes) {
  const isForm = type.startsWith("multipart/");
  const body = isForm || bytes.length === 0 ? {} : JSON.parse(bytes);
  const unmade = unknown(body);
  if (unmade) return unmade;
  clock += 1;
  const made = { id: newId(COLLECTIONS[collection]), object: collection.replace(/(e?)s$/, "$1"), created_at: clock };
  if (collection === "files") Object.assign(made, { bytes: fileOf(type, bytes).length, filename: "f", purpose: "batch" });
  if (collection === "batches") {
    const output = { id: newId("file-"), object: "file", created_at: clock, data: Buffer.from("the batch's output") };
    kept.set(output.id, output);
    Object.assign(made, { input_file_id: body.input_file_id, output_file_id: output.id, status: "completed" });
  }
  if (collection === "responses") {
    const content = [{ type: "output_text", text: body.previous_response_id ?? "first", annotations: [] }];
    const said = { id: newId("msg_"), type: "message", role: "assistant", status: "completed", content };
    Object.assign(made, { object: "response", status: "completed", model: body.model, output: [said] });
    Object.assign(made, { parallel_tool_calls: true, tool_choice: "auto", tools: [] });
  }
  kept.set(made.id, isForm ? { ...made, data: fileOf(type, bytes) } : made);
  return [200, made];
}

function list(collection, query) {
  const all = [...kept.values()].filter(({ id }) => id.startsWith(COLLECTIONS[collection])).reverse();
  if (query.get("order") === "asc") all.reverse();
  const after = query.get("after");
  const from = after ? all.findIndex(({ id }) => id === after) + 1 : 0;
  if (after && from === 0) return missing(after);
  const data = all.slice(from, from + Number(query.get("limit") ?? PAGE));
  const shown = data.map(({ data: _, ...one }) => one);
  const has_more = from + data.length < all.length;
  return [200, { object: "list", data: shown, first_id: data.at(0)?.id ?? null, last_id: data.at(-1)?.id ?? null, has_more }];
}

function answer(method, path, query, type, bytes) {
  const [collection, id, part, partId] = path.replace(/^\/v1\//, "").split("/");
  if (!(collection in COLLECTIONS)) return failure(404, `Unknown path ${path}`);
  if (id === undefined) return method === "GET" ? list(collection, query) : make(collection, type, bytes);
  const found = kept.get(id);
  if (!found) return missing(id);
  const { data, ...shown } = found;
  if (part === "content") return [200, data];
  if (part === "files") {
    const file = partId ?? JSON.parse(bytes).file_id;
    if (!kept.has(file)) return missing(file);
    const attached = { id: file, object: "vector_store.file", created_at: clock, vector_store_id: id, status: "completed" };
    return method === "DELETE" ? [200, { id: file, object: "vector_store.file.deleted", deleted: true }] : [200, attached];
  }
  if (method === "DELETE") {
    kept.delete(id);
    return [200, { id, object: `${found.object}.deleted`, deleted: true }];
  }
  return [200, shown];
}

const server = createServer((request, response) => {
  const pieces = [];
  request.on("data", (piece) => pieces.push(piece));
  request.on("end", () => {
    const url = new URL(request.url, "http://endpoint");
    const isKnown = request.headers.authorization === `Bearer ${KEY}`;
    const type = request.headers["content-type"] ?? "";
    const [status, body] = isKnown
      ? answer(request.method, url.pathname, url.searchParams, type, Buffer.concat(pieces))
      : failure(401, "Incorrect API key provided.", "invalid_api_key");
    const isBytes = Buffer.isBuffer(body);
    response.writeHead(status, { "content-type": isBytes ? "application/octet-stream" : "application/json" });
    response.end(isBytes ? body : JSON.stringify(body));
  });
});
server.listen(0, "127.0.0.1", () => console.log(`listening on http://127.0.0.1:${server.address().port}`));
