// A control image: what a ControlNet or a T2I-Adapter is handed, or the zeros that stand for what it would make.
import { isFactor } from "./editing.js";
import { refuse, shown } from "./errors.js";
import { CONTROLNET, featuresAmong } from "./manifest.js";
import { imagesOf } from "./pictures.js";
import { take } from "./rows.js";

/**
 * @typedef {import("./rows.js").Rows} Rows
 * @typedef {import("./manifest.js").Graph} Graph
 * @typedef {import("./manifest.js").Tensor} Tensor
 * @typedef {import("./pictures.js").Pictures} Pictures
 *
 * @typedef {object} Steering
 * @property {Graph[]} graphs those that run: the ControlNet only where there is a control image
 * @property {number} count of control images; 1 where one is for all images, or there are none
 * @property {(count: number) => Record<string, Rows>} tensors what the graphs are handed for so many images, [count, ...];
 *   of a T2I-Adapter, its picture alone
 * @property {{scale: number, features: Tensor[]} | null} adapts what a T2I-Adapter makes of that picture; null without one
 */

const IMAGE = "controlImage",
  SCALE = "controlnetConditioningScale";

/**
 * Reads a control image, or a list with one for each of several ControlNets.
 * @param {Graph[]} graphs the UNet's, for the size that is drawn
 * @param {Pictures | (Pictures | null)[] | undefined} image of the picture's size; without it nothing of it runs. Of several
 *   ControlNets a list, where null leaves one out
 * @param {number | number[] | undefined} scale what residuals or features are multiplied by; left out, 1
 * @param {Graph} [adapter] the T2I-Adapter's graph, for the size that is drawn
 * @returns {Steering}
 */
export function steer(graphs, image, scale, adapter) {
  const net = graphs.find(({ name }) => name === CONTROLNET),
    features = [...new Map(graphs.flatMap((g) => featuresAmong(g.inputs)).map((t) => [t.name, t])).values()],
    without = {
      graphs: graphs.filter((g) => g !== net),
      count: 1,
      tensors: (/** @type {number} */ count) =>
        Object.fromEntries((net?.outputs ?? features).map((t) => [t.name, zeros(t, count)])),
      adapts: null,
    };
  if (!net && !features.length) {
    refuse(
      image != null,
      `${IMAGE} was given, but the bundle has neither a ControlNet nor a T2I-Adapter; leave it out, or export with ` +
        "--control DIR or --t2i-adapter DIR",
    );
    refuse(scale != null, `${SCALE} was given, but there is no ControlNet and no T2I-Adapter; leave it out`);
    return without;
  }
  if (image == null) {
    refuse(scale != null, `${SCALE} was given without a ${IMAGE}; give one`);
    return without;
  }
  const drawn = net ?? adapter;
  if (!drawn) {
    refuse(true, `${IMAGE} was given, but the bundle has no t2i_adapter; export it with that component`);
    return without;
  }
  const places = drawn.inputs.filter(({ name }) => name.startsWith("control_image")),
    several = places.length > 1,
    /** @type {any[]} */
    images = several ? oneEach(image, IMAGE, places.length) : [image],
    scales = several && Array.isArray(scale) ? oneEach(scale, SCALE, places.length) : places.map(() => scale);
  const pictures = places.map((place, i) =>
    pictureOf(place, several ? `${IMAGE}[${i}]` : IMAGE, images[i], scales[i], several),
  );
  if (images.every((each) => each == null)) return without;
  return {
    graphs,
    count: Math.max(...pictures.map(({ rows }) => rows.dims[0])),
    tensors: (count) => Object.assign({}, ...pictures.map((picture, i) => handed(picture, i, count, Boolean(net)))),
    adapts: net ? null : { scale: pictures[0].factor, features },
  };
}

/** What a request says of each of several ControlNets. @param {any} given @param {string} name @param {number} count */
function oneEach(given, name, count) {
  const told = Array.isArray(given) ? `has ${given.length} entries` : "is for one ControlNet";
  refuse(
    !Array.isArray(given) || given.length !== count,
    `${name} ${told}, and the bundle has ${count}; expected a list of ${count}`,
  );
  return given;
}

/**
 * What a ControlNet or an adapter draws by, where null leaves one of several out: nothing, multiplied by 0.
 * @param {Tensor} place
 * @param {string} name
 * @param {any} image
 * @param {any} scale
 * @param {boolean} several
 */
function pictureOf(place, name, image, scale, several) {
  const factor = scale ?? 1,
    [channels, height, width] = place.shape.slice(1).map(Number);
  refuse(!isFactor(factor), `${SCALE} is ${shown(scale)}; expected a finite number from 0`);
  if (several && image == null) {
    const dims = [1, channels, height, width];
    return { name, rows: { data: new Float32Array(channels * height * width), dims }, factor: 0 };
  }
  return { name, rows: asShares(imagesOf(image, height, width, name), channels), factor };
}

/**
 * What one ControlNet is handed for so many images, or an adapter.
 * @param {{name: string, rows: Rows, factor: number}} picture
 * @param {number} i
 * @param {number} count
 * @param {boolean} scaled
 * @returns {Record<string, Rows>}
 */
function handed({ name, rows, factor }, i, count, scaled) {
  const [given] = rows.dims,
    number = i ? `_${i + 1}` : "";
  refuse(
    given !== 1 && given !== count,
    `${name} has ${given} pictures for ${count} images; expected 1 or ${count}`,
  );
  if (!scaled) return { control_image: rows };
  return {
    [`control_image${number}`]: given === count ? rows : take(rows, Array(count).fill(0)),
    [`control_scale${number}`]: { data: new Float32Array(count).fill(factor), dims: [count] },
  };
}

/** Rows of zeros of a tensor's shape and dtype. @param {Tensor} tensor @param {number} count @returns {Rows} */
function zeros({ shape, dtype }, count) {
  const dims = [count, ...shape.slice(1).map(Number)],
    length = dims.reduce((a, b) => a * b);
  return { data: dtype === "float16" ? new Uint16Array(length) : new Float32Array(length), dims };
}

/**
 * Bytes [N, h, w, 3] as float32 [N, C, h, w], 0 to 1; of one channel grey, as Pillow's.
 * @param {import("./images.js").Images} images
 * @param {number} channels
 * @returns {Rows}
 */
function asShares({ data, dims: [count, height, width] }, channels) {
  const area = height * width,
    made = new Float32Array(count * channels * area);
  for (let k = 0; k < made.length; k++) {
    const at = 3 * (Math.floor(k / (channels * area)) * area + (k % area));
    const byte =
      channels === 1
        ? (19595 * data[at] + 38470 * data[at + 1] + 7471 * data[at + 2] + 2 ** 15) >> 16
        : data[at + (Math.floor(k / area) % 3)];
    made[k] = byte / 255;
  }
  return { data: made, dims: [count, channels, height, width] };
}
