/** The protocol's own document, as a judge of what is said. */

import { readFileSync } from "node:fs";

import { Ajv2020, type ValidateFunction } from "ajv/dist/2020.js";

import type { WireMessage } from "../../src/channel.js";

interface Described {
  name: string;
  result?: unknown;
}

interface Message {
  id?: unknown;
  method?: string;
  params?: unknown;
  result?: unknown;
  error?: unknown;
}

const DOCUMENT = JSON.parse(
  readFileSync(new URL("../../../../protocol/openrpc.json", import.meta.url), "utf8"),
) as { methods: Described[]; "x-notifications": Described[] };

/** Says what is wrong with the messages of connections, by the schemas of protocol/openrpc.json. */
export class SchemaJudge {
  readonly #ajv = new Ajv2020({ strict: false, allErrors: true }).addSchema(DOCUMENT, "openrpc");
  readonly #asked = new WeakMap<object, Map<unknown, string>>();

  /** What is wrong with a message; undefined if nothing is. Messages of a connection must come in order. */
  problem({ connection, direction, message }: WireMessage): string | undefined {
    const said = message as Message;
    const judged = direction === "sent" ? this.#sent(connection, said) : this.#received(connection, said);
    const faults = judged.flatMap(([name, value]) => this.#faults(name, value));
    return faults.length === 0 ? undefined : `${JSON.stringify(message)}: ${faults.join("; ")}`;
  }

  #sent(connection: object, message: Message): [pointer: string, value: unknown][] {
    const asked = this.#asked.get(connection) ?? new Map<unknown, string>();
    this.#asked.set(connection, asked.set(message.id, message.method ?? ""));
    const index = DOCUMENT.methods.findIndex(({ name }) => name === message.method);
    const frame = message.id === undefined ? "NotificationFrame" : "RequestFrame";
    return [
      [`components/schemas/${frame}`, message],
      [`methods/${index}/x-params`, message.params],
    ];
  }

  #received(connection: object, message: Message): [pointer: string, value: unknown][] {
    if (message.method !== undefined) {
      const index = DOCUMENT["x-notifications"].findIndex(({ name }) => name === message.method);
      return [
        ["components/schemas/NotificationFrame", message],
        [`x-notifications/${index}/x-params`, message.params],
      ];
    }
    if (message.error !== undefined) return [["components/schemas/ErrorFrame", message]];
    const asked = this.#asked.get(connection)?.get(message.id);
    const index = DOCUMENT.methods.findIndex(({ name }) => name === asked);
    return [
      ["components/schemas/ResultFrame", message],
      [`methods/${index}/result/schema`, message.result],
    ];
  }

  #faults(pointer: string, value: unknown): string[] {
    let validate: ValidateFunction | undefined;
    try {
      validate = this.#ajv.getSchema(`openrpc#/${pointer}`);
    } catch (error) {
      return [String(error)];
    }
    if (validate === undefined) return [`the protocol does not know it (${pointer})`];
    if (validate(value)) return [];
    return (validate.errors ?? []).map(({ instancePath, message }) => `${instancePath || "it"} ${message}`);
  }
}
