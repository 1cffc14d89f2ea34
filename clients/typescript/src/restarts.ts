import { FOREVER_MS } from "./deadline.js";

/** When a sidecar that ended is started again, and when no more. */
export interface RestartPolicy {
  /** How many restarts there may be ... */
  limit: number;
  /** ... within this time. */
  withinMs: number;
  /** How long to wait before the first; doubled for every other within the time, and up to half of it left out. */
  delayMs: number;
}

const DEFAULTS: RestartPolicy = { limit: 5, withinMs: 180_000, delayMs: 100 };

/** Counts restarts and says how long to wait for the next. */
export class Restarts {
  readonly policy: RestartPolicy;
  readonly #now: () => number;
  readonly #random: () => number;
  #times: number[] = [];

  constructor(policy: Partial<RestartPolicy> = {}, now = () => performance.now(), random = Math.random) {
    this.policy = { ...DEFAULTS, ...policy };
    this.#now = now;
    this.#random = random;
  }

  /** Counts a restart and returns the milliseconds to wait before it; undefined if there have been too many. */
  next(): number | undefined {
    const { limit, withinMs, delayMs } = this.policy;
    const now = this.#now();
    this.#times = this.#times.filter((time) => now - time < withinMs);
    if (this.#times.length >= limit) return undefined;
    // Many hosts whose sidecars ended together do not start them together.
    const delay = delayMs * 2 ** this.#times.length * (0.5 + this.#random() / 2);
    this.#times.push(now);
    return Math.min(delay, FOREVER_MS);
  }
}
