// Settings in the address: a link draws the same picture again.
import { SCHEDULER_NAMES } from "../src/schedulers.js";

/**
 * @typedef {object} Settings
 * @property {string} prompt
 * @property {string} negative
 * @property {string} label
 * @property {string} seed decimal text
 * @property {number} steps
 * @property {number} guidance
 * @property {number[]} mask 1 = full
 * @property {number | null} strength of what begins with a picture, as is `imageGuidance`: of a model of instructions
 * @property {number | null} imageGuidance
 * @property {import("./edit.js").Edit | null} edit the picture itself, which no link holds
 * @property {string | null} sampler null for the bundle's own
 * @property {number | null} controlScale of what is drawn by a control picture
 * @property {import("./control.js").Steered | null} control that picture, which no link holds either
 */

const KNOWN = "prompt negative label seed steps guidance clock strength imageguidance sampler control".split(" ");
const LARGEST_SEED = 2n ** 64n - 1n;
export const MOST_STEPS = 200,
  MOST_GUIDANCE = 99;

/** @param {Settings} settings */
export function toHash(settings) {
  const { prompt, negative, label, seed, steps, guidance, mask, strength, imageGuidance, sampler, controlScale } =
      settings,
    parts = new URLSearchParams();
  parts.set("prompt", prompt);
  parts.set("negative", negative);
  if (label) parts.set("label", label);
  parts.set("seed", seed);
  parts.set("steps", String(steps));
  parts.set("guidance", String(guidance));
  parts.set("clock", mask.join(""));
  if (strength !== null) parts.set("strength", String(strength));
  if (imageGuidance !== null) parts.set("imageguidance", String(imageGuidance));
  if (sampler !== null) parts.set("sampler", sampler);
  if (controlScale !== null) parts.set("control", String(controlScale));
  return `#${parts}`;
}

/**
 * What a link asks for, and what in it is nonsense, in sentences; that is left out.
 * @param {string} hash
 * @returns {{settings: Partial<Settings>, wrong: string[]}}
 */
export function fromHash(hash) {
  const parts = new URLSearchParams(hash.replace(/^#/, ""));
  /** @type {Partial<Settings>} */
  const settings = {};
  /** @type {string[]} */
  const wrong = [];
  /** @param {string} name @param {(text: string) => boolean} good @param {string} expected */
  const read = (name, good, expected) => {
    const text = parts.get(name);
    if (text === null) return null;
    if (good(text)) return text;
    wrong.push(`The link's ${name} is ${JSON.stringify(text.slice(0, 40))}; expected ${expected}. It was left out.`);
    return null;
  };
  for (const name of /** @type {const} */ (["prompt", "negative", "label"])) {
    const text = read(name, (given) => given.length <= 20000, "at most 20,000 characters");
    if (text !== null) settings[name] = text;
  }
  const seed = read("seed", isSeed, "a whole number below 2^64");
  if (seed !== null) settings.seed = seed;
  const steps = read(
    "steps",
    (text) => /^\d{1,3}$/.test(text) && +text >= 1 && +text <= MOST_STEPS,
    `1 to ${MOST_STEPS}`,
  );
  if (steps !== null) settings.steps = Number(steps);
  const guidance = read("guidance", isGuidance, `a number from 0 to ${MOST_GUIDANCE}`);
  if (guidance !== null) settings.guidance = Number(guidance);
  const clock = read("clock", (text) => /^1[01]{0,399}$/.test(text), "ones and zeros, the first a one");
  if (clock !== null) settings.mask = [...clock].map(Number);
  // As the slider has them.
  const strength = read("strength", (text) => /^(0\.05|0\.[1-9]5?|1)$/.test(text), "0.05 to 1 in steps of 0.05");
  if (strength !== null) settings.strength = Number(strength);
  const towards = read("imageguidance", isGuidance, `a number from 0 to ${MOST_GUIDANCE}`);
  if (towards !== null) settings.imageGuidance = Number(towards);
  settings.sampler = read("sampler", (text) => SCHEDULER_NAMES.includes(text), `one of ${SCHEDULER_NAMES.join(", ")}`);
  const control = read("control", isGuidance, `a number from 0 to ${MOST_GUIDANCE}`);
  if (control !== null) settings.controlScale = Number(control);
  for (const name of parts.keys()) {
    if (!KNOWN.includes(name))
      wrong.push(`The link has ${JSON.stringify(name.slice(0, 40))}, which the page does not know. It was left out.`);
  }
  return { settings, wrong };
}

/** @param {string} text */
export function isSeed(text) {
  return /^\d{1,20}$/.test(text) && BigInt(text) <= LARGEST_SEED;
}

/** @param {string} text */
export function isGuidance(text) {
  return /^(\d+(\.\d+)?|\.\d+)$/.test(text) && Number(text) <= MOST_GUIDANCE;
}
