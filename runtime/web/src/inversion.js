// DDIM inversion (Song et al. 2020, section 4.3): from a picture to the noise that DDIM draws it from. Its steps are linear
// in the latent and the UNet's output, so each can be taken backwards, but for one thing: the output belongs to the noisier
// latent that is looked for. The first guess takes the output for the cleaner one; each refinement takes it again for the
// last guess.
import { refuse, shown } from "./errors.js";
import { mix } from "./samplers.js";
import { makeScheduler, Scheduler, withSampler } from "./schedulers.js";

/** @typedef {import("./schedulers.js").SchedulerConfig} SchedulerConfig */

export const DDIM = "ddim";
const MAX_REFINEMENTS = 20;

/**
 * DDIM's steps of a bundle's noise process backwards, the last first, each taken `refinements` times more.
 * @param {SchedulerConfig} config the bundle's
 * @param {number} steps `numInferenceSteps`
 * @param {number} [refinements]
 */
export function inverseScheduler(config, steps, refinements = 0) {
  refuse(
    !Number.isInteger(refinements) || refinements < 0 || refinements > MAX_REFINEMENTS,
    `refinements is ${shown(refinements)}; expected 0 to ${MAX_REFINEMENTS}`,
  );
  const ddim = withSampler(config, DDIM);
  refuse(
    ddim.clip_sample || ddim.eta,
    `the bundle's ddim has clip_sample ${ddim.clip_sample} and eta ${ddim.eta}: such steps cannot be taken backwards; expected false and 0`,
  );
  return new Scheduler(ddim, steps, backwards(refinements + 1));
}

/**
 * DDIM backwards. A row is (x_0 from x, from the output, the next x from x, from the output); the state is the latent that a
 * step began with, which refinements come back to.
 * @param {number} each calls of the UNet in a step
 * @returns {import("./samplers.js").Sampler}
 */
const backwards = (each) => ({
  settings: {},
  calls: (steps) => each * steps,
  draws: () => false,
  make(config, steps) {
    const { timesteps, rows, levels } = makeScheduler(config, steps);
    /** @type {<T>(values: Iterable<T>) => T[]} */
    const again = (values) => [...values].reverse().flatMap((value) => Array(each).fill(value));
    const taken = rows.map(([ofX0, ofOutput, , ofX, ofOut]) => [ofX0, ofOutput, 1 / ofX, -ofOut / ofX]);
    // Before each step the latent is at the level that DDIM's step arrives at.
    return { timesteps: again(timesteps), rows: again(taken), levels: again(levels) };
  },
  step({ rows }, i, x, out, before) {
    const [, , ofX, ofOut] = rows[i],
      begun = i % each ? before[0] : x.slice();
    return [mix([ofX, begun], [ofOut, out]), [begun]];
  },
});
