import type { Readable, Writable } from "node:stream";

import { SidecarRequestError } from "./errors.js";
import { LineSplitter } from "./lines.js";
import type { GenerateProgress, Methods } from "./protocol.js";

interface Pending {
  resolve: (result: never) => void;
  reject: (error: Error) => void;
}

interface Incoming {
  id?: string | number | null;
  method?: string;
  params?: { token: string | number; value: GenerateProgress };
  result?: unknown;
  error?: { code: number; message: string; data?: unknown };
}

/** JSON-RPC over a pair of streams: requests out, responses and progress in. Knows nothing of processes. */
export class Connection {
  readonly #output: Writable;
  readonly #pending = new Map<number, Pending>();
  readonly #progress = new Map<string | number, (value: GenerateProgress) => void>();
  readonly #onBusy: (busy: boolean) => void;
  #nextId = 1;
  #closed: Error | undefined;

  /** `onBusy` is told when the first request goes into flight and when the last one has been answered. */
  constructor(input: Readable, output: Writable, onBusy: (busy: boolean) => void) {
    this.#output = output;
    this.#onBusy = onBusy;
    const splitter = new LineSplitter();
    input.on("data", (chunk: Buffer) => {
      for (const line of splitter.feed(chunk)) this.#take(line);
    });
    // A write to a process that has just died; its exit tells the story, and this must not end the host.
    output.on("error", () => {});
  }

  /** Sends a request; the promise settles with its one response. */
  request<M extends keyof Methods>(method: M, params: Methods[M]["params"]): Request<Methods[M]["result"]> {
    const id = this.#nextId++;
    const response = new Promise<Methods[M]["result"]>((resolve, reject) => {
      if (this.#closed !== undefined) {
        reject(this.#closed);
        return;
      }
      this.#pending.set(id, { resolve: resolve as Pending["resolve"], reject });
      if (this.#pending.size === 1) this.#onBusy(true);
      this.#send({ jsonrpc: "2.0", id, method, params });
    });
    return { id, response };
  }

  /** Sends a message that has no answer. */
  notify(method: string, params: object): void {
    if (this.#closed === undefined) this.#send({ jsonrpc: "2.0", method, params });
  }

  /** Calls `listener` for every progress with this token, until it is taken away with undefined. */
  onProgress(token: string | number, listener: ((value: GenerateProgress) => void) | undefined): void {
    if (listener === undefined) this.#progress.delete(token);
    else this.#progress.set(token, listener);
  }

  /** Fails everything in flight, and everything to come, with `error`. */
  close(error: Error): void {
    this.#closed ??= error;
    const pending = [...this.#pending.values()];
    this.#pending.clear();
    for (const { reject } of pending) reject(error);
    if (pending.length > 0) this.#onBusy(false);
  }

  #send(message: object): void {
    this.#output.write(`${JSON.stringify(message)}\n`);
  }

  #take(line: string): void {
    let message: Incoming;
    try {
      message = JSON.parse(line) as Incoming;
    } catch {
      return; // One stray line costs itself only.
    }
    if (message.method === "$/progress" && message.params !== undefined) {
      this.#progress.get(message.params.token)?.(message.params.value);
    } else if (typeof message.id === "number") {
      this.#settle(message.id, message);
    }
  }

  #settle(id: number, message: Incoming): void {
    const pending = this.#pending.get(id);
    if (pending === undefined) return;
    this.#pending.delete(id);
    if (message.error === undefined) pending.resolve(message.result as never);
    else pending.reject(new SidecarRequestError(message.error));
    if (this.#pending.size === 0) this.#onBusy(false);
  }
}

/** A request that was sent: its id, to cancel it by, and its response. */
export interface Request<Result> {
  readonly id: number;
  readonly response: Promise<Result>;
}
