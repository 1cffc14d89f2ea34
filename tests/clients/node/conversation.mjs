/** The conversation that every client holds in its own words, and what must come of it. */

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";

import { given, killChildren } from "./sidecar.mjs";

const { model, finite, endless, answer } = given;

/** For each test: far more than it takes, far less than for ever. */
export const timeout = 30_000;

/**
 * Registers the tests of one client. `open` resolves with an object of these:
 * - `call(method, params)`: the result; rejects with something that has the `code` and `data` of an error;
 * - `stream(params, onValue)`: the `result` of a streamed generate to come, and a `cancel` for it;
 * - `end()`: ends the sidecar as this client can, and resolves with how it ended, which is `ending`;
 * - `complaints`: what the library itself has found wrong.
 */
export function holdsTheConversation(name, open, ending = { code: 0, signal: null }) {
  describe(name, () => {
    let client;
    before(async () => (client = await open()), { timeout });
    after(killChildren);

    test("initialize says who answers", async () => {
      const result = await client.call("initialize", { protocolVersion: 1, clientInfo: { name } });
      assert.equal(result.protocolVersion, 1);
      assert.equal(result.serverInfo.name, "mlx-sidecar");
    });

    test("a model is loaded", async () => {
      const { state, contextLength } = await client.call("load", { model });
      assert.deepEqual({ state, contextLength }, { state: "ready", contextLength: 2 ** 20 });
    });

    test("a whole answer is the one our own driver got", async () => {
      const { finishReason, text, tokens } = await client.call("generate", finite);
      assert.deepEqual({ finishReason, text, tokens }, { finishReason: "length", ...answer });
    });

    test("a streamed answer has arrived in order and complete when its response does", async () => {
      const values = [];
      const stream = client.stream({ ...finite, partialResultToken: "words" }, (value) => values.push(value));
      const { finishReason, usage, lastSeq, textBytes, ...rest } = await stream.result;
      // Taken before anything else is awaited: what came after the response is not in it.
      const streamed = joined(values);
      assert.deepEqual({ text: streamed.text, tokens: streamed.tokens }, answer);
      assert.deepEqual(
        { finishReason, completionTokens: usage.completionTokens, lastSeq, textBytes },
        {
          finishReason: "length",
          completionTokens: answer.tokens.length,
          lastSeq: streamed.lastSeq,
          textBytes: Buffer.byteLength(answer.text),
        },
      );
      assert.deepEqual(Object.keys(rest), ["timings"]);
    });

    test("a cancel in mid-stream ends in a result, and nothing runs on", async () => {
      const values = [];
      const stream = client.stream({ ...endless, partialResultToken: 7 }, (value) => {
        if (values.push(value) === 1) stream.cancel();
      });
      const result = await stream.result;
      const streamed = joined(values);
      assert.equal(result.finishReason, "cancelled");
      assert.equal(result.lastSeq, streamed.lastSeq);
      assert.equal(result.usage.completionTokens, streamed.tokens.length);
      const both = Math.min(streamed.tokens.length, answer.tokens.length);
      assert.deepEqual(streamed.tokens.slice(0, both), answer.tokens.slice(0, both));
      const { engine, requests } = await client.call("stats", {});
      assert.deepEqual([engine.sequences, requests.cancelled], [0, 1]);
      assert.deepEqual(joined(values), streamed);
    });

    test("an error keeps its code and its data", async () => {
      await assert.rejects(client.call("generate", { ...finite, model: "nobody" }), {
        code: 1002,
        data: { kind: "model_not_loaded", retryable: false, model: "nobody" },
      });
      await assert.rejects(client.call("no/such/method", {}), {
        code: -32601,
        data: { kind: "method_not_found", retryable: false, method: "no/such/method" },
      });
      await assert.rejects(client.call("load", { model, dtype: 16 }), {
        code: -32602,
        data: { kind: "invalid_params", retryable: false, path: "dtype" },
      });
    });

    test("the sidecar ends in order, and the client has nothing to complain of", async () => {
      assert.deepEqual(await client.end(), ending);
      assert.deepEqual(client.complaints, []);
    });
  });
}

/** Puts the parts of a stream together; a part that is missing, double or early fails here. */
export function joined(values) {
  let lastSeq = 0;
  for (const { seq, merged = 1 } of values) assert.equal(seq, (lastSeq += merged));
  return {
    lastSeq,
    text: values.map((value) => value.text).join(""),
    tokens: values.flatMap((value) => value.tokens),
  };
}
