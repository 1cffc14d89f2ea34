export type { WireMessage } from "./channel.js";
export { SidecarClient } from "./client.js";
export type { ProgressOptions } from "./client.js";
export type { RequestOptions } from "./deadline.js";
export {
  SidecarError,
  SidecarExitedError,
  SidecarGaveUpError,
  SidecarRequestError,
  SidecarStartError,
  SidecarTimeoutError,
} from "./errors.js";
export type { ExitStatus } from "./errors.js";
export type { Generation } from "./generation.js";
export type { RestartPolicy } from "./restarts.js";
export type { ConnectOptions, SpawnOptions } from "./session.js";
export { Sidecar } from "./sidecar.js";
export { SupervisedSidecar } from "./supervised.js";
export type { Restart, SuperviseOptions } from "./supervisor.js";
export type * from "./generated/protocol.js";
