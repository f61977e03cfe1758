import assert from "node:assert/strict";
import { test } from "node:test";
import { RequestError } from "../src/errors.js";
import { factorsOf } from "../src/lora.js";
import { readGolden } from "./golden.js";

const { lora, files, cases, refused } = readGolden("low_rank.json");
const bytes = (names) => names.map((name) => Uint8Array.from(Buffer.from(files[name], "base64")));
/** Graphs that take all factors. */
const graphs = (dtype) => [
  {
    inputs: Object.keys(lora.layers).flatMap((part) =>
      ["down", "up"].map((side) => ({ name: `lora_${side}_${part}`, dtype, shape: [], stored_as: null })),
    ),
  },
];

for (const { files: names, scale, ...want } of cases) {
  for (const dtype of ["float32", "float16"]) {
    test(`factors of ${names.join(", ") || "no file"} in ${dtype}`, () => {
      const made = factorsOf(lora, names.length ? bytes(names) : undefined, scale ?? undefined, graphs(dtype));
      assert.deepEqual(Object.keys(made).sort(), Object.keys(want[dtype]).sort());
      for (const [name, { data, dims }] of Object.entries(made)) {
        const kind = dtype === "float16" ? Uint16Array : Float32Array;
        assert.ok(data instanceof kind);
        assert.deepEqual([data, dims], [kind.from(want[dtype][name]), [1, data.length]]);
      }
    });
  }
}

const refuses = (job) =>
  assert.throws(job, (e) => {
    assert.ok(e instanceof RequestError, e.stack);
    assert.ok(!e.message.includes("\n"), e.message);
    return true;
  });

for (const { files: names, scale, why } of refused)
  test(`refused: ${why}`, () => refuses(() => factorsOf(lora, bytes(names), scale ?? undefined, graphs("float32"))));

test("refused: a LoRA of a bundle that takes none, numbers beyond a dtype, what is no file", () => {
  assert.deepEqual(factorsOf(null, undefined, undefined, graphs("float32")), {});
  const [one] = bytes(["float32"]);
  refuses(() => factorsOf(null, one, undefined, graphs("float32")));
  refuses(() => factorsOf(lora, one, NaN, graphs("float32")));
  refuses(() => factorsOf(lora, one, 1e300, graphs("float32")));
  refuses(() => factorsOf(lora, one, 1e6, graphs("float16")));
  refuses(() => factorsOf(lora, /** @type {any} */ ("style.safetensors"), undefined, graphs("float32")));
});
