import { setTimeout as sleep } from "node:timers/promises";

import type { Channel, Request, SendOptions } from "./channel.js";
import { SidecarExitedError, SidecarGaveUpError, SidecarRequestError } from "./errors.js";
import type { Methods } from "./generated/protocol.js";
import { Holdings, type Holding } from "./holdings.js";
import { requestLater } from "./later.js";
import { Restarts, type RestartPolicy } from "./restarts.js";
import { Session, type SpawnOptions } from "./session.js";

/** A sidecar that ended and runs again. */
export interface Restart {
  /** How the one before ended. */
  cause: SidecarExitedError;
  /** How many starts it took. */
  attempts: number;
  /** Models that were loaded and could not be loaded again; or, of those that could, `adapter` or `alias`. */
  lost: (Holding & { error: SidecarRequestError })[];
}

export interface SuperviseOptions extends SpawnOptions {
  /** By default at most 5 restarts within 180 seconds, the first after at most 100 ms. */
  restart?: Partial<RestartPolicy>;
  /** Called when the sidecar runs again and holds what the last one held. */
  onRestart?: (restart: Restart) => void;
  /** Called once, when it ended and will not be started again; every request fails with this from then on. */
  onGiveUp?: (error: SidecarGaveUpError) => void;
}

/**
 * Keeps a sidecar running: a channel over one session after the other.
 *
 * What is in flight when a sidecar ends fails, once, and is never sent again: it may have been carried out. What
 * is requested while there is none waits for the next, in which everything that the last one held is loaded first.
 */
export class Supervisor implements Channel {
  readonly #options: SuperviseOptions;
  readonly #restarts: Restarts;
  readonly #closing = new AbortController();
  readonly #holdings = new Holdings();
  #session: Session;
  /** The session to come, while there is none. */
  #next: Promise<Session> | undefined;

  private constructor(session: Session, options: SuperviseOptions) {
    this.#options = options;
    this.#restarts = new Restarts(options.restart);
    this.#session = session;
    this.#watch(session);
  }

  /** Starts the first sidecar; if that fails there is nothing to supervise, and this rejects. */
  static async start(options: SuperviseOptions): Promise<Supervisor> {
    return new Supervisor(await Session.spawn(options), options);
  }

  /** The session that runs, or the last that did. */
  get session(): Session {
    return this.#session;
  }

  get isRunning(): boolean {
    return this.#next === undefined && !this.#session.connection.isClosed;
  }

  request<M extends keyof Methods>(
    method: M,
    params: Methods[M]["params"],
    options: SendOptions<M> = {},
  ): Request<Methods[M]["result"]> {
    const request =
      this.#next === undefined
        ? this.#session.connection.request(method, params, options)
        : requestLater(this.#next, method, params, options);
    const note = (result: Methods[M]["result"]) => this.#holdings.note(method, params, result);
    // A failure is for whoever asked, and so is an answer that makes no sense.
    request.response.then(note).catch(() => {});
    return request;
  }

  /** Ends the sidecar, also one that is just being started. */
  async close(): Promise<SidecarExitedError> {
    this.#closing.abort();
    const session = await this.#next?.catch(() => undefined);
    await (session ?? this.#session).close();
    return (session ?? this.#session).transport.gone;
  }

  #watch({ transport }: Session): void {
    void transport.gone.then((exit) => {
      if (!this.#closing.signal.aborted) this.#restart(exit);
    });
  }

  #restart(exit: SidecarExitedError): void {
    const { onRestart, onGiveUp } = this.#options;
    const restarting = this.#startAgain(exit);
    this.#next = restarting.then(
      ({ session }) => session,
      (error: unknown) => {
        throw this.#closing.signal.aborted ? exit : error;
      },
    );
    this.#next.catch(() => {});
    void restarting.then(
      ({ session, ...restart }) => {
        this.#session = session;
        this.#next = undefined;
        this.#watch(session);
        onRestart?.({ cause: exit, ...restart });
      },
      (error: unknown) => {
        if (error instanceof SidecarGaveUpError) onGiveUp?.(error);
      },
    );
  }

  async #startAgain(exit: SidecarExitedError): Promise<Omit<Restart, "cause"> & { session: Session }> {
    const { signal } = this.#closing;
    let cause: unknown = exit;
    const lost: Restart["lost"] = [];
    for (let attempts = 1; ; attempts++) {
      await sleep(this.#delayAfter(cause), undefined, { signal, ref: false });
      try {
        const session = await Session.spawn({ ...this.#options, signal }, true);
        await this.#loadAgain(session, lost);
        return { session, attempts, lost };
      } catch (error) {
        signal.throwIfAborted();
        cause = error;
      }
    }
  }

  async #loadAgain({ connection, transport }: Session, lost: Restart["lost"]): Promise<void> {
    const options = { signal: this.#closing.signal, background: true };
    for (const { method, params, ...holding } of this.#holdings) {
      try {
        await connection.request(method, params, options).response;
      } catch (error) {
        if (!(error instanceof SidecarRequestError)) {
          await transport.end();
          throw error;
        }
        this.#holdings.forget(holding);
        lost.push({ ...holding, error });
      }
    }
  }

  #delayAfter(cause: unknown): number {
    const isFinal = cause instanceof SidecarExitedError || cause instanceof SidecarRequestError;
    if (isFinal && !cause.retryable) {
      throw new SidecarGaveUpError("Another start of the sidecar would end the same way.", cause);
    }
    const delay = this.#restarts.next();
    if (delay !== undefined) return delay;
    const { limit, withinMs } = this.#restarts.policy;
    throw new SidecarGaveUpError(`The sidecar was started again ${limit} times within ${withinMs} ms.`, cause);
  }
}
