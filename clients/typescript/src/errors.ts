/** What can go wrong, as classes: what the server answered, or that there is no server any more. */

/** How the process ended; one of the two is null. */
export interface ExitStatus {
  code: number | null;
  signal: NodeJS.Signals | null;
}

/** Base of everything that this package throws on its own account. */
export class SidecarError extends Error {
  override name = "SidecarError";
}

/** The server refused or failed a request. Switch on `kind`; the message is for people. */
export class SidecarRequestError extends SidecarError {
  override name = "SidecarRequestError";
  readonly code: number;
  readonly kind: string;
  readonly retryable: boolean;
  /** Everything else that the server said, such as `path` for a wrong parameter. */
  readonly data: Readonly<Record<string, unknown>>;

  constructor(error: { code: number; message: string; data?: unknown }) {
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
    super(`The sidecar ended ${how}.${stderrTail === "" ? "" : ` It last said:\n${stderrTail}`}`);
    this.status = status;
    this.stderrTail = stderrTail;
  }
}
