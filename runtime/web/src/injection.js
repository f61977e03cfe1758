// Plug-and-play injection (Tumanyan et al. 2022): a picture that was inverted is drawn along, and others take of it. In the
// first steps each image has one row more: the inverted picture at the step's noise level. Which row each row takes queries
// and keys of, and which features, are inputs of the graphs; later, and without an inverted picture, every row takes its own.
import { refuse, shown } from "./errors.js";
import { ATTENTION_ROWS, FEATURE_ROWS } from "./manifest.js";
import { repeated } from "./rows.js";
import { roundEven } from "./schedule_tables.js";

/**
 * @typedef {import("./rows.js").Rows} Rows
 * @typedef {object} Injection a request's, checked
 * @property {Inversion} inverted
 * @property {Record<string, number>} calls for how many calls others take of it, by the graphs' inputs
 *
 * @typedef {object} Inversion what an inversion found, and injection needs
 * @property {Rows} latents [N, C, H, W]
 * @property {Rows} trajectory [steps, N, C, H, W]
 * @property {Rows} timesteps [steps]
 * @property {Record<string, Rows>} cond [N, ...] of each conditioning tensor
 */

// The authors' shares of the steps.
const ATTENTION_SHARE = 0.5,
  FEATURE_SHARE = 0.8;

/**
 * The inverted picture that a request begins with, or null; refuses shares without one, and beside one what a generation
 * would begin with instead.
 * @param {import("./pipeline.js").Arguments} request
 * @returns {Inversion | null}
 */
export function readInverted({ inverted, injectAttention, injectFeatures, latents, image }) {
  if (inverted == null) {
    for (const [name, given] of Object.entries({ injectAttention, injectFeatures }))
      refuse(given != null, `${name} was given without an inverted picture; give inverted too`);
    return null;
  }
  refuse(
    !isInversion(inverted),
    "inverted has not the latents, trajectory, timesteps and cond of an inversion; expected what invert gives",
  );
  for (const [name, given] of Object.entries({ latents, image }))
    refuse(
      given != null,
      `${name} and an inverted picture were given, and a generation begins with one of them; give one`,
    );
  return inverted;
}

/**
 * How much of an inverted picture others take.
 * @param {Inversion} inverted
 * @param {import("./manifest.js").Graph[]} graphs the UNet's
 * @param {import("./schedulers.js").Scheduler} scheduler the generation's; its timesteps must be those of the inversion
 * @param {string} sampler
 * @param {boolean} guided whether images have an unconditional row too
 * @param {import("./pipeline.js").Arguments} request
 * @returns {Injection}
 */
export function injectionOf(inverted, graphs, scheduler, sampler, guided, request) {
  const taken = graphs.flatMap((g) => g.inputs).find((t) => t.name === ATTENTION_ROWS),
    rows = guided ? 3 : 2;
  refuse(
    !taken,
    "an inverted picture was given, but the bundle's UNet takes nothing of other rows; export it with --injection, or begin with its latents alone: latents",
  );
  const batch = taken?.shape[0];
  refuse(
    typeof batch === "number" && batch % rows,
    `the graphs take ${batch} rows at a time, and with an inverted picture an image has ${rows}; expected a guidance that fits, or an export with a batch of ${rows}`,
  );
  const { timesteps } = inverted,
    [steps] = timesteps.dims;
  refuse(
    String(timesteps.data) !== String(scheduler.timesteps),
    `the picture was inverted in ${steps} steps of DDIM, whose timesteps ${sampler} does not have in ${scheduler.timesteps.length} calls; leave scheduler and numInferenceSteps out`,
  );
  const { injectAttention = ATTENTION_SHARE, injectFeatures = FEATURE_SHARE } = request;
  for (const [name, given] of Object.entries({ injectAttention, injectFeatures }))
    refuse(
      typeof given !== "number" || !(given >= 0 && given <= 1),
      `${name} is ${shown(given)}; expected a share of the steps, 0 to 1`,
    );
  const calls = {
    [ATTENTION_ROWS]: roundEven(injectAttention * steps),
    [FEATURE_ROWS]: roundEven(injectFeatures * steps),
  };
  return { inverted, calls };
}

/**
 * What the loop draws along.
 * @param {Injection} injection
 * @param {Record<string, Rows>} cond the generation's conditional rows: what the inversion does not say is taken from here
 * @param {number} count of images
 * @returns {import("./loop.js").Source}
 */
export function sourceOf({ inverted, calls }, cond, count) {
  const { trajectory, cond: own } = inverted,
    [steps, ...dims] = trajectory.dims,
    size = trajectory.data.length / steps;
  const latents = Array.from({ length: steps }, (_, i) =>
    repeated({ data: trajectory.data.subarray(i * size, (i + 1) * size), dims }, count),
  );
  /** @type {Record<string, Rows>} */
  const rows = {};
  for (const [name, given] of Object.entries(cond)) {
    rows[name] = repeated(own[name] ?? given, count);
    const [was, is] = [rows[name], given].map((each) => shown(each.dims));
    refuse(was !== is, `${name} has shape ${is} and the inversion's ${was}; expected the same`);
  }
  return { latents, cond: rows, calls };
}

/** Whether a value is what `invert` gives. @param {any} given @returns {given is Inversion} */
function isInversion(given) {
  const { latents, trajectory, timesteps, cond } = given ?? {};
  if (![latents, trajectory, timesteps].every(isNumbers) || typeof cond !== "object" || !cond) return false;
  const { dims } = trajectory;
  return (
    String(dims) === String([timesteps.data.length, ...latents.dims]) &&
    String(timesteps.dims) === String(dims.slice(0, 1)) &&
    Object.values(cond).every((each) => each?.dims?.[0] === dims[1] && each.data?.length === sizeOf(each))
  );
}

/** @param {any} given */
const isNumbers = (given) =>
  given?.data instanceof Float32Array &&
  Array.isArray(given.dims) &&
  given.data.length === sizeOf(given) &&
  given.data.every(Number.isFinite);
/** @param {Rows} rows */
const sizeOf = ({ dims }) => dims.reduce((a, b) => a * b, 1);
