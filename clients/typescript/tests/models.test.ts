/** What is said about models and adapters, and how far a load or a pull is. */

import assert from "node:assert/strict";

import { describe, test } from "vitest";

import type { SidecarClient } from "../src/client.js";
import { SidecarRequestError, type LoadProgress, type PullProgress } from "../src/index.js";
import { Wire, WiredClient } from "./support/wire.js";

type Watch = ((progress: LoadProgress | PullProgress) => void) | undefined;

const loading = { phase: "weights", doneBytes: 10, totalBytes: 40, tensors: 1, totalTensors: 4 };
const pulling = { phase: "fetching", doneBytes: 10, totalBytes: 40 };
const adapter = { model: "m", adapter: "poet", path: "/adapters/poet" };

/** What each call says; it returns whatever the server answers. */
const said: [call: (client: SidecarClient) => Promise<unknown>, method: string, params: object][] = [
  [(client) => client.load("m"), "load", { model: "m" }],
  [
    (client) => client.load({ model: "m", revision: "v1", alias: "a", pin: true, ttlMs: null }),
    "load",
    { model: "m", revision: "v1", alias: "a", pin: true, ttlMs: null },
  ],
  [(client) => client.reload("m"), "reload", { model: "m" }],
  [(client) => client.alias({ alias: "a", model: "m" }), "alias", { alias: "a", model: "m" }],
  [(client) => client.alias({ alias: "a", model: null }), "alias", { alias: "a", model: null }],
  [(client) => client.pull("m"), "pull", { model: "m" }],
  [(client) => client.pull({ model: "m", revision: "v1" }), "pull", { model: "m", revision: "v1" }],
  [(client) => client.loadAdapter(adapter), "loadAdapter", adapter],
  [
    (client) => client.unloadAdapter({ model: "m", adapter: "poet", force: true }),
    "unloadAdapter",
    { model: "m", adapter: "poet", force: true },
  ],
  [
    (client) => client.generate({ model: "m", prompt: "p", adapter: "poet" }).result,
    "generate",
    { model: "m", prompt: "p", adapter: "poet", partialResultToken: 1 },
  ],
];

test.each(
  said.map(([call, method, params]) => ({ call, method, params })),
)("$method says $params and gives what it was told", async ({ call, method, params }) => {
  const wire = new Wire();
  const answer = call(new WiredClient(wire.connection));
  assert.deepEqual(wire.sent(), [{ jsonrpc: "2.0", id: 1, method, params }]);
  wire.say({ id: 1, result: { model: "m", rank: 8 } });
  assert.deepEqual(await answer, { model: "m", rank: 8 });
});

describe.each([
  { method: "load", value: loading, ask: (client: SidecarClient, onProgress: Watch) => client.load("m", { onProgress }) },
  {
    method: "reload",
    value: loading,
    ask: (client: SidecarClient, onProgress: Watch) => client.reload("m", { onProgress }),
  },
  { method: "pull", value: pulling, ask: (client: SidecarClient, onProgress: Watch) => client.pull("m", { onProgress }) },
])("how far a $method is", ({ method, value, ask }) => {
  const begin = (onProgress: Watch) => {
    const wire = new Wire();
    const answer: Promise<unknown> = ask(new WiredClient(wire.connection), onProgress);
    const [request] = wire.sent();
    assert.equal(request?.method, method);
    const token = request.params["partialResultToken"];
    const progress = (seq: number) =>
      wire.say({ method: "$/progress", params: { token, value: { seq, ...value } } });
    return { wire, answer, token, progress };
  };

  test("is told in order, and before it is done", async () => {
    const seen: unknown[] = [];
    const { wire, answer, progress } = begin((told) => seen.push(told));
    progress(1);
    progress(2);
    wire.say({ id: 1, result: { model: "m" } });
    seen.push(await answer);
    assert.deepEqual(seen, [{ seq: 1, ...value }, { seq: 2, ...value }, { model: "m" }]);
  });

  test("is told before a failure too", async () => {
    const seen: number[] = [];
    const { wire, answer, progress } = begin(({ seq }) => seen.push(seq));
    progress(1);
    const data = { kind: "unloaded", retryable: false, model: "m" };
    wire.say({ id: 1, error: { code: 1017, message: "It was unloaded by force.", data } });
    await assert.rejects(answer, (error) => error instanceof SidecarRequestError && error.kind === "unloaded");
    assert.deepEqual(seen, [1]);
  });

  test("is not asked for unless somebody wants to know", async () => {
    const { wire, answer, token } = begin(undefined);
    assert.equal(token, undefined);
    wire.say({ id: 1, result: { model: "m" } });
    await answer;
  });

  test("is told to a listener whose fault is its own: it ends this request only", async () => {
    const { wire, answer, progress } = begin(() => {
      throw new RangeError("mine");
    });
    progress(1);
    progress(2);
    await assert.rejects(answer, { name: "RangeError", message: "mine" });
    assert.deepEqual(wire.sent(), [{ jsonrpc: "2.0", method: "$/cancelRequest", params: { id: 1 } }]);
    // Its late answer is nobody's.
    wire.say({ id: 1, result: { model: "m" } });
    await wire.caughtUp();
  });
});

test("a load that is given up on its way is cancelled on the server", async () => {
  const wire = new Wire();
  const controller = new AbortController();
  const reason = new Error("enough");
  const onProgress = () => controller.abort(reason);
  const answer = new WiredClient(wire.connection).load("m", { signal: controller.signal, onProgress });
  wire.sent();
  wire.say({ method: "$/progress", params: { token: 1, value: { seq: 1, ...loading } } });
  await assert.rejects(answer, (error) => error === reason);
  assert.deepEqual(wire.sent(), [{ jsonrpc: "2.0", method: "$/cancelRequest", params: { id: 1 } }]);
});
