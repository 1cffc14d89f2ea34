import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";

import { test } from "vitest";

import { run } from "./support/children.js";

const timeout = 120_000;

test("the example answers the question, tells its numbers and ends the sidecar", { timeout }, async ({ signal }) => {
  const example = fileURLToPath(new URL("../dist/examples/chat.js", import.meta.url));
  const { code, stdout, stderr } = await run([example, "What is the capital of France?"], signal);
  assert.equal(code, 0, stderr);
  assert.match(stdout, /^\n> What is the capital of France\?\n\n.*Paris/);
  assert.match(stdout, /TTFT \d+ ms, \d+\.\d tokens\/s \(\d+ tokens, finished by stop\)/);
  assert.match(stdout, /the sidecar exited with code 0\n$/);
  assert.match(stderr, /smollm2-135m loaded as \w+ in \d+ ms/);
});
