/** The real sidecar, started as a host starts it; none outlives the tests. */

import { spawn } from "node:child_process";
import { subscribe } from "node:diagnostics_channel";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";

if (process.env.SIDECAR_CASE === undefined) throw new Error("run: pytest tests/clients/test_node_clients.py");

/** What to ask and what must come of it; see conftest.py. */
export const given = JSON.parse(process.env.SIDECAR_CASE);

// Some libraries start the process themselves and show nobody; Node shows all of them here.
const children = [];
subscribe("child_process", (message) => children.push(message.process));
process.on("exit", killChildren);

/** The process that was started last, whoever did it. */
export const lastChild = () => children.at(-1);

/** Ends what a test that failed has left running. */
export function killChildren() {
  for (const child of children) child.kill("SIGKILL");
}

/** Resolves with how a process ended. */
export async function ended(child) {
  if (child.exitCode === null && child.signalCode === null) await once(child, "exit");
  return { code: child.exitCode, signal: child.signalCode };
}

/** Starts `mlx-sidecar serve`. */
export function serve(...args) {
  return spawn(given.command, ["serve", ...args], { stdio: ["pipe", "pipe", "inherit"] });
}

/** Starts a sidecar that listens; resolves once it does. `connect` opens a connection to it. */
export async function listen() {
  const folder = await mkdtemp(join(tmpdir(), "sidecar-"));
  const path = join(folder, "socket");
  const child = serve("--listen", path);
  child.once("exit", () => rm(folder, { recursive: true, force: true }));
  // The sidecar closes its stdout behind this line, so this also waits for that.
  const said = JSON.parse(await text(child.stdout));
  return { child, path, said, connect: () => connected(path) };
}

async function connected(path) {
  const socket = connect(path);
  await once(socket, "connect");
  return socket;
}
