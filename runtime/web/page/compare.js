// How far two pictures are from each other.

/** @typedef {import("./engine.js").Image} Image */

/** PSNR of bytes in dB; Infinity where they are equal. @param {Image} one @param {Image} other */
export function psnr({ data: a }, { data: b }) {
  let sum = 0;
  for (let k = 0; k < a.length; k++) if (k % 4 < 3) sum += (a[k] - b[k]) ** 2;
  return sum ? 10 * Math.log10((255 ** 2 * 0.75 * a.length) / sum) : Infinity;
}

/**
 * A map of the largest difference of a pixel's channels: black where there is none, white from `white` on.
 * @param {Image} one
 * @param {Image} other
 * @param {number} [white] of 255
 * @returns {Image}
 */
export function differenceMap({ data: a, width, height }, { data: b }, white = 96) {
  const data = new Uint8ClampedArray(a.length);
  for (let k = 0; k < a.length; k += 4) {
    const most = Math.max(Math.abs(a[k] - b[k]), Math.abs(a[k + 1] - b[k + 1]), Math.abs(a[k + 2] - b[k + 2]));
    data[k] = data[k + 1] = data[k + 2] = (255 * most) / white;
    data[k + 3] = 255;
  }
  return { data, width, height };
}
