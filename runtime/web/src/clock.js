// Which steps are full and which are cached. Every call of the UNet is a step.
import { refuse, shown } from "./errors.js";
import { samplerOf } from "./schedulers.js";

const MAX_STEPS = 10000;

/** @typedef {number | string | number[]} Clock a period, or a mask with an entry for each call: 1 = full */

/**
 * For each call of the UNet whether it is full; the first always is.
 * @param {Clock} clock
 * @param {number} steps `numInferenceSteps`
 * @param {string} scheduler a sampler's name, or with the layout of its noise levels
 * @param {number} [start] the first call that is run, for editing; the clock begins there
 */
export function clockMask(clock, steps, scheduler, start = 0) {
  refuse(
    !Number.isInteger(steps) || steps < 1 || steps > MAX_STEPS,
    `steps is ${shown(steps)}; expected a whole number above 0, ${MAX_STEPS} at most`,
  );
  const calls = samplerOf(scheduler).calls(steps) - start;
  let read = clock;
  if (typeof clock === "string" && /^\s*\d+\s*(,\s*\d+\s*)*$/.test(clock)) {
    const entries = clock.split(",").map(Number);
    read = entries.length === 1 ? entries[0] : entries;
  }
  if (typeof read === "number" && Number.isInteger(read) && read > 0) {
    const period = read;
    return Array.from({ length: calls }, (_, i) => i % period === 0);
  }
  refuse(!Array.isArray(read), `clock is ${shown(clock)}; expected a period such as 2 or a mask such as 1,0,1,0`);
  const mask = /** @type {unknown[]} */ (read),
    told = `clock mask ${shown(mask.join())}`;
  refuse(
    mask.some((bit) => bit !== 0 && bit !== 1),
    `${told}: each entry is 0 (cached) or 1 (full)`,
  );
  refuse(
    mask.length !== calls,
    `${told} has ${mask.length} entries for ${callsInWords(steps, scheduler, start)}; expected one each`,
  );
  refuse(!mask[0], `${told} begins with 0; the first step is always full`);
  return mask.map(Boolean);
}

/** How many entries a mask has, and why. @param {number} steps @param {string} scheduler @param {number} [start] */
export function callsInWords(steps, scheduler, start = 0) {
  const calls = samplerOf(scheduler).calls(steps);
  const whole = calls === steps ? `${steps} steps` : `${calls} model calls (${steps} steps of ${scheduler})`;
  return start ? `the last ${calls - start} of ${whole}, which the strength leaves` : whole;
}
