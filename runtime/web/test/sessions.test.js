import assert from "node:assert/strict";
import { test } from "node:test";
import { runOne } from "../src/sessions.js";

// The operator MatMulInteger alone: uint8 [m, k] "a" and int8 [k, n] "b" give int32 [m, n] "c".
const PRODUCT =
  "CAg6YgoYCgFhCgFiEgFjIg1NYXRNdWxJbnRlZ2VyEgFnWhUKAWESEAoOCAISCgoDEgFtCgMSAWtaFQoBYhIQCg4IAxIKCgMSAWsKAxIBbmIVCgFjEhAKDggGEgoKAxIBbQoDEgFuQgQKABAN";

test("ONNX Runtime Web's int8 kernels do not overflow, so that no others are asked for", async () => {
  const ort = await import("onnxruntime-web/wasm");
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(Buffer.from(PRODUCT, "base64"), { executionProviders: ["wasm"] });
  for (const rows of [1, 4, 64]) {
    const { c } = await session.run({
      a: new ort.Tensor("uint8", new Uint8Array(64 * rows).fill(255), [rows, 64]),
      b: new ort.Tensor("int8", new Int8Array(64 * 64).fill(127), [64, 64]),
    });
    assert.ok(c.data.length === 64 * rows && c.data.every((value) => value === 64 * 255 * 127));
  }
  await session.release();
});

test("a graph of a fixed batch is given a row as often as it takes", async () => {
  let given;
  const session = {
    batch: 3,
    put: (rows) => rows,
    get: async (value) => value,
    drop() {},
    run: async (_, table) => ({ y: (given = table.get("x")) }),
  };
  const made = await runOne(
    session,
    { name: "g", inputs: [{ name: "x" }], outputs: [{ name: "y" }] },
    { data: Float32Array.of(1, 2), dims: [1, 2] },
  );
  assert.deepEqual(given, { data: Float32Array.of(1, 2, 1, 2, 1, 2), dims: [3, 2] });
  assert.deepEqual(made, { y: { data: Float32Array.of(1, 2), dims: [1, 2] } });
});
