/** `json-rpc-2.0`, which has no framing: Node's own `readline` finds its lines. */

import { createInterface } from "node:readline";

import { JSONRPCClient, JSONRPCServer, JSONRPCServerAndClient } from "json-rpc-2.0";

import { holdsTheConversation } from "./conversation.mjs";
import { ended, serve } from "./sidecar.mjs";

holdsTheConversation("json-rpc-2.0 over lines of stdio", async () => {
  const child = serve();
  const complaints = [];
  let lastId = 0;
  const rpc = new JSONRPCServerAndClient(
    new JSONRPCServer({ errorListener: (message) => complaints.push(message) }),
    new JSONRPCClient(
      (message) => void child.stdin.write(`${JSON.stringify(message)}\n`),
      () => `request ${++lastId}`,
    ),
    { errorListener: (message) => complaints.push(message) },
  );
  createInterface({ input: child.stdout }).on("line", (line) => rpc.receiveAndSend(JSON.parse(line)));
  const listeners = new Map();
  rpc.addMethod("$/progress", ({ token, value }) => listeners.get(token)(value));
  return {
    complaints,
    call: (method, params) => rpc.request(method, params),
    stream(params, onValue) {
      listeners.set(params.partialResultToken, onValue);
      const result = rpc.request("generate", params);
      const id = `request ${lastId}`;
      return { result, cancel: () => rpc.notify("$/cancelRequest", { id }) };
    },
    async end() {
      if ((await rpc.request("shutdown")) !== null) complaints.push("shutdown was not answered null");
      rpc.notify("exit");
      return ended(child);
    },
  };
});
