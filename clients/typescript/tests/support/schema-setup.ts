/** Every message that a real server sends in any test must be valid by the protocol's schemas. */

import assert from "node:assert/strict";
import { subscribe } from "node:diagnostics_channel";

import { afterEach } from "vitest";

import type { WireMessage } from "../../src/channel.js";
import type { InitializeResult } from "../../src/index.js";
import { SchemaJudge } from "./schema.js";

const judge = new SchemaJudge();
const real = new WeakSet<object>();

/** What was wrong with messages of real servers since the last test. */
export const problems: string[] = [];

subscribe("mlx-sidecar:message", (event) => {
  const { connection, direction, message } = event as WireMessage;
  const { result } = (message ?? {}) as { result?: Partial<InitializeResult> | null };
  // Fakes, which break the rules on purpose, have other names.
  if (direction === "received" && result?.serverInfo?.name === "mlx-sidecar") real.add(connection);
  const problem = judge.problem({ connection, direction, message });
  if (problem !== undefined && direction === "received" && real.has(connection)) problems.push(problem);
});

afterEach(() => {
  assert.deepEqual(problems.splice(0), []);
});
