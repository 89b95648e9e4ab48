// An endpoint that answers all calls of resources.json. The server is Prism, which nobody here wrote; here is only the OpenAPI
// description that it goes by.
//
//   node described.mjs LETTER
//
// Every id has the endpoint's letter in it, and the description has no path and takes no body with any other, so that a request
// that goes to a wrong endpoint is refused.
//
// A row of resources.json is [method of the SDK, call, arguments, answer]:
//
// - `{file_id:file-}` in a path is a parameter with an id of the kind `file-`, and `{version=1}` one that is no id. `{file-}` in
//   arguments or in an answer is such an id, and `"@"` is a file.
// - The answer is the kind of an object, a list of kinds, `"bytes"`, `"events"`, a place to be named in the header `Location`, or
//   JSON. Without it, the answer is the object that the path ends with.
// - Rows of one method differ in what their bodies name.

import { readFileSync, writeFileSync } from "node:fs";

const LETTER = process.argv[2];
const CREATED_AT = 1_700_000_000;

/** Puts the endpoint's ids in the place of their kinds: `{file-}` becomes `file-a123`. */
const withIds = (value) => JSON.parse(JSON.stringify(value).replace(/\{([^{}":=]+)\}/g, (_, kind) => idOf(kind)));
const idOf = (kind) => `${kind}${LETTER}123`;
const objectOf = (kind) => ({ id: idOf(kind), created_at: CREATED_AT });

/** `/files/{file_id:file-}` with the endpoint's own id. A part such as `{version=1}` is no id. */
const pathOf = (path) =>
  `/v1${path.replace(/\{\w+=(\w+)\}/g, "$1").replace(/\{\w+?:([^}]+)\}/g, (_, kind) => idOf(kind))}`;

/** The kind of the last id in a path. */
const lastKind = (path) => [...path.matchAll(/\{\w+?:([^}]+)\}/g)].at(-1)?.[1];

/** What a body has to be: exactly this, but for members that a client adds to say no. */
function bodySchema(value) {
  if (value === "@") return { type: "string" };
  if (value === null || typeof value !== "object" || Array.isArray(value)) return { enum: [value] };
  const properties = Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, bodySchema(inner)]));
  return { type: "object", required: Object.keys(value), properties, additionalProperties: { enum: [false, "false"] } };
}

/** The same as the fields of a form. */
function fieldsOf(value, name = "") {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return { [name]: value };
  const inner = Object.entries(value).map(([key, one]) => fieldsOf(one, name ? `${name}[${key}]` : key));
  return Object.assign({}, ...inner);
}

/** Takes the bodies of another call of the same method and path. */
function addBodies(known = {}, others = {}) {
  for (const [type, { schema }] of Object.entries(others)) known[type].schema = { anyOf: [known[type].schema, schema] };
}

function answerOf(method, path, answer) {
  if (Array.isArray(answer)) {
    const data = answer.map((one) => (typeof one === "string" ? objectOf(one) : one));
    const ends = { first_id: data[0].id ?? null, last_id: data[0].id ?? null };
    return { object: "list", data, ...ends, has_more: false };
  }
  if (typeof answer === "string") return objectOf(answer);
  if (answer) return withIds(answer);
  const kind = lastKind(path);
  return { ...(kind ? objectOf(kind) : { created_at: CREATED_AT }), ...(method === "DELETE" && { deleted: true }) };
}

/** What is made may be named in a header alone. */
const isLocation = (answer) => typeof answer === "string" && answer.startsWith("/");
const headersOf = (answer) =>
  isLocation(answer) ? { Location: { schema: { type: "string" }, example: withIds(answer) } } : {};

function contentOf(method, path, answer) {
  if (answer === "events") return { "text/event-stream": { example: `data: {"type":"event","at":"${idOf("")}"}\n\n` } };
  if (answer === "bytes" || isLocation(answer)) {
    const types = ["application/octet-stream", "application/binary", "application/sdp", "application/json"];
    return Object.fromEntries(types.map((type) => [type, { example: `what is kept at ${idOf("")}` }]));
  }
  return { "application/json": { example: answerOf(method, path, answer) } };
}

const error = { example: { error: { message: "No such object here.", type: "invalid_request_error", code: null } } };
const refusal = { description: "refused", content: { "application/json": error } };
const paths = {};
for (const calls of Object.values(JSON.parse(readFileSync(new URL("resources.json", import.meta.url))))) {
  for (const [, call, args = {}, answer] of calls) {
    const [method, path] = call.split(" ");
    const answered = { description: "answered", headers: headersOf(answer), content: contentOf(method, path, answer) };
    const operation = { responses: { 200: answered, 400: refusal } };
    if (method === "POST") {
      const body = withIds(args);
      const schemas = { "application/json": bodySchema(body), "multipart/form-data": bodySchema(fieldsOf(body)) };
      const content = Object.fromEntries(Object.entries(schemas).map(([type, schema]) => [type, { schema }]));
      // The SDP alone may be the whole body.
      if (args.sdp) content["application/sdp"] = { schema: { enum: [args.sdp] } };
      operation.requestBody = { required: Object.keys(args).length > 0, content };
    }
    const known = ((paths[pathOf(path)] ??= {})[method.toLowerCase()] ??= operation);
    // Calls that differ in their bodies alone are one operation.
    if (known !== operation) addBodies(known.requestBody?.content, operation.requestBody?.content);
  }
}

const file = `${LETTER}.json`;
writeFileSync(file, JSON.stringify({ openapi: "3.1.0", info: { title: LETTER, version: "1" }, paths }));
// Prism's command line takes it from here.
process.argv.splice(2, 1, "mock", "--port", "0", "--errors", file);
await import("@stainless-api/prism-cli");
