import assert from "node:assert/strict";
import { test } from "node:test";
import { clockMask } from "../src/clock.js";
import { RequestError } from "../src/errors.js";

test("periods and masks", () => {
  for (const [clock, steps, sampler, mask] of [
    [3, 5, "ddim", "10010"],
    ["2", 3, "ddim", "101"],
    [" 1, 0 ,1", 3, "ddim", "101"],
    [[1, 0], 2, "euler_karras", "10"],
    [2, 2, "heun", "101"],
    [2, 2, "pndm", "101"],
    [1, 1, "pndm", "1"],
    [99999, 2, "ddim", "10"],
  ]) {
    assert.equal(clockMask(clock, steps, sampler).map(Number).join(""), mask);
  }
});

test("where editing begins, the clock begins", () => {
  for (const [clock, steps, sampler, start, mask] of [
    [2, 5, "ddim", 2, "101"],
    ["1,0,0", 5, "ddim", 2, "100"],
    [2, 3, "heun", 2, "101"],
    [3, 4, "pndm", 2, "100"],
  ]) {
    assert.equal(clockMask(clock, steps, sampler, start).map(Number).join(""), mask);
  }
  assert.throws(
    () => clockMask("1,0,1,0", 4, "ddim", 2),
    /^RequestError: clock mask "1,0,1,0" has 4 entries for the last 2 of 4 steps, which the strength leaves; expected one each$/,
  );
  assert.throws(() => clockMask([1], 3, "heun", 2), /for the last 3 of 5 model calls \(3 steps of heun\), which/);
});

test("nonsense is refused in one line", () => {
  for (const clock of [
    0,
    -1,
    1.5,
    NaN,
    "",
    "a",
    "1,",
    "1;0,1,0",
    [],
    [0, 1, 0],
    [1, 2, 0],
    [1, 0],
    "0,1,1",
    null,
    undefined,
    {},
    true,
    [true, false, true],
    ["1", "0", "0"],
  ]) {
    assert.throws(
      () => clockMask(clock, 3, "ddim"),
      (e) => e instanceof RequestError && /^clock/.test(e.message) && !e.message.includes("\n"),
      String(clock),
    );
  }
  for (const steps of [0, -1, 1.5, "4", NaN, 10001])
    assert.throws(() => clockMask(1, steps, "ddim"), /^RequestError: steps is/);
  for (const name of ["ddpm", "pndm_karras", "toString", "euler_ancestral_beta"])
    assert.throws(() => clockMask(1, 4, name), /scheduler/);
});
