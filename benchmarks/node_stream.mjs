// The Node side of single_stream.py: one answer for every line on stdin, its times on stdout.

import { createInterface } from "node:readline";

import { Sidecar } from "../clients/typescript/dist/esm/index.js";

const [command, model] = process.argv.slice(2);
const sidecar = await Sidecar.spawn({ command, args: ["serve", "--log-level", "error"] });
await sidecar.load(model);
console.log(JSON.stringify({ ready: true }));

for await (const line of createInterface({ input: process.stdin })) {
  const { tokens, maxTokens } = JSON.parse(line);
  const times = [];
  const ids = [];
  const began = performance.now();
  const answer = sidecar.generate({ model, tokens, maxTokens });
  for await (const part of answer) {
    ids.push(...part.tokens);
    for (const _ of part.tokens) times.push(performance.now() - began);
  }
  console.log(JSON.stringify({ ids, firstMs: times[0], lastMs: times.at(-1) }));
}
await sidecar.close();
