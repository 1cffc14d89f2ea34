/** Clients that share a real server over its socket, one of which reads slowly. */

import assert from "node:assert/strict";
import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { afterAll, beforeAll, test } from "vitest";

import { Sidecar, SidecarExitedError, type GenerateProgress } from "../src/index.js";

const timeout = 120_000;
const model = "smollm2-135m";
const story = { model, prompt: "Once upon a time", maxTokens: 24 };

let folder: string;
let path: string;
let server: ChildProcess;
let sidecar: Sidecar;

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), "shared-"));
  path = join(folder, "run", "socket");
  const args = ["serve", "--listen", path, "--log-level", "error"];
  server = spawn("mlx-sidecar", args, { stdio: ["ignore", "pipe", "inherit"] });
  const [line] = (await once(server.stdout ?? assert.fail(), "data")) as [Buffer];
  assert.deepEqual(JSON.parse(line.toString()), { event: "listening", path });
  sidecar = await Sidecar.connect(path);
  await sidecar.load(model);
});

afterAll(async () => {
  await sidecar?.close();
  if (server.exitCode === null && server.signalCode === null) {
    server.kill("SIGTERM");
    await once(server, "exit");
  }
  rmSync(folder, { recursive: true });
});

test("a model that one has loaded is there for the other, who may come and go", { timeout }, async () => {
  const other = await Sidecar.connect(path);
  assert.equal(other.info.instanceId, sidecar.info.instanceId);
  assert.deepEqual(
    (await other.models()).map((info) => info.model),
    [model],
  );
  const [mine, theirs] = await Promise.all([sidecar.generate(story).text(), other.generate(story).text()]);
  assert.equal(theirs, mine);
  assert.deepEqual(await other.close(), { code: null, signal: null });
  assert.equal((await sidecar.ping()).state, "ready");
});

test("what a reader does not take stays with the server, and comes merged at the end", { timeout }, async () => {
  const text = await sidecar.generate(story).text();
  await using slow = await Sidecar.connect(path, { windowBytes: 16 });
  const answer = slow.generate(story);
  const parts: GenerateProgress[] = [];
  for await (const part of answer) {
    parts.push(part);
    // From here on nothing is taken until the answer is complete.
    if (parts.length === 1) await answer.result;
  }
  const { lastSeq, textBytes } = await answer.result;
  assert.equal(parts.map((part) => part.text).join(""), text);
  assert.equal(Buffer.byteLength(text), textBytes);
  const last = parts.at(-1);
  assert.equal(last?.seq, lastSeq);
  const merged = last?.merged ?? assert.fail("nothing was merged");
  const before = parts.slice(0, -1).map((part) => part.text);
  assert(Buffer.byteLength(before.join("")) < 32, "far more than the window was sent ahead");
  assert.equal(before.length + merged, lastSeq);
});

test("a reader that keeps up gets everything through a narrow window", { timeout }, async () => {
  const text = await sidecar.generate(story).text();
  await using narrow = await Sidecar.connect(path, { windowBytes: 1 });
  const answer = narrow.generate(story);
  assert.equal(await answer.text(), text);
  assert.equal((await answer.result).finishReason, "length");
});

test("a deadline ends a generation on the server", { timeout }, async () => {
  const before = (await sidecar.stats()).requests.cancelled;
  const endless = { ...story, maxTokens: 100_000 };
  await assert.rejects(sidecar.generate(endless, { timeoutMs: 50 }).text(), { name: "SidecarTimeoutError" });
  let after = before;
  while (after === before) after = (await sidecar.stats()).requests.cancelled;
  assert.equal(after, before + 1);
});

test("when the server ends, what is in flight is told so", { timeout }, async () => {
  const answer = sidecar.generate({ ...story, maxTokens: 100_000 });
  for await (const part of answer) {
    assert.equal(part.seq, 1);
    server.kill("SIGKILL");
    break;
  }
  await assert.rejects(answer.result, { name: "SidecarExitedError", code: null, signal: null, retryable: true });
  await assert.rejects(sidecar.ping(), SidecarExitedError);
});
