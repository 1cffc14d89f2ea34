/** A real server that is killed in mid-answer, and its supervisor. */

import assert from "node:assert/strict";

import { test } from "vitest";

import { Sidecar, SidecarExitedError, SupervisedSidecar, type Message, type Restart } from "../src/index.js";

const timeout = 180_000;
const model = "smollm2-135m";
const question: Message = { role: "user", content: "What is the capital of France?" };
const capital = { model, messages: [question], maxTokens: 8 };

const OVER = ["stdio", "pipe"] as const;

test.each(OVER)("a server that is killed is back over %s, with its model", { timeout }, async (transport) => {
  const restarts: Restart[] = [];
  await using sidecar = await SupervisedSidecar.spawn({ transport, onRestart: (restart) => restarts.push(restart) });
  const { instanceId } = sidecar.info;
  await sidecar.load({ model, alias: "writer", pin: true });
  const text = await sidecar.generate(capital).text();

  const endless = sidecar.generate({ model, prompt: "Once upon a time", maxTokens: 100_000 });
  const seen: number[] = [];
  const reading = async () => {
    for await (const { seq } of endless) {
      seen.push(seq);
      if (seq === 2) process.kill(sidecar.pid ?? assert.fail(), "SIGKILL");
    }
  };
  await assert.rejects(reading(), { name: "SidecarExitedError", signal: "SIGKILL", retryable: true });
  assert.deepEqual(seen.slice(0, 2), [1, 2]);

  assert.equal(await sidecar.generate({ ...capital, model: "writer" }).text(), text);
  const [held] = await sidecar.models();
  assert.deepEqual([held?.model, held?.aliases, held?.pinned], [model, ["writer"], true]);
  assert.deepEqual(
    restarts.map(({ attempts, lost }) => [attempts, lost]),
    [[1, []]],
  );
  assert.notEqual(sidecar.info.instanceId, instanceId);
  const { requests } = await sidecar.stats();
  assert.deepEqual([requests.started, requests.cancelled], [1, 0]);
  assert.deepEqual(await sidecar.close(), { code: 0, signal: null });
});

test("a server that does not understand its arguments is not worth another start", { timeout }, async () => {
  await assert.rejects(Sidecar.spawn({ args: ["serve", "--no-such-option"] }), (error) => {
    assert(error instanceof SidecarExitedError);
    assert.deepEqual([error.code, error.retryable], [2, false]);
    assert.match(error.stderrTail, /--no-such-option/);
    return true;
  });
});
