// Edges of a picture, white on black, by Sobel's filter: what most ControlNets for edges take well enough.
import { refusal } from "./elements.js";

/** @param {import("./engine.js").Image} image @returns {import("./engine.js").Image} */
export function edgesOf({ data, width, height }) {
  const grey = new Float32Array(width * height);
  for (let k = 0; k < grey.length; k++)
    grey[k] = 0.299 * data[4 * k] + 0.587 * data[4 * k + 1] + 0.114 * data[4 * k + 2];
  // Beyond its edge the picture goes on as it ends.
  const at = (/** @type {number} */ x, /** @type {number} */ y) =>
    grey[Math.min(Math.max(y, 0), height - 1) * width + Math.min(Math.max(x, 0), width - 1)];
  const slopes = new Float32Array(grey.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const across = (/** @type {number} */ row) => at(x + 1, y + row) - at(x - 1, y + row),
        down = (/** @type {number} */ column) => at(x + column, y + 1) - at(x + column, y - 1);
      slopes[y * width + x] = Math.hypot(across(-1) + 2 * across(0) + across(1), down(-1) + 2 * down(0) + down(1));
    }
  }
  const most = slopes.reduce((a, b) => Math.max(a, b));
  if (most < 1) throw refusal("the picture is the same everywhere, so it has no edges; choose another");
  const made = new Uint8ClampedArray(data.length);
  slopes.forEach((slope, k) => made.set([0, 1, 2].map(() => (255 * slope) / most).concat(255), 4 * k));
  return { data: made, width, height };
}
