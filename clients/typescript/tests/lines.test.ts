import assert from "node:assert/strict";

import { test } from "vitest";

import { SidecarError } from "../src/errors.js";
import { LineSplitter } from "../src/lines.js";

const LINES = ['{"text":"plain"}', "zwölf größere Äpfel", "東京 🗼", "x"];
const BYTES = Buffer.from(`${LINES.join("\n")}\n`);

test("lines come out whole, wherever the stream is cut in two", () => {
  for (let cut = 0; cut <= BYTES.length; cut++) {
    const splitter = new LineSplitter();
    const lines = [...splitter.feed(BYTES.subarray(0, cut)), ...splitter.feed(BYTES.subarray(cut))];
    assert.deepEqual(lines, LINES, `cut at byte ${cut}`);
  }
});

test("lines come out whole when every byte comes alone", () => {
  const splitter = new LineSplitter();
  const lines = [...BYTES].flatMap((byte) => splitter.feed(Buffer.of(byte)));
  assert.deepEqual(lines, LINES);
});

test("the other line separators of Unicode stay inside their line", () => {
  const line = "a\u2028b\u2029c\u0085d\ve\ff\rg";
  assert.deepEqual(new LineSplitter().feed(Buffer.from(`${line}\n`)), [line]);
});

test("a carriage return before the newline is left to whoever reads the line", () => {
  assert.deepEqual(new LineSplitter().feed(Buffer.from("{}\r\n{}\r\n")), ["{}\r", "{}\r"]);
});

test("empty lines are left out", () => {
  assert.deepEqual(new LineSplitter().feed(Buffer.from("\n\na\n\n\nb\n\n")), ["a", "b"]);
});

test("an unfinished line waits for its newline", () => {
  const splitter = new LineSplitter();
  assert.deepEqual(splitter.feed(Buffer.from("a\nunfin")), ["a"]);
  assert.deepEqual(splitter.feed(Buffer.alloc(0)), []);
  assert.deepEqual(splitter.feed(Buffer.from("ished")), []);
  assert.deepEqual(splitter.feed(Buffer.from("\n")), ["unfinished"]);
});

test("a line may be as long as the bound, and every line may", () => {
  assert.deepEqual(new LineSplitter(4).feed(Buffer.from("1234\n1234\n1234\n")), ["1234", "1234", "1234"]);
});

test("a line beyond the bound is an error, in one piece or in many, with its newline or without", () => {
  assert.throws(() => new LineSplitter(4).feed(Buffer.from("12345\n")), SidecarError);
  assert.throws(() => new LineSplitter(4).feed(Buffer.from("12345")), SidecarError);
  const splitter = new LineSplitter(4);
  assert.deepEqual(splitter.feed(Buffer.from("123")), []);
  assert.throws(() => splitter.feed(Buffer.from("45")), SidecarError);
});
