/** Sidecars that are reached over a Unix socket: those that connect back, and those that listen. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";

import { afterEach, beforeEach, describe, expect, test } from "vitest";

import { Sidecar, SidecarExitedError, SidecarStartError, type SpawnOptions } from "../src/index.js";
import { DOES_NOT_CONNECT, fakeOnTheLine, fakeSidecar, hungUp, Line } from "./support/children.js";

describe("a sidecar that connects back", () => {
  const spawn = (fake: SpawnOptions, options: SpawnOptions = {}) =>
    Sidecar.spawn({ ...fake, transport: "pipe", ...options });

  test("finds its socket where nobody else can look, and nothing is left of it once it has connected", async () => {
    const first = `
      const place = process.argv.at(-1);
      const { mode } = require("node:fs").statSync(require("node:path").dirname(place));
    `;
    const fake = fakeSidecar(`on.models = ({ id }) => say({ id, result: { models: [place, mode] } });`, first);
    await using sidecar = await spawn(fake);
    const [place, mode] = (await sidecar.models()) as unknown as [string, number];
    assert.equal(mode & 0o777, 0o700);
    assert(place.startsWith(tmpdir()));
    assert(!existsSync(dirname(place)));
  });

  test("is the only one that is let in", async () => {
    const fake = fakeSidecar(`
      const second = require("node:net").connect(process.argv.at(-1));
      const turnedAway = new Promise((resolve) => second.on("error", resolve).on("close", resolve));
      on.ping = ({ id }) => turnedAway.then(() => say({ id, result: "alone" }));
    `);
    await using sidecar = await spawn(fake);
    assert.equal(await sidecar.ping(), "alone");
  });

  test("may print to stdout as much as it likes", async () => {
    const print = `require("node:fs").writeSync(1, '{"id": 1, "result": {}}\\n'.repeat(1_000))`;
    const flood = `for (let i = 0; i < 100; i++) ${print};`;
    const fake = fakeSidecar(`${flood} on.ping = ({ id }) => say({ id, result: "pong" });`, flood);
    await using sidecar = await spawn(fake);
    assert.equal(sidecar.info.serverInfo.name, "fake");
    assert.equal(await sidecar.ping(), "pong");
  });

  test("and ends before that is told with its code and its last words", async () => {
    const fake = fakeSidecar("", `require("node:fs").writeSync(2, "no socket"); process.exit(2);`);
    const expected = { name: "SidecarExitedError", code: 2, stderrTail: "no socket", retryable: false };
    await assert.rejects(spawn(fake), expected);
  });

  test("and never does is ended in time, and told with its last words", async () => {
    using line = await Line.open();
    const fake = fakeOnTheLine(line, `fs.writeSync(2, "too busy"); on.end = () => {};`, DOES_NOT_CONNECT);
    const spawning = spawn(fake, { startTimeoutMs: 1_000 });
    const caller = await line.caller();
    await assert.rejects(spawning, (error) => {
      assert(error instanceof SidecarStartError);
      assert.match(error.message, /did not answer within 1000 ms\. It last said:\ntoo busy$/);
      return true;
    });
    await hungUp(caller);
  });

  test("is a start error if its program is missing", async () => {
    const expected = { name: "SidecarStartError", message: /ENOENT/ };
    await assert.rejects(spawn({ command: "no-such-program-anywhere" }), expected);
  });
});

describe.each(["stdio", "pipe"] as const)("a start over %s", (transport) => {
  test("that is given up rejects with the signal's reason, and what was started has ended", async () => {
    using line = await Line.open();
    const controller = new AbortController();
    const fake = fakeOnTheLine(line, `on.initialize = () => {}; on.end = () => {}; process.on("SIGTERM", () => {});`);
    const spawning = Sidecar.spawn({ ...fake, transport, signal: controller.signal });
    const caller = await line.caller();
    const reason = new Error("changed my mind");
    controller.abort(reason);
    await assert.rejects(spawning, (error) => error === reason);
    await hungUp(caller);
  });

  test("that was given up before it began starts nothing", async () => {
    const reason = new Error("no need");
    const options = { command: "no-such-program-anywhere", transport, signal: AbortSignal.abort(reason) };
    await assert.rejects(Sidecar.spawn(options), (error) => error === reason);
  });
});

describe("a sidecar that listens", () => {
  let folder: string;
  let path: string;
  let server: Server;
  let heard: string[];
  let callers: Socket[];

  beforeEach(async () => {
    folder = mkdtempSync(join(tmpdir(), "listen-"));
    path = join(folder, "s");
    heard = [];
    callers = [];
    server = createServer((caller) => {
      callers.push(caller.on("error", () => {}));
      caller.setEncoding("utf8").on("data", (text: string) => {
        for (const line of text.trim().split("\n")) answer(caller, JSON.parse(line) as { id?: number; method: string });
      });
    });
    await once(server.listen(path), "listening");
  });

  afterEach(() => {
    server.close();
    rmSync(folder, { recursive: true });
  });

  function answer(caller: Socket, { id, method }: { id?: number; method: string }): void {
    heard.push(method);
    const info = { protocolVersion: 1, serverInfo: { name: "fake", version: "0" }, limits: { maxFrameBytes: 1e6 } };
    const results = new Map<string, unknown>([
      ["initialize", info],
      ["shutdown", null],
      ["ping", callers.indexOf(caller)],
    ]);
    if (results.has(method)) caller.write(`${JSON.stringify({ jsonrpc: "2.0", id, result: results.get(method) })}\n`);
    if (method === "exit") caller.end();
  }

  test("serves many, and is left running by each that closes", async () => {
    const first = await Sidecar.connect(path);
    const second = await Sidecar.connect(path);
    assert.equal(first.pid, undefined);
    assert.deepEqual([await first.ping(), await second.ping()], [0, 1]);
    assert.deepEqual(await first.close(), { code: null, signal: null });
    assert.deepEqual(await first.exited, { code: null, signal: null });
    assert.deepEqual(heard.slice(-2), ["shutdown", "exit"]);
    assert.equal(await second.ping(), 1);
    await second.close();
  });

  test("that hangs up rejects what is in flight, which may be sent again", async () => {
    const sidecar = await Sidecar.connect(path);
    const load = sidecar.load("m");
    callers[0]?.destroy();
    const expected = { name: "SidecarExitedError", code: null, signal: null, retryable: true };
    await assert.rejects(load, { ...expected, message: "The sidecar closed the connection." });
    await assert.rejects(sidecar.ping(), SidecarExitedError);
    assert.deepEqual(await sidecar.close(), { code: null, signal: null });
  });

  test("but does not hang up when it is asked to is hung up on", async () => {
    const sidecar = await Sidecar.connect(path);
    heard.push = () => 0;
    callers[0]?.removeAllListeners("data").pause();
    assert.deepEqual(await sidecar.close(), { code: null, signal: null });
  });

  test("but does not answer in time is a start error", async () => {
    server.removeAllListeners("connection").on("connection", (caller) => caller.resume().on("error", () => {}));
    const connecting = Sidecar.connect(path, { startTimeoutMs: 50 });
    const message = "The sidecar did not answer within 50 ms.";
    await assert.rejects(connecting, { name: "SidecarStartError", message });
  });

  test("is a start error if it is not there, or not any more", async () => {
    const missing = join(folder, "nobody");
    await assert.rejects(Sidecar.connect(missing), (error) => {
      assert(error instanceof SidecarStartError);
      expect(error.message).toBe(`Nobody listens at ${missing} (ENOENT). Start 'mlx-sidecar serve --listen' there.`);
      return true;
    });
    await assert.rejects(Sidecar.connect(folder), SidecarStartError);
  });
});
