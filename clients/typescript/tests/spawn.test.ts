import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

import { test } from "vitest";

import { Sidecar, SidecarExitedError, SidecarRequestError, SidecarStartError } from "../src/index.js";
import { SidecarProcess } from "../src/process.js";
import { fakeSidecar } from "./support/children.js";

function isAlive(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
}

test("a missing program is a spawn error that says what to do", async () => {
  await assert.rejects(Sidecar.spawn({ command: "no-such-program-anywhere" }), (error) => {
    assert(error instanceof SidecarStartError);
    assert.match(error.message, /^no-such-program-anywhere could not be started \(ENOENT\)\. Install .* `command`\.$/);
    assert.equal((error.cause as NodeJS.ErrnoException).code, "ENOENT");
    return true;
  });
});

test("a program that the system refuses at once is a spawn error too", async () => {
  await assert.rejects(Sidecar.spawn({ command: `${process.execPath}/inside-a-file` }), {
    name: "SidecarStartError",
    message: /ENOTDIR/,
  });
});

test("a child that ends before it answers is told with its code and its last words", async () => {
  const fake = fakeSidecar(`on.initialize = () => { fs.writeSync(2, "no module named 'x'\\n"); process.exit(3); };`);
  await assert.rejects(Sidecar.spawn(fake), (error) => {
    assert(error instanceof SidecarExitedError);
    assert.equal(error.code, 3);
    assert.equal(error.signal, null);
    assert.equal(error.stderrTail, "no module named 'x'");
    assert.match(error.message, /ended with code 3\. It last said:\nno module named 'x'$/);
    return true;
  });
});

test("a child that was gone before the first request is no broken pipe to the host", async () => {
  await assert.rejects(Sidecar.spawn({ command: process.execPath, args: ["-e", ""] }), {
    name: "SidecarExitedError",
    code: 0,
    signal: null,
    retryable: false,
  });
});

test("a child that does not answer in time is a spawn error, and it is dead", async () => {
  let log = "";
  const fake = fakeSidecar(`
    on.initialize = () => {};
    on.end = () => {};
    process.on("SIGTERM", () => {});
    fs.writeSync(2, process.pid + " is thinking");
  `);
  const spawning = Sidecar.spawn({ ...fake, startTimeoutMs: 2_000, onLog: (text) => (log += text) });
  await assert.rejects(spawning, (error) => {
    assert(error instanceof SidecarStartError);
    assert.match(error.message, /did not answer within 2000 ms\. It last said:\n\d+ is thinking$/);
    return true;
  });
  assert.equal(isAlive(Number.parseInt(log, 10)), false);
});

test("a server that refuses the client is a typed error, and its process has ended", async () => {
  let log = "";
  const fake = fakeSidecar(`
    const error = { code: -32602, message: "version 2 only", data: { kind: "invalid_params" } };
    on.initialize = ({ id }) => say({ id, error });
    fs.writeSync(2, String(process.pid));
  `);
  await assert.rejects(Sidecar.spawn({ ...fake, onLog: (text) => (log += text) }), SidecarRequestError);
  assert.equal(isAlive(Number.parseInt(log, 10)), false);
});

test("a program that only repeats what it is told is not taken for a sidecar", async () => {
  const args = ["-e", "process.stdin.pipe(process.stdout)"];
  const spawning = Sidecar.spawn({ command: process.execPath, args, startTimeoutMs: 2_000 });
  await assert.rejects(spawning, SidecarStartError);
});

test("a server that states no limits is a start error", async () => {
  for (const script of [`delete info.limits;`, `info.limits = null;`, `info.limits = {};`]) {
    const message = /does not say how long a message may be/;
    await assert.rejects(Sidecar.spawn(fakeSidecar(script)), { name: "SidecarStartError", message });
  }
});

test("a server is told who speaks: name, version and process", async () => {
  const packageFile = new URL("../package.json", import.meta.url);
  const { version } = JSON.parse(readFileSync(packageFile, "utf8")) as { version: string };
  const fake = fakeSidecar(`
    const welcome = on.initialize;
    on.initialize = (message) => { greeting = message.params; welcome(message); };
    let greeting;
    on.models = ({ id }) => say({ id, result: { models: [greeting.clientInfo, greeting.processId] } });
  `);
  await using sidecar = await Sidecar.spawn(fake);
  assert.deepEqual(await sidecar.models(), [{ name: "mlx-sidecar-typescript", version }, process.pid]);
});

test("ten megabytes of log do not keep a child from answering, and only their end is kept", async () => {
  const fake = fakeSidecar(`
    for (let i = 0; i < 160; i++) fs.writeSync(2, "x".repeat(65535) + "\\n");
    fs.writeSync(2, "last words");
    on.ping = () => process.exit(1);
  `);
  let logged = 0;
  const sidecar = await Sidecar.spawn({ ...fake, onLog: (text) => (logged += text.length) });
  await assert.rejects(sidecar.ping(), (error) => {
    assert(error instanceof SidecarExitedError);
    assert.match(error.stderrTail, /^x+\nlast words$/);
    assert(error.stderrTail.length <= 8192);
    return true;
  });
  assert.equal(logged, 160 * 65536 + "last words".length);
});

test("a character of the log that comes in two writes is one character", async () => {
  const fake = fakeSidecar(`
    const [first, ...rest] = Buffer.from("ü");
    fs.writeSync(2, Buffer.from([first]));
    on.ping = ({ id }) => { fs.writeSync(2, Buffer.from(rest)); say({ id, result: {} }); };
  `);
  let log = "";
  const sidecar = await Sidecar.spawn({ ...fake, onLog: (text) => (log += text) });
  await sidecar.ping();
  await sidecar.close();
  assert.equal(log, "ü");
});

test("an error of the child after its start is not an uncaught exception", async () => {
  const started = await SidecarProcess.start(fakeSidecar(""));
  for (const code of ["EPERM", "EPERM"]) started.child.emit("error", Object.assign(new Error(code), { code }));
  assert.equal((await started.end()).code, 0);
});

test("the limit that the server states is kept", async () => {
  const fake = fakeSidecar(`
    info.limits.maxFrameBytes = 500;
    on.tokenize = ({ id }) => say({ id, result: { tokens: [] } });
  `);
  await using sidecar = await Sidecar.spawn(fake);
  assert.equal(sidecar.info.limits.maxFrameBytes, 500);
  const tokenize = (length: number) => sidecar.tokenize({ model: "m", text: "x".repeat(length) });
  await assert.rejects(tokenize(500), { name: "SidecarRequestError", kind: "invalid_request" });
  assert.deepEqual(await tokenize(50), { tokens: [] });
});

test("the child gets the environment that it was given", async () => {
  const fake = fakeSidecar(`on.models = ({ id }) => say({ id, result: { models: [process.env.GREETING] } });`);
  await using sidecar = await Sidecar.spawn({ ...fake, env: { ...process.env, GREETING: "hello" } });
  assert.deepEqual(await sidecar.models(), ["hello"]);
});
