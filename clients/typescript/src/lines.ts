import { SidecarError } from "./errors.js";

/** Far above any answer, and still few enough bytes for one string. */
const MAX_LINE_BYTES = 256 * 1024 * 1024;

/**
 * Splits a byte stream into lines at 0x0A and nowhere else.
 *
 * Not `readline`: newer versions of it also split at U+2028 and U+2029, which may stand inside JSON strings.
 * It looks at every byte once and decodes whole lines only, so characters may be cut anywhere.
 */
export class LineSplitter {
  readonly #maxBytes: number;
  #pieces: Buffer[] = [];
  #held = 0;

  constructor(maxBytes = MAX_LINE_BYTES) {
    this.#maxBytes = maxBytes;
  }

  /**
   * Returns the lines that `chunk` completes, without their newline; empty ones are left out.
   *
   * @throws SidecarError if a line grows beyond the bound; nothing can be read after that
   */
  feed(chunk: Buffer): string[] {
    const lines: string[] = [];
    let start = 0;
    for (let end = chunk.indexOf(10); end >= 0; end = chunk.indexOf(10, start)) {
      this.#hold(chunk.subarray(start, end));
      if (this.#held > 0) lines.push(this.#release());
      start = end + 1;
    }
    this.#hold(chunk.subarray(start));
    return lines;
  }

  #hold(piece: Buffer): void {
    if (piece.length === 0) return;
    this.#held += piece.length;
    if (this.#held > this.#maxBytes) {
      this.#pieces = [];
      throw new SidecarError(`The sidecar sent a line of more than ${this.#maxBytes} bytes.`);
    }
    this.#pieces.push(piece);
  }

  #release(): string {
    const [first] = this.#pieces;
    const line = this.#pieces.length === 1 && first !== undefined ? first : Buffer.concat(this.#pieces);
    this.#pieces = [];
    this.#held = 0;
    return line.toString("utf8");
  }
}
