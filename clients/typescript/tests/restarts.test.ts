import assert from "node:assert/strict";

import { test } from "vitest";

import { Restarts, type RestartPolicy } from "../src/restarts.js";

function restarts({ random = 1, ...policy }: Partial<RestartPolicy & { random: number }> = {}) {
  const clock = { now: 0 };
  return { clock, restarts: new Restarts(policy, () => clock.now, () => random) };
}

test("the wait doubles from restart to restart", () => {
  const { restarts: patient } = restarts({ limit: 5, delayMs: 100 });
  assert.deepEqual([1, 2, 3, 4, 5].map(() => patient.next()), [100, 200, 400, 800, 1600]);
});

test("chance takes up to half of a wait away", () => {
  assert.equal(restarts({ delayMs: 100, random: 0 }).restarts.next(), 50);
  assert.equal(restarts({ delayMs: 100, random: 0.5 }).restarts.next(), 75);
});

test("there are five within three minutes, and no sixth", () => {
  const { clock, restarts: limited } = restarts();
  for (let restart = 0; restart < 5; restart++) {
    assert.notEqual(limited.next(), undefined);
    clock.now += 35_000;
  }
  assert.equal(clock.now, 175_000);
  assert.equal(limited.next(), undefined);
});

test("those of long ago count no more, neither for the limit nor for the wait", () => {
  const { clock, restarts: limited } = restarts({ limit: 2, withinMs: 1_000, delayMs: 100 });
  assert.deepEqual([limited.next(), limited.next(), limited.next()], [100, 200, undefined]);
  clock.now = 999;
  assert.equal(limited.next(), undefined);
  clock.now = 1_000;
  assert.deepEqual([limited.next(), limited.next(), limited.next()], [100, 200, undefined]);
});

test("a limit of none restarts nothing", () => {
  assert.equal(restarts({ limit: 0 }).restarts.next(), undefined);
});
