/** A sidecar that ends and is started again, as its callers see it. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { afterEach, beforeEach, describe, test } from "vitest";

import {
  SidecarExitedError,
  SidecarGaveUpError,
  SidecarRequestError,
  SidecarTimeoutError,
  SupervisedSidecar,
  type Restart,
  type SuperviseOptions,
} from "../src/index.js";
import { fakeOnTheLine, fakeSidecar, hungUp, Line, runHost } from "./support/children.js";

const AT_ONCE = { delayMs: 0 };

/** What every fake here does: it remembers what it was asked to hold, and ends when it is asked for its stats. */
const MORTAL = `
  const held = [];
  const aliases = {};
  let generated = 0;
  const nameOf = ({ model, revision }) => aliases[model] ?? (revision ? model + "@" + revision : model);
  const hold = ({ id, params }, result) => { held.push(params); say({ id, result }); };
  on.load = (message) => {
    const model = nameOf(message.params);
    aliases[message.params.alias] = model;
    hold(message, { model });
  };
  on.loadAdapter = (message) => hold(message, { ...message.params, model: nameOf(message.params) });
  on.alias = (message) => {
    aliases[message.params.alias] = message.params.model;
    hold(message, { ...message.params, model: message.params.model && nameOf(message.params) });
  };
  on.unload = on.unloadAdapter = ({ id, params }) => say({ id, result: { ...params, model: nameOf(params) } });
  on.generate = () => { generated += 1; };
  on.models = ({ id }) => say({ id, result: { models: [{ pid: process.pid, held, generated }] } });
  on.stats = () => process.kill(process.pid, "SIGKILL");
  on.ping = ({ id }) => say({ id, result: "pong" });
`;

interface Memory {
  pid: number;
  held: object[];
  generated: number;
}

let starts: string;

beforeEach(() => {
  starts = join(mkdtempSync(join(tmpdir(), "starts-")), "starts");
  writeFileSync(starts, "");
});

afterEach(() => rmSync(join(starts, ".."), { recursive: true }));

/** A fake's code that counts its starts: `start` is 1 in the first process. */
function counting(): string {
  const file = JSON.stringify(starts);
  return `fs.appendFileSync(${file}, "x"); const start = fs.statSync(${file}).size;`;
}

function startsSoFar(): number {
  return statSync(starts).size;
}

function mortal(script = "", options: SuperviseOptions = {}): SuperviseOptions {
  return { ...fakeSidecar(`${MORTAL}${counting()}${script}`), restart: AT_ONCE, ...options };
}

async function memory(sidecar: SupervisedSidecar): Promise<Memory> {
  const [found] = (await sidecar.models()) as unknown as Memory[];
  return found ?? assert.fail();
}

/** Spawns, and tells how to wait for the next restart. */
async function supervise(options: SuperviseOptions) {
  const restarts: Restart[] = [];
  let wake = () => {};
  const sidecar = await SupervisedSidecar.spawn({
    ...options,
    onRestart: (restart) => {
      restarts.push(restart);
      wake();
    },
  });
  const restarted = async () => {
    while (restarts.length === 0) await new Promise<void>((resolve) => (wake = resolve));
    return restarts.shift() as Restart;
  };
  return { sidecar, restarted, [Symbol.asyncDispose]: () => sidecar[Symbol.asyncDispose]() };
}

describe.each(["stdio", "pipe"] as const)("over %s", (transport) => {
  test("a sidecar that is killed runs again, with the models that were loaded and as they were loaded", async () => {
    await using running = await supervise(mortal("", { transport }));
    const { sidecar, restarted } = running;
    const load = { model: "b", dtype: "float32" } as const;
    await sidecar.load("a");
    await sidecar.load(load);
    await sidecar.load("c");
    await sidecar.unload("c");
    const before = await memory(sidecar);
    assert.equal(before.pid, sidecar.pid);

    await assert.rejects(sidecar.stats(), { name: "SidecarExitedError", signal: "SIGKILL", retryable: true });
    assert.equal(sidecar.pid, undefined);
    const { cause, attempts, lost } = await restarted();
    assert(cause instanceof SidecarExitedError);
    assert.equal(cause.signal, "SIGKILL");
    assert.deepEqual([attempts, lost], [1, []]);

    const after = await memory(sidecar);
    assert.notEqual(after.pid, before.pid);
    assert.equal(sidecar.pid, after.pid);
    assert.deepEqual(after.held, [{ model: "a" }, load]);
  });

  test("what is asked while there is no sidecar waits for the next, and for its models", async () => {
    await using running = await supervise(mortal("", { transport }));
    const { sidecar } = running;
    await sidecar.load("a");
    await assert.rejects(sidecar.stats(), SidecarExitedError);
    const { held } = await memory(sidecar);
    assert.deepEqual(held, [{ model: "a" }]);
  });
});

test("what was in flight is rejected once, and is not repeated", async () => {
  await using running = await supervise(mortal());
  const { sidecar } = running;
  const generation = sidecar.generate({ model: "m", prompt: "p" });
  const outcomes = await Promise.allSettled([generation.text(), generation.result, sidecar.load("m"), sidecar.stats()]);
  assert.deepEqual(
    outcomes.map(({ status }) => status),
    // The load was answered before the end.
    ["rejected", "rejected", "fulfilled", "rejected"],
  );
  for (const outcome of outcomes) {
    if (outcome.status === "rejected") assert(outcome.reason instanceof SidecarExitedError);
  }
  const after = await memory(sidecar);
  assert.equal(after.generated, 0);
});

test("a load that was in flight is not repeated either, and one that failed is forgotten", async () => {
  const script = `
    on.load = ({ id, params }) => {
      held.push(params);
      if (params.model === "bad") say({ id, error: { code: 1003, message: "no", data: { kind: "invalid_model" } } });
      if (params.model === "deadly") process.kill(process.pid, "SIGKILL");
    };
  `;
  await using running = await supervise(mortal(script));
  const { sidecar } = running;
  await assert.rejects(sidecar.load("bad"), SidecarRequestError);
  await assert.rejects(sidecar.load("deadly"), SidecarExitedError);
  assert.deepEqual((await memory(sidecar)).held, []);
});

test("a generation that is asked for meanwhile is sent to the next, streams, and can be cancelled", async () => {
  const script = `
    on.generate = ({ id, params }) => {
      const value = { seq: 1, text: "Once", tokens: [1] };
      say({ method: "$/progress", params: { token: params.partialResultToken, value } });
      on["$/cancelRequest"] = ({ params }) => {
        if (params.id === id) say({ id, result: { finishReason: "cancelled" } });
      };
    };
  `;
  await using running = await supervise(mortal(script));
  const { sidecar } = running;
  await assert.rejects(sidecar.stats(), SidecarExitedError);
  const early = sidecar.generate({ model: "m", prompt: "p" });
  early.cancel();
  assert.equal((await early.result).finishReason, "cancelled");

  await assert.rejects(sidecar.stats(), SidecarExitedError);
  const generation = sidecar.generate({ model: "m", prompt: "p" });
  const parts: string[] = [];
  for await (const { text } of generation) {
    parts.push(text);
    generation.cancel();
  }
  assert.deepEqual(parts, ["Once"]);
  assert.equal((await generation.result).finishReason, "cancelled");
});

test("whoever waits may give up: by a signal, by a deadline, or because all is closed", async () => {
  using line = await Line.open();
  const stuck = `${MORTAL}${counting()} if (start > 1) on.initialize = () => {};`;
  const sidecar = await SupervisedSidecar.spawn({ ...fakeOnTheLine(line, stuck), restart: AT_ONCE });
  await line.caller();
  await assert.rejects(sidecar.stats(), SidecarExitedError);
  const second = await line.caller();

  await assert.rejects(sidecar.ping({ timeoutMs: 10 }), SidecarTimeoutError);
  await assert.rejects(sidecar.generate({ model: "m", prompt: "p" }, { timeoutMs: 10 }).text(), SidecarTimeoutError);
  const reason = new Error("enough");
  await assert.rejects(sidecar.ping({ signal: AbortSignal.abort(reason) }), (error) => error === reason);
  const controller = new AbortController();
  const aborted = assert.rejects(sidecar.ping({ signal: controller.signal }), (error) => error === reason);
  controller.abort(reason);
  await aborted;

  const waiting = assert.rejects(sidecar.ping(), { name: "SidecarExitedError", signal: "SIGKILL" });
  assert.deepEqual(await sidecar.close(), { code: null, signal: "SIGKILL" });
  await waiting;
  await hungUp(second);
  await assert.rejects(sidecar.ping(), SidecarExitedError);
  assert.equal(startsSoFar(), 2);
});

test.each([0, 2, 69, 75])("after exit code %i another start would be no use", async (code) => {
  let gaveUp: SidecarGaveUpError[] = [];
  const onGiveUp = (error: SidecarGaveUpError) => (gaveUp = [...gaveUp, error]);
  const options = mortal(`on.stats = () => process.exit(${code});`, { onGiveUp });
  const sidecar = await SupervisedSidecar.spawn(options);
  await assert.rejects(sidecar.stats(), { name: "SidecarExitedError", code, retryable: false });
  await assert.rejects(sidecar.ping(), (error) => {
    assert(error instanceof SidecarGaveUpError);
    assert.match(error.message, /^Another start of the sidecar would end the same way\. The sidecar ended with code/);
    assert(error.cause instanceof SidecarExitedError);
    assert.equal(error.cause.code, code);
    return true;
  });
  assert.equal(gaveUp.length, 1);
  assert.equal(startsSoFar(), 1);
  assert.deepEqual(await sidecar.close(), { code, signal: null });
});

test.each([1, 70, 71])("after exit code %i it is started again", async (code) => {
  await using running = await supervise(mortal(`on.stats = () => process.exit(${code});`));
  await assert.rejects(running.sidecar.stats(), { code });
  assert.equal((await running.restarted()).cause.code, code);
});

test("one that ends again and again is given up, and who waited is told", async () => {
  let gaveUp: SidecarGaveUpError | undefined;
  const script = `if (start > 1) process.exit(70);`;
  const options = mortal(script, { restart: { delayMs: 0, limit: 3 }, onGiveUp: (error) => (gaveUp = error) });
  const sidecar = await SupervisedSidecar.spawn(options);
  await assert.rejects(sidecar.stats(), SidecarExitedError);
  await assert.rejects(sidecar.ping(), (error) => {
    assert(error instanceof SidecarGaveUpError);
    assert.match(error.message, /^The sidecar was started again 3 times within 180000 ms\. .* ended with code 70\.$/);
    return true;
  });
  assert(gaveUp instanceof SidecarGaveUpError);
  assert.equal(startsSoFar(), 4);
  await assert.rejects(sidecar.generate({ model: "m", prompt: "p" }).text(), SidecarGaveUpError);
});

test("a start that fails is tried again, and one in which a model ends it too", async () => {
  const script = `
    if (start === 2) process.exit(70);
    if (start === 3) on.load = () => process.kill(process.pid, "SIGKILL");
  `;
  await using running = await supervise(mortal(script));
  const { sidecar, restarted } = running;
  await sidecar.load("m");
  await assert.rejects(sidecar.stats(), SidecarExitedError);
  assert.equal((await restarted()).attempts, 3);
  assert.deepEqual((await memory(sidecar)).held, [{ model: "m" }]);
  assert.equal(startsSoFar(), 4);
});

test("a model that cannot be loaded again is named, once, and the rest goes on", async () => {
  const script = `
    const { load } = on;
    on.load = (message) => {
      if (start === 1 || message.params.model !== "gone") return load(message);
      const data = { kind: "model_not_found", retryable: false };
      say({ id: message.id, error: { code: 1001, message: "no such model", data } });
    };
  `;
  await using running = await supervise(mortal(script));
  const { sidecar, restarted } = running;
  await sidecar.load("gone");
  await sidecar.load("here");
  await assert.rejects(sidecar.stats(), SidecarExitedError);
  const { lost } = await restarted();
  assert.deepEqual(
    lost.map(({ model, error }) => [model, error.kind]),
    [["gone", "model_not_found"]],
  );
  await assert.rejects(sidecar.stats(), SidecarExitedError);
  assert.deepEqual((await restarted()).lost, []);
  assert.deepEqual((await memory(sidecar)).held, [{ model: "here" }]);
});

test("a model comes back with its aliases, its adapters and its latest settings", async () => {
  await using running = await supervise(mortal());
  const { sidecar, restarted } = running;
  const poet = { adapter: "poet", path: "/adapters/poet" };
  await sidecar.load({ model: "m", revision: "v1", alias: "current", pin: true });
  await sidecar.load({ model: "m", revision: "v2", dtype: "float32" });
  await sidecar.load({ model: "gone", alias: "past" });
  await sidecar.loadAdapter({ model: "past", ...poet });
  await sidecar.loadAdapter({ model: "m@v2", ...poet });
  await sidecar.loadAdapter({ model: "m@v2", ...poet, adapter: "critic" });
  await sidecar.alias({ alias: "current", model: "m@v2" });
  await sidecar.alias({ alias: "stable", model: "m@v1" });
  await sidecar.alias({ alias: "canary", model: "m@v2" });
  // What is loaded already only gets other settings, under whatever name.
  await sidecar.load({ model: "current", ttlMs: null });
  await sidecar.unloadAdapter({ model: "current", adapter: "critic" });
  await sidecar.alias({ alias: "canary", model: null });
  await sidecar.unload("past");
  const expected = [
    { model: "m", revision: "v1", pin: true },
    { model: "m", revision: "v2", dtype: "float32", ttlMs: null },
    { model: "m@v2", ...poet },
    { alias: "current", model: "m@v2" },
    { alias: "stable", model: "m@v1" },
  ];
  for (let restart = 0; restart < 2; restart++) {
    await assert.rejects(sidecar.stats(), SidecarExitedError);
    assert.deepEqual((await restarted()).lost, []);
    assert.deepEqual((await memory(sidecar)).held, expected);
  }
});

test("what a model had is not asked for if the model does not come back, and what fails alone is named", async () => {
  const script = `
    const { load, loadAdapter } = on;
    const refuse = ({ id }, kind) => say({ id, error: { code: 1, message: "no", data: { kind, retryable: false } } });
    on.load = (message) =>
      start > 1 && message.params.model === "gone" ? refuse(message, "model_not_found") : load(message);
    on.loadAdapter = (message) => (start > 1 ? refuse(message, "invalid_adapter") : loadAdapter(message));
  `;
  await using running = await supervise(mortal(script));
  const { sidecar, restarted } = running;
  for (const model of ["gone", "here"]) {
    await sidecar.load({ model, alias: `${model} too` });
    await sidecar.loadAdapter({ model, adapter: "poet", path: "/adapters/poet" });
  }
  await assert.rejects(sidecar.stats(), SidecarExitedError);
  const { lost } = await restarted();
  assert.deepEqual(
    lost.map(({ error, ...holding }) => [holding, error.kind]),
    [
      [{ model: "gone" }, "model_not_found"],
      [{ model: "here", adapter: "poet" }, "invalid_adapter"],
    ],
  );
  assert.deepEqual((await memory(sidecar)).held, [{ model: "here" }, { alias: "here too", model: "here" }]);
});

test("what is lost in a start that fails is named after the one that does not", async () => {
  const script = `
    const { load } = on;
    on.load = (message) => {
      const { id, params } = message;
      if (start === 1 || (start > 2 && params.model === "here")) return load(message);
      if (params.model === "here") return process.kill(process.pid, "SIGKILL");
      say({ id, error: { code: 1001, message: "no such model", data: { kind: "model_not_found", retryable: false } } });
    };
  `;
  await using running = await supervise(mortal(script));
  const { sidecar, restarted } = running;
  await sidecar.load("gone");
  await sidecar.load("here");
  await assert.rejects(sidecar.stats(), SidecarExitedError);
  const { attempts, lost } = await restarted();
  assert.deepEqual([attempts, lost.map(({ model }) => model)], [2, ["gone"]]);
});

test("a sidecar that answers nonsense to a load harms nobody", async () => {
  await using running = await supervise(mortal(`on.load = ({ id }) => say({ id, result: null });`));
  assert.equal(await running.sidecar.load("m"), null);
  assert.equal(await running.sidecar.ping(), "pong");
});

test("a sidecar that stops making sense is ended and started again", async () => {
  const endless = `on.detokenize = () => process.stdout.write("x".repeat(2 ** 22), on.detokenize);`;
  await using running = await supervise(mortal(endless));
  const { sidecar, restarted } = running;
  const expected = { name: "SidecarError", message: /a line of more than/ };
  await assert.rejects(sidecar.detokenize({ model: "m", tokens: [1] }), expected);
  await restarted();
  assert.equal(await sidecar.ping(), "pong");
});

test("a first start that fails is the caller's, and nothing is started again", async () => {
  const options = mortal(`process.exit(70);`);
  await assert.rejects(SupervisedSidecar.spawn(options), { name: "SidecarExitedError", code: 70 });
  assert.equal(startsSoFar(), 1);
});

test("one that is closed stays closed", async () => {
  const { sidecar } = await supervise(mortal());
  assert.deepEqual(await sidecar.close(), { code: 0, signal: null });
  await assert.rejects(sidecar.ping(), { name: "SidecarExitedError", code: 0 });
  assert.deepEqual(await sidecar.close(), { code: 0, signal: null });
  assert.equal(startsSoFar(), 1);
});

test("waiting for a restart keeps the host alive only if somebody waits", async ({ signal }) => {
  using line = await Line.open();
  const script = (delayMs: number, rest: string) => `
    const options = ${JSON.stringify({ ...fakeOnTheLine(line, MORTAL), restart: { delayMs } })};
    const sidecar = await SupervisedSidecar.spawn(options);
    await sidecar.stats().catch((error) => console.log(error.signal));
    ${rest}
  `;
  const idle = runHost(script(2 ** 30, ""), signal);
  assert.deepEqual(await idle, { code: 0, signal: null, stdout: "SIGKILL\n", stderr: "" });
  const waiting = runHost(script(50, "console.log(await sidecar.ping());"), signal);
  assert.deepEqual(await waiting, { code: 0, signal: null, stdout: "SIGKILL\npong\n", stderr: "" });
  for (let child = 0; child < 3; child++) await hungUp(await line.caller());
});

test("a host that has nothing left to do does not stay for a sidecar that starts again", async ({ signal }) => {
  using line = await Line.open();
  using hold = await Line.open();
  const fake = fakeOnTheLine(line, `${MORTAL}${counting()} if (start > 1) on.load = () => line.write("loading");`);
  const script = `
    const { connect } = await import("node:net");
    const sidecar = await SupervisedSidecar.spawn(${JSON.stringify({ ...fake, restart: AT_ONCE })});
    await sidecar.load("m");
    connect(${hold.port}, "127.0.0.1").resume();
    await sidecar.stats().catch(() => {});
  `;
  const host = runHost(script, signal);
  await line.caller();
  const second = await line.caller();
  await once(second, "data");
  // The next has been asked for the model, which it will never have; nothing else holds the host now.
  (await hold.caller()).destroy();
  assert.equal((await host).code, 0);
  await hungUp(second);
});
