/**
 * Splits a byte stream into lines at 0x0A and nowhere else.
 *
 * Not `readline`: newer versions of it also split at U+2028 and U+2029, which may stand inside JSON strings.
 */
export class LineSplitter {
  #pieces: Buffer[] = [];

  /** Returns the lines that `chunk` completes, without their newline. */
  feed(chunk: Buffer): string[] {
    const lines: string[] = [];
    let start = 0;
    for (let end = chunk.indexOf(10); end >= 0; end = chunk.indexOf(10, start)) {
      this.#pieces.push(chunk.subarray(start, end));
      const line = this.#pieces.length === 1 ? this.#pieces[0] : Buffer.concat(this.#pieces);
      this.#pieces = [];
      if (line !== undefined && line.length > 0) lines.push(line.toString("utf8"));
      start = end + 1;
    }
    if (start < chunk.length) this.#pieces.push(chunk.subarray(start));
    return lines;
  }
}
