/** What can go wrong, as classes: what the server answered, or that there is no server any more. */

/** How the process ended; one of the two is null. */
export interface ExitStatus {
  code: number | null;
  signal: NodeJS.Signals | null;
}

/** The `error` of a response, as it is on the wire. */
export interface ErrorObject {
  code: number;
  message: string;
  data?: unknown;
}

/** What the server can say went wrong; `protocol/errors.py` has the meanings. */
export type ErrorKind =
  | "parse_error"
  | "invalid_request"
  | "duplicate_id"
  | "shutting_down"
  | "method_not_found"
  | "invalid_params"
  | "internal_error"
  | "not_initialized"
  | "cancelled"
  | "model_not_found"
  | "model_not_loaded"
  | "invalid_model"
  | "context_overflow"
  | "unsupported"
  | "backend_unavailable";

/** Base of everything that this package throws on its own account. */
export class SidecarError extends Error {
  override name = "SidecarError";
}

/** The server refused or failed a request. Switch on `kind`; the message is for people. */
export class SidecarRequestError extends SidecarError {
  override name = "SidecarRequestError";
  readonly code: number;
  /** One of these; a newer server may know more. */
  readonly kind: ErrorKind | (string & {});
  readonly retryable: boolean;
  /** Everything else that the server said, such as `path` for a wrong parameter. */
  readonly data: Readonly<Record<string, unknown>>;

  constructor(error: ErrorObject) {
    super(error.message);
    const data = typeof error.data === "object" && error.data !== null ? error.data : {};
    this.data = data as Record<string, unknown>;
    this.code = error.code;
    this.kind = typeof this.data["kind"] === "string" ? this.data["kind"] : "unknown";
    this.retryable = this.data["retryable"] === true;
  }
}

/** The process could not be started, or did not answer `initialize` in time. */
export class SidecarSpawnError extends SidecarError {
  override name = "SidecarSpawnError";
}

/** The process is gone. Requests that were in flight may or may not have been carried out. */
export class SidecarExitedError extends SidecarError {
  override name = "SidecarExitedError";
  readonly status: ExitStatus;
  /** The last of what the process wrote to stderr. */
  readonly stderrTail: string;

  constructor(status: ExitStatus, stderrTail: string) {
    const how = status.signal === null ? `with code ${status.code}` : `by ${status.signal}`;
    super(`The sidecar ended ${how}.${lastWords(stderrTail)}`);
    this.status = status;
    this.stderrTail = stderrTail;
  }
}

/** The end of a message that quotes what the process wrote to stderr. */
export function lastWords(stderrTail: string): string {
  return stderrTail === "" ? "" : ` It last said:\n${stderrTail}`;
}
