// Where the steps of a schedule lie: alphas, timesteps and noise levels. The training tables are float32, rounded
// where torch rounds them: 1 - alpha cancels near t = 0, and published models are sampled with those roundings.
import { refuse } from "./errors.js";

/** @typedef {import("./schedulers.js").SchedulerConfig} SchedulerConfig */

const round32 = Math.fround;
// float16's smallest positive number stands in for a terminal alpha of 0, whose sigma would be infinite.
const TERMINAL_ALPHA = 2 ** -24;

/** To the nearest whole number, halves to the even one. @param {number} x */
export function roundEven(x) {
  const low = Math.floor(x),
    part = x - low;
  return part > 0.5 || (part === 0.5 && low % 2 !== 0) ? low + 1 : low;
}

/** Evenly spaced numbers. @param {number} start @param {number} end @param {number} count */
function linspace(start, end, count) {
  const stride = (end - start) / (count - 1);
  return Array.from({ length: count }, (_, i) => (i && i === count - 1 ? end : start + (i ? i * stride : 0)));
}

/** Share of signal left at each training timestep: falling, to 0 at zero SNR. @param {SchedulerConfig} config */
export function alphasCumprod(config) {
  const alphas = betas(config).map((beta) => 1 - beta);
  return cumulativeProduct(config.rescale_betas_zero_snr ? zeroTerminalSnr(alphas) : alphas);
}

/** @param {Float32Array} alphas */
function cumulativeProduct(alphas) {
  let product = 1; // float64, rounded when it is stored
  return alphas.map((alpha) => (product *= alpha));
}

/** Lin et al. 2023, Algorithm 1: shift sqrt(alpha_bar) to end at 0. @param {Float32Array} alphas */
function zeroTerminalSnr(alphas) {
  const root = cumulativeProduct(alphas).map(Math.sqrt),
    first = root[0],
    last = root[root.length - 1];
  const scale = round32(first / round32(first - last));
  const bar = root.map((r) => round32(round32(r - last) * scale) ** 2);
  // Through betas and back, for the two roundings that the published tables have.
  return bar.map((value, i) => 1 - round32(1 - round32(i ? value / bar[i - 1] : value)));
}

/** @param {SchedulerConfig} config */
function betas(config) {
  const steps = config.num_train_timesteps;
  if (config.trained_betas) return new Float32Array(config.trained_betas);
  if (config.beta_schedule === "squaredcos_cap_v2") {
    const bar = (/** @type {number} */ t) => Math.cos((((t + 0.008) / 1.008) * Math.PI) / 2) ** 2;
    return Float32Array.from({ length: steps }, (_, i) => Math.min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999));
  }
  const scaled = config.beta_schedule === "scaled_linear";
  const [first, last] = [config.beta_start, config.beta_end].map((beta) => round32(scaled ? Math.sqrt(beta) : beta));
  // As torch has them: a float32 stride from both ends.
  const stride = round32(round32(last - first) / (steps - 1));
  const at = (/** @type {number} */ i) =>
    2 * i < steps - 1 || steps === 1 ? first + (i && stride * i) : last - stride * (steps - 1 - i);
  return Float32Array.from({ length: steps }, (_, i) => at(i)).map((beta) => (scaled ? beta * beta : beta));
}

/**
 * Training timesteps at which the UNet is asked, falling.
 * @param {SchedulerConfig} config
 * @param {number} steps
 * @param {{points?: number, last?: number, fractional?: boolean}} [how] points that divide the schedule, one past the
 *   highest timestep, whether `linspace` keeps fractions
 */
export function spacedTimesteps(
  config,
  steps,
  { points = steps, last = config.num_train_timesteps, fractional = false } = {},
) {
  const train = config.num_train_timesteps;
  let spaced;
  if (config.timestep_spacing === "linspace") {
    spaced = linspace(0, last - 1, points)
      .map(fractional ? round32 : roundEven)
      .reverse();
  } else if (config.timestep_spacing === "leading") {
    spaced = Array.from(
      { length: points },
      (_, i) => (points - 1 - i) * Math.floor(last / points) + config.steps_offset,
    );
  } else {
    const stride = last - train / steps - last;
    spaced = Array.from({ length: Math.ceil(last / (train / steps)) }, (_, i) => roundEven(last + i * stride) - 1);
  }
  spaced = spaced.slice(0, steps);
  refuse(
    spaced[0] > train - 1,
    `${steps} steps with steps_offset ${config.steps_offset} start at timestep ${spaced[0]}: expected at most ${train - 1}; take fewer steps`,
  );
  return spaced;
}

/**
 * Timesteps of a model that was distilled on `original_inference_steps`.
 * @param {SchedulerConfig} config
 * @param {number} steps
 */
export function distilledTimesteps(config, steps) {
  const original = config.original_inference_steps;
  refuse(
    steps > original || original > config.num_train_timesteps,
    `${steps} steps of ${config.name} with original_inference_steps ${original}: expected ${original} at most; take fewer steps`,
  );
  const each = Math.floor(config.num_train_timesteps / original);
  return Array.from({ length: steps }, (_, i) => (original - Math.floor((i * original) / steps)) * each - 1);
}

/**
 * Timesteps and noise levels of samplers that keep fractions of timesteps; the last level is where the last step arrives.
 * @param {SchedulerConfig} config
 * @param {number} steps
 */
export function eulerLevels(config, steps) {
  const table = sigmaTable(config);
  let timesteps = spacedTimesteps(config, steps, { fractional: true });
  let sigmas = timesteps.map((t) => interpolated(table, t));
  const kind = spreadOf(config);
  if (kind) {
    sigmas = spread(kind, sigmas[0], sigmas[sigmas.length - 1], steps);
    timesteps = sigmas.map(timestepOf(table));
  }
  return withArrival(config, table, timesteps, sigmas);
}

/**
 * The same for multistep solvers: whole timesteps, and levels over the whole table.
 * @param {SchedulerConfig} config
 * @param {number} steps
 * @param {boolean} roundKarras
 */
export function solverLevels(config, steps, roundKarras) {
  const table = sigmaTable(config),
    kind = spreadOf(config);
  let timesteps, sigmas;
  if (kind) {
    sigmas = spread(kind, table[table.length - 1], table[0], steps);
    timesteps = sigmas.map(timestepOf(table));
    if (kind === "karras" && roundKarras) timesteps = timesteps.map(roundEven);
  } else {
    // They divide the schedule by N + 1 and drop the lowest point.
    timesteps = spacedTimesteps(config, steps, { points: steps + 1, last: lastTimestep(config) });
    sigmas = timesteps.map((t) => interpolated(table, t));
  }
  return withArrival(config, table, timesteps.map(Math.trunc), sigmas);
}

/** The layout of the noise levels; "" where the timesteps' own are taken. @param {SchedulerConfig} config */
export function spreadOf(config) {
  return config.use_karras_sigmas
    ? "karras"
    : config.use_exponential_sigmas
      ? "exponential"
      : config.use_beta_sigmas
        ? "beta"
        : "";
}

/** @param {SchedulerConfig} config @param {Float32Array} table @param {number[]} timesteps @param {number[]} sigmas */
function withArrival(config, table, timesteps, sigmas) {
  const arrival = config.final_sigmas_type === "sigma_min" ? table[0] : 0;
  return { timesteps: Float32Array.from(timesteps), sigmas: [...sigmas, arrival].map(round32) };
}

/** @param {SchedulerConfig} config */
function terminalAlphas(config) {
  const alphas = alphasCumprod(config);
  if (config.rescale_betas_zero_snr) alphas[alphas.length - 1] = TERMINAL_ALPHA;
  return alphas;
}

/** @param {SchedulerConfig} config */
function sigmaTable(config) {
  return terminalAlphas(config).map((alpha) => Math.sqrt(round32(round32(1 - alpha) / alpha)));
}

/** @param {Float32Array} table @param {number} t */
function interpolated(table, t) {
  const low = Math.min(Math.floor(t), table.length - 1);
  return t === low ? table[low] : table[low] + (table[low + 1] - table[low]) * (t - low);
}

/** One past the highest timestep that `lambda_min_clipped` leaves. @param {SchedulerConfig} config */
function lastTimestep(config) {
  const train = config.num_train_timesteps,
    least = config.lambda_min_clipped;
  if (least === null) return train;
  const lambdas = terminalAlphas(config).map(
    (a) => round32(Math.log(round32(Math.sqrt(a)))) - round32(Math.log(round32(Math.sqrt(round32(1 - a))))),
  );
  const last = lambdas.filter((lambda) => lambda >= round32(least)).length;
  refuse(!last, `lambda_min_clipped ${least}: expected at most ${lambdas[0]}, where the training schedule begins`);
  return last;
}

/**
 * Levels from the highest to the lowest: Karras et al. 2022, equation 5; even in log; or quantiles.
 * @param {string} kind
 * @param {number} highest
 * @param {number} lowest
 * @param {number} count
 */
function spread(kind, highest, lowest, count) {
  if (kind === "exponential") return linspace(Math.log(highest), Math.log(lowest), count).map(Math.exp);
  const ramp = linspace(0, 1, count);
  if (kind === "beta") return ramp.map((share) => lowest + betaQuantile(1 - share) * (highest - lowest));
  const start = highest ** (1 / 7),
    end = lowest ** (1 / 7);
  return ramp.map((share) => (start + share * (end - start)) ** 7);
}

// Beta(a, a), the distribution of Lee et al. 2024; BETA is the complete beta function there.
const A = 0.6,
  BETA = 2.4153442080024714;

/** Coefficients of x^k in B_x(a, a) / x^a, which are (1 - a)_k / (k! (a + k)). */
const SERIES = [1 / A];
for (let k = 1, product = 1; k < 60; k++) SERIES.push((product *= (k - A) / k) / (A + k));

/**
 * A quantile of Beta(0.6, 0.6). With y = x^a the distribution function is nearly a line in y, which Newton's method
 * follows down to x = 0; the upper half mirrors the lower one.
 * @param {number} share from 0 to 1
 */
export function betaQuantile(share) {
  const wanted = Math.min(share, 1 - share) * BETA;
  let y = wanted * A;
  for (let i = 0; i < 12; i++) {
    const x = Math.min(y ** (1 / A), 0.5);
    const value = x ** A * SERIES.reduceRight((sum, c) => sum * x + c, 0);
    y = x ** A - (value - wanted) * A * (1 - x) ** (1 - A);
  }
  const x = Math.max(y, 0) ** (1 / A);
  return share <= 0.5 ? x : 1 - x;
}

/** The fractional timestep of a noise level, the table taken as linear in log(sigma). @param {Float32Array} table */
function timestepOf(table) {
  const logs = table.map(Math.log);
  return (/** @type {number} */ sigma) => {
    const wanted = Math.log(Math.max(sigma, 1e-10));
    let above = 0;
    while (above < logs.length && logs[above] <= wanted) above++;
    const low = Math.min(Math.max(above - 1, 0), logs.length - 2);
    const w = Math.min(Math.max((logs[low] - wanted) / round32(logs[low] - logs[low + 1]), 0), 1);
    return (1 - w) * low + w * (low + 1);
  };
}
