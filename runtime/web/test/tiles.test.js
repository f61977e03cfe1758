import assert from "node:assert/strict";
import { test } from "node:test";
import { decode } from "../src/images.js";
import { closeTo } from "./golden.js";

const VAE = { scaling_factor: 2, downscale: 2, mean: null, std: null };
const graph = { name: "vae_decoder", inputs: [{ name: "z" }], outputs: [{ name: "sample" }] };

/** A decoder of one channel that doubles every pixel, and gives of each tile what `paint` makes of a number and the tile's first one. */
function fakeDecoder(paint) {
  const sizes = [];
  return {
    sizes,
    session: {
      batch: null,
      put: (rows) => rows,
      get: async (value) => value,
      drop() {},
      async run(_, table) {
        const {
            data,
            dims: [, , height, width],
          } = table.get("z"),
          made = new Float32Array(4 * data.length);
        sizes.push(`${height}x${width}`);
        for (let y = 0; y < 2 * height; y++)
          for (let x = 0; x < 2 * width; x++)
            made[y * 2 * width + x] = paint(data[(y >> 1) * width + (x >> 1)], data[0]);
        return { sample: { data: made, dims: [1, 1, 2 * height, 2 * width] } };
      },
    },
  };
}

const latents = (height, width) => ({
  data: Float32Array.from({ length: height * width }, (_, k) => 2 * k),
  dims: [1, 1, height, width],
});

test("a decoder that looks at one pixel gives the same in tiles, at any size", async () => {
  for (const [height, width] of [
    [8, 8],
    [9, 11],
    [16, 5],
    [21, 13],
  ]) {
    const { session } = fakeDecoder((value) => value),
      z = latents(height, width);
    const whole = await decode(session, () => graph, VAE, z),
      tiled = await decode(session, () => graph, VAE, z, 8);
    assert.deepEqual(tiled.dims, [1, 1, 2 * height, 2 * width]);
    closeTo(tiled.data, whole.data, 1e-4);
    const square = await decode(
      session,
      (h, w) => (h === 8 && w === 8 ? graph : null),
      VAE,
      latents(Math.max(8, height), Math.max(8, width)),
      8,
    );
    closeTo(
      square.data,
      (await decode(session, () => graph, VAE, latents(Math.max(8, height), Math.max(8, width)))).data,
      1e-4,
    );
  }
});

test("tiles fade into each other over a quarter", async () => {
  const { session, sizes } = fakeDecoder((_, first) => first);
  const { data } = await decode(session, () => graph, VAE, latents(1, 14), 8);
  assert.deepEqual(sizes, ["1x8", "1x8", "1x2"]);
  // Tiles begin at 0, 6 and 12; each is constant, the first pixel being its beginning. They are 2 high, so 4 pixels fade.
  const row = [...Array(12).fill(0), 0, 1.5, 3, 4.5, ...Array(8).fill(6), 6, 7.5, 9, 10.5];
  closeTo(data.slice(0, 28), row, 1e-6);
});

test("where there is no graph for what is left, a whole tile that ends there is decoded", async () => {
  const { session, sizes } = fakeDecoder((value) => value);
  await decode(session, (h, w) => (h === 8 && w === 8 ? graph : null), VAE, latents(8, 14), 8);
  assert.deepEqual(sizes, Array(6).fill("8x8"));
});

test("latents are brought to the decoder's scale", async () => {
  const { session } = fakeDecoder((value) => value),
    z = { data: Float32Array.of(1, 2, 3, 4), dims: [2, 1, 1, 2] };
  closeTo(
    (await decode(session, () => graph, { ...VAE, mean: [10], std: [4] }, z)).data,
    [12, 12, 14, 14, 12, 12, 14, 14, 16, 16, 18, 18, 16, 16, 18, 18],
    1e-6,
  );
});

test("a picture that is not finite is the bundle's fault", async () => {
  const { session } = fakeDecoder(() => NaN);
  await assert.rejects(
    decode(session, () => graph, VAE, latents(4, 4)),
    /^BundleError: vae_decoder: its sample holds NaN or infinity; export it in fp32/,
  );
});
