import type { Duplex, Readable, Writable } from "node:stream";

import type { SidecarExitedError } from "./errors.js";

/** How long each step of an orderly end may take before a ruder one. */
export const PATIENCE_MS = 2_000;

/** The way to a sidecar: two byte streams and their end. A connection uses the streams and knows no more. */
export interface Transport {
  readonly input: Readable;
  readonly output: Writable;
  /** The id of the sidecar's process, if it was started here. */
  readonly pid: number | undefined;
  /** Settles when the sidecar is gone and all that it said has been read; never rejects. */
  readonly gone: Promise<SidecarExitedError>;
  /** Lets this sidecar keep the host's event loop alive, or not. */
  holdEventLoop(hold: boolean): void;
  /** Hangs up and waits for `gone`; by force in the end, if the sidecar was started here. */
  end(): Promise<SidecarExitedError>;
  /** Ends it at once, with no regard for what it is doing. */
  kill(): void;
}

/** Settles when nothing more will come out of `stream`, however that came about. */
export function closed(stream: Duplex | Readable): Promise<void> {
  return new Promise((resolve) => {
    if (stream.closed) resolve();
    else stream.once("close", resolve);
  });
}

/** True if `promise` settles within `ms`. The wait does not keep the host alive. */
export async function within(promise: Promise<unknown>, ms: number): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(() => resolve(false), ms).unref();
  });
  try {
    return await Promise.race([promise.then(() => true), late]);
  } finally {
    clearTimeout(timer);
  }
}
