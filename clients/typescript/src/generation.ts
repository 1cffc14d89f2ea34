import type { Request } from "./channel.js";
import { SidecarError } from "./errors.js";
import type { GenerateProgress, GenerateResult } from "./generated/protocol.js";

export type Ask = (onProgress: (part: GenerateProgress) => void) => Request<GenerateResult>;

/**
 * An answer as it is generated: iterate over its parts, once, or await `text()`, or only `result`.
 *
 * Parts that nobody has taken yet are kept, up to the window: then the server keeps the text, in one merged part,
 * until some have been taken or the answer is complete.
 *
 * Leaving the loop early cancels the generation. A failure rejects the iteration, after the parts that came
 * before it, and `result`; either may be left alone. An iteration that did not get every part of an answer ends
 * with a SidecarError.
 */
export class Generation implements AsyncIterable<GenerateProgress> {
  /** How it ended: finish reason, usage, timings. */
  readonly result: Promise<GenerateResult>;
  readonly #request: Request<GenerateResult>;
  readonly #windowBytes: number;
  readonly #signal: AbortSignal | undefined;
  readonly #parts: GenerateProgress[] = [];
  #taken = 0;
  /** How many parts have been taken, as the server counts them: before it merged any. */
  #came = 0;
  #unacknowledgedBytes = 0;
  #wake: () => void = () => {};
  #ended = false;
  #iterated = false;

  /** `ask` sends the request; the server was told `windowBytes`, and `signal` also ends the iteration. */
  constructor(ask: Ask, windowBytes: number, signal: AbortSignal | undefined) {
    this.#windowBytes = windowBytes;
    this.#signal = signal;
    this.#request = ask((part) => {
      this.#parts.push(part);
      this.#wake();
    });
    this.result = this.#request.response.finally(() => {
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
        const part = this.#take();
        if (part !== undefined) yield part;
        else if (this.#ended) break;
        else await new Promise<void>((resolve) => (this.#wake = resolve));
      }
      this.#checkAllCame(await this.result);
    } finally {
      this.cancel();
    }
  }

  /** The next part, which the server is told of once half of the window has been taken. */
  #take(): GenerateProgress | undefined {
    const part = this.#parts[this.#taken];
    if (part === undefined) return undefined;
    this.#taken += 1;
    this.#came += part.merged ?? 1;
    // Not `shift`, which moves all that follow, every time.
    if (this.#taken * 2 >= this.#parts.length) {
      this.#parts.splice(0, this.#taken);
      this.#taken = 0;
    }
    this.#unacknowledgedBytes += Buffer.byteLength(part.text);
    if (this.#unacknowledgedBytes * 2 >= this.#windowBytes) {
      this.#unacknowledgedBytes = 0;
      this.#request.acknowledge(part.seq);
    }
    return part;
  }

  #checkAllCame({ lastSeq }: GenerateResult): void {
    if (lastSeq === undefined || lastSeq === this.#came) return;
    const lost = `Of the answer's ${lastSeq} parts ${this.#came} came: something else wrote into the connection.`;
    throw new SidecarError(`${lost} For a \`command\` that prints there is \`transport: "pipe"\`.`);
  }
}
