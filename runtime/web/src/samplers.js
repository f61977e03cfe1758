// The samplers: how x_t and the UNet's output become the next, less noisy x. A step is a linear combination whose
// coefficients are known before the first image: a row of them for each step, of which the first two are those of x_0
// (from x_t, from the output). They belong to step i; a timestep is never looked up, since Karras spacing repeats some.
import { alphasCumprod, distilledTimesteps, eulerLevels, solverLevels, spacedTimesteps } from "./schedule_tables.js";

/**
 * @typedef {import("./schedulers.js").SchedulerConfig} SchedulerConfig
 * @typedef {import("./schedulers.js").Scheduler} Scheduler
 * @typedef {Float32Array[]} State
 * @typedef {object} Sampler
 * @property {Record<string, unknown>} settings what it reads, with defaults; all read the noise process too
 * @property {string[]} [predictions] what the UNet may return; all three where left out
 * @property {(steps: number) => number} calls how often the UNet is called in so many steps
 * @property {(step: number) => number} [callOf] the call at which editing begins that leaves out so many steps; the
 *   same number where left out
 * @property {(config: SchedulerConfig) => boolean} draws whether its steps draw fresh noise
 * @property {boolean} [scales] whether the UNet's input is scaled, by the third of a row
 * @property {(config: SchedulerConfig, steps: number) => {timesteps: ArrayLike<number>, rows: number[][],
 *   levels: number[][], sigma?: number}} make `levels`: of x_t before each step, the share of x_0 in it, and of noise
 * @property {(s: Scheduler, i: number, x: Float32Array, out: Float32Array, before: State, noise: Float32Array | null) =>
 *   [Float32Array, State]} step `before` is empty at the first step that runs
 */

const { sqrt, log, expm1, floor } = Math;

// Weights of the outputs, the newest first, by how many there are (Liu et al. 2022, equation 12; Adams-Bashforth).
const PLMS = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]];
const SPACING = { timestep_spacing: "leading", steps_offset: 0 };
const SIGMAS = {
  timestep_spacing: "linspace",
  steps_offset: 0,
  use_karras_sigmas: false,
  use_exponential_sigmas: false,
  use_beta_sigmas: false,
};
const ZERO_SNR = { rescale_betas_zero_snr: false };
const once = (/** @type {number} */ steps) => steps;
const always = () => true,
  never = () => false;
const withEta = (/** @type {SchedulerConfig} */ config) => config.eta > 0;

/**
 * The sum of coefficients times arrays, a new array; terms with coefficient 0 are left out.
 * @param {...[number, Float32Array | null]} terms
 */
export function mix(...terms) {
  const total = new Float32Array(/** @type {Float32Array} */ (terms.find(([, array]) => array)?.[1]).length);
  for (const [weight, array] of terms) {
    if (weight && array) for (let k = 0; k < total.length; k++) total[k] += weight * array[k];
  }
  return total;
}

/** Share of signal at whole timesteps; below 0 the schedule's end. @param {SchedulerConfig} config */
function alphas(config) {
  const table = alphasCumprod(config),
    end = config.set_alpha_to_one ? 1 : table[0];
  return (/** @type {number} */ t) => (t >= 0 ? table[t] : end);
}

/**
 * What x_0 takes from x_t = alpha x_0 + sigma eps, and from the output.
 * @param {SchedulerConfig} config
 * @param {number} alpha
 * @param {number} sigma
 */
function ofX0(config, alpha, sigma) {
  if (config.prediction_type === "epsilon") return [1 / alpha, -sigma / alpha];
  return config.prediction_type === "v_prediction" ? [alpha, -sigma] : [0, 1];
}

/** The same of eps. @param {SchedulerConfig} config @param {number} alpha @param {number} sigma */
function ofEps(config, alpha, sigma) {
  if (config.prediction_type === "epsilon") return [0, 1];
  return config.prediction_type === "v_prediction" ? [sigma, alpha] : [1 / sigma, -alpha / sigma];
}

/**
 * x_0 from x = x_0 + sigma eps, and the scale of what the UNet is shown.
 * @param {SchedulerConfig} config
 * @param {number} sigma
 */
function ofSigma(config, sigma) {
  const scale = 1 / sqrt(sigma ** 2 + 1),
    [fromX, fromOut] = ofX0(config, scale, sigma * scale);
  return [fromX * scale, fromOut, scale];
}

/** The shares of x_0 and of noise in x_t = sqrt(a) x_0 + sqrt(1 - a) eps. @param {number} a */
const levelOf = (a) => [sqrt(a), sqrt(1 - a)];

/** @param {SchedulerConfig} config @param {number[]} sigmas */
function firstSigma(config, sigmas) {
  const highest = Math.max(...sigmas);
  return config.timestep_spacing === "leading" ? sqrt(highest ** 2 + 1) : highest;
}

/**
 * Song et al. 2020, equation 12. Where x_0 is not clipped, its part is folded into those of x_t and of the output.
 * @type {Sampler}
 */
const ddim = {
  settings: { ...SPACING, ...ZERO_SNR, clip_sample: true, clip_sample_range: 1, set_alpha_to_one: true, eta: 0 },
  calls: once,
  draws: withEta,
  make(config, steps) {
    const at = alphas(config),
      timesteps = spacedTimesteps(config, steps);
    // Not the next step's timestep: under linspace and trailing spacing the two differ.
    const stride = floor(config.num_train_timesteps / steps);
    const rows = timesteps.map((t) => {
      const a = at(t),
        b = at(t - stride),
        std = config.eta * sqrt(((1 - b) / (1 - a)) * (1 - a / b));
      const direction = sqrt(1 - b - std ** 2),
        x0 = ofX0(config, sqrt(a), sqrt(1 - a)),
        eps = ofEps(config, sqrt(a), sqrt(1 - a));
      const [ofX, ofOut] = eps.map((of, k) => direction * of + (config.clip_sample ? 0 : sqrt(b) * x0[k]));
      return [...x0, sqrt(b), ofX, ofOut, std];
    });
    return { timesteps, rows, levels: timesteps.map((t) => levelOf(at(t))) };
  },
  step(s, i, x, out, _, noise) {
    const [, , ofX0, ofX, ofOut, std] = s.rows[i];
    return [mix([ofX, x], [ofOut, out], [ofX0, s.clip ? s.predicted(i, x, out) : null], [std, noise]), []];
  },
};

/**
 * Liu et al. 2022, equations 11 and 12; the second call corrects the first step. The state is the last three outputs,
 * the newest first; after the first call also, before them, what it adds to the second's result.
 * @type {Sampler}
 */
const pndm = {
  settings: { ...SPACING, set_alpha_to_one: false },
  predictions: ["epsilon", "v_prediction"],
  calls: (steps) => (steps > 1 ? steps + 1 : 1),
  callOf: (step) => (step ? step + 1 : 0), // the second call belongs to the first step
  draws: never,
  make(config, steps) {
    const at = alphas(config),
      timesteps = spacedTimesteps(config, steps),
      stride = floor(config.num_train_timesteps / steps);
    if (timesteps.length > 1) timesteps.splice(1, 0, timesteps[1]);
    const rows = timesteps.map((t, i) => {
      const a = at(i === 1 ? t + stride : t),
        b = at(i === 1 ? t : t - stride);
      const ofEpsilon = (a - b) / (a * sqrt(1 - b) + sqrt(a * (1 - a) * b)),
        [epsX, epsOut] = ofEps(config, sqrt(a), sqrt(1 - a));
      // The second call's timestep is not where the step that it corrects begins.
      return [...ofX0(config, sqrt(at(t)), sqrt(1 - at(t))), sqrt(b / a) + ofEpsilon * epsX, ofEpsilon * epsOut];
    });
    return { timesteps, rows, levels: timesteps.map((t) => levelOf(at(t))) };
  },
  step(s, i, x, out, before) {
    const [, , ofX, ofOut] = s.rows[i];
    if (i === 1 && before.length) return [mix([1, before[0]], [ofOut / 2, out]), before.slice(1)];
    const kept = out.slice();
    if (i === 1) return [x.slice(), [kept]]; // nothing to correct
    const outs = [kept, ...before],
      weights = PLMS[before.length];
    const next = mix(
      [ofX, x],
      ...outs.map((each, k) => /** @type {[number, Float32Array]} */ ([ofOut * weights[k], each])),
    );
    if (i || s.rows.length === 1) return [next, outs.slice(0, 3)];
    return [next, [mix([s.rows[1][2], x], [s.rows[1][3] / 2, out]), kept]];
  },
};

/** The shares of x_0 and of noise in x_t of a variance of 1, by its noise levels. @param {ArrayLike<number>} sigmas @param {number} count */
const solverShares = (sigmas, count) =>
  Array.from({ length: count }, (_, i) => {
    const a = 1 / sqrt(sigmas[i] ** 2 + 1);
    return [a, sigmas[i] * a];
  });

/**
 * DPM-Solver++, second-order multistep, midpoint (Lu et al. 2022, Algorithm 2). The state is x_0.
 * @param {boolean} stochastic
 * @returns {Sampler}
 */
const dpm = (stochastic) => ({
  settings: {
    ...SIGMAS,
    ...ZERO_SNR,
    final_sigmas_type: "zero",
    lower_order_final: true,
    euler_at_final: false,
    lambda_min_clipped: null,
  },
  calls: once,
  draws: () => stochastic,
  make(config, steps) {
    const { timesteps, sigmas } = solverLevels(config, steps, config.beta_schedule !== "squaredcos_cap_v2"),
      last = timesteps.length - 1;
    const lower =
      config.final_sigmas_type === "zero" || config.euler_at_final || (config.lower_order_final && last < 14);
    let before = 0;
    const rows = Array.from(timesteps, (_, i) => {
      const s = sigmas[i],
        t = sigmas[i + 1],
        a = 1 / sqrt(s ** 2 + 1),
        b = 1 / sqrt(t ** 2 + 1),
        ratio = t / s;
      // With fresh noise as much again of the old noise goes.
      const kept = stochastic ? ratio ** 2 : ratio,
        gain = b * (1 - kept),
        h = log(s) - log(t || 1);
      const extra = i && !(i === last && lower) ? (0.5 * gain * h) / before : 0;
      before = h;
      return [
        ...ofX0(config, a, s * a),
        (kept * b) / a,
        gain + extra,
        -extra,
        b * t * sqrt(Math.max(1 - ratio ** 2, 0)),
      ];
    });
    return { timesteps, rows, levels: solverShares(sigmas, rows.length) };
  },
  step(s, i, x, out, before, noise) {
    const [, , ofX, ofX0, ofBefore, std] = s.rows[i],
      x0 = s.predicted(i, x, out);
    return [mix([ofX, x], [ofX0, x0], [ofBefore, before[0] ?? x0], [std, noise]), [x0]];
  },
});

/**
 * UniPC of second order, bh2, on the predicted x_0 (Zhao et al. 2023). The output first corrects x_t, then the next x is
 * predicted from that. A row goes on with the weights of the corrected x after a step of first order (x before, x_0
 * before, x_0) and of second (x before, x_0 before, x_0 before that, x_0), then of the next x by first order (corrected
 * x, x_0) and by second (the same, x_0 before), and whether second order may be used. The state is the corrected x, x_0
 * and, after second order, the x_0 before.
 * @type {Sampler}
 */
const unipc = {
  settings: { ...SIGMAS, ...ZERO_SNR, final_sigmas_type: "zero", lower_order_final: true },
  calls: once,
  draws: never,
  make(config, steps) {
    const { timesteps, sigmas } = solverLevels(config, steps, true),
      last = timesteps.length - 1;
    let before = NaN,
      correct = new Array(7).fill(0);
    const rows = Array.from(timesteps, (_, i) => {
      const s = sigmas[i],
        t = sigmas[i + 1],
        a = 1 / sqrt(s ** 2 + 1),
        b = 1 / sqrt(t ** 2 + 1),
        h = log(s) - log(t);
      const ofX = (t * b) / (s * a),
        e = expm1(-h),
        gain = -b * e,
        second = i > 0 && !(i === last && config.lower_order_final);
      const phi = e / -h - 1,
        b1 = phi / e,
        r = -before / h,
        old = (b1 - (2 * (phi / -h - 0.5)) / e) / (1 - r),
        fresh = b1 - old;
      const half = (gain * 0.5 * h) / before;
      const row = [
        ...ofX0(config, a, s * a),
        ...correct,
        ofX,
        gain,
        ...(second ? [ofX, gain + half, -half, 1] : [0, 0, 0, 0]),
      ];
      correct = [
        ofX,
        gain / 2,
        gain / 2,
        ...(second ? [ofX, gain * (1 - old / r - fresh), (gain * old) / r, gain * fresh] : [0, 0, 0, 0]),
      ];
      before = h;
      return row;
    });
    return { timesteps, rows, levels: solverShares(sigmas, rows.length) };
  },
  step(s, i, x, out, before) {
    const row = s.rows[i].slice(2),
      x0 = s.predicted(i, x, out);
    const weights = before.length === 2 ? row.slice(0, 3) : row.slice(3, 7);
    const corrected = before.length
      ? mix(...[...before, x0].map((each, k) => /** @type {[number, Float32Array]} */ ([weights[k], each])))
      : x.slice();
    if (before.length && row[12]) {
      return [mix([row[9], corrected], [row[10], x0], [row[11], before[1]]), [corrected, x0, before[1]]];
    }
    return [mix([row[7], corrected], [row[8], x0]), [corrected, x0]];
  },
};

/**
 * Karras et al. 2022, Algorithm 2 without churn; ancestral: below the next level, and fresh noise up to it.
 * @param {boolean} ancestral
 * @returns {Sampler}
 */
const euler = (ancestral) => ({
  settings: ancestral
    ? { ...SPACING, timestep_spacing: "linspace", ...ZERO_SNR }
    : { ...SIGMAS, ...ZERO_SNR, final_sigmas_type: "zero" },
  predictions: ancestral ? ["epsilon", "v_prediction"] : undefined,
  calls: once,
  draws: () => ancestral,
  scales: true,
  make(config, steps) {
    const { timesteps, sigmas } = eulerLevels(config, steps);
    const rows = Array.from(timesteps, (_, i) => {
      const s = sigmas[i],
        t = sigmas[i + 1],
        to = ancestral ? t ** 2 / s : t,
        std = ancestral ? t * sqrt(1 - (t / s) ** 2) : 0;
      const x0 = ofSigma(config, s),
        share = 1 - to / s;
      return [...x0, to / s + share * x0[0], share * x0[1], std];
    });
    return { timesteps, rows, levels: rows.map((_, i) => [1, sigmas[i]]), sigma: firstSigma(config, sigmas) };
  },
  step(s, i, x, out, _, noise) {
    const [, , , ofX, ofOut, std] = s.rows[i];
    return [mix([ofX, x], [ofOut, out], [std, noise]), []];
  },
});

/** Karras et al. 2022, Algorithm 1. The state is what the first call adds to the second's result. @type {Sampler} */
const heun = {
  settings: { ...SIGMAS, clip_sample: false, clip_sample_range: 1 },
  calls: (steps) => 2 * steps - 1,
  callOf: (step) => 2 * step,
  draws: never,
  scales: true,
  make(config, steps) {
    const levels = eulerLevels(config, steps),
      sigmas = levels.sigmas;
    // Calls 2k and 2k + 1 take the step from level k to level k + 1, and are made at the one and at the other.
    const at = Array.from({ length: 2 * steps - 1 }, (_, i) => (i + 1) >> 1);
    const rows = at.map((level, i) => {
      const half = (sigmas[(i >> 1) + 1] - sigmas[i >> 1]) / (2 * sigmas[level]);
      return [...ofSigma(config, sigmas[level]), 1 + 2 * half, -2 * half, half];
    });
    return {
      timesteps: at.map((level) => levels.timesteps[level]),
      rows,
      levels: at.map((level) => [1, sigmas[level]]),
      sigma: firstSigma(config, sigmas),
    };
  },
  step(s, i, x, out, before) {
    const [, , , ofX, ofX0, half] = s.rows[i],
      x0 = s.predicted(i, x, out);
    if (i % 2 === 0) return [mix([ofX, x], [ofX0, x0]), [mix([1 + half, x], [-half, x0])]];
    return before.length ? [mix([1, before[0]], [half, x], [-half, x0]), []] : [x.slice(), []];
  },
};

/**
 * Latent consistency models (Luo et al. 2023, Algorithm 3): predict x_0, add noise of the next level.
 * @type {Sampler}
 */
const lcm = {
  settings: {
    ...ZERO_SNR,
    clip_sample: false,
    clip_sample_range: 1,
    original_inference_steps: 50,
    timestep_scaling: 10,
  },
  calls: once,
  draws: always,
  make(config, steps) {
    const timesteps = distilledTimesteps(config, steps),
      at = alphas(config);
    const rows = timesteps.map((t, i) => {
      // The boundary condition of consistency models, x itself at timestep 0; the last step adds no noise.
      const a = at(t),
        b = i + 1 < steps ? at(timesteps[i + 1]) : 1,
        u = (t * config.timestep_scaling) ** 2,
        root = sqrt(b);
      return [
        ...ofX0(config, sqrt(a), sqrt(1 - a)),
        root / (4 * u + 1),
        root * sqrt((4 * u) / (4 * u + 1)),
        sqrt(1 - b),
      ];
    });
    return { timesteps, rows, levels: timesteps.map((t) => levelOf(at(t))) };
  },
  step(s, i, x, out, _, noise) {
    const [, , ofX, ofX0, std] = s.rows[i];
    return [mix([ofX, x], [ofX0, s.predicted(i, x, out)], [std, noise]), []];
  },
};

/**
 * Trajectory consistency distillation (Zheng et al. 2024, Algorithm 4): below the next timestep, then up with noise.
 * @type {Sampler}
 */
const tcd = {
  settings: { ...ZERO_SNR, original_inference_steps: 50, eta: 0.3 },
  calls: once,
  draws: withEta,
  make(config, steps) {
    const timesteps = distilledTimesteps(config, steps),
      at = alphas(config);
    const rows = timesteps.map((t, i) => {
      const next = timesteps[i + 1] ?? 0,
        a = at(t),
        c = at(floor(Math.fround(Math.fround(1 - config.eta) * next))),
        kept = at(next) / c;
      const x0 = ofX0(config, sqrt(a), sqrt(1 - a)),
        eps = ofEps(config, sqrt(a), sqrt(1 - a));
      const [ofX, ofOut] = x0.map((of, k) => sqrt(kept * c) * of + sqrt(kept * (1 - c)) * eps[k]);
      return [...x0, ofX, ofOut, sqrt(1 - kept)];
    });
    return { timesteps, rows, levels: timesteps.map((t) => levelOf(at(t))) };
  },
  step(s, i, x, out, _, noise) {
    const [, , ofX, ofOut, std] = s.rows[i];
    return [mix([ofX, x], [ofOut, out], [std, noise]), []];
  },
};

/** Without a prototype, so that any name is only a name. @type {Record<string, Sampler>} */
export const SAMPLERS = Object.assign(Object.create(null), {
  ddim,
  pndm,
  dpmpp_2m: dpm(false),
  dpmpp_2m_sde: dpm(true),
  unipc,
  euler: euler(false),
  euler_ancestral: euler(true),
  heun,
  lcm,
  tcd,
});
