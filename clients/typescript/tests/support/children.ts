/** Children to spawn: fakes of the sidecar that misbehave on purpose, and hosts that end in their own way. */

import { spawn } from "node:child_process";
import { once } from "node:events";
import { createServer, type AddressInfo, type Socket } from "node:net";
import { text } from "node:stream/consumers";

import type { ExitStatus, SpawnOptions } from "../../src/index.js";

export const PACKAGE = new URL("../../dist/esm/index.js", import.meta.url).href;

/**
 * Answers `initialize`, and ends as a sidecar should, over stdin and stdout or over the socket at `--pipe`. A
 * test's script adds to `on`, or replaces what is there.
 */
const SIDECAR = `
  const fs = require("node:fs");
  const pipe = process.argv.indexOf("--pipe");
  const socket = pipe > 0 ? require("node:net").connect(process.argv[pipe + 1]) : undefined;
  const say = (message) => (socket ?? process.stdout).write(JSON.stringify({ jsonrpc: "2.0", ...message }) + "\\n");
  const info = {
    protocolVersion: 1,
    serverInfo: { name: "fake", version: "0" },
    capabilities: {},
    limits: { maxFrameBytes: 2 ** 26, maxSentFrameBytes: 2 ** 24, maxBatchMembers: 64, maxInFlight: 1024, maxUnsentBytes: 2 ** 23 },
    instanceId: "fake",
  };
  const on = {
    initialize: ({ id }) => say({ id, result: info }),
    shutdown: ({ id }) => say({ id, result: null }),
    exit: () => process.exit(0),
    end: () => process.exit(0),
  };
  const lines = require("node:readline").createInterface({ input: socket ?? process.stdin });
  lines.on("line", (line) => {
    const message = JSON.parse(line);
    on[message.method]?.(message);
  });
  lines.on("close", () => on.end());
  // For children that are told to ignore every other end: a failed test leaves none of them behind.
  setTimeout(() => process.exit(99), 60_000);
`;

/** How to spawn a fake sidecar; `script` is what is wrong with it, and `first` what it does before it connects. */
export function fakeSidecar(script: string, first = ""): SpawnOptions & { command: string; args: string[] } {
  // What follows the dashes is for the script, not for Node.
  return { command: process.execPath, args: ["-e", `${first}${SIDECAR}${script}`, "--"] };
}

/** A fake sidecar with a line to the test: whatever happens to it, the test's end of that line is closed. */
export function fakeOnTheLine(line: Line, script: string, first = "") {
  const call = `
    const line = require("node:net").connect(${line.port}, "127.0.0.1");
    line.on("error", () => {});
  `;
  return fakeSidecar(`${call}${script}`, first);
}

/** For a fake's `first`: it has never heard of `--pipe`. */
export const DOES_NOT_CONNECT = "process.argv.splice(1);";

/** Where fakes call; each call is taken in order. */
export class Line implements Disposable {
  readonly #server = createServer((socket) => this.#called(socket.on("error", () => {})));
  readonly #callers: Socket[] = [];
  readonly #waiting: ((caller: Socket) => void)[] = [];

  static async open(): Promise<Line> {
    const line = new Line();
    await once(line.#server.listen(0, "127.0.0.1"), "listening");
    return line;
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port;
  }

  /** The next caller. */
  caller(): Promise<Socket> {
    return new Promise((resolve) => {
      const caller = this.#callers.shift();
      if (caller === undefined) this.#waiting.push(resolve);
      else resolve(caller);
    });
  }

  [Symbol.dispose](): void {
    this.#server.close();
  }

  #called(caller: Socket): void {
    const waiting = this.#waiting.shift();
    if (waiting === undefined) this.#callers.push(caller);
    else waiting(caller);
  }
}

/** Settles when whoever called has ended. */
export async function hungUp(caller: Socket): Promise<void> {
  if (!caller.closed) await once(caller.resume(), "close");
}

export interface Ended extends ExitStatus {
  stdout: string;
  stderr: string;
}

/** Runs a program to its end. */
export async function run(args: string[], signal: AbortSignal, env: NodeJS.ProcessEnv = {}): Promise<Ended> {
  const environment = { ...process.env, ...env };
  const child = spawn(process.execPath, args, { stdio: ["ignore", "pipe", "pipe"], signal, env: environment });
  const status = new Promise<ExitStatus>((resolve, reject) => {
    child.once("error", reject);
    child.once("close", (code, ending) => resolve({ code, signal: ending }));
  });
  const [stdout, stderr] = await Promise.all([text(child.stdout), text(child.stderr)]);
  return { ...(await status), stdout, stderr };
}

/** Runs a program that imports this package, to its end. */
export function runHost(script: string, signal: AbortSignal, env?: NodeJS.ProcessEnv): Promise<Ended> {
  const head = `import { Sidecar, SupervisedSidecar } from ${JSON.stringify(PACKAGE)};`;
  return run(["--input-type=module", "-e", `${head}${script}`], signal, env);
}

/** The code that spawns `options`, for a program. */
export function spawning(options: SpawnOptions): string {
  return `Sidecar.spawn(${JSON.stringify(options)})`;
}
