export { SidecarError, SidecarExitedError, SidecarRequestError, SidecarSpawnError } from "./errors.js";
export type { ExitStatus } from "./errors.js";
export { Generation } from "./generation.js";
export type { GenerateOptions } from "./generation.js";
export { Sidecar } from "./sidecar.js";
export type { RequestOptions, SpawnOptions } from "./sidecar.js";
export type * from "./protocol.js";
