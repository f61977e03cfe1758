import assert from "node:assert/strict";
import { test } from "node:test";
import { noLora } from "../src/lora.js";
import { hasRows, parseManifest } from "../src/manifest.js";
import { readFileSync } from "node:fs";

const golden = new URL("../../golden/manifests/pipeline.json", import.meta.url);

test("without a LoRA the factors that graphs take are zeros, once, in the dtypes that they declare", () => {
  const { targets, lora } = parseManifest(new Uint8Array(readFileSync(golden)));
  const { graphs } = targets[0].components.unet,
    zeros = noLora(graphs);
  assert.deepEqual(
    Object.keys(zeros).sort(),
    Object.keys(lora.layers)
      .flatMap((part) => [`lora_down_${part}`, `lora_up_${part}`])
      .sort(),
  );
  for (const [name, { data, dims }] of Object.entries(zeros)) {
    assert.ok(data instanceof Float32Array && data.every((value) => value === 0) && !hasRows(name), name);
    const { shape } = graphs.flatMap(({ inputs }) => inputs).find((t) => t.name === name);
    assert.deepEqual([dims, dims[0]], [shape, 1]);
  }
  const half = graphs.map((g) => ({ ...g, inputs: g.inputs.map((t) => ({ ...t, dtype: "float16" })) }));
  assert.ok(Object.values(noLora(half)).every(({ data }) => data instanceof Uint16Array));
  assert.deepEqual(noLora([{ ...graphs[0], inputs: [] }]), {});
});
