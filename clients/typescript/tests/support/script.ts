/** Replays a recorded conversation; tests/clients/conversations/README.md says what its steps mean. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { PassThrough, type Readable } from "node:stream";

import { SidecarClient } from "../../src/client.js";
import {
  SidecarError,
  SidecarExitedError,
  SidecarRequestError,
  SidecarStartError,
  type ExitStatus,
  type GenerateParams,
  type Generation,
  type Methods,
  type RequestOptions,
} from "../../src/index.js";
import { LineSplitter } from "../../src/lines.js";
import { Session } from "../../src/session.js";
import { closed, type Transport } from "../../src/transport.js";
import { SchemaJudge } from "./schema.js";

const WELCOME = JSON.parse(
  readFileSync(new URL("../../../../tests/clients/welcome.json", import.meta.url), "utf8"),
) as object;

type Asks = {
  [M in keyof Methods]?: (client: SidecarClient, params: Methods[M]["params"], options: RequestOptions) => Promise<unknown>;
};

const ASK: Asks = {
  load: (client, params, options) => client.load(params, options),
  reload: (client, { model }, options) => client.reload(model, options),
  unload: (client, params, options) => client.unload(params, options),
  alias: (client, params, options) => client.alias(params, options),
  pull: (client, params, options) => client.pull(params, options),
  loadAdapter: (client, params, options) => client.loadAdapter(params, options),
  unloadAdapter: (client, params, options) => client.unloadAdapter(params, options),
  ping: (client, _, options) => client.ping(options),
};

type Step = { [Kind in keyof Script]?: Script[Kind] extends (value: infer Value) => unknown ? Value : never };

export interface Conversation {
  title: string;
  steps: Step[];
}

interface Expected {
  of: string;
  texts?: string[];
  result?: unknown;
  error?: { kind: string; data?: unknown };
  incomplete?: true;
  gone?: true;
  refused?: true;
  abandoned?: true;
}

/** The server's side of one connection, and the caller of the client at its other end. */
export class Script {
  readonly #bytewise: boolean;
  readonly #transport = new MemoryTransport();
  readonly #said = linesOf(this.#transport.output);
  readonly #names = new Map<string, unknown>();
  readonly #calls = new Map<string, Call>();
  readonly #judge = new SchemaJudge();
  #client: SidecarClient | undefined;

  constructor(bytewise: boolean) {
    this.#bytewise = bytewise;
  }

  /** Replays everything; rejects with the first difference. */
  async replay({ steps }: Conversation): Promise<void> {
    for (const step of steps) {
      const [[kind, value] = assert.fail("an empty step"), ...others] = Object.entries(step);
      assert.deepEqual(others, []);
      await (this[kind as keyof Script] as (value: unknown) => Promise<void> | void)(value);
    }
    assert(
      [...this.#calls.values()].every(({ compared }) => compared),
      "a call had no outcome",
    );
    this.hangUp();
    assert.equal(await this.#next(), undefined);
  }

  async open(members: object): Promise<void> {
    this.call({ name: "opening", method: "initialize" });
    await this.expect({ id: "$id:opening", method: "initialize" });
    this.send({ id: "$id:opening", result: { ...WELCOME, ...members } });
    await this.outcome({ of: "opening", result: {} });
  }

  call({ name, method, params = {} }: { name: string; method: string; params?: object }): void {
    const controller = new AbortController();
    this.#calls.set(name, new Call(this.#begin(method, params, controller.signal), controller));
  }

  async expect(frame: object): Promise<void> {
    const message = await this.#next();
    this.#compare({ jsonrpc: "2.0", ...frame }, message);
  }

  send(frame: object): void {
    const text = this.#named(JSON.stringify({ jsonrpc: "2.0", ...frame }));
    const problem = this.#judge.problem({ connection: this, direction: "received", message: JSON.parse(text) });
    assert.equal(problem, undefined);
    this.sendText(`${text}\n`);
  }

  sendText(text: string): void {
    const bytes = Buffer.from(this.#named(text));
    if (!this.#bytewise) this.#transport.input.write(bytes);
    else for (const byte of bytes) this.#transport.input.write(Buffer.of(byte));
  }

  async read({ of, texts }: { of: string; texts: string[] }): Promise<void> {
    assert.deepEqual(await this.#call(of).nextTexts(texts.length), texts);
  }

  cancel(name: string): void {
    (this.#call(name).begun as Generation).cancel();
  }

  abandon(name: string): void {
    const { controller } = this.#call(name);
    controller.abort(controller);
  }

  hangUp(): void {
    this.#transport.input.end();
  }

  async outcome({ of, texts, ...expected }: Expected): Promise<void> {
    const call = this.#call(of);
    const { result, error } = await call.settled;
    if (expected.incomplete) {
      assert(error instanceof SidecarError, String(error));
      assert.equal(error.name, "SidecarError");
    } else if (expected.gone) assert(error instanceof SidecarExitedError, String(error));
    else if (expected.refused) assert(error instanceof SidecarStartError, String(error));
    else if (expected.abandoned) assert.equal(error, call.controller);
    else if (expected.error === undefined) this.#compare(expected.result, result, error);
    else {
      assert(error instanceof SidecarRequestError, String(error));
      this.#compare(expected.error, error);
    }
    if (texts !== undefined) assert.deepEqual(call.texts, texts);
    call.compared = true;
  }

  #call(name: string): Call {
    return this.#calls.get(name) ?? assert.fail(`there is no call ${name}`);
  }

  #begin(method: string, params: object, signal: AbortSignal): Promise<unknown> | Generation {
    if (method === "initialize") {
      return Session.open(() => Promise.resolve(this.#transport), {}).then((session) => {
        this.#client = new ScriptedClient(session);
        return session.info;
      });
    }
    const client = this.#client ?? assert.fail("nothing has been opened");
    if (method === "generate") return client.generate(params as GenerateParams, { signal });
    const ask = ASK[method as keyof Methods] ?? assert.fail(`no call of ${method} is known here`);
    return ask(client, params as never, { signal });
  }

  /** The next message of the client, acknowledgements left out; undefined if it has hung up. */
  async #next(): Promise<object | undefined> {
    for (;;) {
      const { value: line } = await this.#said.next();
      if (line === undefined) return undefined;
      const message = JSON.parse(line) as { method?: string };
      assert.equal(this.#judge.problem({ connection: this, direction: "sent", message }), undefined);
      if (message.method !== "$/streamAck") return message;
    }
  }

  #named(text: string): string {
    return text.replace(/"\$(?:id|token):\w+"/g, (name) => {
      const key = JSON.parse(name) as string;
      assert(this.#names.has(key), `${key} has not been expected yet`);
      return JSON.stringify(this.#names.get(key));
    });
  }

  #compare(expected: unknown, actual: unknown, context: unknown = actual): void {
    if (!this.#matches(expected, actual)) assert.deepEqual(context, expected);
  }

  #matches(expected: unknown, actual: unknown): boolean {
    if (expected === "$any") return actual !== undefined;
    if (typeof expected === "string" && /^\$(id|token):/.test(expected)) {
      if (!this.#names.has(expected)) this.#names.set(expected, actual);
      return actual !== undefined && this.#names.get(expected) === actual;
    }
    if (typeof expected !== "object" || expected === null) return expected === actual;
    if (typeof actual !== "object" || actual === null) return false;
    if (Array.isArray(expected) && (!Array.isArray(actual) || actual.length !== expected.length)) return false;
    return Object.entries(expected).every(([key, value]) => this.#matches(value, actual[key as keyof typeof actual]));
  }
}

/** Something that the caller has begun, and what has come of it. */
class Call {
  readonly begun: Promise<unknown> | Generation;
  readonly controller: AbortController;
  readonly texts: string[] = [];
  readonly settled: Promise<{ result?: unknown; error?: unknown }>;
  compared = false;
  #seen = 0;
  #wake: () => void = () => {};

  constructor(begun: Promise<unknown> | Generation, controller: AbortController) {
    this.begun = begun;
    this.controller = controller;
    this.settled = this.#follow().then(
      (result) => ({ result }),
      (error: unknown) => ({ error }),
    );
  }

  async nextTexts(count: number): Promise<string[]> {
    this.#seen += count;
    while (this.texts.length < this.#seen) await new Promise<void>((resolve) => (this.#wake = resolve));
    return this.texts.slice(this.#seen - count, this.#seen);
  }

  async #follow(): Promise<unknown> {
    if (this.begun instanceof Promise) return this.begun;
    for await (const { text } of this.begun) {
      this.texts.push(text);
      this.#wake();
    }
    return this.begun.result;
  }
}

class ScriptedClient extends SidecarClient {
  readonly #session: Session;

  constructor(session: Session) {
    super(session.connection, session.windowBytes);
    this.#session = session;
  }

  get info() {
    return this.#session.info;
  }

  get pid() {
    return undefined;
  }

  close(): Promise<ExitStatus> {
    return this.#session.close();
  }
}

/** A pair of streams in memory; whoever is at the other end hangs up when this end does. */
class MemoryTransport implements Transport {
  readonly input = new PassThrough();
  readonly output = new PassThrough();
  readonly pid = undefined;
  readonly gone = closed(this.input).then(() => new SidecarExitedError({ code: null, signal: null }, ""));

  holdEventLoop(): void {}

  kill(): void {
    this.input.destroy();
  }

  end(): Promise<SidecarExitedError> {
    this.output.end();
    this.input.end();
    return this.gone;
  }
}

async function* linesOf(stream: Readable): AsyncGenerator<string, undefined> {
  const splitter = new LineSplitter();
  for await (const chunk of stream) yield* splitter.feed(chunk as Buffer);
  return undefined;
}
