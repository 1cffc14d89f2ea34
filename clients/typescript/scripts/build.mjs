/** Compiles the package to dist: as ES modules, as CommonJS, and the examples. */

import { execFileSync } from "node:child_process";
import { rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";

process.chdir(fileURLToPath(new URL("..", import.meta.url)));
const tsc = createRequire(import.meta.url).resolve("typescript/bin/tsc");

rmSync("dist", { recursive: true, force: true });
// The examples come last: they import the package by its name, and so what has been built.
for (const part of ["esm", "cjs", "examples"]) {
  execFileSync(process.execPath, [tsc, "-p", `tsconfig.${part}.json`], { stdio: "inherit" });
}
// Without it Node would take these files for what the package is otherwise, ES modules.
writeFileSync("dist/cjs/package.json", '{ "type": "commonjs" }\n');
