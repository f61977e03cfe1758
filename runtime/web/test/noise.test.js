import assert from "node:assert/strict";
import { test } from "node:test";
import { RequestError } from "../src/errors.js";
import { noise, noises, philox, readSeed } from "../src/noise.js";
import { closeTo, readGolden } from "./golden.js";

const golden = readGolden("noise.json");

test("Random123's known answers", () => {
  for (const { counter, key, words } of golden.philox4x32_10) {
    const made = new Uint32Array(4),
      parse = (list) => list.map((word) => parseInt(word, 16));
    philox(parse(counter), parse(key), made);
    assert.deepEqual([...made], parse(words));
  }
});

test("noise of the golden corpus", () => {
  for (const { seed, shape, image, draw, values } of golden.noise) {
    closeTo(noise(readSeed(seed), new Float32Array(shape.reduce((a, b) => a * b)), image, draw), values, 1e-6);
  }
});

test("an image is the same whatever the number of images", () => {
  const both = noises(7n, 2, 6, 3, 1);
  assert.deepEqual(both.slice(6), noise(7n, new Float32Array(6), 4, 1));
  assert.notDeepEqual(both.slice(0, 6), both.slice(6));
});

test("seeds", () => {
  for (const [given, seed] of [
    [0, 0n],
    ["18446744073709551615", 2n ** 64n - 1n],
    [5n, 5n],
    ["9007199254740993", 9007199254740993n],
  ]) {
    assert.equal(readSeed(given), seed);
  }
  for (const bad of [
    -1,
    1.5,
    NaN,
    2 ** 53,
    "18446744073709551616",
    2n ** 64n,
    -1n,
    "",
    " 1",
    "0x1",
    "1e3",
    null,
    undefined,
    true,
    [1],
    ["1"],
    {},
  ]) {
    assert.throws(
      () => readSeed(bad),
      (e) => e instanceof RequestError && /^seed is .*; expected 0 to 2\^64/.test(e.message),
      String(bad),
    );
  }
});
