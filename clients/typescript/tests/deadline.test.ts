import assert from "node:assert/strict";
import { getEventListeners } from "node:events";

import { afterEach, beforeEach, describe, test, vi } from "vitest";

import { Deadline } from "../src/deadline.js";
import { Sidecar, SidecarTimeoutError } from "../src/index.js";
import { fakeSidecar } from "./support/children.js";

describe("with a clock of the test", () => {
  beforeEach(() => void vi.useFakeTimers());
  afterEach(() => void vi.useRealTimers());

  test("the time that passes aborts with a typed error, and not before", () => {
    const { signal } = new Deadline({ timeoutMs: 1_000 });
    vi.advanceTimersByTime(999);
    assert.equal(signal?.aborted, false);
    vi.advanceTimersByTime(1);
    assert(signal?.reason instanceof SidecarTimeoutError);
    assert.equal(signal.reason.timeoutMs, 1_000);
    assert.equal(signal.reason.message, "The request was not answered within 1000 ms.");
  });

  test("the signal that it was given comes first, with its own reason", () => {
    const controller = new AbortController();
    const { signal } = new Deadline({ signal: controller.signal, timeoutMs: 1_000 });
    controller.abort("enough");
    vi.advanceTimersByTime(1_000);
    assert.equal(signal?.reason, "enough");
  });

  test("once cleared it holds neither timer nor signal", () => {
    const controller = new AbortController();
    const deadline = new Deadline({ signal: controller.signal, timeoutMs: 1_000 });
    assert.equal(vi.getTimerCount(), 1);
    deadline.clear();
    assert.equal(vi.getTimerCount(), 0);
    assert.equal(getEventListeners(controller.signal, "abort").length, 0);
    controller.abort();
    assert.equal(deadline.signal?.aborted, false);
  });

  test("a time that no timer can wait is very long, and not none", () => {
    const { signal } = new Deadline({ timeoutMs: Infinity });
    vi.advanceTimersByTime(86_400_000);
    assert.equal(signal?.aborted, false);
  });
});

test("without a time the signal stays itself, and one that is aborted already needs no timer", () => {
  const { signal } = new AbortController();
  assert.equal(new Deadline({ signal }).signal, signal);
  assert.equal(new Deadline({}).signal, undefined);
  const aborted = AbortSignal.abort();
  assert.equal(new Deadline({ signal: aborted, timeoutMs: 1 }).signal, aborted);
});

test("requests and generations that take too long reject, and the server is told", async () => {
  await using sidecar = await Sidecar.spawn(
    fakeSidecar(`
      const cancelled = [];
      on["$/cancelRequest"] = ({ params }) => cancelled.push(params.id);
      on.generate = ({ params }) => {
        const value = { seq: 1, text: "a part", tokens: [1] };
        say({ method: "$/progress", params: { token: params.partialResultToken, value } });
      };
      on.models = ({ id }) => say({ id, result: { models: cancelled } });
    `),
  );
  await assert.rejects(sidecar.load("m", { timeoutMs: 20 }), { name: "SidecarTimeoutError", timeoutMs: 20 });
  const generation = sidecar.generate({ model: "m", prompt: "p" }, { timeoutMs: 20 });
  await assert.rejects(generation.text(), SidecarTimeoutError);
  await assert.rejects(generation.result, SidecarTimeoutError);
  assert.equal((await sidecar.models({ timeoutMs: 30_000 })).length, 2);
});
