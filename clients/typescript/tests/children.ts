/** Children to spawn: fakes of the sidecar that misbehave on purpose, and hosts that end in their own way. */

import { spawn } from "node:child_process";
import { text } from "node:stream/consumers";

import type { ExitStatus, SpawnOptions } from "../src/index.js";

const PACKAGE = new URL("../src/index.js", import.meta.url).href;

/** Answers `initialize`, and ends as a sidecar should. A test's script adds to `on`, or replaces what is there. */
const SIDECAR = `
  const fs = require("node:fs");
  const say = (message) => process.stdout.write(JSON.stringify({ jsonrpc: "2.0", ...message }) + "\\n");
  const info = {
    protocolVersion: 1,
    serverInfo: { name: "fake", version: "0" },
    capabilities: {},
    limits: { maxFrameBytes: 2 ** 26 },
    instanceId: "fake",
  };
  const on = {
    initialize: ({ id }) => say({ id, result: info }),
    shutdown: ({ id }) => say({ id, result: null }),
    exit: () => process.exit(0),
    end: () => process.exit(0),
  };
  const lines = require("node:readline").createInterface({ input: process.stdin });
  lines.on("line", (line) => {
    const message = JSON.parse(line);
    on[message.method]?.(message);
  });
  lines.on("close", () => on.end());
  // For children that are told to ignore every other end: a failed test leaves none of them behind.
  setTimeout(() => process.exit(99), 60_000);
`;

/** How to spawn a fake sidecar; `script` is what is wrong with it. */
export function fakeSidecar(script: string): SpawnOptions & { command: string; args: string[] } {
  return { command: process.execPath, args: ["-e", `${SIDECAR}${script}`] };
}

export interface Ended extends ExitStatus {
  stdout: string;
  stderr: string;
}

/** Runs a program to its end. */
export async function run(args: string[], signal: AbortSignal): Promise<Ended> {
  const child = spawn(process.execPath, args, { stdio: ["ignore", "pipe", "pipe"], signal });
  const status = new Promise<ExitStatus>((resolve, reject) => {
    child.once("error", reject);
    child.once("close", (code, ending) => resolve({ code, signal: ending }));
  });
  const [stdout, stderr] = await Promise.all([text(child.stdout), text(child.stderr)]);
  return { ...(await status), stdout, stderr };
}

/** Runs a program that uses this package, with `sidecar` spawned from `fake`, to its end. */
export function runHost(fake: SpawnOptions, script: string, signal: AbortSignal): Promise<Ended> {
  const head = `
    import { Sidecar } from ${JSON.stringify(PACKAGE)};
    const sidecar = await Sidecar.spawn(${JSON.stringify(fake)});
  `;
  return run(["--input-type=module", "-e", `${head}${script}`], signal);
}
