import assert from "node:assert/strict";
import { test } from "node:test";

import { Sidecar, SidecarExitedError } from "../src/index.js";
import { fakeSidecar } from "./children.js";

const timeout = 30_000;

test("close resolves with how it ended, every time it is asked", { timeout }, async () => {
  const sidecar = await Sidecar.spawn(fakeSidecar(""));
  const [first, second] = await Promise.all([sidecar.close(), sidecar.close()]);
  assert.deepEqual(first, { code: 0, signal: null });
  assert.equal(second, first);
  assert.equal(await sidecar.close(), first);
  assert.equal(await sidecar.exited, first);
});

test("close says shutdown once, waits for its answer, and says exit before it closes stdin", { timeout }, async () => {
  const fake = fakeSidecar(`
    const heard = [];
    on.shutdown = ({ id }) => { heard.push("shutdown"); say({ id, result: null }); };
    on.exit = () => heard.push("exit");
    on.end = () => { fs.writeSync(2, heard.join()); process.exit(0); };
  `);
  let log = "";
  const sidecar = await Sidecar.spawn({ ...fake, onLog: (text) => (log += text) });
  await Promise.all([sidecar.close(), sidecar.close()]);
  assert.equal(log, "shutdown,exit");
});

test("leaving the scope of an await using closes the sidecar", { timeout }, async () => {
  let exited;
  {
    await using sidecar = await Sidecar.spawn(fakeSidecar(""));
    exited = sidecar.exited;
  }
  assert.deepEqual(await exited, { code: 0, signal: null });
});

test("a child that ignores shutdown and the end of its input is ended by SIGTERM", { timeout }, async () => {
  const sidecar = await Sidecar.spawn(fakeSidecar(`on.shutdown = on.exit = on.end = () => {};`));
  assert.deepEqual(await sidecar.close(), { code: null, signal: "SIGTERM" });
});

test("a child that ignores that too is killed", { timeout }, async () => {
  const fake = fakeSidecar(`on.shutdown = on.exit = on.end = () => {}; process.on("SIGTERM", () => {});`);
  const sidecar = await Sidecar.spawn(fake);
  const pending = sidecar.ping();
  const rejected = assert.rejects(pending, SidecarExitedError);
  assert.deepEqual(await sidecar.close(), { code: null, signal: "SIGKILL" });
  await rejected;
});

test("a child that is killed rejects every request in flight, once each", { timeout }, async () => {
  const fake = fakeSidecar(`
    let requests = 0;
    on.ping = on.stats = on.generate = () => { if (++requests === 3) process.kill(process.pid, "SIGKILL"); };
  `);
  const sidecar = await Sidecar.spawn(fake);
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
    assert.deepEqual(outcome.reason.status, { code: null, signal: "SIGKILL" });
    assert.match(outcome.reason.message, /^The sidecar ended by SIGKILL\.$/);
  }
  assert.equal(rejections, 4);
  assert.deepEqual(await sidecar.exited, { code: null, signal: "SIGKILL" });
});

test("what a child answered before it died still counts", { timeout }, async () => {
  const fake = fakeSidecar(`
    on.models = ({ id }) => {
      fs.writeSync(1, JSON.stringify({ jsonrpc: "2.0", id, result: { models: ["x".repeat(50_000)] } }) + "\\n");
      process.kill(process.pid, "SIGKILL");
    };
  `);
  const sidecar = await Sidecar.spawn(fake);
  const models = sidecar.models();
  const ping = sidecar.ping();
  assert.deepEqual(await models, ["x".repeat(50_000)]);
  await assert.rejects(ping, SidecarExitedError);
});

test("after the end requests and generations reject, and close says how it was", { timeout }, async () => {
  const sidecar = await Sidecar.spawn(fakeSidecar(`on.ping = () => process.exit(7);`));
  await assert.rejects(sidecar.ping(), SidecarExitedError);
  await assert.rejects(sidecar.load("m"), SidecarExitedError);
  await assert.rejects(sidecar.generate({ model: "m", prompt: "p" }).text(), SidecarExitedError);
  assert.deepEqual(await sidecar.close(), { code: 7, signal: null });
});

test("a request during close is rejected by the end of the process, and never left", { timeout }, async () => {
  const sidecar = await Sidecar.spawn(fakeSidecar(""));
  const closing = sidecar.close();
  const ping = sidecar.ping();
  await assert.rejects(ping, SidecarExitedError);
  assert.deepEqual(await closing, { code: 0, signal: null });
});

test("a child that stops reading breaks no pipe over the host", { timeout }, async () => {
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

test("a child whose own child keeps its pipes open has ended all the same", { timeout }, async () => {
  const fake = fakeSidecar(`
    const { spawn } = require("node:child_process");
    on.ping = () => {
      // Lives until somebody closes the other end of the pipes.
      const chatter = "setInterval(() => process.stdout.write('chatter'), 50)";
      spawn(process.execPath, ["-e", chatter], { stdio: ["ignore", 1, 2] });
      process.kill(process.pid, "SIGKILL");
    };
  `);
  const sidecar = await Sidecar.spawn(fake);
  await assert.rejects(sidecar.ping(), SidecarExitedError);
  assert.deepEqual(await sidecar.close(), { code: null, signal: "SIGKILL" });
});

test("an abort needs no answer, and the server hears of it", { timeout }, async () => {
  const fake = fakeSidecar(`
    on["$/cancelRequest"] = ({ params }) => { cancelled = params.id; };
    let cancelled;
    on.models = ({ id }) => say({ id, result: { models: [cancelled, id] } });
  `);
  await using sidecar = await Sidecar.spawn(fake);
  const controller = new AbortController();
  const load = sidecar.load("m", { signal: controller.signal });
  controller.abort(new RangeError("enough"));
  await assert.rejects(load, { name: "RangeError", message: "enough" });
  const [cancelled, id] = (await sidecar.models()) as unknown as number[];
  assert.equal(cancelled, Number(id) - 1);
});
