import type { Request, SendOptions } from "./channel.js";
import { FOREVER_MS } from "./deadline.js";
import type { Methods } from "./generated/protocol.js";
import type { Session } from "./session.js";

/** A request that is sent as soon as there is a session; until then `signal` ends it, and nothing else. */
export function requestLater<M extends keyof Methods>(
  next: Promise<Session>,
  method: M,
  params: Methods[M]["params"],
  options: SendOptions<M>,
): Request<Methods[M]["result"]> {
  let sent: Request<Methods[M]["result"]> | undefined;
  let cancelled = false;
  const response = waitFor(next, options.signal).then(({ connection }) => {
    sent = connection.request(method, params, options);
    if (cancelled) sent.cancel();
    return sent.response;
  });
  const cancel = () => {
    cancelled = true;
    sent?.cancel();
  };
  return { response, cancel, acknowledge: (seq) => sent?.acknowledge(seq) };
}

/** Settles as `next` does, or rejects when `signal` aborts; until then the host stays alive. */
async function waitFor(next: Promise<Session>, signal: AbortSignal | undefined): Promise<Session> {
  const alive = setInterval(() => {}, FOREVER_MS);
  let abort = () => {};
  const aborted = new Promise<never>((_, reject) => {
    abort = () => reject(signal?.reason);
    if (signal?.aborted) abort();
    else signal?.addEventListener("abort", abort, { once: true });
  });
  try {
    return await Promise.race([next, aborted]);
  } finally {
    clearInterval(alive);
    signal?.removeEventListener("abort", abort);
  }
}
