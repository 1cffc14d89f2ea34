/** That the schemas are held up to what real servers say, and can be found wanting. */

import assert from "node:assert/strict";

import { test } from "vitest";

import { problems } from "./support/schema-setup.js";
import { Wire } from "./support/wire.js";

const INFO = {
  protocolVersion: 1,
  serverInfo: { name: "mlx-sidecar", version: "0" },
  capabilities: {},
  limits: { maxFrameBytes: 1, maxSentFrameBytes: 1, maxBatchMembers: 1, maxInFlight: 1, maxUnsentBytes: 1 },
  instanceId: "x",
};

const PONG = { id: 2, result: { state: "ready", uptimeMs: 1, inFlight: 0, lastStepAgeMs: null } };

/** What the setup finds wrong when a server of that name says these frames to a request whose id is 2. */
async function problemsOf(name: string, method: "ping" | "shutdown", ...frames: object[]): Promise<string[]> {
  const wire = new Wire();
  const opened = wire.connection.request("initialize", { protocolVersion: 1 }).response;
  wire.say({ id: 1, result: { ...INFO, serverInfo: { name, version: "0" } } });
  await opened;
  const { response } = wire.connection.request(method, {});
  for (const frame of frames) wire.say(frame);
  await response.catch(() => {});
  return problems.splice(0);
}

test("an answer of a real server that its schema does not allow is found", async () => {
  assert.deepEqual(await problemsOf("mlx-sidecar", "ping", PONG), []);
  const [found, ...others] = await problemsOf("mlx-sidecar", "ping", { id: 2, result: { uptimeMs: "long" } });
  assert.match(found ?? "", /\/uptimeMs must be number/);
  assert.match(found ?? "", /must have required property 'inFlight'/);
  assert.deepEqual(others, []);
});

test("so is a value where there must be none, an error without its kind, and progress that is none", async () => {
  assert.deepEqual(await problemsOf("mlx-sidecar", "shutdown", { id: 2, result: null }), []);
  assert.equal((await problemsOf("mlx-sidecar", "shutdown", { id: 2, result: {} })).length, 1);
  const error = { code: 1, message: "no", data: { retryable: false } };
  assert.equal((await problemsOf("mlx-sidecar", "ping", { id: 2, error })).length, 1);
  const progress = { method: "$/progress", params: { token: 2, value: { seq: "1", text: "" } } };
  assert.equal((await problemsOf("mlx-sidecar", "ping", progress, PONG)).length, 1);
  assert.equal((await problemsOf("mlx-sidecar", "ping", { method: "$/gossip", params: {} }, PONG)).length, 1);
});

test("a fake may say what it likes", async () => {
  assert.deepEqual(await problemsOf("fake", "ping", { id: 2, result: 42 }), []);
});
