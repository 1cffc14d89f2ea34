import assert from "node:assert/strict";
import { subscribe, unsubscribe } from "node:diagnostics_channel";
import { getEventListeners } from "node:events";

import { test } from "vitest";

import type { WireMessage } from "../src/channel.js";
import { SidecarError, SidecarRequestError } from "../src/errors.js";
import type { GenerateProgress } from "../src/generated/protocol.js";
import { LineSplitter } from "../src/lines.js";
import { Wire } from "./support/wire.js";

test("a request is one line of JSON-RPC with an id of its own", () => {
  const wire = new Wire();
  wire.connection.request("load", { model: "a\nb" });
  wire.connection.request("ping", {});
  const frames = wire.sent();
  assert.deepEqual(frames, [
    { jsonrpc: "2.0", id: 1, method: "load", params: { model: "a\nb" } },
    { jsonrpc: "2.0", id: 2, method: "ping", params: {} },
  ]);
});

test("responses find their requests in any order", async () => {
  const wire = new Wire();
  const requests = ["a", "b", "c"].map((text) => wire.connection.request("tokenize", { model: "m", text }));
  const ids = wire.sent().map(({ id }) => id);
  for (const index of [2, 0, 1]) wire.say({ id: ids[index], result: { tokens: [index] } });
  const results = await Promise.all(requests.map(({ response }) => response));
  assert.deepEqual(results, [{ tokens: [0] }, { tokens: [1] }, { tokens: [2] }]);
});

test("a response that ends with a carriage return, or comes byte by byte, is understood", async () => {
  const wire = new Wire();
  const { response } = wire.connection.request("detokenize", { model: "m", tokens: [1] });
  for (const byte of Buffer.from('{"jsonrpc":"2.0","id":1,"result":{"text":"é\u2028🗼"}}\r\n')) {
    wire.input.write(Buffer.of(byte));
  }
  assert.deepEqual(await response, { text: "é\u2028🗼" });
});

test("lines that are not messages, and messages that mean nothing, are harmless", async () => {
  const wire = new Wire();
  const { response } = wire.connection.request("stats", {});
  const strays = [
    "Loading checkpoint shards: 100%",
    '{"jsonrpc": "2.0", "id": 1, "result"',
    " ",
    "null",
    "42",
    '"text"',
    "[]",
    '[{"id": 1, "result": 1}]',
    "{}",
    '{"id": "1", "result": "another id"}',
    '{"id": 99, "result": "nobody asked"}',
    '{"method": "$/progress"}',
    '{"method": "$/progress", "params": null}',
    '{"method": "$/progress", "params": {"token": "unknown", "value": {}}}',
    '{"method": "$/newerThanThisClient", "params": {"id": 1}}',
  ];
  wire.input.write(`${strays.join("\n")}\n`);
  wire.say({ id: 1, result: "the answer" });
  assert.equal(await response, "the answer");
});

test("a complaint about something that no request is known for is a warning, each once", async () => {
  const wire = new Wire();
  const warnings: Error[] = [];
  const keep = (warning: Error) => warnings.push(warning);
  process.on("warning", keep);
  const complain = (message: unknown) => wire.say({ id: null, error: { code: -32700, message } });
  complain("The frame is not valid JSON.");
  complain("The frame is not valid JSON.");
  complain("The frame is too long.");
  // None of these is a complaint.
  for (const message of [undefined, 42]) complain(message);
  for (const strange of [{ id: null, result: 1 }, { id: null, error: null }, { id: null, error: "x" }]) wire.say(strange);
  wire.say({ id: null, method: "ping", error: { code: 1, message: "a request" } });
  await wire.caughtUp();
  // Warnings are emitted on the next tick.
  await new Promise((resolve) => process.nextTick(resolve));
  process.off("warning", keep);
  assert.deepEqual(
    warnings.map(({ name, message }) => [name, message]),
    [
      ["SidecarWarning", "The sidecar could not read a message: The frame is not valid JSON."],
      ["SidecarWarning", "The sidecar could not read a message: The frame is too long."],
    ],
  );
});

test("a request from the other end is not mistaken for an answer", async () => {
  const wire = new Wire();
  const { response } = wire.connection.request("ping", {});
  wire.say({ id: 1, method: "ping", params: {} });
  wire.say({ id: 1, result: "pong" });
  assert.equal(await response, "pong");
});

test("progress reaches its own request in order, and before the response that follows it", async () => {
  const wire = new Wire();
  const seen: unknown[] = [];
  const generate = (name: string) => {
    const onProgress = ({ seq }: GenerateProgress) => seen.push(`${name} ${seq}`);
    return wire.connection.request("generate", { model: "m" }, { onProgress }).response;
  };
  const mine = generate("mine");
  const other = generate("other");
  const tokens = wire.sent().map(({ params }) => params["partialResultToken"]);
  assert.equal(new Set(tokens).size, 2);
  for (const seq of [1, 2]) wire.progress(tokens[0], seq, "");
  wire.progress(tokens[1], 1, "");
  wire.say({ id: 1, result: {} });
  await mine.then(() => seen.push("my response"));
  assert.deepEqual(seen, ["mine 1", "mine 2", "other 1", "my response"]);
  wire.progress(tokens[0], 3, "");
  wire.progress(tokens[1], 2, "");
  wire.say({ id: 2, result: {} });
  await other;
  assert.deepEqual(seen.slice(4), ["other 2"]);
});

test("a request without a listener asks for no progress", () => {
  const wire = new Wire();
  wire.connection.request("generate", { model: "m", prompt: "p" });
  assert.deepEqual(wire.sent()[0]?.params, { model: "m", prompt: "p" });
});

test("an acknowledgement names the request's token, and is not sent after the response", async () => {
  const wire = new Wire();
  const { response, acknowledge } = wire.connection.request("generate", { model: "m" }, { onProgress: () => {} });
  acknowledge(7);
  const [request, ack] = wire.sent();
  const token = request?.params["partialResultToken"];
  assert.deepEqual(ack, { jsonrpc: "2.0", method: "$/streamAck", params: { token, seq: 7 } });
  wire.say({ id: 1, result: {} });
  await response;
  acknowledge(8);
  assert.deepEqual(wire.sent(), []);
});

test("a request in the background does not make the connection busy, whatever runs beside it", async () => {
  const wire = new Wire();
  const background = wire.connection.request("load", { model: "m" }, { background: true }).response;
  assert.deepEqual(wire.busy, []);
  const ping = wire.connection.request("ping", {}).response;
  wire.say({ id: 2, result: {} });
  await ping;
  assert.deepEqual(wire.busy, [true, false]);
  wire.say({ id: 1, result: {} });
  await background;
  assert.deepEqual(wire.busy, [true, false]);
});

test("whoever subscribes to the diagnostics channel sees every message both ways", async () => {
  const wire = new Wire();
  const seen: unknown[] = [];
  const onMessage = (event: unknown) => {
    const { connection, direction, message } = event as WireMessage;
    if (connection === wire.connection) seen.push([direction, message]);
  };
  subscribe("mlx-sidecar:message", onMessage);
  const { response } = wire.connection.request("ping", {});
  wire.say({ id: 1, result: "pong" });
  await response;
  wire.connection.notify("exit", {});
  unsubscribe("mlx-sidecar:message", onMessage);
  wire.connection.notify("exit", {});
  assert.deepEqual(seen, [
    ["sent", { jsonrpc: "2.0", id: 1, method: "ping", params: {} }],
    ["received", { jsonrpc: "2.0", id: 1, result: "pong" }],
    ["sent", { jsonrpc: "2.0", method: "exit", params: {} }],
  ]);
});

test("an error response rejects with its code, kind, retryability and data", async () => {
  const wire = new Wire();
  const { response } = wire.connection.request("stats", {});
  const data = { kind: "invalid_params", retryable: true, path: "messages[0].role" };
  wire.say({ id: 1, error: { code: -32602, message: "Parameter is wrong.", data } });
  await assert.rejects(response, (error) => {
    assert(error instanceof SidecarRequestError);
    assert(error instanceof SidecarError);
    assert.equal(error.name, "SidecarRequestError");
    assert.equal(error.message, "Parameter is wrong.");
    assert.equal(error.code, -32602);
    assert.equal(error.kind, "invalid_params");
    assert.equal(error.retryable, true);
    assert.deepEqual(error.data, data);
    return true;
  });
});

test("an error response without data is of unknown kind and not retryable", async () => {
  const wire = new Wire();
  const { response } = wire.connection.request("stats", {});
  wire.say({ id: 1, error: { code: 1, message: "no" } });
  await assert.rejects(response, { kind: "unknown", retryable: false, data: {} });
});

test("close rejects every pending request once, with the first reason given", async () => {
  const wire = new Wire();
  const end = new SidecarError("gone");
  const requests = [1, 2, 3].map(() => wire.connection.request("ping", {}).response);
  wire.connection.close(end);
  wire.connection.close(new SidecarError("gone again"));
  const outcomes = await Promise.allSettled(requests);
  assert.deepEqual(outcomes, requests.map(() => ({ status: "rejected", reason: end })));
  await assert.rejects(wire.connection.request("ping", {}).response, (error) => error === end);
  assert.deepEqual(wire.busy, [true, false]);
});

test("after close a request rejects with the same error, and nothing is sent any more", async () => {
  const wire = new Wire();
  const end = new SidecarError("gone");
  wire.connection.close(end);
  const request = wire.connection.request("ping", {});
  await assert.rejects(request.response, (error) => error === end);
  request.cancel();
  wire.connection.notify("exit", {});
  assert.deepEqual(wire.sent(), []);
  assert.deepEqual(wire.busy, []);
});

test("it is busy from the first request in flight to the last answer", async () => {
  const wire = new Wire();
  const first = wire.connection.request("ping", {}).response;
  const second = wire.connection.request("ping", {}).response;
  wire.say({ id: 2, result: {} });
  await second;
  assert.deepEqual(wire.busy, [true]);
  wire.say({ id: 1, error: { code: 1, message: "no" } });
  await assert.rejects(first);
  assert.deepEqual(wire.busy, [true, false]);
});

test("a broken pipe at either end is not an uncaught exception", async () => {
  const wire = new Wire();
  for (const stream of [wire.input, wire.output]) {
    const closed = new Promise((resolve) => stream.once("close", resolve));
    stream.destroy(new Error("EPIPE"));
    await closed;
  }
  wire.connection.notify("exit", {});
});

test("params that are not JSON reject, send nothing and leave nothing in flight", async () => {
  const wire = new Wire();
  const { response } = wire.connection.request("generate", { model: "m", seed: 1n as unknown as number });
  await assert.rejects(response, TypeError);
  assert.deepEqual(wire.sent(), []);
  assert.deepEqual(wire.busy, []);
});

test("a request beyond the server's limit is refused here, and one at the limit is sent", async () => {
  const wire = new Wire();
  const text = "ä".repeat(100);
  wire.connection.request("tokenize", { model: "m", text });
  wire.connection.maxFrameBytes = Buffer.byteLength(JSON.stringify(wire.sent()[0]));
  const tooLong = wire.connection.request("tokenize", { model: "m", text: `${text}.` });
  await assert.rejects(tooLong.response, { name: "SidecarRequestError", kind: "invalid_request" });
  wire.connection.request("tokenize", { model: "m", text });
  assert.deepEqual(
    wire.sent().map(({ params }) => params["text"]),
    [text],
  );
});

test("a line that never ends is the end of the connection, not of the host's memory", async () => {
  const wire = new Wire(new LineSplitter(1000));
  const { response } = wire.connection.request("ping", {});
  for (let piece = 0; piece < 11; piece++) wire.input.write("x".repeat(100));
  await assert.rejects(response, { name: "SidecarError", message: /more than 1000 bytes/ });
  wire.input.write(`x\n{"id":2,"result":"too late"}\n`);
  await assert.rejects(wire.connection.request("ping", {}).response, { name: "SidecarError" });
  assert.deepEqual(wire.busy, [true, false]);
  assert(wire.input.destroyed);
});

test("a signal that is aborted already rejects with its reason, and nothing is sent", async () => {
  const wire = new Wire();
  const signal = AbortSignal.abort("no need");
  const { response } = wire.connection.request("ping", {}, { signal });
  await assert.rejects(response, (reason) => reason === "no need");
  assert.deepEqual(wire.sent(), []);
});

test("aborting rejects at once, cancels on the server and waits for no answer", async () => {
  const wire = new Wire();
  const controller = new AbortController();
  const reason = new Error("changed my mind");
  const { response } = wire.connection.request("load", { model: "m" }, { signal: controller.signal });
  const { id } = wire.sent()[0] ?? {};
  controller.abort(reason);
  await assert.rejects(response, (error) => error === reason);
  assert.deepEqual(wire.sent(), [{ jsonrpc: "2.0", method: "$/cancelRequest", params: { id } }]);
  assert.deepEqual(wire.busy, [true, false]);
  wire.say({ id, error: { code: -32800, message: "cancelled", data: { kind: "cancelled" } } });
  await wire.caughtUp();
});

test("aborting after the answer does nothing", async () => {
  const wire = new Wire();
  const controller = new AbortController();
  const { response } = wire.connection.request("stats", {}, { signal: controller.signal });
  wire.say({ id: wire.sent()[0]?.id, result: "stats" });
  assert.equal(await response, "stats");
  controller.abort();
  assert.deepEqual(wire.sent(), []);
});

test("a signal that outlives its requests collects no listeners", async () => {
  const wire = new Wire();
  const { signal } = new AbortController();
  const requests = [1, 2, 3].map(() => wire.connection.request("ping", {}, { signal }).response);
  assert.equal(getEventListeners(signal, "abort").length, 3);
  wire.say({ id: 1, result: {} });
  wire.say({ id: 2, error: { code: 1, message: "no" } });
  await Promise.allSettled(requests.slice(0, 2));
  wire.connection.close(new SidecarError("gone"));
  await Promise.allSettled(requests);
  assert.equal(getEventListeners(signal, "abort").length, 0);
});

test("cancel asks the server and leaves the answer to it; after the answer it asks nothing", async () => {
  const wire = new Wire();
  const { response, cancel } = wire.connection.request("generate", { model: "m" });
  cancel();
  assert.deepEqual(
    wire.sent().map(({ method, params }) => [method, params["id"]]),
    [
      ["generate", undefined],
      ["$/cancelRequest", 1],
    ],
  );
  wire.say({ id: 1, result: { finishReason: "cancelled" } });
  assert.deepEqual(await response, { finishReason: "cancelled" });
  cancel();
  assert.deepEqual(wire.sent(), []);
});
