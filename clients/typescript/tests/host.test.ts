/** What a host that uses the package goes through as a process: when it ends, and what may end it. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { describe, test } from "vitest";

import { DOES_NOT_CONNECT, fakeOnTheLine, fakeSidecar, hungUp, Line, runHost, spawning } from "./support/children.js";

const OVER = [{ transport: "stdio" }, { transport: "pipe" }] as const;

/** Lets go of nothing by itself: neither at the end of its input nor when it is asked to end. */
const STUBBORN = `on.shutdown = on.exit = on.end = () => {}; process.on("SIGTERM", () => {});`;

describe.each(OVER)("over $transport", (over) => {
  test("an idle sidecar does not keep its host alive, and ends with it", async ({ signal }) => {
    using line = await Line.open();
    const fake = { ...fakeOnTheLine(line, ""), ...over };
    const host = runHost(`await ${spawning(fake)}; console.log("nothing left to do");`, signal);
    const sidecar = await line.caller();
    assert.deepEqual(await host, { code: 0, signal: null, stdout: "nothing left to do\n", stderr: "" });
    await hungUp(sidecar);
  });

  test("a sidecar that was busy does not keep its host alive when it is idle again", async ({ signal }) => {
    const fake = { ...fakeSidecar(`on.ping = ({ id }) => say({ id, result: "pong" });`), ...over };
    const script = `
      const sidecar = await ${spawning(fake)};
      process.on("beforeExit", () => console.log("idle"));
      console.log(await sidecar.ping());
    `;
    assert.equal((await runHost(script, signal)).stdout, "pong\nidle\n");
  });

  test("a request in flight keeps the host alive until it is answered", async ({ signal }) => {
    using line = await Line.open();
    // The answer takes a trip over the test: a host that nothing keeps alive is idle long before.
    const answer = `line.write("asked"); line.once("data", () => say({ id, result: "pong" }));`;
    const fake = { ...fakeOnTheLine(line, `on.ping = ({ id }) => { ${answer} };`), ...over };
    const script = `
      const sidecar = await ${spawning(fake)};
      process.on("beforeExit", () => console.log("idle"));
      sidecar.ping().then(console.log);
    `;
    const host = runHost(script, signal);
    const sidecar = await line.caller();
    await once(sidecar, "data");
    sidecar.write("answer");
    assert.deepEqual(await host, { code: 0, signal: null, stdout: "pong\nidle\n", stderr: "" });
  });

  test("a request that was aborted, or timed out, does not keep the host alive", async ({ signal }) => {
    const fake = { ...fakeSidecar(`on.load = () => {};`), ...over };
    const script = `
      const sidecar = await ${spawning(fake)};
      const controller = new AbortController();
      const load = sidecar.load("m", { signal: controller.signal, timeoutMs: 1e9 });
      controller.abort();
      await load.catch((error) => console.log(error.name));
      await sidecar.load("m", { timeoutMs: 1 }).catch((error) => console.log(error.name));
    `;
    const stdout = "AbortError\nSidecarTimeoutError\n";
    assert.deepEqual(await runHost(script, signal), { code: 0, signal: null, stdout, stderr: "" });
  });

  test("a host that is killed with a request in flight takes the sidecar with it", async ({ signal }) => {
    using line = await Line.open();
    const fake = { ...fakeOnTheLine(line, `on.ping = () => process.kill(process.ppid, "SIGKILL");`), ...over };
    const host = runHost(`const sidecar = await ${spawning(fake)}; await sidecar.ping();`, signal);
    const sidecar = await line.caller();
    assert.equal((await host).signal, "SIGKILL");
    await hungUp(sidecar);
  });

  test.each([
    { end: "process.exit()", script: "process.exit(3);", code: 3 },
    { end: "an uncaught exception", script: `setImmediate(() => { throw new Error("a defect"); });`, code: 1 },
    { end: "nothing left to do", script: "", code: 0 },
  ])("a host that ends by $end leaves no sidecar behind, however stubborn it is", async ({ script, code }) => {
    using line = await Line.open();
    const fake = { ...fakeOnTheLine(line, STUBBORN), ...over };
    const host = runHost(`await ${spawning(fake)}; ${script}`, AbortSignal.timeout(20_000));
    const sidecar = await line.caller();
    assert.equal((await host).code, code);
    await hungUp(sidecar);
  });
});

test("a host that ends while it waits for a caller leaves no folder behind", async ({ signal }) => {
  const folder = mkdtempSync(join(tmpdir(), "host-"));
  try {
    const fake = { ...fakeSidecar("", DOES_NOT_CONNECT), transport: "pipe" as const };
    const script = `
      ${spawning(fake)};
      const { readdirSync } = await import("node:fs");
      while (readdirSync(process.env.TMPDIR).length === 0) await new Promise(setImmediate);
      process.exit(3);
    `;
    const { code, stderr } = await runHost(script, signal, { TMPDIR: folder });
    assert.deepEqual([code, stderr], [3, ""]);
    assert.deepEqual(readdirSync(folder), []);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("two sidecars are one exit handler, no signal handler, and nothing once they have ended", async ({ signal }) => {
  const script = `
    const count = () => {
      const counts = process.eventNames().map((name) => [name, process.listenerCount(name)]);
      console.log(JSON.stringify(Object.fromEntries(counts)));
    };
    count();
    const first = await ${spawning(fakeSidecar(""))};
    const second = await ${spawning(fakeSidecar(""))};
    count();
    await first.close();
    await second.close();
    count();
  `;
  const { stdout, stderr } = await runHost(script, signal);
  assert.equal(stderr, "");
  const [before, during, after] = stdout
    .trim()
    .split("\n")
    .map((line) => JSON.parse(line) as Record<string, number>);
  assert.deepEqual(during, { ...before, exit: (before?.["exit"] ?? 0) + 1 });
  assert.deepEqual({ exit: 0, ...after }, { exit: 0, ...before });
});

test("a generation that fails is no unhandled rejection, however little is read", async ({ signal }) => {
  const fake = fakeSidecar(`
    const error = { code: 1002, message: "not loaded", data: { kind: "model_not_loaded" } };
    on.generate = ({ id }) => say({ id, error });
    on.ping = ({ id }) => say({ id, result: {} });
  `);
  const script = `
    const sidecar = await ${spawning(fake)};
    const ask = () => sidecar.generate({ model: "m", prompt: "p" });
    ask();
    ask().text().catch((error) => console.log("text", error.kind));
    ask().result.catch((error) => console.log("result", error.kind));
    try {
      for await (const part of ask()) console.log(part);
    } catch (error) {
      console.log("loop", error.kind);
    }
    await sidecar.ping();
    ask();
    await sidecar.close();
    await new Promise(setImmediate);
    console.log("still here");
  `;
  const { code, stdout, stderr } = await runHost(script, signal);
  assert.equal(stderr, "");
  assert.deepEqual(stdout.split("\n").sort(), [
    "",
    "loop model_not_loaded",
    "result model_not_loaded",
    "still here",
    "text model_not_loaded",
  ]);
  assert.equal(code, 0);
});
