import type { Readable, Writable } from "node:stream";

import { SidecarRequestError, type ErrorObject } from "./errors.js";
import { LineSplitter } from "./lines.js";
import type { GenerateProgress, Methods, ProgressParams } from "./protocol.js";

export interface RequestOptions {
  /** Aborting rejects the promise with the signal's reason at once, and ends the request on the server. */
  signal?: AbortSignal;
}

/** A request that was sent. */
export interface Request<Result> {
  readonly response: Promise<Result>;
  /** Asks the server to end the request; `response` then says how it ended. */
  cancel(): void;
}

interface Pending {
  resolve: (result: never) => void;
  reject: (reason: unknown) => void;
  /** Called when the request has left the table, for whatever reason. */
  forget: () => void;
}

interface Incoming {
  id?: unknown;
  method?: unknown;
  params?: Partial<ProgressParams> | null;
  result?: unknown;
  error?: ErrorObject | null;
}

/** JSON-RPC over a pair of streams: requests out, responses and progress in. Knows nothing of processes. */
export class Connection {
  /** The longest line that the server takes; `initialize` says it. */
  maxFrameBytes = Infinity;
  readonly #output: Writable;
  readonly #pending = new Map<number, Pending>();
  readonly #progress = new Map<unknown, (value: GenerateProgress) => void>();
  readonly #splitter: LineSplitter;
  readonly #onBusy: (busy: boolean) => void;
  #nextId = 1;
  #closed: Error | undefined;

  /** `onBusy` is told when the first request goes into flight and when the last one has been answered. */
  constructor(input: Readable, output: Writable, onBusy: (busy: boolean) => void, splitter = new LineSplitter()) {
    this.#output = output;
    this.#onBusy = onBusy;
    this.#splitter = splitter;
    input.on("data", (chunk: Buffer) => this.#read(chunk));
    // A pipe to a process that has just died; its exit tells the story, and this must not end the host.
    for (const stream of [input, output]) stream.on("error", () => {});
  }

  /** Sends a request; its response settles with the one answer, or when `signal` aborts. */
  request<M extends keyof Methods>(
    method: M,
    params: Methods[M]["params"],
    { signal }: RequestOptions = {},
  ): Request<Methods[M]["result"]> {
    const id = this.#nextId++;
    const cancel = () => {
      if (this.#pending.has(id)) this.notify("$/cancelRequest", { id });
    };
    // What throws in here rejects the promise, and must come before the request is in the table.
    const response = new Promise<Methods[M]["result"]>((resolve, reject) => {
      signal?.throwIfAborted();
      if (this.#closed !== undefined) throw this.#closed;
      const frame = this.#encode({ jsonrpc: "2.0", id, method, params });
      const abort = () => {
        cancel();
        this.#take(id)?.reject(signal?.reason);
      };
      signal?.addEventListener("abort", abort, { once: true });
      const forget = () => signal?.removeEventListener("abort", abort);
      this.#pending.set(id, { resolve: resolve as Pending["resolve"], reject, forget });
      if (this.#pending.size === 1) this.#onBusy(true);
      this.#output.write(frame);
    });
    return { response, cancel };
  }

  /** Sends a message that has no answer. */
  notify(method: string, params: object): void {
    if (this.#closed === undefined) this.#output.write(this.#encode({ jsonrpc: "2.0", method, params }));
  }

  /** Calls `listener` for every progress with this token, until it is taken away with undefined. */
  onProgress(token: string | number, listener: ((value: GenerateProgress) => void) | undefined): void {
    if (listener === undefined) this.#progress.delete(token);
    else this.#progress.set(token, listener);
  }

  /** Fails everything in flight, and everything to come, with `error`. */
  close(error: Error): void {
    this.#closed ??= error;
    for (const id of [...this.#pending.keys()]) this.#take(id)?.reject(this.#closed);
  }

  #encode(message: object): string {
    const frame = `${JSON.stringify(message)}\n`;
    const bytes = Buffer.byteLength(frame) - 1;
    if (bytes > this.maxFrameBytes) {
      // The server would refuse it too, but without an id: it does not read what it will not take.
      const text = `The request has ${bytes} bytes; the server takes at most ${this.maxFrameBytes}.`;
      throw new SidecarRequestError({ code: -32600, message: text, data: { kind: "invalid_request" } });
    }
    return frame;
  }

  #read(chunk: Buffer): void {
    if (this.#closed !== undefined) return;
    try {
      for (const line of this.#splitter.feed(chunk)) this.#dispatch(decode(line));
    } catch (error) {
      this.close(error as Error);
    }
  }

  #dispatch(message: Incoming): void {
    if (message.method === "$/progress") {
      const { token, value } = message.params ?? {};
      if (value !== undefined) this.#progress.get(token)?.(value);
    } else if (message.method === undefined && typeof message.id === "number") {
      const pending = this.#take(message.id);
      if (message.error == null) pending?.resolve(message.result as never);
      else pending?.reject(new SidecarRequestError(message.error));
    }
  }

  /** Takes a request out of the table; whoever does so settles it. */
  #take(id: number): Pending | undefined {
    const pending = this.#pending.get(id);
    if (pending === undefined) return undefined;
    this.#pending.delete(id);
    pending.forget();
    if (this.#pending.size === 0) this.#onBusy(false);
    return pending;
  }
}

/** The message of a line. A stray line, such as something that a library printed, is a message that says nothing. */
function decode(line: string): Incoming {
  try {
    return (JSON.parse(line) ?? {}) as Incoming;
  } catch {
    return {};
  }
}
