import type { Methods } from "./generated/protocol.js";

/** A model, or something that it has. */
export interface Holding {
  model: string;
  adapter?: string;
  alias?: string;
}

/** A holding, and how to ask for it. */
export interface Reminder extends Holding {
  method: "load" | "loadAdapter" | "alias";
  params: Methods[Reminder["method"]]["params"];
}

type Notes = { [M in keyof Methods]?: (params: Methods[M]["params"], result: Methods[M]["result"]) => void };

/** What a sidecar was asked to hold, and holds, so that the next one can be asked for it in the same order. */
export class Holdings implements Iterable<Reminder> {
  readonly #reminders = new Map<string, Reminder>();

  /** By the names that the server gives the models: requests may have others for them. */
  readonly #notes: Notes = {
    load: ({ alias, ...load }, { model }) => {
      const { model: _, revision, dtype, ...settings } = load;
      const known = this.#reminders.get(keyOf({ model }))?.params;
      this.#reminders.set(keyOf({ model }), { model, method: "load", params: { ...load, ...known, ...settings } });
      if (alias !== undefined) this.#alias(alias, model);
    },
    unload: (_, { model }) => this.forget({ model }),
    alias: (_, { alias, model }) => {
      if (model === null) this.#reminders.delete(keyOf({ alias }));
      else this.#alias(alias, model);
    },
    loadAdapter: ({ path }, { model, adapter }) => {
      const params = { model, adapter, path };
      this.#reminders.set(keyOf({ model, adapter }), { model, adapter, method: "loadAdapter", params });
    },
    unloadAdapter: (_, { model, adapter }) => this.forget({ model, adapter }),
  };

  /** Takes in what a request that succeeded has changed. */
  note<M extends keyof Methods>(method: M, params: Methods[M]["params"], result: Methods[M]["result"]): void {
    this.#notes[method]?.(params, result);
  }

  /** Forgets a holding; a model with all that it has. */
  forget(holding: Holding): void {
    if (holding.adapter ?? holding.alias) this.#reminders.delete(keyOf(holding));
    else for (const [key, { model }] of this.#reminders) if (model === holding.model) this.#reminders.delete(key);
  }

  [Symbol.iterator](): Iterator<Reminder> {
    return this.#reminders.values();
  }

  #alias(alias: string, model: string): void {
    // Behind the model that it has been moved to.
    this.#reminders.delete(keyOf({ alias }));
    this.#reminders.set(keyOf({ alias }), { model, alias, method: "alias", params: { alias, model } });
  }
}

/** There is one alias of a name, and of each model one adapter. */
function keyOf({ model, adapter, alias }: Partial<Holding>): string {
  return JSON.stringify(alias === undefined ? { model, adapter } : { alias });
}
