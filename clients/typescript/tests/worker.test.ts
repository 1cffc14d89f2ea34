/** The package inside a worker thread of its host. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { Worker } from "node:worker_threads";

import { describe, test } from "vitest";

import { fakeOnTheLine, hungUp, Line, PACKAGE, spawning } from "./support/children.js";

function work(script: string): Worker {
  const code = `
    (async () => {
      const { parentPort } = require("node:worker_threads");
      const { Sidecar } = await import(${JSON.stringify(PACKAGE)});
      ${script}
    })();
  `;
  return new Worker(code, { eval: true });
}

const ANSWERS = `
  on.generate = ({ id, params }) => {
    const value = { seq: 1, text: "from a worker", tokens: [1] };
    say({ method: "$/progress", params: { token: params.partialResultToken, value } });
    say({ id, result: { finishReason: "stop" } });
  };
`;

describe.each(["stdio", "pipe"] as const)("over %s", (transport) => {
  test("a worker gets its answers, and an idle sidecar neither keeps it alive nor outlives it", async () => {
    using line = await Line.open();
    const worker = work(`
      const sidecar = await ${spawning({ ...fakeOnTheLine(line, ANSWERS), transport })};
      parentPort.postMessage(await sidecar.generate({ model: "m", prompt: "p" }).text());
    `);
    const sidecar = await line.caller();
    const exited = once(worker, "exit");
    assert.deepEqual(await once(worker, "message"), ["from a worker"]);
    assert.deepEqual(await exited, [0]);
    await hungUp(sidecar);
  });

  test("a worker that is terminated with a request in flight takes the sidecar with it", async () => {
    using line = await Line.open();
    const worker = work(`
      const sidecar = await ${spawning({ ...fakeOnTheLine(line, ""), transport })};
      parentPort.postMessage("ready");
      await sidecar.ping();
    `);
    const sidecar = await line.caller();
    await once(worker, "message");
    await worker.terminate();
    await hungUp(sidecar);
  });
});
