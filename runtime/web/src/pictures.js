// Pictures that a request is given, of the size that is drawn: as a canvas has them, or as bytes [N, h, w, 3].
import { refuse, shown } from "./errors.js";

/**
 * @typedef {import("./rows.js").Rows} Rows
 * @typedef {import("./images.js").Images} Images
 * @typedef {{data: Uint8ClampedArray | Uint8Array, width: number, height: number}} Rgba ImageData, or what looks like it
 * @typedef {Rgba | Rgba[] | {data: Uint8Array, dims: number[]}} Pictures
 * @typedef {Rgba | Rgba[] | {data: Float32Array | Uint8Array | Uint16Array | Int32Array, dims: number[]}} Depths
 */

// Of the cubic that torch and OpenCV interpolate with.
const CUBIC = -0.75,
  TAPS = 4;
const WHITE = 255,
  BLACK = 0;

/**
 * What `image` holds, or another argument of pictures, bytes [N, height, width, 3].
 * @param {unknown} given ImageData or a list of it (what is transparent is laid on white), or bytes [h, w], [h, w, C] or
 *   [N, h, w, C], C being 1 or 3
 * @param {number} height
 * @param {number} width
 * @param {string} [name] of the argument
 * @returns {Images}
 */
export function imagesOf(given, height, width, name = "image") {
  const expected = `expected ImageData of ${width} x ${height}, or {data, dims} of uint8 [N, ${height}, ${width}, 3]`,
    canvases = canvasesOf(given);
  if (canvases) {
    const area = height * width,
      made = new Uint8Array(3 * area * canvases.length);
    canvases.forEach((each, n) => {
      checkSize(name, each.width, each.height, width, height, expected);
      for (let k = 0; k < area; k++)
        for (let c = 0; c < 3; c++) made[3 * (n * area + k) + c] = laidOn(WHITE, each.data, k, c);
    });
    return { data: made, dims: [canvases.length, height, width, 3] };
  }
  const array = arrayOf(given);
  let dims = array?.dims ?? [];
  if (dims.length === 2) dims = [...dims, 1];
  if (dims.length === 3) dims = [1, ...dims];
  const [count, high, wide, channels] = dims;
  refuse(
    !array || !(array.data instanceof Uint8Array) || dims.length !== 4 || !(channels === 1 || channels === 3),
    `${name} is ${spelt(given)}; ${expected}`,
  );
  checkSize(name, wide, high, width, height, expected);
  const bytes = /** @type {{data: Uint8Array}} */ (array).data;
  const data =
    channels === 3 ? bytes : Uint8Array.from({ length: 3 * bytes.length }, (_, k) => bytes[Math.floor(k / 3)]);
  return { data, dims: [count, height, width, 3] };
}

/**
 * What `maskImage` holds, [N, height, width]: 1 where the picture is drawn anew, else 0.
 * @param {unknown} given ImageData or a list of it (what is transparent is laid on black), of which half white and more
 *   counts; or bytes with the same meaning, [h, w], [N, h, w] or [N, h, w, 1]
 * @param {number} height
 * @param {number} width
 */
export function masksOf(given, height, width) {
  const expected = `expected ImageData of ${width} x ${height}, or {data, dims} of uint8 [N, ${height}, ${width}]`,
    canvases = canvasesOf(given),
    area = height * width;
  let found;
  if (canvases) {
    found = new Uint8Array(area * canvases.length);
    for (const [n, each] of canvases.entries()) {
      checkSize("maskImage", each.width, each.height, width, height, expected);
      for (let k = 0; k < area; k++) found[n * area + k] = Number(grey(each.data, k) >= 128);
    }
  } else {
    const array = arrayOf(given);
    let dims = array?.dims ?? [];
    if (dims.length === 4 && dims[3] === 1) dims = dims.slice(0, 3);
    if (dims.length === 2) dims = [1, ...dims];
    refuse(
      !array || !(array.data instanceof Uint8Array) || dims.length !== 3,
      `maskImage is ${spelt(given)}; ${expected}`,
    );
    checkSize("maskImage", dims[2], dims[1], width, height, expected);
    found = /** @type {{data: Uint8Array}} */ (array).data.map((value) => Number(value >= 128));
  }
  const count = found.length / area;
  for (let n = 0; n < count; n++)
    refuse(
      !found.subarray(n * area, (n + 1) * area).includes(1),
      "maskImage covers nothing; expected white where the picture is to be drawn anew",
    );
  return { data: found, dims: [count, height, width] };
}

/**
 * What `depthMap` holds, float32 [N, h, w] in any unit, the nearer the larger.
 * @param {unknown} given ImageData of the size that is drawn, or a list of it; or numbers [h, w] or [N, h, w] of any size
 * @param {number} height
 * @param {number} width
 * @returns {{data: Float32Array, dims: number[]}}
 */
export function depthsOf(given, height, width) {
  const expected = `expected ImageData of ${width} x ${height}, or {data, dims} of [N, h, w], larger where nearer`,
    canvases = canvasesOf(given);
  let made, dims;
  if (canvases) {
    const area = height * width;
    made = new Float32Array(area * canvases.length);
    for (const [n, each] of canvases.entries()) {
      checkSize("depthMap", each.width, each.height, width, height, expected);
      for (let k = 0; k < area; k++) made[n * area + k] = grey(each.data, k) / 255;
    }
    dims = [canvases.length, height, width];
  } else {
    const array = arrayOf(given);
    dims = array?.dims ?? [];
    if (dims.length === 2) dims = [1, ...dims];
    refuse(
      !array || dims.length !== 3 || array.data instanceof BigInt64Array || array.data instanceof BigUint64Array,
      `depthMap is ${spelt(given)}; ${expected}`,
    );
    made = Float32Array.from(/** @type {any} */ (array).data);
  }
  refuse(!made.every(Number.isFinite), "depthMap holds NaN or infinity; expected finite numbers");
  for (let n = 0, size = dims[1] * dims[2]; n < made.length; n += size)
    refuse(
      made.subarray(n, n + size).every((value) => value === made[n]),
      "depthMap is the same everywhere; expected larger numbers where something is nearer",
    );
  return { data: made, dims };
}

/**
 * float32 [N, h, w] at another size, as torch's `interpolate(mode="bicubic")`: cubic, no smoothing before.
 * @param {{data: Float32Array, dims: number[]}} maps
 * @param {number} height
 * @param {number} width
 */
export function resized({ data, dims: [count, high, wide] }, height, width) {
  const down = along(data, count, high, wide, height);
  return { data: along(down, count * height, wide, 1, width), dims: [count, height, width] };
}

/**
 * The middle of three dimensions at another size.
 * @param {Float32Array} values [before, have, after]
 * @param {number} before
 * @param {number} have
 * @param {number} after
 * @param {number} size
 */
function along(values, before, have, after, size) {
  const made = new Float32Array(before * size * after);
  for (let i = 0; i < size; i++) {
    const at = (i + 0.5) * (have / size) - 0.5,
      first = Math.floor(at) - 1;
    for (let tap = first; tap < first + TAPS; tap++) {
      const away = Math.abs(at - tap),
        from = Math.min(Math.max(tap, 0), have - 1);
      const near = ((CUBIC + 2) * away - (CUBIC + 3)) * away ** 2 + 1,
        far = ((away - 5) * away + 8) * away * CUBIC - 4 * CUBIC,
        weight = Math.fround(away <= 1 ? near : far);
      for (let b = 0; b < before; b++)
        for (let a = 0; a < after; a++)
          made[(b * size + i) * after + a] += weight * values[(b * have + from) * after + a];
    }
  }
  return made;
}

/**
 * What of a picture covers another size: the whole of one side, and the middle of the other.
 * @param {number} width of the picture, as is `height`
 * @param {number} height
 * @param {number} toWidth
 * @param {number} toHeight
 */
export function coveringBox(width, height, toWidth, toHeight) {
  const scale = Math.max(toWidth / width, toHeight / height),
    wide = Math.min(toWidth / scale, width),
    high = Math.min(toHeight / scale, height);
  return { left: (width - wide) / 2, top: (height - high) / 2, width: wide, height: high };
}

/**
 * A picture as `image` takes it, or with `nearest` as `maskImage` does: scaled until it covers the size, what is over cut
 * off at both ends. It needs a browser's canvas.
 * @param {ImageBitmap | HTMLCanvasElement | OffscreenCanvas} picture
 * @param {number} width
 * @param {number} height
 * @param {{nearest?: boolean}} [how] takes the nearest pixel, for masks
 */
export function fitted(picture, width, height, { nearest = false } = {}) {
  const box = coveringBox(picture.width, picture.height, width, height),
    context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error("this browser has no canvas to scale a picture with");
  context.imageSmoothingEnabled = !nearest;
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, box.left, box.top, box.width, box.height, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/** Pictures of a canvas's kind; null where it is something else. @param {unknown} given @returns {Rgba[] | null} */
function canvasesOf(given) {
  const list = Array.isArray(given) ? given : [given];
  const are = list.every(
    (each) =>
      (each?.data instanceof Uint8ClampedArray || each?.data instanceof Uint8Array) &&
      each.data.length > 0 &&
      each.data.length === 4 * each.width * each.height,
  );
  return are && list.length ? list : null;
}

/** An array with its shape; null where that is something else. @param {any} given @returns {{data: any, dims: number[]} | null} */
function arrayOf(given) {
  const { data, dims } = given ?? {};
  const is =
    ArrayBuffer.isView(data) &&
    !(data instanceof DataView) &&
    Array.isArray(dims) &&
    dims.every((side) => Number.isInteger(side) && side > 0) &&
    dims.reduce((a, b) => a * b, 1) === /** @type {any} */ (data).length;
  return is ? given : null;
}

/** @param {any} given */
function spelt(given) {
  const data = given?.data;
  if (ArrayBuffer.isView(data)) return `${data.constructor.name} ${shown(given.dims ?? [given.width, given.height])}`;
  return given && typeof given === "object" ? Object.prototype.toString.call(given).slice(8, -1) : shown(given);
}

/** @param {string} name @param {number} w @param {number} h @param {number} width @param {number} height @param {string} expected */
function checkSize(name, w, h, width, height, expected) {
  refuse(w !== width || h !== height, `${name} has ${w} x ${h} pixels (width x height); ${expected}`);
}

/** One channel of a pixel on an opaque ground, to Pillow's rounding. @param {number} ground @param {ArrayLike<number>} data @param {number} k @param {number} c */
function laidOn(ground, data, k, c) {
  const alpha = data[4 * k + 3],
    sum = 128 * (data[4 * k + c] * alpha + ground * (255 - alpha)) + 16384;
  return alpha === 255 ? data[4 * k + c] : (((sum >> 8) + sum) >> 8) >> 7;
}

/** How bright a pixel is, 0 to 255, as Pillow weighs the colours. @param {ArrayLike<number>} data @param {number} k */
function grey(data, k) {
  const [r, g, b] = [0, 1, 2].map((c) => laidOn(BLACK, data, k, c));
  return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16;
}
