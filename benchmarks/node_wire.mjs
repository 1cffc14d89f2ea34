// The Node side of wire.py. One JSON line of figures for each round; CLIENT is one of those below.
//
//   node node_wire.mjs throughput CLIENT PYTHON SERVER STREAMS TOKENS ROUNDS
//   node node_wire.mjs ping stdio PYTHON SERVER STREAMS PINGS ROUNDS
//   node node_wire.mjs ping SOCKET - - STREAMS PINGS ROUNDS

import { spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

import { Sidecar } from "../clients/typescript/dist/esm/index.js";

const [measure, how, python, server, ...numbers] = process.argv.slice(2);
const [streams, count, rounds] = numbers.map(Number);
const model = "smollm2-135m";
const serve = [server, "serve", "--log-level", "error"];

/** Our own client. */
async function ours() {
  const sidecar = await Sidecar.spawn({ command: python, args: serve });
  return {
    pid: sidecar.pid,
    load: () => sidecar.load(model),
    async generate(params, onPart) {
      for await (const part of sidecar.generate(params)) onPart(part);
    },
    close: () => sidecar.close(),
  };
}

/** The client of Visual Studio Code, which knows nothing of us. */
async function vscode() {
  const require = createRequire(new URL("../tests/clients/node/package.json", import.meta.url));
  const rpc = require("vscode-jsonrpc/node");
  const child = spawn(python, serve, { stdio: ["pipe", "pipe", "inherit"] });
  const connection = rpc.createMessageConnection(
    new rpc.StreamMessageReader(child.stdout),
    new rpc.StreamMessageWriter(child.stdin),
  );
  connection.listen();
  await connection.sendRequest("initialize", { protocolVersion: 1 });
  let token = 0;
  return {
    pid: child.pid,
    load: () => connection.sendRequest("load", { model }),
    async generate(params, onPart) {
      const partialResultToken = ++token;
      const listener = connection.onProgress(new rpc.ProgressType(), partialResultToken, onPart);
      await connection.sendRequest("generate", { ...params, partialResultToken });
      listener.dispose();
    },
    async close() {
      await connection.sendRequest("shutdown");
      await connection.sendNotification("exit");
      connection.dispose();
    },
  };
}

/** Seconds of processor time that a process has used, over all of its threads. */
function cpuSeconds(pid) {
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1].split(" ");
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

async function throughput() {
  const client = await { ours, vscode }[how]();
  await client.load();
  for (let round = 0; round < rounds; round++) {
    let frames = 0;
    let tokens = 0;
    const cpu = cpuSeconds(client.pid);
    const began = performance.now();
    const one = () =>
      client.generate({ model, tokens: [1], maxTokens: count, deduplicate: false }, (part) => {
        frames += 1;
        tokens += part.tokens.length;
      });
    await Promise.all(Array.from({ length: streams }, one));
    const seconds = (performance.now() - began) / 1000;
    const cpuMicroseconds = ((cpuSeconds(client.pid) - cpu) * 1e6) / tokens;
    console.log(JSON.stringify({ frames: frames / seconds, tokens: tokens / seconds, cpuMicroseconds }));
  }
  await client.close();
}

async function ping() {
  const sidecar = how === "stdio" ? await Sidecar.spawn({ command: python, args: serve }) : await Sidecar.connect(how);
  await sidecar.load(model);
  const answers = Array.from({ length: streams }, () => sidecar.generate({ model, tokens: [1], maxTokens: 2 ** 30, deduplicate: false }));
  const read = answers.map(async (answer) => {
    for await (const _ of answer);
  });
  for (let round = 0; round < rounds; round++) {
    const times = [];
    for (let sent = 0; sent < count; sent++) {
      const began = performance.now();
      await sidecar.ping();
      times.push((performance.now() - began) * 1000);
    }
    times.sort((a, b) => a - b);
    console.log(JSON.stringify({ median: times[count >> 1], p99: times[Math.floor(count * 0.99)], worst: times.at(-1) }));
  }
  for (const answer of answers) answer.cancel();
  await Promise.all(read);
  await sidecar.close();
}

await { throughput, ping }[measure]();
