import { channel } from "node:diagnostics_channel";
import type { Readable, Writable } from "node:stream";

import type { Channel, Request, SendOptions, WireMessage } from "./channel.js";
import { SidecarRequestError } from "./errors.js";
import type * as wire from "./generated/protocol.js";
import { LineSplitter } from "./lines.js";

interface Pending {
  resolve: (result: never) => void;
  reject: (reason: unknown) => void;
  /** Rejects at once, and cancels the request on the server. */
  abort: (reason: unknown) => void;
  onProgress: ((value: never) => void) | undefined;
  /** Called when the request has left the table, for whatever reason. */
  forget: () => void;
}

interface Incoming {
  id?: unknown;
  method?: unknown;
  params?: Partial<wire.ProgressParams> | null;
  result?: unknown;
  error?: wire.ErrorObject | null;
}

const messages = channel("mlx-sidecar:message");

/** JSON-RPC over a pair of streams: requests out, responses and progress in. Knows nothing of processes. */
export class Connection implements Channel {
  /** The longest line that the server takes; `initialize` says it. */
  maxFrameBytes = Infinity;
  readonly #input: Readable;
  readonly #output: Writable;
  readonly #pending = new Map<unknown, Pending>();
  readonly #splitter: LineSplitter;
  readonly #onBusy: (busy: boolean) => void;
  readonly #complaints = new Set<string>();
  #nextId = 1;
  #inFlight = 0;
  #closed: Error | undefined;

  /** `onBusy` is told when the first request goes into flight and when the last one has been answered. */
  constructor(input: Readable, output: Writable, onBusy: (busy: boolean) => void, splitter = new LineSplitter()) {
    this.#input = input;
    this.#output = output;
    this.#onBusy = onBusy;
    this.#splitter = splitter;
    input.on("data", (chunk: Buffer) => this.#read(chunk));
    // A pipe to a process that has just died; its exit tells the story, and this must not end the host.
    for (const stream of [input, output]) stream.on("error", () => {});
  }

  get isClosed(): boolean {
    return this.#closed !== undefined;
  }

  /** Sends a request; its response settles with the one answer, or when `signal` aborts. */
  request<M extends keyof wire.Methods>(
    method: M,
    params: wire.Methods[M]["params"],
    { signal, onProgress, background = false }: SendOptions<M> = {},
  ): Request<wire.Methods[M]["result"]> {
    const id = this.#nextId++;
    const cancel = () => {
      if (this.#pending.has(id)) this.notify("$/cancelRequest", { id });
    };
    const acknowledge = (seq: number) => {
      if (this.#pending.has(id)) this.notify("$/streamAck", { token: id, seq });
    };
    // What throws in here rejects the promise, and must come before the request is in the table.
    const response = new Promise<wire.Methods[M]["result"]>((resolve, reject) => {
      signal?.throwIfAborted();
      if (this.#closed !== undefined) throw this.#closed;
      const token = onProgress && { partialResultToken: id };
      const message = { jsonrpc: "2.0", id, method, params: { ...params, ...token } };
      const frame = this.#encode(message);
      const abort = (reason: unknown) => {
        cancel();
        this.#take(id)?.reject(reason);
      };
      const aborted = () => abort(signal?.reason);
      signal?.addEventListener("abort", aborted, { once: true });
      if (!background) this.#count(1);
      const forget = () => {
        signal?.removeEventListener("abort", aborted);
        if (!background) this.#count(-1);
      };
      this.#pending.set(id, { resolve: resolve as Pending["resolve"], reject, abort, onProgress, forget });
      this.#write(message, frame);
    });
    return { response, cancel, acknowledge };
  }

  /** Sends a message that has no answer. */
  notify<M extends keyof wire.ClientNotifications>(method: M, params: wire.ClientNotifications[M]): void {
    if (this.#closed !== undefined) return;
    const message = { jsonrpc: "2.0", method, params };
    this.#write(message, this.#encode(message));
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
      const data = { kind: "invalid_request", retryable: false } as const;
      throw new SidecarRequestError({ code: -32600, message: text, data });
    }
    return frame;
  }

  #write(message: object, frame: string): void {
    this.#tell("sent", message);
    this.#output.write(frame);
  }

  #read(chunk: Buffer): void {
    if (this.#closed !== undefined) return;
    try {
      for (const line of this.#splitter.feed(chunk)) this.#dispatch(decode(line));
    } catch (error) {
      // Nothing that comes after can be understood, and nothing more may be collected.
      this.close(error as Error);
      this.#input.destroy();
    }
  }

  #dispatch(message: Incoming): void {
    this.#tell("received", message);
    if (message.method === "$/progress") {
      this.#progress(message.params ?? {});
    } else if (message.method === undefined && typeof message.id === "number") {
      const pending = this.#take(message.id);
      if (message.error == null) pending?.resolve(message.result as never);
      else pending?.reject(new SidecarRequestError(message.error));
    } else if (message.method === undefined && message.id === null) {
      this.#warn(message.error?.message);
    }
  }

  #progress({ token, value }: Partial<wire.ProgressParams>): void {
    const pending = this.#pending.get(token);
    try {
      if (value !== undefined) pending?.onProgress?.(value as never);
    } catch (error) {
      pending?.abort(error);
    }
  }

  /** Says, once, what the server could not make out whose it was: no request will ever be rejected with it. */
  #warn(complaint: unknown): void {
    if (typeof complaint !== "string" || this.#complaints.has(complaint)) return;
    this.#complaints.add(complaint);
    process.emitWarning(`The sidecar could not read a message: ${complaint}`, { type: "SidecarWarning" });
  }

  #tell(direction: WireMessage["direction"], message: unknown): void {
    if (messages.hasSubscribers) messages.publish({ connection: this, direction, message } satisfies WireMessage);
  }

  #count(change: 1 | -1): void {
    const before = this.#inFlight;
    this.#inFlight += change;
    if (before === 0 || this.#inFlight === 0) this.#onBusy(this.#inFlight > 0);
  }

  /** Takes a request out of the table; whoever does so settles it. */
  #take(id: unknown): Pending | undefined {
    const pending = this.#pending.get(id);
    if (pending === undefined) return undefined;
    this.#pending.delete(id);
    pending.forget();
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
