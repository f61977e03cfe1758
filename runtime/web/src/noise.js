// Seeded normal noise that every runtime draws alike: Philox4x32-10 (Salmon et al. 2011), then Box-Muller.
import { refuse, shown } from "./errors.js";

/** The high word of a product of two 32-bit words; Math.imul gives the low one. @param {number} a @param {number} b */
function high(a, b) {
  const a0 = a & 0xffff,
    a1 = a >>> 16,
    b0 = b & 0xffff,
    b1 = b >>> 16;
  const middle = a1 * b0 + ((a0 * b0) >>> 16);
  return a1 * b1 + (middle >>> 16) + ((a0 * b1 + (middle & 0xffff)) >>> 16);
}

/**
 * Philox4x32-10: four words from a counter, in Random123's order; the key's low word is first.
 * @param {ArrayLike<number>} counter
 * @param {ArrayLike<number>} key
 * @param {Uint32Array} words written
 */
export function philox(counter, key, words) {
  let c0 = counter[0],
    c1 = counter[1],
    c2 = counter[2],
    c3 = counter[3],
    k0 = key[0],
    k1 = key[1];
  for (let round = 0; round < 10; round++) {
    const h0 = high(0xd2511f53, c0),
      l0 = Math.imul(0xd2511f53, c0),
      h1 = high(0xcd9e8d57, c2),
      l1 = Math.imul(0xcd9e8d57, c2);
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 = (k0 + 0x9e3779b9) | 0;
    k1 = (k1 + 0xbb67ae85) | 0;
  }
  ((words[0] = c0), (words[1] = c1), (words[2] = c2), (words[3] = c3));
}

/**
 * A seed, 0 to 2^64 - 1, as a whole number, a BigInt or decimal text.
 * @param {unknown} given
 */
export function readSeed(given) {
  const whole =
    typeof given === "bigint" || Number.isSafeInteger(given) || (typeof given === "string" && /^\d{1,20}$/.test(given));
  const seed = whole ? BigInt(/** @type {string} */ (given)) : -1n;
  refuse(
    seed < 0n || seed >= 1n << 64n,
    `seed is ${shown(given)}; expected 0 to 2^64 - 1 as a whole number, a BigInt or decimal text`,
  );
  return seed;
}

/**
 * Standard normal values of one image and one draw, the same in every runtime.
 * @param {bigint} seed the key
 * @param {Float32Array} values filled, in C order
 * @param {number} [image] which image of the generation
 * @param {number} [draw] 0 is the initial latent, k the k-th fresh noise
 */
export function noise(seed, values, image = 0, draw = 0) {
  const key = [Number(seed & 0xffffffffn), Number(seed >> 32n)],
    counter = [0, image, draw, 0],
    words = new Uint32Array(4);
  for (let at = 0; at < values.length; at += 4) {
    counter[0] = at / 4;
    philox(counter, key, words);
    for (let k = 0; k < 4; k += 2) {
      // The half keeps the share away from 0, whose logarithm is infinite.
      const radius = Math.sqrt(-2 * Math.log((words[k] + 0.5) / 2 ** 32));
      const angle = 2 * Math.PI * ((words[k + 1] + 0.5) / 2 ** 32);
      values[at + k] = radius * Math.cos(angle);
      values[at + k + 1] = radius * Math.sin(angle); // beyond the end it is dropped
    }
  }
  return values;
}

/**
 * One draw for each of some images.
 * @param {bigint} seed
 * @param {number} count images
 * @param {number} size values of each
 * @param {number} first number of the first image
 * @param {number} draw
 */
export function noises(seed, count, size, first, draw) {
  const values = new Float32Array(count * size);
  for (let n = 0; n < count; n++) noise(seed, values.subarray(n * size, (n + 1) * size), first + n, draw);
  return values;
}
