import assert from "node:assert/strict";

import { describe, test } from "vitest";

import { Sidecar, SidecarExitedError, type SpawnOptions } from "../src/index.js";
import { fakeSidecar } from "./support/children.js";

// At once, because most of them wait for a child to be given up on.
describe.concurrent.each(["stdio", "pipe"] as const)("over %s", (transport) => {
  const spawn = (script: string, options: SpawnOptions = {}) =>
    Sidecar.spawn({ ...fakeSidecar(script), transport, ...options });

  test("close resolves with how it ended, every time it is asked", async () => {
    const sidecar = await spawn("");
    const [first, second] = await Promise.all([sidecar.close(), sidecar.close()]);
    assert.deepEqual(first, { code: 0, signal: null });
    assert.equal(second, first);
    assert.equal(await sidecar.close(), first);
    assert.equal(await sidecar.exited, first);
  });

  test("close says shutdown once, waits for its answer, and says exit before it hangs up", async () => {
    const script = `
      const heard = [];
      on.shutdown = ({ id }) => { heard.push("shutdown"); say({ id, result: null }); };
      on.exit = () => heard.push("exit");
      on.end = () => { fs.writeSync(2, heard.join()); process.exit(0); };
    `;
    let log = "";
    const sidecar = await spawn(script, { onLog: (text) => (log += text) });
    await Promise.all([sidecar.close(), sidecar.close()]);
    assert.equal(log, "shutdown,exit");
  });

  test("leaving the scope of an await using closes the sidecar", async () => {
    let exited;
    {
      await using sidecar = await spawn("");
      exited = sidecar.exited;
    }
    assert.deepEqual(await exited, { code: 0, signal: null });
  });

  test("a child that ignores shutdown and the end of its input is ended by SIGTERM", async () => {
    const sidecar = await spawn(`on.shutdown = on.exit = on.end = () => {};`);
    assert.deepEqual(await sidecar.close(), { code: null, signal: "SIGTERM" });
  });

  test("a child that ignores that too is killed", async () => {
    const script = `on.shutdown = on.exit = on.end = () => {}; process.on("SIGTERM", () => {});`;
    const sidecar = await spawn(script);
    const pending = sidecar.ping();
    const rejected = assert.rejects(pending, SidecarExitedError);
    assert.deepEqual(await sidecar.close(), { code: null, signal: "SIGKILL" });
    await rejected;
  });

  test("a child that is killed rejects every request in flight, once each", async () => {
    const script = `
      let requests = 0;
      on.ping = on.stats = on.generate = () => { if (++requests === 3) process.kill(process.pid, "SIGKILL"); };
    `;
    const sidecar = await spawn(script);
    const generation = sidecar.generate({ model: "m", prompt: "p" });
    let rejections = 0;
    const count = (error: unknown) => {
      rejections += 1;
      throw error;
    };
    const requests = [sidecar.ping(), sidecar.stats(), generation.result, generation.text()];
    const outcomes = await Promise.allSettled(requests.map((request) => Promise.resolve(request).catch(count)));
    for (const outcome of outcomes) {
      assert(outcome.status === "rejected" && outcome.reason instanceof SidecarExitedError);
      assert.equal(outcome.reason.code, null);
      assert.equal(outcome.reason.signal, "SIGKILL");
      assert.equal(outcome.reason.retryable, true);
      assert.match(outcome.reason.message, /^The sidecar ended by SIGKILL\.$/);
    }
    assert.equal(rejections, 4);
    assert.deepEqual(await sidecar.exited, { code: null, signal: "SIGKILL" });
  });

  test("what a child answered before it died still counts", async () => {
    const script = `
      on.models = ({ id }) => {
        const answer = { jsonrpc: "2.0", id, result: { models: ["x".repeat(50_000)] } };
        fs.writeSync(socket?._handle.fd ?? 1, JSON.stringify(answer) + "\\n");
        process.kill(process.pid, "SIGKILL");
      };
    `;
    const sidecar = await spawn(script);
    const models = sidecar.models();
    const ping = sidecar.ping();
    assert.deepEqual(await models, ["x".repeat(50_000)]);
    await assert.rejects(ping, SidecarExitedError);
  });

  test("after the end requests and generations reject, and close says how it was", async () => {
    const sidecar = await spawn(`on.ping = () => process.exit(7);`);
    await assert.rejects(sidecar.ping(), SidecarExitedError);
    await assert.rejects(sidecar.load("m"), SidecarExitedError);
    await assert.rejects(sidecar.generate({ model: "m", prompt: "p" }).text(), SidecarExitedError);
    assert.deepEqual(await sidecar.close(), { code: 7, signal: null });
  });

  test("a request during close is rejected by the end of the process, and never left", async () => {
    const sidecar = await spawn("");
    const closing = sidecar.close();
    const ping = sidecar.ping();
    await assert.rejects(ping, SidecarExitedError);
    assert.deepEqual(await closing, { code: 0, signal: null });
  });

  test("a child whose own child keeps its pipes open has ended all the same", async () => {
    const script = `
      const { spawn } = require("node:child_process");
      on.ping = () => {
        // Lives until somebody closes the other end of the pipes.
        const chatter = "setInterval(() => process.stdout.write('chatter'), 50)";
        spawn(process.execPath, ["-e", chatter], { stdio: ["ignore", 1, 2] });
        process.kill(process.pid, "SIGKILL");
      };
    `;
    const sidecar = await spawn(script);
    await assert.rejects(sidecar.ping(), SidecarExitedError);
    assert.deepEqual(await sidecar.close(), { code: null, signal: "SIGKILL" });
  });

  test("an abort needs no answer, and the server hears of it", async () => {
    const script = `
      on["$/cancelRequest"] = ({ params }) => { cancelled = params.id; };
      let cancelled;
      on.models = ({ id }) => say({ id, result: { models: [cancelled, id] } });
    `;
    await using sidecar = await spawn(script);
    const controller = new AbortController();
    const load = sidecar.load("m", { signal: controller.signal });
    controller.abort(new RangeError("enough"));
    await assert.rejects(load, { name: "RangeError", message: "enough" });
    const [cancelled, id] = (await sidecar.models()) as unknown as number[];
    assert.equal(cancelled, Number(id) - 1);
  });
});

test("a child that stops reading breaks no pipe over the host", async () => {
  const fake = fakeSidecar(`
    on.end = () => {};
    on.ping = ({ id }) => { fs.closeSync(0); say({ id, result: {} }); };
  `);
  const sidecar = await Sidecar.spawn(fake);
  await sidecar.ping();
  const pending = sidecar.tokenize({ model: "m", text: "x".repeat(2 ** 20) });
  const rejected = assert.rejects(pending, SidecarExitedError);
  process.kill(sidecar.pid ?? assert.fail(), "SIGKILL");
  await rejected;
});
