/** No library at all: Node's `readline`, to which some characters end a line that JSON allows in a string. */

import assert from "node:assert/strict";
import { createInterface } from "node:readline";
import { after, test } from "node:test";

import { timeout } from "./conversation.mjs";
import { ended, given, killChildren, serve } from "./sidecar.mjs";

const LINE_SEPARATORS = /[\u2028\u2029\u0085]/;

after(killChildren);

test("text with line separators in it arrives as one line for each message", { timeout }, async () => {
  const child = serve();
  const requests = [
    ["initialize", { protocolVersion: 1 }],
    ["load", { model: given.model }],
    ["detokenize", given.detokenize],
    ["generate", { ...given.separators, partialResultToken: "separators" }],
    ["shutdown", {}],
  ];
  const send = (message) => child.stdin.write(`${JSON.stringify({ jsonrpc: "2.0", ...message })}\n`);
  const results = [];
  const progress = [];
  let asked = 0;
  const ask = () => {
    const [method, params] = requests[asked];
    send({ id: asked++, method, params });
  };
  ask();
  for await (const line of createInterface({ input: child.stdout })) {
    // Not every version of Node breaks lines there, so ask for what none of them can break.
    assert.doesNotMatch(line, LINE_SEPARATORS);
    const { id, result, params } = JSON.parse(line);
    if (id === undefined) progress.push(params.value.text);
    else {
      results[id] = result;
      if (asked < requests.length) ask();
      else send({ method: "exit" });
    }
  }
  assert.deepEqual(results[2], { text: given.detokenized });
  assert.match(given.detokenized, LINE_SEPARATORS);
  assert.equal(progress.join(""), "\u2028\u2028\u2028");
  assert.equal(results[4], null);
  assert.deepEqual(await ended(child), { code: 0, signal: null });
});
