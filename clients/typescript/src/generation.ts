import type { Connection, Request, RequestOptions } from "./connection.js";
import type { GenerateParams, GenerateProgress, GenerateResult } from "./protocol.js";

/**
 * An answer as it is generated: iterate over its parts, once, or await `text()`, or only `result`.
 *
 * Leaving the loop early cancels the generation. A failure rejects the iteration, after the parts that came
 * before it, and `result`; either may be left alone.
 */
export class Generation implements AsyncIterable<GenerateProgress> {
  /** How it ended: finish reason, usage, timings. */
  readonly result: Promise<GenerateResult>;
  readonly #request: Request<GenerateResult>;
  readonly #signal: AbortSignal | undefined;
  readonly #parts: GenerateProgress[] = [];
  #wake: () => void = () => {};
  #ended = false;
  #iterated = false;

  constructor(connection: Connection, token: string, params: GenerateParams, options: RequestOptions) {
    this.#signal = options.signal;
    connection.onProgress(token, (part) => {
      this.#parts.push(part);
      this.#wake();
    });
    this.#request = connection.request("generate", { ...params, partialResultToken: token }, options);
    this.result = this.#request.response.finally(() => {
      connection.onProgress(token, undefined);
      this.#ended = true;
      this.#wake();
    });
    // Whoever iterates gets the error from the iteration; `result` may be left alone.
    this.result.catch(() => {});
  }

  /** Ends the generation on the server; `result` then says "cancelled". Nothing if it has ended. */
  cancel(): void {
    this.#request.cancel();
  }

  [Symbol.asyncIterator](): AsyncGenerator<GenerateProgress, void, undefined> {
    // Two loops would each get some of the parts, and neither would know.
    if (this.#iterated) throw new TypeError("A generation can be iterated over once; its parts are gone.");
    this.#iterated = true;
    return this.#iterate();
  }

  /** The whole text, once it is complete. */
  async text(): Promise<string> {
    let text = "";
    for await (const part of this) text += part.text;
    return text;
  }

  async *#iterate(): AsyncGenerator<GenerateProgress, void, undefined> {
    try {
      for (;;) {
        // Also when everything is here already: who aborts wants no more of it.
        this.#signal?.throwIfAborted();
        const part = this.#parts.shift();
        if (part !== undefined) yield part;
        else if (this.#ended) break;
        else await new Promise<void>((resolve) => (this.#wake = resolve));
      }
      await this.result;
    } finally {
      this.cancel();
    }
  }
}
