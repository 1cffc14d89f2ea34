/** `jayson` over the socket: a connection for each call, and the first message that comes is the answer. */

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";

import jayson from "jayson/promise/index.js";

import { timeout } from "./conversation.mjs";
import { ended, given, killChildren, listen } from "./sidecar.mjs";

describe("jayson over a socket that the sidecar listens on", { timeout }, () => {
  let sidecar, client;
  before(async () => {
    sidecar = await listen();
    client = jayson.Client.tcp({ path: sidecar.path });
  }, { timeout });
  after(killChildren);

  test("listening is said once, on stdout, which is closed then", () => {
    assert.deepEqual(sidecar.said, { event: "listening", path: sidecar.path });
  });

  test("what needs no initialize is answered", async () => {
    const ping = await client.request("ping", []);
    assert.equal(ping.result.state, "starting");
    const info = await client.request("server/info", {});
    assert.equal(info.result.processId, sidecar.child.pid);
    const { result: described } = await client.request("rpc.discover", []);
    assert(described.methods.some(({ name }) => name === "generate"));
  });

  test("every connection opens for itself", async () => {
    const opened = await client.request("initialize", { protocolVersion: 1 });
    assert.equal(opened.result.serverInfo.name, "mlx-sidecar");
    const { error } = await client.request("generate", given.finite);
    assert.deepEqual([error.code, error.data.kind], [-32002, "not_initialized"]);
  });

  test("an error keeps its code and its data", async () => {
    const { error } = await client.request("no/such/method", {});
    assert.equal(error.code, -32601);
    assert.deepEqual(error.data, { kind: "method_not_found", retryable: false, method: "no/such/method" });
  });

  test("a batch is answered with all of its answers", async () => {
    const batch = ["ping", "no/such/method"].map((method) => client.request(method, {}, undefined, false));
    const answers = await client.request(batch);
    const byId = new Map(answers.map((answer) => [answer.id, answer]));
    assert.equal(byId.size, 2);
    assert.equal(typeof byId.get(batch[0].id).result.uptimeMs, "number");
    assert.equal(byId.get(batch[1].id).error.code, -32601);
  });

  test("exit ends only the connection that it came on; a signal ends the sidecar", async () => {
    await client.request("exit", {}, null);
    const info = await client.request("server/info", {});
    assert.equal(info.result.processId, sidecar.child.pid);
    sidecar.child.kill("SIGTERM");
    assert.deepEqual(await ended(sidecar.child), { code: 128 + 15, signal: null });
  });
});
