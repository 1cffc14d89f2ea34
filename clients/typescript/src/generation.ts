import type { Connection } from "./connection.js";
import type { GenerateParams, GenerateProgress, GenerateResult } from "./protocol.js";

export interface GenerateOptions {
  /** Aborting ends the generation on the server; the iteration and `result` reject with the signal's reason. */
  signal?: AbortSignal;
}

/**
 * An answer as it is generated: iterate over its parts, once, or await `text()`, or only `result`.
 *
 * Leaving the loop early cancels the generation.
 */
export class Generation implements AsyncIterable<GenerateProgress> {
  /** How it ended: finish reason, usage, timings. */
  readonly result: Promise<GenerateResult>;
  readonly #parts: GenerateProgress[] = [];
  readonly #cancel: () => void;
  #wake: () => void = () => {};
  #ended = false;

  constructor(connection: Connection, token: string, params: GenerateParams, options: GenerateOptions) {
    const { signal } = options;
    signal?.throwIfAborted();
    connection.onProgress(token, (part) => {
      this.#parts.push(part);
      this.#wake();
    });
    const request = connection.request("generate", { ...params, partialResultToken: token });
    this.#cancel = () => connection.notify("$/cancelRequest", { id: request.id });
    signal?.addEventListener("abort", this.#cancel, { once: true });
    this.result = request.response
      .then((result) => {
        signal?.throwIfAborted();
        return result;
      })
      .finally(() => {
        connection.onProgress(token, undefined);
        signal?.removeEventListener("abort", this.#cancel);
        this.#ended = true;
        this.#wake();
      });
    // Whoever iterates gets the error from the iteration; `result` may be left alone.
    this.result.catch(() => {});
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<GenerateProgress, void, undefined> {
    try {
      for (;;) {
        const part = this.#parts.shift();
        if (part !== undefined) yield part;
        else if (this.#ended) break;
        else await new Promise<void>((resolve) => (this.#wake = resolve));
      }
      await this.result;
    } finally {
      if (!this.#ended) this.#cancel();
    }
  }

  /** The whole text, once it is complete. */
  async text(): Promise<string> {
    let text = "";
    for await (const part of this) text += part.text;
    return text;
  }
}
