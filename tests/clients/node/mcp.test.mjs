/** The stdio transport of `@modelcontextprotocol/sdk`, with raw messages: our methods are not MCP's. */

import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";

import { holdsTheConversation } from "./conversation.mjs";
import { ended, given, lastChild } from "./sidecar.mjs";

holdsTheConversation("@modelcontextprotocol/sdk over stdio", async () => {
  const transport = new StdioClientTransport({ command: given.command, args: ["serve"] });
  const complaints = [];
  const waiting = new Map();
  const listeners = new Map();
  transport.onerror = (error) => complaints.push(error);
  transport.onmessage = ({ id, method, params, result, error }) => {
    if (method === "$/progress") listeners.get(params.token)(params.value);
    else if (error === undefined) waiting.get(id).resolve(result);
    else waiting.get(id).reject(error);
  };
  await transport.start();
  const child = lastChild();
  const call = (method, params) => {
    const id = waiting.size;
    return new Promise((resolve, reject) => {
      waiting.set(id, { resolve, reject });
      transport.send({ jsonrpc: "2.0", id, method, params });
    });
  };
  return {
    complaints,
    call,
    stream(params, onValue) {
      listeners.set(params.partialResultToken, onValue);
      const id = waiting.size;
      const result = call("generate", params);
      const cancel = () => transport.send({ jsonrpc: "2.0", method: "$/cancelRequest", params: { id } });
      return { result, cancel };
    },
    // The end of stdin is how MCP ends a server. It knows no result that is null, as that of `shutdown` is.
    async end() {
      await transport.close();
      return ended(child);
    },
  };
});
