/** The client with the real server and a real model; one sidecar for the whole file. */

import assert from "node:assert/strict";

import { afterAll, beforeAll, test } from "vitest";

import {
  Sidecar,
  SidecarExitedError,
  type GenerateProgress,
  type LoadProgress,
  type LoadResult,
  type Message,
} from "../src/index.js";

const timeout = 120_000;
const model = "smollm2-135m";
const question: Message = { role: "user", content: "What is the capital of France?" };
const capital = { model, messages: [question], maxTokens: 16 };
/** Far more than any test waits for. */
const endless = { model, prompt: "Once upon a time", maxTokens: 2_000 };

let sidecar: Sidecar;
let loaded: LoadResult;

beforeAll(async () => {
  sidecar = await Sidecar.spawn();
  loaded = await sidecar.load(model);
});

afterAll(async () => {
  await sidecar?.close();
});

/** Returns once no sequence is left in the engine; every attempt waits for two answers. */
async function untilIdle(): Promise<void> {
  for (let attempt = 0; attempt < 5_000; attempt++) {
    if ((await sidecar.stats()).engine.sequences === 0) return;
    await sidecar.ping();
  }
  assert.fail("the engine still has sequences");
}

test("the server says who it is", { timeout }, async () => {
  assert.equal(sidecar.info.protocolVersion, 1);
  assert.equal(sidecar.info.serverInfo.name, "mlx-sidecar");
  assert(sidecar.info.limits.maxFrameBytes >= 2 ** 20);
  assert.equal((await sidecar.ping()).state, "ready");
});

test("a loaded model says what it is, and in which precision", { timeout }, async () => {
  const { device } = (await sidecar.stats()).engine;
  assert.equal(loaded.model, model);
  assert.equal(loaded.state, "ready");
  assert(loaded.parameters > 100_000_000);
  assert(loaded.bytes > loaded.parameters);
  assert(loaded.contextLength >= 2048);
  assert(loaded.vocabulary > 40_000);
  assert(loaded.loadMs >= loaded.phases.weightsMs);
  if (device === "cpu") {
    assert.equal(loaded.dtype, "float32");
    assert.match(loaded.reason ?? "", /\w/);
  } else {
    assert.notEqual(loaded.dtype, "float32");
    assert.equal(loaded.reason, undefined);
  }
});

test("an answer streams in numbered parts that add up to its text, its tokens and its usage", { timeout }, async () => {
  const answer = sidecar.generate(capital);
  const again = sidecar.generate(capital);
  const parts: GenerateProgress[] = [];
  for await (const part of answer) parts.push(part);
  const result = await answer.result;
  const text = parts.map((part) => part.text).join("");
  const tokens = parts.flatMap((part) => part.tokens);
  assert.match(text, /Paris/);
  assert.deepEqual(
    parts.map(({ seq }) => seq),
    parts.map((_, index) => index + 1),
  );
  assert(parts.length > 1);
  assert.equal(result.lastSeq, parts.length);
  assert.equal(result.finishReason, "stop");
  assert.equal(result.usage.completionTokens, tokens.length);
  assert(result.usage.promptTokens > 7);
  assert(result.timings.ttftMs > 0);
  assert.equal(await again.text(), text);
  assert.equal((await sidecar.detokenize({ model, tokens })).text, text);
});

test("answers that are generated at the same time do not mix", { timeout }, async () => {
  const first = sidecar.generate(capital);
  const second = sidecar.generate({ ...endless, maxTokens: 4 });
  const [text, other] = await Promise.all([first.text(), second.text()]);
  assert.match(text, /^The capital of France is Paris/);
  assert.doesNotMatch(other, /capital/);
  assert.equal((await second.result).usage.completionTokens, 4);
  assert.equal((await second.result).finishReason, "length");
});

test("aborting in mid-stream rejects with the reason, and the server stays usable", { timeout }, async () => {
  const controller = new AbortController();
  const reason = new Error("the user closed the window");
  const answer = sidecar.generate(endless, { signal: controller.signal });
  let parts = 0;
  const consume = async () => {
    for await (const _ of answer) if (++parts === 2) controller.abort(reason);
  };
  await assert.rejects(consume(), (error) => error === reason);
  await assert.rejects(answer.result, (error) => error === reason);
  assert.equal(parts, 2);
  await untilIdle();
  assert.match(await sidecar.generate({ ...capital, maxTokens: 2 }).text(), /^The capital/);
});

test("leaving the loop ends the generation on the server", { timeout }, async () => {
  const earlier = (await sidecar.stats()).requests;
  const answer = sidecar.generate(endless);
  for await (const part of answer) {
    assert.equal(part.seq, 1);
    break;
  }
  const { finishReason, usage } = await answer.result;
  assert.equal(finishReason, "cancelled");
  assert(usage.completionTokens < endless.maxTokens);
  await untilIdle();
  const later = (await sidecar.stats()).requests;
  assert.equal(later.cancelled, earlier.cancelled + 1);
  assert.equal(later.failed, earlier.failed);
});

test("cancel ends the generation in order", { timeout }, async () => {
  const answer = sidecar.generate(endless);
  const parts: GenerateProgress[] = [];
  for await (const part of answer) {
    if (parts.length === 0) answer.cancel();
    parts.push(part);
  }
  const result = await answer.result;
  assert.equal(result.finishReason, "cancelled");
  assert.equal(result.lastSeq, parts.length);
});

test("a model that is not loaded, or not there, is a typed error", { timeout }, async () => {
  const expected = { name: "SidecarRequestError", code: 1002, kind: "model_not_loaded", retryable: false };
  const answer = sidecar.generate({ ...capital, model: "nobody" });
  await assert.rejects(answer.text(), expected);
  await assert.rejects(answer.result, expected);
  await assert.rejects(sidecar.tokenize({ model: "nobody", text: "x" }), expected);
  await assert.rejects(sidecar.load("nobody"), { code: 1001, kind: "model_not_found" });
});

test("a wrong parameter is a typed error that names it", { timeout }, async () => {
  const data = (path: string) => ({ kind: "invalid_params", retryable: false, path });
  const wrong = sidecar.generate({ ...capital, topP: 1.5 });
  await assert.rejects(wrong.result, { code: -32602, kind: "invalid_params", data: data("topP") });
  const unknown = sidecar.generate({ ...capital, temprature: 1 } as typeof capital);
  await assert.rejects(unknown.result, { code: -32602, kind: "invalid_params", data: data("temprature") });
});

test("identical answers at the same time are worked out once, unless somebody objects", { timeout }, async () => {
  const answers = [sidecar.generate(capital), sidecar.generate({ ...capital, priority: "low" })];
  const alone = sidecar.generate({ ...capital, deduplicate: false });
  const [first, second, third] = await Promise.all([...answers, alone].map((answer) => answer.text()));
  assert.match(first ?? "", /Paris/);
  assert.equal(second, first);
  assert.equal(third, first);
  const shared = await Promise.all([...answers, alone].map(async (answer) => (await answer.result).shared ?? false));
  assert.deepEqual(shared.slice(0, 2).sort(), [false, true]);
  assert.equal(shared[2], false);
});

test("an answer that takes too long is a typed error behind the parts that came", { timeout }, async () => {
  const answer = sidecar.generate({ ...endless, priority: "high", deadlineMs: 3_000 });
  const parts: GenerateProgress[] = [];
  const consume = async () => {
    for await (const part of answer) parts.push(part);
  };
  const data = { kind: "deadline_exceeded", retryable: false, deadlineMs: 3_000, neverStarted: false };
  await assert.rejects(consume(), { name: "SidecarRequestError", code: 1010, kind: "deadline_exceeded", data });
  assert(parts.length > 0);
  await untilIdle();
});

test("text becomes tokens and the same text again", { timeout }, async () => {
  const text = "Größe 東京 🗼\n\u2028 end";
  const { tokens } = await sidecar.tokenize({ model, text, addSpecialTokens: false });
  assert(tokens.length > 5);
  assert.equal((await sidecar.detokenize({ model, tokens })).text, text);
});

test("a signal that times out rejects a request with its own reason", { timeout }, async () => {
  const signal = AbortSignal.timeout(1);
  await assert.rejects(sidecar.generate(endless, { signal }).result, { name: "TimeoutError" });
  await untilIdle();
});

test("models tells what was loaded, and what it is called", { timeout }, async () => {
  const { dtype, parameters, contextLength, bytes } = loaded;
  assert.deepEqual(await sidecar.alias({ alias: "writer", model }), { alias: "writer", model, previous: null });
  const info = (await sidecar.models()).find(({ state }) => state === "ready") ?? assert.fail();
  assert.deepEqual(
    { ...info, uses: 0, idleMs: 0, kvBytesPerToken: 0, prefillPeakBytes: 0, loadMs: 0, ttlMs: 0, reason: "" },
    {
      ...{ model, state: "ready", dtype, parameters, contextLength, bytes, aliases: ["writer"], adapters: [] },
      ...{ loads: 1, pinned: false, inUse: 0, uses: 0, idleMs: 0, kvBytesPerToken: 0, prefillPeakBytes: 0 },
      ...{ loadMs: 0, ttlMs: 0, reason: "" },
    },
  );
  assert(info.uses > 0);
});

test("what is no adapter, or nowhere, is refused and costs the model nothing", { timeout }, async () => {
  const adapter = { model: "writer", adapter: "poet", path: "/" };
  await assert.rejects(sidecar.loadAdapter(adapter), { kind: "invalid_adapter" });
  await assert.rejects(sidecar.generate({ ...capital, adapter: "poet" }).text(), { kind: "adapter_not_loaded" });
  await assert.rejects(sidecar.unloadAdapter(adapter as never), { kind: "invalid_params" });
  await assert.rejects(sidecar.pull("no such model"), { kind: "pull_failed" });
  assert.match(await sidecar.generate({ ...capital, model: "writer" }).text(), /Paris/);
});

test("a model is loaded anew while it answers, and tells how far that is", { timeout }, async () => {
  const answer = sidecar.generate({ model, prompt: "Once upon a time", maxTokens: 20 });
  const told: LoadProgress[] = [];
  const { bytes } = await sidecar.reload("writer", { onProgress: (progress) => told.push(progress) });
  assert.deepEqual(
    told.map(({ seq }) => seq),
    told.map((_, index) => index + 1),
  );
  const last = told.at(-1) ?? assert.fail();
  assert.deepEqual([last.doneBytes, last.totalBytes], [bytes, bytes]);
  assert.equal((await answer.result).finishReason, "length");
  assert.match(await sidecar.generate(capital).text(), /Paris/);
});

test("whoever is forced out of a model is told behind what came, and the model is gone", { timeout }, async () => {
  const answer = sidecar.generate(endless);
  const parts: string[] = [];
  const reading = async () => {
    for await (const { text } of answer) {
      if (parts.push(text) === 1) unloaded = sidecar.unload({ model, force: true });
    }
  };
  let unloaded: Promise<unknown> | undefined;
  await assert.rejects(reading(), { kind: "unloaded" });
  assert(parts.length > 0);
  assert.deepEqual(await unloaded, { model, state: "unloaded" });
  assert(!(await sidecar.models()).some((info) => info.model === model));
  await assert.rejects(sidecar.generate(capital).text(), { kind: "model_not_loaded" });
  await assert.rejects(sidecar.generate({ ...capital, model: "writer" }).text(), { kind: "model_not_loaded" });
});

test("leaving the scope of an await using ends a server in order", { timeout }, async () => {
  let exited;
  {
    await using other = await Sidecar.spawn();
    assert.deepEqual(await other.models(), []);
    exited = other.exited;
  }
  assert.deepEqual(await exited, { code: 0, signal: null });
});

test("close ends the server with code 0, and what comes after is told so", { timeout }, async () => {
  assert.deepEqual(await sidecar.close(), { code: 0, signal: null });
  await assert.rejects(sidecar.ping(), SidecarExitedError);
});
