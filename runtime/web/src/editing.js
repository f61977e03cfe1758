// Editing: from the pictures of a request to where the loop begins, what the UNet sees of them, and what stays. The
// arithmetic is diffusers': strength, masks, scales and their order.
import { BundleError, refuse, shown } from "./errors.js";
import { depthsOf, imagesOf, masksOf, resized } from "./pictures.js";
import { beside, range, take } from "./rows.js";
import { runOne } from "./sessions.js";

/**
 * @typedef {import("./rows.js").Rows} Rows
 * @typedef {import("./manifest.js").Vae} Vae
 * @typedef {import("./manifest.js").Graph} Graph
 *
 * @typedef {object} Edit what a request says in pictures, checked
 * @property {string[]} takes what the UNet takes beside the latent and the request's pictures become
 * @property {import("./images.js").Images | null} image bytes [1 or N, h, w, 3]; null where there is no picture to begin with
 * @property {{data: Uint8Array, dims: number[]} | null} mask [1 or N, h, w], 1 where the picture is drawn anew; null: everywhere
 * @property {Rows | null} depth float32 [1 or N, 1, H, W] of the latent's size, -1 (far) to 1 (near)
 * @property {number} strength share of the steps that are run
 * @property {number | null} imageGuidance of a UNet that is guided by a picture too
 * @property {boolean} paste whether the finished picture has the image's own pixels outside of the mask
 * @property {number} feather pixels inside of the mask's edge over which the new picture fades in
 *
 * @typedef {object} Beginning what the loop is given of an edit
 * @property {Rows} latents where it begins
 * @property {Rows | null} concat channels after the latent's
 * @property {import("./loop.js").Kept | null} kept
 */

// diffusers' defaults, without a mask and with one.
const STRENGTH = 0.8,
  STRENGTH_WITH_MASK = 1,
  IMAGE_GUIDANCE = 1.5;
const MAX_FEATHER = 256;

/**
 * Checks what a request says in pictures against what the bundle's UNet takes.
 * @param {import("./manifest.js").Sample} sample
 * @param {[number, number]} size height and width of the latent
 * @param {number} downscale pixels of a side for one of the latent
 * @param {import("./pipeline.js").Arguments} request
 * @returns {Edit}
 */
export function readEdit(sample, [height, width], downscale, request) {
  const {
    image,
    maskImage,
    depthMap,
    strength,
    imageGuidanceScale,
    paste = false,
    feather = 0,
    concatLatents,
  } = request;
  // A request that has the concatenated channels itself needs no pictures for them.
  const takes = concatLatents ? [] : sample.concat,
    [high, wide] = [downscale * height, downscale * width];
  refuse(typeof paste !== "boolean", `paste is ${shown(paste)}; expected true or false`);
  refuse(
    !Number.isInteger(feather) || feather < 0 || feather > MAX_FEATHER,
    `feather is ${shown(feather)}; expected a whole number from 0 to ${MAX_FEATHER}, in pixels`,
  );
  for (const [name, given, part] of /** @type {const} */ ([
    ["image", image, ["image", "masked_image"]],
    ["maskImage", maskImage, ["mask"]],
    ["depthMap", depthMap, ["depth"]],
  ])) {
    const needed = part.some((each) => takes.includes(each));
    refuse(needed && given == null, `the bundle's UNet takes ${inWords(takes)} beside the latent; give ${name}`);
  }
  refuse(
    depthMap != null && !takes.includes("depth"),
    "depthMap was given, but the bundle's UNet takes no depth; leave it out",
  );
  for (const [name, given] of Object.entries({ maskImage, strength }))
    refuse(image == null && given != null, `${name} was given without an image; give image too`);
  const pasting = paste ? "paste" : "feather";
  refuse(maskImage == null && (paste || feather), `${pasting} was given without a mask; give maskImage too`);
  refuse(feather && !paste, "feather was given, but nothing is pasted; give paste: true too");
  const instructed = takes.includes("image");
  refuse(
    instructed && maskImage != null,
    "maskImage was given, but the bundle's UNet follows instructions for the whole picture; leave it out",
  );
  refuse(
    instructed && strength != null,
    "strength was given, but the bundle's UNet sees the image in every step and begins from noise; give imageGuidanceScale",
  );
  refuse(
    imageGuidanceScale != null && !instructed,
    "imageGuidanceScale was given, but the bundle's UNet is not guided by an image; leave it out",
  );
  const usual = image == null || instructed ? 1 : maskImage == null ? STRENGTH : STRENGTH_WITH_MASK;
  const images = image == null ? null : imagesOf(image, high, wide),
    mask = maskImage == null ? null : masksOf(maskImage, high, wide);
  if (mask) {
    const small = latentMask(mask, downscale),
      area = height * width;
    for (const n of range(mask.dims[0]))
      refuse(
        !(/** @type {Float32Array} */ (small.data).subarray(n * area, (n + 1) * area).includes(1)),
        `maskImage is too thin: no pixel of it is left at the latent's size; expected ${downscale} pixels or more`,
      );
  }
  const guidance = instructed ? (imageGuidanceScale ?? IMAGE_GUIDANCE) : null;
  refuse(
    guidance !== null && !isFactor(guidance),
    `imageGuidanceScale is ${shown(guidance)}; expected a finite number from 0`,
  );
  return {
    takes,
    image: images,
    mask,
    depth: depthMap == null ? null : scaledDepth(depthsOf(depthMap, high, wide), height, width),
    strength: strength ?? usual,
    imageGuidance: guidance,
    paste,
    feather,
  };
}

/** What is concatenated to the latent, for messages. @param {string[]} takes */
export function inWords(takes) {
  return takes.join(" and ").replaceAll("_", " ");
}

/** Whether a number is finite as float32 holds it, and from 0. @param {unknown} given */
export function isFactor(given) {
  return typeof given === "number" && given >= 0 && Number.isFinite(Math.fround(given));
}

/**
 * Depth at the latent's size, float32 [N, 1, H, W], from -1 to 1 in each map.
 * @param {{data: Float32Array, dims: number[]}} maps
 * @param {number} height
 * @param {number} width
 * @returns {Rows}
 */
function scaledDepth(maps, height, width) {
  const { data } = resized(maps, height, width),
    area = height * width,
    made = new Float32Array(data.length);
  for (let n = 0; n < data.length; n += area) {
    const map = data.subarray(n, n + area),
      low = map.reduce((a, b) => Math.min(a, b)),
      high = map.reduce((a, b) => Math.max(a, b));
    refuse(low === high, "depthMap is the same everywhere at the latent's size; expected a coarser one");
    for (let k = 0; k < area; k++) made[n + k] = 2 * Math.fround((map[k] - low) / (high - low)) - 1;
  }
  return { data: made, dims: [maps.dims[0], 1, height, width] };
}

/** How many pictures the request has; 1 where one is for all images, or there are none. @param {Edit} edit */
export function picturesOf({ image, mask, depth }) {
  return Math.max(...[image, mask, depth].map((each) => each?.dims[0] ?? 1));
}

/**
 * Whether nothing of the picture is in the latents that the loop begins with. As in diffusers: under a mask all of the noise
 * is noise alone; without one, the picture shows through it.
 * @param {Edit} edit
 */
export function beginsWithNoise({ image, mask, strength, imageGuidance }) {
  return !image || imageGuidance !== null || (mask !== null && strength === 1);
}

/** Refuses pictures that are neither one nor one for each image. @param {Edit} edit @param {number} count */
export function checkPictures({ image, mask, depth }, count) {
  for (const [name, each] of Object.entries({ image, maskImage: mask, depthMap: depth }))
    refuse(
      each && ![1, count].includes(each.dims[0]),
      `${name} has ${each?.dims[0]} pictures for ${count} images; expected 1 or ${count}`,
    );
}

/**
 * Where the loop begins, what the UNet sees beside the latent, and what stays.
 * @param {Edit} edit
 * @param {Vae | null} vae null where latents are pictures
 * @param {import("./schedulers.js").Scheduler} scheduler
 * @param {number} start first step that is run
 * @param {Rows} noise standard normal, float32 [N, C, H, W]
 * @param {(batches: Rows[]) => Promise<Rows[]>} encode from pictures [1 or N, 3, h, w] to what the encoder gives, [1 or N, C, H, W]
 * @returns {Promise<Beginning>}
 */
export async function begin(edit, vae, scheduler, start, noise, encode) {
  const { image, mask, depth, takes } = edit,
    { dims } = noise,
    [count] = dims,
    drawn = /** @type {Float32Array} */ (noise.data),
    sigma = Math.fround(scheduler.initNoiseSigma),
    pure = { data: drawn.map((value) => value * sigma), dims };
  /** @param {Rows} rows for every image */
  const each = (rows) => (rows.dims[0] === count ? rows : take(rows, Array(count).fill(0)));
  if (!image) return { latents: pure, concat: depth && takes.includes("depth") ? each(depth) : null, kept: null };
  const pixels = asPixels(image),
    masks = mask && latentMask(mask, vae?.downscale ?? 1),
    blends = masks !== null && !takes.includes("mask"),
    fromNoise = beginsWithNoise(edit);
  /** @type {Record<string, Rows>} */
  const wanted = {};
  if (blends || !fromNoise) wanted.source = pixels;
  if (takes.includes("image")) wanted.image = pixels;
  if (mask && takes.includes("masked_image")) wanted.masked_image = greyed(pixels, mask);
  const encoded = await encode(Object.values(wanted)),
    /** @type {Record<string, Rows>} */ found = {};
  Object.keys(wanted).forEach((name, k) => (found[name] = encoded[k]));
  /** @param {Rows} rows */
  const scaled = (rows) => each(vae ? fromVae(vae, rows) : rows);
  let latents = pure,
    kept = null;
  if (found.source) {
    const source = /** @type {Float32Array} */ (scaled(found.source).data);
    if (source.length !== drawn.length)
      throw new BundleError(
        `vae_encoder gives ${source.length / count} numbers for a picture, and a latent has ${drawn.length / count}; export again`,
      );
    if (!fromNoise) latents = { data: scheduler.addNoise(start, source, drawn), dims };
    if (blends) kept = { mask: /** @type {Float32Array} */ (each(masks).data), latents: source, noise: drawn };
  }
  /** @type {Record<string, Rows | null>} */
  const parts = {
    mask: masks,
    masked_image: found.masked_image ? scaled(found.masked_image) : null,
    image: found.image ?? null,
    depth,
  };
  const after = takes.flatMap((name) => parts[name] ?? []).map(each);
  return { latents, concat: after.length ? beside(after, 1) : null, kept };
}

/**
 * Bytes [N, h, w, 3] as float32 [N, 3, h, w], -1 to 1; `toUint8` makes the same bytes of them.
 * @param {import("./images.js").Images} images
 * @returns {{data: Float32Array, dims: number[]}}
 */
export function asPixels({ data, dims: [count, height, width] }) {
  const area = height * width,
    made = new Float32Array(data.length);
  for (let n = 0; n < count; n++)
    for (let c = 0; c < 3; c++)
      for (let k = 0; k < area; k++)
        made[(3 * n + c) * area + k] = Math.fround(data[3 * (n * area + k) + c] / 127.5) - 1;
  return { data: made, dims: [count, 3, height, width] };
}

/**
 * Pictures with grey for all pixels in the mask: one for each of both, of which one may be for all.
 * @param {{data: Float32Array, dims: number[]}} pixels
 * @param {{data: Uint8Array, dims: number[]}} mask
 * @returns {Rows}
 */
function greyed(pixels, mask) {
  const count = Math.max(pixels.dims[0], mask.dims[0]),
    size = pixels.data.length / pixels.dims[0],
    area = size / 3,
    made = new Float32Array(count * size);
  for (let k = 0; k < made.length; k++) {
    const under = (Math.floor(k / size) * area + (k % area)) % mask.data.length;
    made[k] = mask.data[under] ? 0 : pixels.data[k % pixels.data.length];
  }
  return { data: made, dims: [count, ...pixels.dims.slice(1)] };
}

/**
 * Encodes pictures, float32 [N, 3, h, w], one at a time: the mean of what the encoder gives, [N, C, H, W].
 * @param {import("./loop.js").Session} session
 * @param {Graph} graph
 * @param {Rows} pixels
 * @param {AbortSignal} [signal]
 * @returns {Promise<Rows>}
 */
export async function encode(session, graph, pixels, signal) {
  const means = [],
    [{ name }] = graph.outputs;
  let dims = [0];
  for (const n of range(pixels.dims[0])) {
    signal?.throwIfAborted();
    const made = (await runOne(session, graph, take(pixels, [n])))[name],
      // After the means, the logarithms of the variances.
      channels = name === "latent_parameters" ? Math.floor(made.dims[1] / 2) : made.dims[1];
    means.push(/** @type {Float32Array} */ (made.data).slice(0, (made.data.length / made.dims[1]) * channels));
    dims = [channels, ...made.dims.slice(2)];
  }
  const size = dims.reduce((a, b) => a * b),
    data = new Float32Array(means.length * size);
  means.forEach((each, n) => data.set(each, n * size));
  return { data, dims: [means.length, ...dims] };
}

/** What the encoder gives as the loop takes it: the reverse of what a decoder is given. @param {Vae} vae @param {Rows} latents @returns {Rows} */
export function fromVae({ mean, std, scaling_factor: scale }, { data, dims }) {
  const area = dims[2] * dims[3];
  const moved = /** @type {Float32Array} */ (data).map((value, k) => {
    const c = Math.floor(k / area) % dims[1];
    return mean && std ? ((value - mean[c]) * scale) / std[c] : value * scale;
  });
  return { data: moved, dims };
}

/**
 * Masks [N, h, w] at the latent's size, float32 [N, 1, H, W]: each square's upper left pixel, as in diffusers.
 * @param {{data: Uint8Array, dims: number[]}} masks
 * @param {number} downscale
 * @returns {Rows}
 */
export function latentMask({ data, dims: [count, height, width] }, downscale) {
  const [high, wide] = [height, width].map((side) => Math.ceil(side / downscale)),
    made = new Float32Array(count * high * wide);
  for (let k = 0; k < made.length; k++) {
    const row = Math.floor(k / wide),
      n = Math.floor(row / high);
    made[k] = data[(n * height + downscale * (row % high)) * width + downscale * (k % wide)];
  }
  return { data: made, dims: [count, 1, high, wide] };
}

/**
 * How much of the new picture shows, float32 [N, h, w]: 0 outside of the mask, 1 where its edge is far enough away. Each
 * of `pixels` rings, from the mask's edge inwards, shows more, in equal steps; the picture's edge is none.
 * @param {{data: Uint8Array, dims: number[]}} masks
 * @param {number} pixels
 */
export function feathered({ data, dims: [count, height, width] }, pixels) {
  // Rows or columns, whichever are more, to the nearest pixel outside: forward from the neighbours before, then back.
  const far = pixels + 1,
    away = Float32Array.from(data, (inside) => (inside ? far : 0));
  const least = (
    /** @type {number} */ n,
    /** @type {number} */ y,
    /** @type {number} */ x,
    /** @type {number} */ to,
  ) => {
    const at = (n * height + y) * width + x;
    if (!away[at]) return;
    let nearest = away[at];
    for (const [dy, dx] of [
      [0, to],
      [to, -1],
      [to, 0],
      [to, 1],
    ]) {
      const [row, column] = [y + dy, x + dx];
      if (row >= 0 && row < height && column >= 0 && column < width)
        nearest = Math.min(nearest, away[at + dy * width + dx] + 1);
    }
    away[at] = nearest;
  };
  for (let n = 0; n < count; n++) {
    for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) least(n, y, x, -1);
    for (let y = height - 1; y >= 0; y--) for (let x = width - 1; x >= 0; x--) least(n, y, x, 1);
  }
  return away.map((distance) => distance / far);
}

/**
 * Finished pictures, float32 [N, 3, h, w], with the image's own pixels outside of the mask, if so asked.
 * @param {Edit} edit
 * @param {Rows} pixels
 * @returns {Rows}
 */
export function pasted({ image, mask, paste, feather }, pixels) {
  if (!paste || !image || !mask) return pixels;
  const alpha = feathered(mask, feather),
    own = asPixels(image).data,
    drawn = /** @type {Float32Array} */ (pixels.data),
    made = new Float32Array(drawn.length),
    [, channels, height, width] = pixels.dims,
    area = height * width;
  for (let k = 0; k < made.length; k++) {
    const share = alpha[(Math.floor(k / (channels * area)) * area + (k % area)) % alpha.length],
      stays = own[k % own.length];
    made[k] = share ? share * drawn[k] + (1 - share) * stays : stays;
  }
  return { data: made, dims: pixels.dims };
}
