/** The package as it would be published, and as those who install it find it. Needs what `npm run build` makes. */

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import { afterAll, beforeAll, test } from "vitest";

import { fakeSidecar, spawning } from "./support/children.js";

const PACKAGE = fileURLToPath(new URL("..", import.meta.url));
const TIMEOUT = 120_000;
const execute = promisify(execFile);

let project: string;
let files: string[];

beforeAll(async () => {
  project = mkdtempSync(join(tmpdir(), "project-"));
  const { stdout } = await execute("npm", ["pack", "--json", "--pack-destination", project], { cwd: PACKAGE });
  const [packed] = JSON.parse(stdout) as { filename: string; files: { path: string }[] }[];
  files = packed?.files.map(({ path }) => path) ?? [];
  // Without a registry: the package needs nothing but itself.
  const options = ["--offline", "--no-audit", "--no-fund", "--prefix", project];
  await execute("npm", ["install", ...options, join(project, packed?.filename ?? "")], { cwd: project });
}, TIMEOUT);

afterAll(() => rmSync(project, { recursive: true }));

/** What a program in the project prints. */
async function run(script: string, type: "module" | "commonjs"): Promise<unknown> {
  const { stdout } = await execute(process.execPath, [`--input-type=${type}`, "-e", script], { cwd: project });
  return JSON.parse(stdout);
}

const FAKE = fakeSidecar(`on.ping = ({ id }) => say({ id, result: 1 });`);
const ASK = `
  const sidecar = await ${spawning(FAKE)};
  const answer = await sidecar.ping();
  const { code } = await sidecar.close();
  console.log(JSON.stringify({ answer, code }));
`;

test("it can be imported and it can be required, and both work", async () => {
  const imported = `import { Sidecar } from "mlx-sidecar"; ${ASK}`;
  const required = `const { Sidecar } = require("mlx-sidecar"); (async () => { ${ASK} })();`;
  assert.deepEqual(await run(imported, "module"), { answer: 1, code: 0 });
  assert.deepEqual(await run(required, "commonjs"), { answer: 1, code: 0 });
});

test("both ways lead to the same names", async () => {
  const imported = `import * as all from "mlx-sidecar"; console.log(JSON.stringify(Object.keys(all).sort()));`;
  const required = `console.log(JSON.stringify(Object.keys(require("mlx-sidecar")).sort()));`;
  const names = (await run(imported, "module")) as string[];
  assert(names.includes("SupervisedSidecar"));
  assert.deepEqual(await run(required, "commonjs"), names);
});

test("it holds the compiled client, its licence and its readme, and nothing of the workshop", () => {
  const others = files.filter((path) => !/^dist\/(esm|cjs)\/.+\.(js|d\.ts)$/.test(path));
  assert.deepEqual(others.sort(), ["LICENSE", "README.md", "dist/cjs/package.json", "package.json"]);
});

test("publint and arethetypeswrong find nothing wrong with it", { timeout: TIMEOUT }, async () => {
  await execute("npm", ["run", "check:package"], { cwd: PACKAGE });
});
