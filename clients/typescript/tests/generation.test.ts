import assert from "node:assert/strict";

import { test } from "vitest";

import { SidecarError, SidecarExitedError, SidecarRequestError } from "../src/errors.js";
import { Generation, type Ask } from "../src/generation.js";
import type { GenerateProgress } from "../src/generated/protocol.js";
import { Wire } from "./support/wire.js";

const TOKEN = 1;
const RESULT = { finishReason: "stop", lastSeq: 3 };

function generate(wire: Wire, { signal, windowBytes = 2 ** 18 }: { signal?: AbortSignal; windowBytes?: number } = {}) {
  const params = { model: "m", prompt: "p" };
  const ask: Ask = (onProgress) => wire.connection.request("generate", params, { signal, onProgress });
  return new Generation(ask, windowBytes, signal);
}

function answer(wire: Wire, parts = ["a", "b", "c"]): void {
  for (const [index, text] of parts.entries()) wire.progress(TOKEN, index + 1, text);
  wire.say({ id: 1, result: { ...RESULT, lastSeq: parts.length } });
}

async function partsOf(generation: AsyncIterable<GenerateProgress>): Promise<string[]> {
  const parts: string[] = [];
  for await (const { text } of generation) parts.push(text);
  return parts;
}

test("the request goes out at once and asks for progress", () => {
  const wire = new Wire();
  generate(wire);
  assert.deepEqual(
    wire.sent().map(({ method, params }) => [method, params]),
    [["generate", { model: "m", prompt: "p", partialResultToken: TOKEN }]],
  );
});

test("parts come in order, those from before the loop and those that come during it", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  wire.progress(TOKEN, 1, "early");
  await wire.caughtUp();
  const seen: string[] = [];
  for await (const { text } of generation) {
    seen.push(text);
    if (text === "early") wire.progress(TOKEN, 2, "late");
    if (text === "late") wire.say({ id: 1, result: { ...RESULT, lastSeq: 2 } });
  }
  assert.deepEqual(seen, ["early", "late"]);
  assert.equal((await generation.result).finishReason, "stop");
});

test("an answer that was complete before the loop began is read in full", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  answer(wire);
  await generation.result;
  assert.deepEqual(await partsOf(generation), ["a", "b", "c"]);
});

test("text is all the parts, and result can be awaited without them", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  answer(wire);
  assert.equal((await generation.result).lastSeq, 3);
  assert.equal(await generation.text(), "abc");
});

test("parts are given once: a second loop is told so instead of getting nothing", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  answer(wire);
  await partsOf(generation);
  await assert.rejects(partsOf(generation), TypeError);
  await assert.rejects(generation.text(), TypeError);
});

test("a failure comes after the parts before it, once, and is typed", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  wire.progress(TOKEN, 1, "a");
  wire.say({ id: 1, error: { code: -32603, message: "failed", data: { kind: "internal_error", retryable: true } } });
  const iterator = generation[Symbol.asyncIterator]();
  assert.equal((await iterator.next()).value?.text, "a");
  await assert.rejects(iterator.next(), { name: "SidecarRequestError", kind: "internal_error" });
  assert.deepEqual(await iterator.next(), { done: true, value: undefined });
  await assert.rejects(generation.result, SidecarRequestError);
});

test("the end of the process comes after the parts before it", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  wire.progress(TOKEN, 1, "a");
  await wire.caughtUp();
  wire.connection.close(new SidecarExitedError({ code: null, signal: "SIGKILL" }, ""));
  const iterator = generation[Symbol.asyncIterator]();
  assert.equal((await iterator.next()).value?.text, "a");
  await assert.rejects(iterator.next(), SidecarExitedError);
});

test("leaving the loop cancels once, and result says how it ended", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  wire.progress(TOKEN, 1, "a");
  for await (const part of generation) {
    assert.equal(part.text, "a");
    break;
  }
  assert.deepEqual(
    wire.sent().map(({ method }) => method),
    ["generate", "$/cancelRequest"],
  );
  wire.say({ id: 1, result: { finishReason: "cancelled" } });
  assert.equal((await generation.result).finishReason, "cancelled");
});

test("an exception in the loop cancels, and is the one that comes out", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  wire.progress(TOKEN, 1, "a");
  const consume = async () => {
    for await (const part of generation) throw new RangeError(part.text);
  };
  await assert.rejects(consume(), { name: "RangeError", message: "a" });
  assert.equal(wire.sent().at(-1)?.method, "$/cancelRequest");
});

test("a loop that runs to the end cancels nothing", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  answer(wire);
  await generation.text();
  generation.cancel();
  assert.deepEqual(
    wire.sent().map(({ method }) => method),
    ["generate"],
  );
});

test("cancel ends the loop in order, with what came until then", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  wire.progress(TOKEN, 1, "a");
  const text = generation.text();
  generation.cancel();
  assert.deepEqual(wire.sent().at(-1)?.params, { id: 1 });
  wire.say({ id: 1, result: { finishReason: "cancelled" } });
  assert.equal(await text, "a");
});

test("aborting before it began rejects loop and result with the reason, and sends nothing", async () => {
  const wire = new Wire();
  const reason = new Error("no need");
  const generation = generate(wire, { signal: AbortSignal.abort(reason) });
  await assert.rejects(generation.text(), (error) => error === reason);
  await assert.rejects(generation.result, (error) => error === reason);
  assert.deepEqual(wire.sent(), []);
});

test("aborting wakes a loop that waits for a part, and cancels on the server", async () => {
  const wire = new Wire();
  const controller = new AbortController();
  const reason = new Error("changed my mind");
  const generation = generate(wire, controller);
  const iterator = generation[Symbol.asyncIterator]();
  const waiting = iterator.next();
  controller.abort(reason);
  await assert.rejects(waiting, (error) => error === reason);
  await assert.rejects(generation.result, (error) => error === reason);
  assert.deepEqual(
    wire.sent().map(({ method }) => method),
    ["generate", "$/cancelRequest"],
  );
});

test("aborting stops the loop also when the whole answer has arrived", async () => {
  const wire = new Wire();
  const controller = new AbortController();
  const generation = generate(wire, controller);
  answer(wire);
  await generation.result;
  const seen: string[] = [];
  const consume = async () => {
    for await (const { text } of generation) {
      seen.push(text);
      controller.abort();
    }
  };
  await assert.rejects(consume(), { name: "AbortError" });
  assert.deepEqual(seen, ["a"]);
  assert.deepEqual(await generation.result, RESULT);
});

test("progress that comes after the end is not kept", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  answer(wire, ["a"]);
  await generation.result;
  wire.progress(TOKEN, 2, "stray");
  await wire.caughtUp();
  assert.equal(await generation.text(), "a");
});

test("a part that was lost is noticed once the others have been read, and the result is known all the same", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  wire.progress(TOKEN, 1, "a");
  wire.input.write("a library says hello");
  wire.progress(TOKEN, 2, "b");
  wire.progress(TOKEN, 3, "c");
  wire.say({ id: 1, result: RESULT });
  const seen: string[] = [];
  const consume = async () => {
    for await (const { text } of generation) seen.push(text);
  };
  await assert.rejects(consume(), (error) => {
    assert(error instanceof SidecarError);
    assert.equal(error.name, "SidecarError");
    assert.match(error.message, /^Of the answer's 3 parts 2 came: something else wrote into the connection\./);
    return true;
  });
  assert.deepEqual(seen, ["a", "c"]);
  assert.deepEqual(await generation.result, RESULT);
});

test("merged parts count as many as they were", async () => {
  const wire = new Wire();
  const generation = generate(wire);
  wire.progress(TOKEN, 1, "a");
  wire.say({ method: "$/progress", params: { token: TOKEN, value: { seq: 3, text: "bc", tokens: [2, 3], merged: 2 } } });
  wire.say({ id: 1, result: RESULT });
  assert.equal(await generation.text(), "abc");
});

/** The acknowledgements among what the client has sent. */
function acknowledged(wire: Wire): unknown[] {
  return wire
    .sent()
    .filter(({ method }) => method === "$/streamAck")
    .map(({ params }) => [params["token"], params["seq"]]);
}

test("parts are acknowledged once half of the window has been taken, up to the last that was", async () => {
  const wire = new Wire();
  const generation = generate(wire, { windowBytes: 12 });
  for (const seq of [1, 2, 3, 4, 5, 6, 7]) wire.progress(TOKEN, seq, "ab");
  await wire.caughtUp();
  const iterator = generation[Symbol.asyncIterator]();
  const take = async (count: number) => {
    for (let part = 0; part < count; part++) await iterator.next();
    return acknowledged(wire);
  };
  assert.deepEqual(await take(0), []);
  assert.deepEqual(await take(2), []);
  assert.deepEqual(await take(1), [[TOKEN, 3]]);
  assert.deepEqual(await take(2), []);
  assert.deepEqual(await take(2), [[TOKEN, 6]]);
});

test("the window is counted in bytes, and a part beyond it is acknowledged by itself", async () => {
  const wire = new Wire();
  const generation = generate(wire, { windowBytes: 8 });
  wire.progress(TOKEN, 1, "é");
  wire.progress(TOKEN, 2, "é");
  wire.progress(TOKEN, 9, "a merged part that is longer than the window");
  await wire.caughtUp();
  const iterator = generation[Symbol.asyncIterator]();
  await iterator.next();
  assert.deepEqual(acknowledged(wire), []);
  await iterator.next();
  assert.deepEqual(acknowledged(wire), [[TOKEN, 2]]);
  await iterator.next();
  assert.deepEqual(acknowledged(wire), [[TOKEN, 9]]);
});

test("what nobody takes is not acknowledged, and the result comes all the same", async () => {
  const wire = new Wire();
  const generation = generate(wire, { windowBytes: 1 });
  answer(wire);
  assert.deepEqual(await generation.result, RESULT);
  assert.deepEqual(acknowledged(wire), []);
  assert.equal(await generation.text(), "abc");
});

test("a reader that is always behind gets everything, in order", async () => {
  const wire = new Wire();
  const generation = generate(wire, { windowBytes: 1 });
  const expected = Array.from({ length: 500 }, (_, index) => `${index} `);
  let said = 0;
  const say = () => said < expected.length && wire.progress(TOKEN, said + 1, expected[said++] ?? "");
  for (let ahead = 0; ahead < 50; ahead++) say();
  const seen: string[] = [];
  for await (const { text } of generation) {
    seen.push(text);
    if (!say() && seen.length === expected.length) wire.say({ id: 1, result: { ...RESULT, lastSeq: said } });
  }
  assert.deepEqual(seen, expected);
});
