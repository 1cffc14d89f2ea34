/** `@open-rpc/client-js`: both framings, batches, no cancellation of its own. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { Duplex } from "node:stream";
import { after, test } from "node:test";

import {
  Client,
  ContentLengthMessageFramer,
  NewlineDelimitedMessageFramer,
  RequestManager,
  StreamTransport,
} from "@open-rpc/client-js";
import { StdioTransport } from "@open-rpc/client-js/stdio";

import { holdsTheConversation, timeout } from "./conversation.mjs";
import { ended, given, killChildren, lastChild, listen, serve } from "./sidecar.mjs";

after(killChildren);

for (const Framer of [NewlineDelimitedMessageFramer, ContentLengthMessageFramer]) {
  holdsTheConversation(`@open-rpc/client-js over stdio with ${Framer.name}`, async () => {
    return client(spawned(new Framer()), () => ended(lastChild()));
  });

  holdsTheConversation(
    `@open-rpc/client-js over a socket with ${Framer.name}`,
    async () => {
      const sidecar = await listen();
      const socket = await sidecar.connect();
      const closed = once(socket, "close");
      const { readable, writable } = Duplex.toWeb(socket);
      return client(StreamTransport.fromStreams(readable, writable, new Framer()), async () => {
        await closed;
        sidecar.child.kill("SIGTERM");
        return ended(sidecar.child);
      });
    },
    { code: 128 + 15, signal: null },
  );
}

test("a batch of @open-rpc/client-js gets every answer that it asks for", { timeout }, async () => {
  const rpc = new RequestManager([spawned(new NewlineDelimitedMessageFramer())]);
  await rpc.connectPromise;
  rpc.startBatch();
  const requests = ["ping", "no/such/method", "server/info"].map((method) => rpc.request({ method }));
  rpc.stopBatch();
  const [ping, missing, info] = await Promise.allSettled(requests);
  assert.equal(ping.value.state, "starting");
  assert.deepEqual([missing.reason.code, missing.reason.data.kind], [-32601, "method_not_found"]);
  assert.equal(info.value.processId, lastChild().pid);
  rpc.close();
  assert.deepEqual(await ended(lastChild()), { code: 0, signal: null });
});

function spawned(framer) {
  const onLog = (log) => process.stderr.write(log);
  return new StdioTransport({ command: given.command, args: ["serve"], framer, onLog, shutdownTimeout: timeout });
}

function client(transport, whenEnded) {
  const complaints = [];
  const rpc = new Client(new RequestManager([transport]));
  rpc.onError((error) => complaints.push(error));
  let lastId;
  transport.subscribe("pending", ({ request }) => (lastId = request.id ?? lastId));
  return {
    complaints,
    call: (method, params) => rpc.request({ method, params }),
    stream(params, onValue) {
      rpc.onNotification(({ method, params: { token, value } }) => {
        if (method === "$/progress" && token === params.partialResultToken) onValue(value);
      });
      const result = rpc.request({ method: "generate", params });
      return { result, cancel: () => rpc.notify({ method: "$/cancelRequest", params: { id: lastId } }) };
    },
    async end() {
      if ((await rpc.request({ method: "shutdown" })) !== null) complaints.push("shutdown was not answered null");
      await rpc.notify({ method: "exit" });
      const status = await whenEnded();
      rpc.close();
      return status;
    },
  };
}
