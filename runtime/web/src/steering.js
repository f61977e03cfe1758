// A control image: what a bundle's ControlNet is handed, or the zeros that stand for its residuals without one.
import { isFactor } from "./editing.js";
import { refuse, shown } from "./errors.js";
import { CONTROLNET } from "./manifest.js";
import { imagesOf } from "./pictures.js";
import { take } from "./rows.js";

/**
 * @typedef {import("./rows.js").Rows} Rows
 * @typedef {import("./manifest.js").Graph} Graph
 *
 * @typedef {object} Steering
 * @property {Graph[]} graphs those that run: the ControlNet only where there is a control image
 * @property {number} count of control images; 1 where one is for all images, or there are none
 * @property {(count: number) => Record<string, Rows>} tensors what the graphs are handed for so many images, [count, ...]
 */

/**
 * Reads a control image.
 * @param {Graph[]} graphs the UNet's, for the size that is drawn
 * @param {import("./pictures.js").Pictures | undefined} image of the picture's size; without it the ControlNet does not run
 * @param {number | undefined} scale what residuals are multiplied by; left out, 1
 * @returns {Steering}
 */
export function steer(graphs, image, scale) {
  const net = graphs.find(({ name }) => name === CONTROLNET);
  if (!net) {
    refuse(
      image != null,
      "controlImage was given, but the bundle has no ControlNet; leave it out, or export with --control DIR",
    );
    refuse(scale != null, "controlnetConditioningScale was given, but there is no ControlNet; leave it out");
    return { graphs, count: 1, tensors: () => ({}) };
  }
  if (image == null) {
    refuse(scale != null, "controlnetConditioningScale was given without a controlImage; give one");
    return {
      graphs: graphs.filter((g) => g !== net),
      count: 1,
      tensors: (count) => Object.fromEntries(net.outputs.map((t) => [t.name, zeros(t, count)])),
    };
  }
  const factor = scale ?? 1;
  refuse(!isFactor(factor), `controlnetConditioningScale is ${shown(scale)}; expected a finite number from 0`);
  const [height, width] = (net.inputs.find(({ name }) => name === "control_image")?.shape ?? []).slice(2).map(Number),
    images = imagesOf(image, height, width, "controlImage"),
    [given] = images.dims;
  return {
    graphs,
    count: given,
    tensors(count) {
      refuse(
        given !== 1 && given !== count,
        `controlImage has ${given} pictures for ${count} images; expected 1 or ${count}`,
      );
      const pixels = asShares(images);
      return {
        control_image: given === count ? pixels : take(pixels, Array(count).fill(0)),
        control_scale: { data: new Float32Array(count).fill(factor), dims: [count] },
      };
    },
  };
}

/** Rows of zeros of a tensor's shape and dtype. @param {import("./manifest.js").Tensor} tensor @param {number} count @returns {Rows} */
function zeros({ shape, dtype }, count) {
  const dims = [count, ...shape.slice(1).map(Number)],
    length = dims.reduce((a, b) => a * b);
  return { data: dtype === "float16" ? new Uint16Array(length) : new Float32Array(length), dims };
}

/** Bytes [N, h, w, 3] as float32 [N, 3, h, w], 0 to 1. @param {import("./images.js").Images} images @returns {Rows} */
function asShares({ data, dims: [count, height, width] }) {
  const area = height * width,
    made = new Float32Array(data.length);
  for (let k = 0; k < made.length; k++) {
    const n = Math.floor(k / (3 * area)),
      c = Math.floor(k / area) % 3;
    made[k] = data[3 * (n * area + (k % area)) + c] / 255;
  }
  return { data: made, dims: [count, 3, height, width] };
}
