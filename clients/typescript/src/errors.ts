/**
 * What can go wrong, as classes: what the server answered, or that there is no server.
 *
 *     SidecarError
 *     |-- SidecarRequestError   the server refused or failed a request
 *     |-- SidecarTimeoutError   a request was not answered within its `timeoutMs`
 *     |-- SidecarStartError     there was no sidecar to speak to in the first place
 *     |-- SidecarExitedError    there is none any more
 *     `-- SidecarGaveUpError    and a supervisor starts no other
 */

import type { ErrorKind, ErrorObject } from "./generated/protocol.js";

/** How the process ended; one of the two is null, or both for a sidecar that was not started here. */
export interface ExitStatus {
  code: number | null;
  signal: NodeJS.Signals | null;
}

/**
 * Exit codes after which another start would end the same way: in order, wrong arguments, a backend that this
 * machine does not have, a socket that a live sidecar serves.
 */
const FINAL_EXIT_CODES: readonly (number | null)[] = [0, 2, 69, 75];

/** Base of everything that this package throws on its own account. */
export class SidecarError extends Error {
  override name = "SidecarError";
  /** Whether the same request may succeed if it is sent again, if need be to another sidecar. */
  readonly retryable: boolean = false;
}

/** The server refused or failed a request. Switch on `kind`; the message is for people. */
export class SidecarRequestError extends SidecarError {
  override name = "SidecarRequestError";
  readonly code: number;
  /** One of these; a newer server may know more. */
  readonly kind: ErrorKind | (string & {});
  override readonly retryable: boolean;
  /** Everything else that the server said, such as `path` for a wrong parameter. */
  readonly data: Readonly<Record<string, unknown>>;

  constructor(error: ErrorObject) {
    super(error.message);
    const data: unknown = error.data;
    this.data = typeof data === "object" && data !== null ? (data as Record<string, unknown>) : {};
    this.code = error.code;
    this.kind = typeof this.data["kind"] === "string" ? this.data["kind"] : "unknown";
    this.retryable = this.data["retryable"] === true;
  }
}

/** A request was not answered in time; it has been cancelled on the server. */
export class SidecarTimeoutError extends SidecarError {
  override name = "SidecarTimeoutError";
  readonly timeoutMs: number;

  constructor(timeoutMs: number) {
    super(`The request was not answered within ${timeoutMs} ms.`);
    this.timeoutMs = timeoutMs;
  }
}

/** The sidecar could not be started or reached, did not answer in time, or speaks another version. */
export class SidecarStartError extends SidecarError {
  override name = "SidecarStartError";
}

/** The sidecar is gone. Requests that were in flight may or may not have been carried out. */
export class SidecarExitedError extends SidecarError implements ExitStatus {
  override name = "SidecarExitedError";
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  /** False if another start would end the same way. */
  override readonly retryable: boolean;
  /** The last of what the process wrote to stderr. */
  readonly stderrTail: string;

  constructor({ code, signal }: ExitStatus, stderrTail: string) {
    super(`${describe(code, signal)}${lastWords(stderrTail)}`);
    this.code = code;
    this.signal = signal;
    this.retryable = !FINAL_EXIT_CODES.includes(code);
    this.stderrTail = stderrTail;
  }
}

/** A supervised sidecar ended and is not started again; `cause` is how it ended, or why it could not be started. */
export class SidecarGaveUpError extends SidecarError {
  override name = "SidecarGaveUpError";

  constructor(reason: string, cause: unknown) {
    super(`${reason} ${cause instanceof Error ? cause.message : String(cause)}`, { cause });
  }
}

/** What a start that failed with `reason` rejects with. */
export function startError(reason: unknown, stderrTail: string): unknown {
  if (!(reason instanceof SidecarTimeoutError)) return reason;
  return new SidecarStartError(`The sidecar did not answer within ${reason.timeoutMs} ms.${lastWords(stderrTail)}`);
}

/** The end of a message that quotes what the process wrote to stderr. */
function lastWords(stderrTail: string): string {
  return stderrTail === "" ? "" : ` It last said:\n${stderrTail}`;
}

function describe(code: number | null, signal: NodeJS.Signals | null): string {
  if (signal !== null) return `The sidecar ended by ${signal}.`;
  return code === null ? "The sidecar closed the connection." : `The sidecar ended with code ${code}.`;
}
