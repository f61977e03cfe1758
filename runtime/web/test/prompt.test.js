import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { BundleError, RequestError } from "../src/errors.js";
import { emphasize, parsePrompt, tokenized } from "../src/prompt.js";
import { Tokenizer } from "../src/tokenizer.js";
import { closeTo, GOLDEN, readGolden } from "./golden.js";

const { encoder, cases } = readGolden("tokens/prompts.json");
const tokenizer = new Tokenizer(readFileSync(new URL("tokens/tokenizer.json", GOLDEN)));
const tokenize = (text) => tokenizer.encode(text);

for (const { prompt, emphasis, chunks } of cases) {
  test(`tokens of ${JSON.stringify(prompt).slice(0, 60)}${emphasis ? "" : ", brackets as characters"}`, () => {
    const found = tokenized(prompt, tokenize, encoder, emphasis);
    assert.deepEqual(
      found.map((chunk) => chunk.ids),
      chunks.map((chunk) => chunk.ids),
    );
    found.forEach((chunk, i) => closeTo(chunk.weights, chunks[i].weights, 1e-6));
  });
}

test("a word's last sigma, a mark in capitals, other spaces and joined accents are as in Python", () => {
  // From the Python library tokenizers 0.23.3 with the same file.
  for (const [text, ids] of [
    ["ΣΣ", [139, 225, 139, 481]],
    ["<|ENDOFTEXT|>, a", [27, 347, 68, 77, 518, 69, 83, 68, 87, 339, 91, 285, 267, 320]],
    ["a\u0085b\u3000c", [320, 321, 322]],
    ["a\ufeffb", [320, 171, 119, 379, 321]],
  ]) {
    assert.deepEqual(tokenize(text), ids, JSON.stringify(text));
  }
});

test("tokens of drawings-64, whose merges compete", () => {
  // prompts.json has random prompts, with the ids that Python's tokenizers 0.23.3 gives with this file.
  const file = new URL("../../../edgediff/zoo/drawings-64/tokenizer/tokenizer.json", import.meta.url);
  const drawings = new Tokenizer(readFileSync(file));
  for (const [text, ids] of JSON.parse(readFileSync(new URL("prompts.json", import.meta.url), "utf8"))) {
    assert.deepEqual(drawings.encode(text), ids, JSON.stringify(text));
  }
});

test("spaces around a weight are those of Python", () => {
  assert.deepEqual(parsePrompt("(a:\u00a02\x85\x1c)"), [["a", 2]]);
  assert.deepEqual(parsePrompt("(a:2\ufeff)"), [["a:2\ufeff", 1.1]]);
});

test("weights beyond 0 to 10, and lone surrogates, are refused", () => {
  for (const prompt of ["(a:10.1)", "(a:-1)", "((((a:9):9):9):9)"])
    assert.throws(() => parsePrompt(prompt), /^RequestError: prompt: the weight of "a"/);
  assert.throws(() => tokenized("a \ud83d", tokenize, encoder), /lone surrogate/);
});

test("a prompt of 10,000 characters is refused in one line, and soon", () => {
  const start = performance.now();
  for (const prompt of [
    "apple ".repeat(1667),
    "a".repeat(10000),
    "(".repeat(10000),
    "[(".repeat(5000),
    "1".repeat(10000),
  ]) {
    assert.throws(
      () => tokenized(prompt, tokenize, encoder),
      (e) => e instanceof RequestError && /expected 640 at most/.test(e.message) && !e.message.includes("\n"),
    );
  }
  assert.throws(() => tokenized("a".repeat(100001), tokenize, encoder), /100001 characters/);
  assert.ok(performance.now() - start < 5000);
});

test("a tokenizer that is none is refused", () => {
  for (const text of [
    "",
    "{}",
    '{"model":{"type":"WordPiece"}}',
    '{"model":{"type":"BPE","end_of_word_suffix":"</w>","vocab":{},"merges":["a b"]},"added_tokens":[]}',
  ]) {
    assert.throws(() => new Tokenizer(new TextEncoder().encode(text)), BundleError);
  }
});

test("emphasis keeps the mean of a chunk", () => {
  const hidden = Float32Array.of(1, 2, 3, 4);
  assert.equal(emphasize(hidden, [1, 1]), hidden);
  closeTo(emphasize(hidden, [1, 2]), [1 * (10 / 17), 2 * (10 / 17), 6 * (10 / 17), 8 * (10 / 17)], 1e-6);
  closeTo(emphasize(Float32Array.of(1, -1, 0, 0), [2, 1]), [2, -2, 0, 0], 0);
});
