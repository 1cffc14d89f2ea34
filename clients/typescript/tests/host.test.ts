/** What a host that uses the package goes through as a process: when it ends, and what may end it. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, type AddressInfo, type Server, type Socket } from "node:net";
import { test } from "node:test";

import { fakeSidecar, runHost } from "./children.js";

const timeout = 30_000;

/** A fake sidecar with a line to the test: whatever happens to it, the test's end of that line is closed. */
function fakeOnTheLine(server: Server, script: string) {
  return fakeSidecar(`
    const line = require("node:net").connect(${(server.address() as AddressInfo).port}, "127.0.0.1");
    ${script}
  `);
}

async function listen(): Promise<{ server: Server; caller: Promise<Socket>; [Symbol.dispose](): void }> {
  const server = createServer();
  const caller = once(server, "connection").then(([socket]) => socket as Socket);
  await once(server.listen(0, "127.0.0.1"), "listening");
  return { server, caller, [Symbol.dispose]: () => void server.close() };
}

test("an idle sidecar does not keep its host alive, and ends with it", { timeout }, async ({ signal }) => {
  using line = await listen();
  const fake = fakeOnTheLine(line.server, "");
  const host = runHost(fake, `console.log("nothing left to do");`, signal);
  const socket = await line.caller;
  const hungUp = once(socket.resume(), "close");
  assert.deepEqual(await host, { code: 0, signal: null, stdout: "nothing left to do\n", stderr: "" });
  await hungUp;
});

test("a sidecar that was busy does not keep its host alive when it is idle again", { timeout }, async ({ signal }) => {
  const fake = fakeSidecar(`on.ping = ({ id }) => say({ id, result: "pong" });`);
  const script = `
    process.on("beforeExit", () => console.log("idle"));
    console.log(await sidecar.ping());
  `;
  assert.equal((await runHost(fake, script, signal)).stdout, "pong\nidle\n");
});

test("a request in flight keeps the host alive until it is answered", { timeout }, async ({ signal }) => {
  using line = await listen();
  // The answer takes a trip over the test: a host that nothing keeps alive is idle long before.
  const fake = fakeOnTheLine(
    line.server,
    `on.ping = ({ id }) => { line.write("asked"); line.once("data", () => say({ id, result: "pong" })); };`,
  );
  const script = `
    process.on("beforeExit", () => console.log("idle"));
    sidecar.ping().then(console.log);
  `;
  const host = runHost(fake, script, signal);
  const socket = await line.caller;
  await once(socket, "data");
  socket.write("answer");
  assert.deepEqual(await host, { code: 0, signal: null, stdout: "pong\nidle\n", stderr: "" });
});

test("a request that was aborted does not keep the host alive", { timeout }, async ({ signal }) => {
  const fake = fakeSidecar(`on.load = () => {};`);
  const script = `
    const controller = new AbortController();
    const load = sidecar.load("m", { signal: controller.signal });
    controller.abort();
    await load.catch((error) => console.log(error.name));
  `;
  assert.deepEqual(await runHost(fake, script, signal), { code: 0, signal: null, stdout: "AbortError\n", stderr: "" });
});

test("a host that is killed with a request in flight takes the sidecar with it", { timeout }, async ({ signal }) => {
  using line = await listen();
  const fake = fakeOnTheLine(line.server, `on.ping = () => process.kill(process.ppid, "SIGKILL");`);
  const host = runHost(fake, "await sidecar.ping();", signal);
  const socket = await line.caller;
  const hungUp = once(socket.resume(), "close");
  assert.equal((await host).signal, "SIGKILL");
  await hungUp;
});

test("a generation that fails is no unhandled rejection, however little is read", { timeout }, async ({ signal }) => {
  const fake = fakeSidecar(`
    const error = { code: 1002, message: "not loaded", data: { kind: "model_not_loaded" } };
    on.generate = ({ id }) => say({ id, error });
    on.ping = ({ id }) => say({ id, result: {} });
  `);
  const script = `
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
  const { code, stdout, stderr } = await runHost(fake, script, signal);
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
