/** `vscode-jsonrpc`, which language clients of editors are made of: Content-Length, its own cancellation. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { after, test } from "node:test";

import * as rpc from "vscode-jsonrpc/node";

import { holdsTheConversation, joined, timeout } from "./conversation.mjs";
import { ended, given, killChildren, listen, serve } from "./sidecar.mjs";

after(killChildren);

holdsTheConversation("vscode-jsonrpc over stdio", async () => {
  const child = serve();
  return client([child.stdout, child.stdin], () => ended(child));
});

holdsTheConversation("vscode-jsonrpc over a pipe that it listens on", async () => {
  const name = rpc.generateRandomPipeName();
  const transport = await rpc.createClientPipeTransport(name);
  const child = serve("--pipe", name);
  child.once("exit", () => transport.close());
  return client(await transport.onConnected(), () => ended(child));
});

const terminated = { code: 128 + 15, signal: null };

holdsTheConversation(
  "vscode-jsonrpc over a socket that the sidecar listens on",
  async () => {
    const sidecar = await listen();
    const socket = await sidecar.connect();
    const closed = once(socket, "close");
    return client(ends(socket), async () => {
      await closed;
      sidecar.child.kill("SIGTERM");
      return ended(sidecar.child);
    });
  },
  terminated,
);

test("hosts that use the same ids and tokens hear and cancel only their own requests", { timeout }, async () => {
  const sidecar = await listen();
  const sockets = [await sidecar.connect(), await sidecar.connect()];
  const [left, right] = sockets.map((socket) => {
    const closed = once(socket, "close");
    return client(ends(socket), () => closed);
  });
  for (const host of [left, right]) {
    await host.call("initialize", { protocolVersion: 1 });
    await host.call("load", { model: given.model });
  }
  const heard = { left: [], right: [] };
  const cancelled = left.stream({ ...given.endless, partialResultToken: "same" }, (value) => heard.left.push(value));
  const whole = right.stream({ ...given.finite, partialResultToken: "same" }, (value) => {
    if (heard.right.push(value) === 1) cancelled.cancel();
  });
  assert.equal((await cancelled.result).finishReason, "cancelled");
  assert.equal((await whole.result).finishReason, "length");
  const { text, tokens } = joined(heard.right);
  assert.deepEqual({ text, tokens }, given.answer);
  assert.equal((await cancelled.result).lastSeq, joined(heard.left).lastSeq);

  await left.end();
  assert.equal((await right.call("ping")).state, "ready");
  await right.end();
  assert.deepEqual([...left.complaints, ...right.complaints], []);
  sidecar.child.kill("SIGTERM");
  assert.deepEqual(await ended(sidecar.child), terminated);
});

const ends = (socket) => [new rpc.SocketMessageReader(socket), new rpc.SocketMessageWriter(socket)];

function client([reader, writer], whenEnded) {
  const complaints = [];
  const complain = (message) => complaints.push(message);
  const logger = { error: complain, warn: complain, info: complain, log: complain };
  const connection = rpc.createMessageConnection(reader, writer, logger);
  connection.onError(complain);
  connection.listen();
  return {
    complaints,
    call: (method, ...params) => connection.sendRequest(method, ...params),
    stream(params, onValue) {
      const source = new rpc.CancellationTokenSource();
      connection.onProgress(new rpc.ProgressType(), params.partialResultToken, onValue);
      const result = connection.sendRequest("generate", params, source.token);
      return { result, cancel: () => source.cancel() };
    },
    async end() {
      if ((await connection.sendRequest("shutdown")) !== null) complain("shutdown was not answered null");
      await connection.sendNotification("exit");
      return whenEnded();
    },
  };
}
