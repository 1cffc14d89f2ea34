// Our sidecar through its Node client over stdio: one round for every line on stdin.
//
//   node sidecar_node.mjs PYTHON MODEL DTYPE FIRST_REQUEST

import { createInterface } from "node:readline";

import { Sidecar } from "../../clients/typescript/dist/esm/index.js";

const [python, model, dtype, first] = process.argv.slice(2);

/** Counts the tokens of each stream, and says when all have so many. */
class Progress {
  #counts;
  #waiting = [];

  constructor(streams) {
    this.#counts = new Array(streams).fill(0);
  }

  add(stream, tokens) {
    this.#counts[stream] += tokens;
    if (this.#waiting.length === 0) return;
    const least = Math.min(...this.#counts);
    this.#waiting = this.#waiting.filter(({ wanted, go }) => least < wanted || go());
  }

  reached(wanted) {
    return new Promise((resolve) => this.#waiting.push({ wanted, go: () => void resolve() }));
  }
}

async function answer({ tokens, maxTokens }, began, onTokens) {
  const sent = performance.now() - began;
  const parts = [];
  const ids = [];
  let text = "";
  for await (const part of sidecar.generate({ model, tokens, maxTokens })) {
    parts.push([performance.now() - began, part.tokens.length]);
    ids.push(...part.tokens);
    text += part.text;
    onTokens(part.tokens.length);
  }
  return { sent, parts, ids, text };
}

function round({ requests }) {
  const began = performance.now();
  const early = requests.filter(({ afterTokens }) => !afterTokens);
  const progress = new Progress(early.length);
  const answers = requests.map(async (request) => {
    if (request.afterTokens) await progress.reached(request.afterTokens);
    const stream = early.indexOf(request);
    return answer(request, began, (tokens) => stream >= 0 && progress.add(stream, tokens));
  });
  return Promise.all(answers);
}

const say = (value) => console.log(JSON.stringify(value));

const spawned = performance.now();
const args = ["-P", "-m", "mlx_sidecar.runtime", "serve", "--log-level", "error"];
const sidecar = await Sidecar.spawn({ command: python, args });
const began = performance.now();
await sidecar.load(model, { dtype });
const loadMs = performance.now() - began;
const firstTokenMs = first ? (await answer(JSON.parse(first), spawned, () => {})).parts[0][0] : null;
say({ pid: sidecar.pid, loadMs, firstTokenMs });
for await (const line of createInterface({ input: process.stdin })) {
  const asked = JSON.parse(line);
  say(asked.how === "stats" ? await sidecar.stats() : await round(asked));
}
await sidecar.close();
