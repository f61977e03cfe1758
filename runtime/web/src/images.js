// Latents become pictures, one after the other: as a whole, or in tiles that fade into each other.
import { refuse } from "./errors.js";
import { beside, joined, range, take } from "./rows.js";
import { roundEven } from "./schedule_tables.js";
import { runOne } from "./sessions.js";

/**
 * @typedef {import("./rows.js").Rows} Rows
 * @typedef {{data: Uint8Array, dims: number[]}} Images [N, H, W, C]
 */

/**
 * From float32 [N, C, H, W], clipped to [-1, 1], to bytes [N, H, W, C]; halves go to the even neighbour.
 * @param {Rows} pixels
 * @returns {Images}
 */
export function toUint8({ data, dims: [count, channels, height, width] }) {
  const area = height * width,
    made = new Uint8Array(data.length);
  for (let n = 0; n < count * channels; n++) {
    let to = Math.floor(n / channels) * channels * area + (n % channels);
    for (let k = n * area; k < (n + 1) * area; k++, to += channels) {
      const share = Math.fround(Math.fround(Number(data[k]) * 0.5) + 0.5);
      made[to] = roundEven(Math.fround(Math.min(Math.max(share, 0), 1) * 255));
    }
  }
  return { data: made, dims: [count, height, width, channels] };
}

/**
 * One of some images as a canvas takes it: new ImageData(data, width, height).
 * @param {Images} images
 * @param {number} [index]
 */
export function toRgba({ data, dims: [count, height, width, channels] }, index = 0) {
  refuse(
    !(index >= 0 && index < count) || ![1, 3].includes(channels),
    `image ${index} of ${count} with ${channels} channels: expected one of them, with 1 or 3`,
  );
  const made = new Uint8ClampedArray(4 * height * width);
  for (let k = 0, at = index * height * width * channels; k < made.length; k += 4, at += channels) {
    made[k] = data[at];
    made[k + 1] = data[at + (channels > 1 ? 1 : 0)];
    made[k + 2] = data[at + channels - 1];
    made[k + 3] = 255;
  }
  return { data: made, width, height };
}

/**
 * Decodes latents [N, C, H, W]: pixels [N, 3, h, w], about -1 to 1.
 * @param {import("./loop.js").Session} session
 * @param {(height: number, width: number) => import("./manifest.js").Graph | null} graphAt
 * @param {import("./manifest.js").Vae} vae
 * @param {Rows} latents
 * @param {number | null} [tile] side of a tile in the latent, a multiple of 4
 * @param {AbortSignal} [signal]
 */
export async function decode(session, graphAt, vae, latents, tile = null, signal) {
  const [count, channels, height, width] = latents.dims,
    area = height * width,
    { mean, std, scaling_factor: scale, downscale } = vae;
  const z = {
    dims: latents.dims,
    data: /** @type {Float32Array} */ (latents.data).map((value, k) => {
      const c = Math.floor(k / area) % channels;
      return mean && std ? (value * std[c]) / scale + mean[c] : value / scale;
    }),
  };
  const made = [];
  for (const n of range(count)) {
    signal?.throwIfAborted();
    made.push(await inTiles(session, graphAt, take(z, [n]), tile ?? Math.max(height, width), downscale));
  }
  return joined(...made);
}

/**
 * One latent, in a single tile where that is large enough.
 * @param {import("./loop.js").Session} session
 * @param {(h: number, w: number) => import("./manifest.js").Graph | null} graphAt
 * @param {Rows} z
 * @param {number} tile
 * @param {number} scale
 */
async function inTiles(session, graphAt, z, tile, scale) {
  const [, , height, width] = z.dims,
    overlap = tile / 4,
    stride = tile - overlap;
  const pixels = async (/** @type {number} */ top, /** @type {number} */ left) => {
    const bottom = Math.min(top + tile, height),
      right = Math.min(left + tile, width);
    let y = top,
      x = left,
      graph = graphAt(bottom - y, right - x);
    if (!graph) {
      // No graph for what is left: a whole tile that ends there.
      y = Math.max(bottom - tile, 0);
      x = Math.max(right - tile, 0);
      graph = /** @type {import("./manifest.js").Graph} */ (graphAt(bottom - y, right - x));
    }
    const made = (await runOne(session, graph, cropped(z, y, x, bottom - y, right - x)))[graph.outputs[0].name];
    return cropped(made, scale * (top - y), scale * (left - x), scale * (bottom - top), scale * (right - left));
  };
  if (Math.max(height, width) <= tile) return pixels(0, 0);
  const bands = [];
  /** @type {Rows[]} */
  let above = [];
  for (let top = 0; top < height; top += stride) {
    /** @type {Rows[]} */
    const row = [];
    for (let left = 0; left < width; left += stride) {
      const made = await pixels(top, left);
      if (above.length) blend(above[row.length], made, 2, scale * overlap);
      if (row.length) blend(row[row.length - 1], made, 3, scale * overlap);
      row.push(made);
    }
    const side = scale * stride;
    bands.push(
      beside(
        row.map((each) => cropped(each, 0, 0, Math.min(side, each.dims[2]), Math.min(side, each.dims[3]))),
        3,
      ),
    );
    above = row;
  }
  return beside(bands, 2);
}

/**
 * A part of a map [1, C, H, W].
 * @param {Rows} map
 * @param {number} top
 * @param {number} left
 * @param {number} height
 * @param {number} width
 * @returns {Rows}
 */
function cropped({ data, dims: [, channels, h, w] }, top, left, height, width) {
  const made = new Float32Array(channels * height * width);
  for (let r = 0; r < channels * height; r++) {
    const at = (Math.floor(r / height) * h + top + (r % height)) * w + left;
    made.set(/** @type {Float32Array} */ (data).subarray(at, at + width), r * width);
  }
  return { data: made, dims: [1, channels, height, width] };
}

/**
 * Fades from the end of the tile before into the beginning of this one, which is changed.
 * @param {Rows} before
 * @param {Rows} tile
 * @param {number} axis
 * @param {number} overlap
 */
function blend(before, tile, axis, overlap) {
  const count = Math.min(before.dims[axis], tile.dims[axis], overlap),
    [, channels, height, width] = tile.dims;
  const old = /** @type {Float32Array} */ (before.data),
    made = /** @type {Float32Array} */ (tile.data),
    [h, w] = before.dims.slice(2);
  const rows = axis === 2 ? count : height,
    columns = axis === 3 ? count : width;
  for (let c = 0; c < channels; c++) {
    for (let y = 0; y < rows; y++) {
      for (let x = 0; x < columns; x++) {
        const at = (c * height + y) * width + x,
          from = (c * h + y + (axis === 2 ? h - count : 0)) * w + x + (axis === 3 ? w - count : 0);
        const share = (axis === 2 ? y : x) / count;
        made[at] = old[from] * (1 - share) + made[at] * share;
      }
    }
  }
}
