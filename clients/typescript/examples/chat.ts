/** Asks the demo model one question and prints its answer as it is generated. */

import { Sidecar } from "mlx-sidecar";

const question = process.argv[2] ?? "What is the capital of France?";
const model = "smollm2-135m";

const spawned = performance.now();
const sidecar = await Sidecar.spawn();
const initialized = performance.now();
const loaded = await sidecar.load(model);
console.error(
  `sidecar answered after ${(initialized - spawned).toFixed(0)} ms; ` +
    `${model} loaded as ${loaded.dtype} in ${loaded.loadMs.toFixed(0)} ms`,
);

console.log(`\n> ${question}\n`);
const answer = sidecar.generate({ model, messages: [{ role: "user", content: question }], maxTokens: 256 });
for await (const part of answer) process.stdout.write(part.text);

const { timings, usage, finishReason } = await answer.result;
const { code } = await sidecar.close();
console.log(
  `\n\nTTFT ${timings.ttftMs.toFixed(0)} ms, ${timings.tokensPerSecond.toFixed(1)} tokens/s ` +
    `(${usage.completionTokens} tokens, finished by ${finishReason}); the sidecar exited with code ${code}`,
);
