import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { classRows, encodeTexts, guidanceEmbedding, rowsOf, timeIds } from "../src/conditioning.js";
import { RequestError } from "../src/errors.js";
import { Tokenizer } from "../src/tokenizer.js";
import { closeTo, GOLDEN, readGolden } from "./golden.js";

const { encoder: one } = readGolden("tokens/prompts.json");
const tokenizer = new Tokenizer(readFileSync(new URL("tokens/tokenizer.json", GOLDEN)));
const tokenize = (text) => tokenizer.encode(text);
const LENGTH = one.max_length;

/** Encoders whose states are [id, id / 1000] of each token, negated by a skipped layer; the pooled text is the second id. */
function fakeEncoders() {
  const ran = [];
  const use = (component, job) => {
    const hidden = (name, sign) => ({ [name]: sign });
    const session = {
      batch: null,
      put: (rows) => rows,
      get: async (value) => value,
      drop() {},
      async run(graph, table) {
        const { data, dims } = table.get("input_ids"),
          ids = Array.from(data, Number);
        assert.ok(data instanceof BigInt64Array && dims[0] === 1);
        ran.push(`${component}: ${ids.slice(1, 3)}`);
        const states = (sign) => ({
          data: Float32Array.from(ids.flatMap((id) => [sign * id, (sign * id) / 1000])),
          dims: [1, LENGTH, 2],
        });
        return { last: states(1), skipped: states(-1), pooled: { data: Float32Array.of(ids[1]), dims: [1, 1] } };
      },
    };
    return job(session, {
      name: component,
      inputs: [{ name: "input_ids", dtype: "int64", shape: ["batch", LENGTH] }],
      outputs: ["last", "skipped", "pooled"].map((name) => ({ name })),
      ...hidden,
    });
  };
  return { ran, use };
}

const spec = (count, zeros = false) => ({
  encoders: ["text_encoder", "text_encoder_2"]
    .slice(0, count)
    .map((component, k) => ({ ...one, component, hidden: ["last", "skipped"], pooled: k ? "pooled" : null })),
  zeros_without_negative: zeros,
});
const encode = (texts, { encoders = 1, zeros = false, count = 1, guided = true, any = true } = {}) => {
  const { ran, use } = fakeEncoders();
  return encodeTexts(spec(encoders, zeros), Array(encoders).fill(tokenize), use, texts, count, guided, any).then(
    ([cond, uncond]) => ({ cond, uncond, ran }),
  );
};

test("texts become states, each distinct chunk once, all lengthened to the longest", async () => {
  const { cond, uncond, ran } = await encode(
    { prompt: ["a", "it's 12 apples, the dog's!"], negativePrompt: "a" },
    { count: 2 },
  );
  assert.deepEqual(cond.encoder_hidden_states.dims, [2, 2 * LENGTH, 2]);
  assert.deepEqual(uncond.encoder_hidden_states.dims, [2, 2 * LENGTH, 2]);
  assert.equal(ran.length, 4); // "a", an empty chunk, and two
  const ids = (rows, n) => Array.from({ length: 2 * LENGTH }, (_, k) => rows.data[(n * 2 * LENGTH + k) * 2]);
  assert.deepEqual(ids(cond.encoder_hidden_states, 0).slice(0, 3), [524, 320, 525]);
  assert.deepEqual(ids(cond.encoder_hidden_states, 0).slice(LENGTH, LENGTH + 2), [524, 525]);
  assert.deepEqual(ids(cond.encoder_hidden_states, 1).slice(0, 4), [524, 72, 339, 6]);
  assert.deepEqual(ids(uncond.encoder_hidden_states, 1), ids(cond.encoder_hidden_states, 0));
});

test("weights multiply states, and the chunk's mean stays", async () => {
  const plain = (await encode({ prompt: "a red" })).cond.encoder_hidden_states.data,
    weighted = (await encode({ prompt: "a (red:2)" })).cond.encoder_hidden_states.data;
  const mean = (values) => values.reduce((a, b) => a + b) / values.length;
  closeTo([mean(weighted) / mean(plain), weighted[4] / weighted[2] / (plain[4] / plain[2])], [1, 2], 1e-5);
  assert.notDeepEqual((await encode({ prompt: "(a)", emphasis: false })).cond, (await encode({ prompt: "(a)" })).cond);
});

test("two encoders are joined along the features, the second has the pooled text", async () => {
  const { cond, uncond } = await encode({ prompt: "a", prompt2: "red" }, { encoders: 2 });
  assert.deepEqual(cond.encoder_hidden_states.dims, [1, LENGTH, 4]);
  closeTo(cond.encoder_hidden_states.data.slice(4, 8), [320, 0.32, 513, 0.513], 1e-6);
  assert.deepEqual([...cond.text_embeds.data], [513]);
  assert.deepEqual([...uncond.text_embeds.data], [525]);
  closeTo(
    (await encode({ prompt: "a", clipSkip: 1 })).cond.encoder_hidden_states.data.slice(2, 4),
    [-320, -0.32],
    1e-6,
  );
});

test("without a negative prompt guidance leads away from zeros where the model wants those", async () => {
  const zero = (rows) => Object.values(rows).every(({ data }) => data.every((value) => value === 0));
  assert.ok(zero((await encode({ prompt: "a" }, { encoders: 2, zeros: true })).uncond));
  for (const texts of [{ negativePrompt: "" }, { negativePrompt2: "b" }]) {
    assert.ok(!zero((await encode({ prompt: "a", ...texts }, { encoders: 2, zeros: true })).uncond));
  }
  const { uncond, ran } = await encode({ prompt: "a", negativePrompt: "b" }, { guided: false });
  assert.deepEqual([uncond, ran.length], [{}, 1]);
});

test("texts that do not fit are refused", async () => {
  for (const [texts, options, why] of [
    [{ prompt: ["a"] }, { count: 2 }, /^prompt has 1 entries for 2 images/],
    [{ prompt: 5 }, {}, /^prompt is 5/],
    [{ prompt: "a", negativePrompt: ["a", 1] }, { count: 2 }, /^negativePrompt is/],
    [{ prompt: "a", prompt2: "b" }, {}, /^prompt2 was given, but/],
    [{ prompt: "a", clipSkip: 2 }, {}, /^clipSkip is 2; expected a whole number from 0 to 1/],
    [{ prompt: "a", clipSkip: -1 }, {}, /^clipSkip/],
    [{ prompt: "it's 12 apples, the dog's!" }, { any: false }, /^prompt: it is longer than 10 tokens/],
    [{ prompt: "apple ".repeat(1667) }, {}, /^prompt: \d+ tokens; expected 640 at most/],
  ]) {
    await assert.rejects(
      encode(texts, options),
      (e) => e instanceof RequestError && why.test(e.message),
      JSON.stringify(texts).slice(0, 60),
    );
  }
});

test("classes by name and by index, one after the other where none is named", () => {
  const known = { labels: ["x", "y"], null_label: 2 };
  const values = (label, count, dtype = "int64") =>
    classRows(known, label, count, true, dtype).map((rows) => Array.from(rows.class_labels.data, Number));
  assert.deepEqual(values(undefined, 3), [
    [0, 1, 0],
    [2, 2, 2],
  ]);
  assert.deepEqual(values("y", 2, "int32"), [
    [1, 1],
    [2, 2],
  ]);
  assert.deepEqual(values(["y", 0], 2), [
    [1, 0],
    [2, 2],
  ]);
  assert.throws(() => classRows({ ...known, null_label: null }, 0, 1, true, "int64"), /no null class/);
});

test("sizes and guidance as models are told them", () => {
  assert.deepEqual([...timeIds(6, 32, 48, false).data], [32, 48, 0, 0, 32, 48]);
  assert.deepEqual(
    [timeIds(5, 32, 48, false), timeIds(5, 32, 48, true)].map(({ data }) => data[4]),
    [6, 2.5],
  );
  assert.throws(() => timeIds(4, 1, 1, false), RequestError);
  const { data, dims } = guidanceEmbedding(1.001, 5, 2);
  assert.deepEqual(dims, [2, 5]);
  closeTo(
    data,
    [1, 2].flatMap(() => [Math.sin(1), Math.sin(1e-4), Math.cos(1), Math.cos(1e-4), 0]),
    1e-6,
  );
});

test("arrays are checked and repeated", () => {
  const needed = new Map([
    ["encoder_hidden_states", { name: "encoder_hidden_states", dtype: "float32", shape: ["batch", "tokens", 2] }],
  ]);
  const embeds = (dims, data = new Float32Array(dims.reduce((a, b) => a * b)).fill(1)) => ({
    encoder_hidden_states: { data, dims },
  });
  assert.deepEqual(rowsOf(needed, embeds([1, 3, 2]), 2).encoder_hidden_states, {
    data: new Float32Array(12).fill(1),
    dims: [2, 3, 2],
  });
  for (const [given, why] of [
    [{}, /needs a prompt, or promptEmbeds of shape \[batch, tokens, 2\]/],
    [{ x: 1 }, /^x is not an input/],
    [embeds([3, 3, 2]), /1 or 2 rows/],
    [embeds([1, 3, 3]), /has shape \[1,3,3\]/],
    [embeds([1, 0, 2], new Float32Array(0)), /has shape/],
    [embeds([1, 3, 2], new Float32Array(5)), /has shape/],
    [embeds([1, 3, 2], [1, 2, 3, 4, 5, 6]), /has shape/],
    [embeds([1, 1, 2], Float32Array.of(1, NaN)), /NaN/],
    [{ encoder_hidden_states: 5 }, /has shape/],
  ]) {
    assert.throws(
      () => rowsOf(needed, given, 2),
      (e) => e instanceof RequestError && why.test(e.message),
      JSON.stringify(given),
    );
  }
});
