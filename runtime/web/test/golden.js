// The golden corpus, and how numbers are compared with it.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";

export const GOLDEN = new URL("../../golden/", import.meta.url);

export function readGolden(path) {
  return JSON.parse(readFileSync(new URL(path, GOLDEN), "utf8"));
}

export function goldenFiles(folder) {
  const found = readdirSync(new URL(`${folder}/`, GOLDEN)).filter((name) => name.endsWith(".json"));
  assert.ok(found.length > 1, `no files in golden/${folder}`);
  return found;
}

export function largest(values) {
  return values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
}

export function closeTo(found, expected, tolerance) {
  assert.equal(found.length, expected.length);
  for (let i = 0; i < expected.length; i++) {
    const difference = Math.abs(found[i] - expected[i]);
    assert.ok(difference <= tolerance, `element ${i} is ${found[i]}; expected ${expected[i]} within ${tolerance}`);
  }
}
