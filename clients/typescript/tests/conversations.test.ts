/** The recorded conversations that every client replays. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";

import { describe, test } from "vitest";

import { Script, type Conversation } from "./support/script.js";

const FOLDER = new URL("../../../tests/clients/conversations/", import.meta.url);

const conversations = readdirSync(FOLDER)
  .filter((name) => name.endsWith(".json"))
  .map((name) => JSON.parse(readFileSync(new URL(name, FOLDER), "utf8")) as Conversation);
const titled = conversations.map((conversation) => [conversation.title, conversation] as const);

describe.each([
  { cut: "whole", bytewise: false },
  { cut: "byte by byte", bytewise: true },
])("sent $cut", ({ bytewise }) => {
  test.each(titled)("%s", async (_, conversation) => {
    await new Script(bytewise).replay(conversation);
  });
});

test("there are conversations, and one that goes differently is told apart", async () => {
  assert(conversations.length >= 10);
  const replays = conversations.flatMap((conversation) =>
    conversation.steps.flatMap((step, index) => {
      const { outcome } = step;
      if (outcome === undefined) return [];
      const wrong = { of: outcome.of, result: { finishReason: "never" } };
      const steps = conversation.steps.map((other, at) => (at === index ? { outcome: wrong } : other));
      return [new Script(false).replay({ ...conversation, steps })];
    }),
  );
  assert(replays.length > 0);
  for (const replay of replays) await assert.rejects(replay, assert.AssertionError);
});
