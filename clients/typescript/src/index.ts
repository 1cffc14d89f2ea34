export type { RequestOptions } from "./connection.js";
export { SidecarError, SidecarExitedError, SidecarRequestError, SidecarSpawnError } from "./errors.js";
export type { ErrorKind, ErrorObject, ExitStatus } from "./errors.js";
export type { Generation } from "./generation.js";
export { Sidecar } from "./sidecar.js";
export type { SpawnOptions } from "./sidecar.js";
export type * from "./protocol.js";
