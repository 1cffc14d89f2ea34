/** Both ends of a connection in memory: the real client at one, the test at the other. */

import { PassThrough } from "node:stream";

import { SidecarClient } from "../../src/client.js";
import { Connection } from "../../src/connection.js";
import type { ExitStatus, InitializeResult } from "../../src/index.js";
import type { LineSplitter } from "../../src/lines.js";

export interface Sent {
  id?: number;
  method: string;
  params: Record<string, unknown>;
}

export class Wire {
  readonly input = new PassThrough();
  readonly output = new PassThrough();
  /** What the connection said of being busy, in order. */
  readonly busy: boolean[] = [];
  readonly connection: Connection;

  constructor(splitter?: LineSplitter) {
    this.connection = new Connection(this.input, this.output, (busy) => this.busy.push(busy), splitter);
  }

  /** Says something as the server would. */
  say(message: object): void {
    this.input.write(`${JSON.stringify({ jsonrpc: "2.0", ...message })}\n`);
  }

  progress(token: unknown, seq: number, text: string): void {
    this.say({ method: "$/progress", params: { token, value: { seq, text, tokens: [seq] } } });
  }

  /** What the client has sent since the last call. */
  sent(): Sent[] {
    const bytes = (this.output.read() as Buffer | null) ?? Buffer.alloc(0);
    return bytes
      .toString("utf8")
      .split("\n")
      .slice(0, -1)
      .map((line) => JSON.parse(line) as Sent);
  }

  /** Returns once the client has read everything that was said before. */
  async caughtUp(): Promise<void> {
    const { response } = this.connection.request("ping", {});
    this.say({ id: this.sent().at(-1)?.id, result: null });
    await response;
  }
}

/** What callers see of a connection; there is no process behind it. */
export class WiredClient extends SidecarClient {
  readonly pid = undefined;

  constructor(connection: Connection) {
    super(connection, 2 ** 18);
  }

  get info(): InitializeResult {
    throw new Error("nobody was asked");
  }

  close(): Promise<ExitStatus> {
    return Promise.resolve({ code: null, signal: null });
  }
}
