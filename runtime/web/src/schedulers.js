// The settings of a scheduler, under diffusers' names, and the scheduler that is made from them.
import { refuse, shown } from "./errors.js";
import { mix, SAMPLERS } from "./samplers.js";

/**
 * Settings as `readScheduler` returns them, with every default filled in.
 * @typedef {{name: string, num_train_timesteps: number, beta_start: number, beta_end: number, beta_schedule: string,
 *   trained_betas: number[] | null, prediction_type: string, timestep_spacing: string, steps_offset: number,
 *   rescale_betas_zero_snr: boolean, clip_sample: boolean, clip_sample_range: number, set_alpha_to_one: boolean, eta: number,
 *   use_karras_sigmas: boolean, use_exponential_sigmas: boolean, use_beta_sigmas: boolean, final_sigmas_type: string,
 *   lower_order_final: boolean, euler_at_final: boolean, lambda_min_clipped: number | null,
 *   original_inference_steps: number, timestep_scaling: number}} SchedulerConfig
 */

/** @typedef {[(value: any, config: any) => boolean, string]} Kind a test, and what is expected */
/** @param {...string} words @returns {Kind} */
const one = (...words) => [(v) => words.includes(v), `one of ${words.join(", ")}`];
/** @param {number} least @returns {Kind} */
const whole = (least) => [(v) => Number.isInteger(v) && v >= least, `an integer of at least ${least}`];
/** @param {string} expected @param {(v: number) => boolean} holds @returns {Kind} */
const number = (expected, holds) => [(v) => Number.isFinite(v) && holds(v), expected];
/** @type {Kind} */
const flag = [(v) => typeof v === "boolean", "true or false"];
const isBeta = (/** @type {number} */ v) => Number.isFinite(v) && v > 0 && v < 1;
const beta = number("a number above 0 and below 1", isBeta),
  positive = number("a number above 0", (v) => v > 0);

/** Each setting's kind, and what it is where a sampler does not read it. @type {Record<string, [Kind, unknown]>} */
const SETTINGS = {
  num_train_timesteps: [whole(1), 1000],
  beta_start: [beta, 0.0001],
  beta_end: [beta, 0.02],
  beta_schedule: [one("linear", "scaled_linear", "squaredcos_cap_v2"), "linear"],
  trained_betas: [
    [
      (v, c) => v === null || (Array.isArray(v) && v.length === c.num_train_timesteps && v.every(isBeta)),
      "null, or a beta for each training timestep",
    ],
    null,
  ],
  prediction_type: [one("epsilon", "v_prediction", "sample"), "epsilon"],
  timestep_spacing: [one("linspace", "leading", "trailing"), "leading"],
  steps_offset: [whole(0), 0],
  rescale_betas_zero_snr: [flag, false],
  clip_sample: [flag, true],
  clip_sample_range: [positive, 1],
  set_alpha_to_one: [flag, true],
  eta: [number("a number from 0 to 1", (v) => v >= 0 && v <= 1), 0],
  use_karras_sigmas: [flag, false],
  use_exponential_sigmas: [flag, false],
  use_beta_sigmas: [flag, false],
  final_sigmas_type: [one("zero", "sigma_min"), "zero"],
  lower_order_final: [flag, true],
  euler_at_final: [flag, false],
  lambda_min_clipped: [[(v) => v === null || Number.isFinite(v), "a finite number, or null"], null],
  original_inference_steps: [whole(1), undefined],
  timestep_scaling: [positive, undefined],
};
const PROCESS = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"];
const SPREADS = ["karras", "exponential", "beta"];
/** @param {string} spread */
const settingOf = (spread) => `use_${spread}_sigmas`;
/** What a request may name: a sampler, or a sampler with one of these layouts of its noise levels. */
export const SCHEDULER_NAMES = Object.entries(SAMPLERS).flatMap(([name, { settings }]) => [
  name,
  ...SPREADS.filter((spread) => settingOf(spread) in settings).map((spread) => `${name}_${spread}`),
]);

/**
 * Checks a manifest's settings and fills in the sampler's defaults.
 * @param {Record<string, unknown>} given
 * @returns {SchedulerConfig}
 */
export function readScheduler(given) {
  const name = String(given.name),
    sampler = SAMPLERS[name];
  refuse(!sampler, `scheduler name ${shown(given.name)}: expected one of ${Object.keys(SAMPLERS).join(", ")}`);
  /** @type {Record<string, unknown>} */
  const config = { name };
  for (const key of Object.keys(given)) {
    refuse(
      key !== "name" && !Object.hasOwn(SETTINGS, key),
      `scheduler ${key}: there is no such setting; update the runtime`,
    );
  }
  for (const [key, [[holds, expected], unread]] of Object.entries(SETTINGS)) {
    const reads = key in sampler.settings,
      usual = reads ? sampler.settings[key] : unread;
    const value = given[key] === undefined || (key === "timestep_spacing" && given[key] === null) ? usual : given[key];
    const told = `scheduler ${key} ${shown(value)}: expected`;
    if (reads || PROCESS.includes(key)) refuse(!holds(value, { ...config, ...given }), `${told} ${expected}`);
    else {
      const readers = Object.keys(SAMPLERS).filter((each) => key in SAMPLERS[each].settings),
        expects = unread === undefined ? "none" : shown(unread);
      refuse(
        value !== unread,
        `scheduler ${key} ${shown(value)}: ${name} does not read it; expected ${expects}; it is a setting of ${readers.join(", ")}`,
      );
    }
    config[key] = value;
  }
  const { predictions } = sampler;
  refuse(
    predictions && !predictions.includes(String(config.prediction_type)),
    `scheduler prediction_type ${shown(config.prediction_type)}: expected one of ${predictions?.join(", ")} for ${name}`,
  );
  const spreads = SPREADS.filter((spread) => config[settingOf(spread)]);
  refuse(spreads.length > 1, `scheduler: ${spreads.join(" and ")} sigmas are both true; expected one of them`);
  return /** @type {any} */ (config);
}

/** The sampler of one of `SCHEDULER_NAMES`. @param {string} name */
export function samplerOf(name) {
  refuse(!SCHEDULER_NAMES.includes(name), `scheduler ${shown(name)}: expected one of ${SCHEDULER_NAMES.join(", ")}`);
  return SAMPLERS[baseOf(name)];
}

/** Without the layout of the noise levels. @param {string} name */
const baseOf = (name) => (name in SAMPLERS ? name : name.slice(0, name.lastIndexOf("_")));

/** One of `SCHEDULER_NAMES`: the sampler and the layout of its noise levels. @param {SchedulerConfig} config */
export function nameOf(config) {
  const spread = SPREADS.find((each) => /** @type {any} */ (config)[settingOf(each)]);
  return spread ? `${config.name}_${spread}` : config.name;
}

/**
 * A bundle's settings for another sampler: the same noise process, and of the rest what both read. Where the bundle's own
 * does not read them, x_0 is not clipped and the last step ends at the first timestep's alpha, as in Stable Diffusion.
 * @param {SchedulerConfig} config
 * @param {string} name one of `SCHEDULER_NAMES`
 * @returns {SchedulerConfig}
 */
export function withSampler(config, name) {
  if (name === nameOf(config)) return config;
  const { settings } = samplerOf(name),
    own = SAMPLERS[config.name].settings,
    told = /** @type {Record<string, any>} */ (config),
    base = baseOf(name);
  const layouts = SPREADS.map(settingOf);
  const shared = Object.keys(settings).filter((key) => key in own && key !== "eta" && !layouts.includes(key));
  const off = ["clip_sample", "set_alpha_to_one"].filter((key) => key in settings);
  return readScheduler({
    name: base,
    // Of the noise process too: refused by a sampler that does not read it.
    ...(config.rescale_betas_zero_snr ? { rescale_betas_zero_snr: true } : {}),
    ...Object.fromEntries(off.map((key) => [key, false])),
    ...Object.fromEntries([...PROCESS, ...shared].map((key) => [key, told[key]])),
    ...(name === base ? {} : { [settingOf(name.slice(base.length + 1))]: true }),
  });
}

/** The steps of one schedule, ready to take. It keeps nothing between steps: the caller has the state. */
export class Scheduler {
  /**
   * @param {SchedulerConfig} config
   * @param {number} steps
   * @param {import("./samplers.js").Sampler} [sampler] how its steps are taken, where that is not the sampler's own way
   */
  constructor(config, steps, sampler = SAMPLERS[config.name]) {
    this.sampler = sampler;
    const made = this.sampler.make(config, steps);
    /** As fed to the UNet, one for each call. */
    this.timesteps = Float32Array.from(made.timesteps);
    this.rows = made.rows.map((row) => row.map(Math.fround));
    /** Of x_t before each step: the share of x_0 in it, and of noise. */
    this.levels = made.levels.map((row) => row.map(Math.fround));
    /** Standard deviation of the initial latent. */
    this.initNoiseSigma = made.sigma ?? 1;
    this.needsNoise = this.sampler.draws(config);
    /** Bound of the predicted x_0; 0 where there is none. */
    this.clip =
      config.clip_sample && "clip_sample" in this.sampler.settings ? Math.fround(config.clip_sample_range) : 0;
  }

  /**
   * The UNet's input at step i; `x` itself where the sampler does not scale.
   * @param {number} i
   * @param {Float32Array} x
   */
  scaleModelInput(i, x) {
    return this.sampler.scales ? mix([this.rows[i][2], x]) : x;
  }

  /**
   * Takes step i: the latent after it, and the state for the next one.
   * @param {number} i
   * @param {Float32Array} x left as it is, and not kept
   * @param {Float32Array} out what the UNet returned, the same way
   * @param {Float32Array[] | null} state what step i - 1 returned
   * @param {Float32Array | null} noise standard normal, where `needsNoise`
   * @param {boolean} [first] whether it is the first step that is run, wherever that is
   * @returns {[Float32Array, Float32Array[]]}
   */
  step(i, x, out, state, noise, first = i === 0) {
    refuse(!first && !state, `scheduler state, none: step ${i} expected the state of step ${i - 1}`);
    return this.sampler.step(
      this,
      i,
      x,
      out,
      first ? [] : /** @type {Float32Array[]} */ (state),
      this.needsNoise ? noise : null,
    );
  }

  /** x_0 as the output of step i predicts it. @param {number} i @param {Float32Array} x @param {Float32Array} out */
  predicted(i, x, out) {
    const x0 = mix([this.rows[i][0], x], [this.rows[i][1], out]),
      { clip } = this;
    if (clip) for (let k = 0; k < x0.length; k++) x0[k] = Math.min(Math.max(x0[k], -clip), clip);
    return x0;
  }

  /**
   * What x_t before step i is for a known x_0, a new array: where editing begins, and what inpainting keeps.
   * @param {number} i from 0 to the number of steps; after the last one x_t is x_0
   * @param {Float32Array} x0 finished latents
   * @param {Float32Array} noise standard normal
   */
  addNoise(i, x0, noise) {
    if (i === this.levels.length) return x0.slice();
    refuse(!this.levels[i], `step ${i}: expected 0 to ${this.levels.length - 1}`);
    const [signal, level] = this.levels[i];
    return mix([signal, x0], [level, noise]);
  }
}

/**
 * How many steps an edit leaves out at the beginning, as diffusers counts them.
 * @param {number} strength
 * @param {number} steps `numInferenceSteps`
 */
export function stepsLeftOut(strength, steps) {
  refuse(
    typeof strength !== "number" || !(strength >= 0 && strength <= 1),
    `strength is ${shown(strength)}; expected 0 (nothing changes) to 1`,
  );
  const run = Math.min(Math.trunc(steps * strength), steps);
  refuse(
    run < 1,
    `strength is ${strength}: of ${steps} step${steps === 1 ? "" : "s"} it leaves none; expected ${Number((1 / steps).toPrecision(6))} or more, or more steps`,
  );
  return steps - run;
}

/** Number of the call at which editing begins that leaves out so many steps. @param {string} name @param {number} step */
export const callOf = (name, step) => (samplerOf(name).callOf ?? Number)(step);

/** A scheduler with every coefficient computed. @param {SchedulerConfig} config @param {number} steps */
export function makeScheduler(config, steps) {
  const limit = config.num_train_timesteps;
  refuse(
    !Number.isInteger(steps) || steps < 1 || steps > limit,
    `numInferenceSteps is ${shown(steps)}; expected a whole number from 1 to ${limit}`,
  );
  const scheduler = new Scheduler(config, steps),
    bad = scheduler.rows.findIndex((row) => !row.every(Number.isFinite));
  refuse(
    bad >= 0,
    `${config.name} in ${steps} steps: step ${bad} would divide by zero; take fewer steps or, where the terminal SNR is zero, a prediction other than epsilon`,
  );
  return scheduler;
}
