import { SidecarTimeoutError } from "./errors.js";

export interface RequestOptions {
  /** Aborting rejects the promise with the signal's reason at once, and ends the request on the server. */
  signal?: AbortSignal | undefined;
  /** After this time the promise rejects with SidecarTimeoutError, and the request is ended on the server. */
  timeoutMs?: number | undefined;
}

/** The longest that a timer of Node can wait; it takes what is longer for 1 ms. */
export const FOREVER_MS = 2 ** 31 - 1;

/** `signal` and `timeoutMs` as one signal; `clear` lets go of both. The wait does not keep the host alive. */
export class Deadline {
  readonly signal: AbortSignal | undefined;
  readonly clear: () => void = () => {};

  constructor({ signal, timeoutMs }: RequestOptions) {
    this.signal = signal;
    if (timeoutMs === undefined || signal?.aborted) return;
    // Not AbortSignal.any: a signal that outlives its requests would collect what hangs on it.
    const controller = new AbortController();
    const abort = () => controller.abort(signal?.reason);
    const timeout = () => controller.abort(new SidecarTimeoutError(timeoutMs));
    const timer = setTimeout(timeout, Math.min(timeoutMs, FOREVER_MS)).unref();
    signal?.addEventListener("abort", abort, { once: true });
    this.signal = controller.signal;
    this.clear = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", abort);
    };
  }
}
