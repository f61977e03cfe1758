// Figures of this device, in the format that `edgediff bench --json` writes: `edgediff bench --import` shows them.
import { loopMs, sum } from "./ledger_chart.js";

/** @typedef {import("./engine.js").ResultMessage} ResultMessage */

const BACKENDS = { wasm: "onnxruntime-web", webgpu: "onnxruntime-web-webgpu" };

/** Samples of each part of one generation, in milliseconds. @param {ResultMessage} result @param {string} loop */
function partsOf(result, loop) {
  const { ledger, stages, ms } = result;
  /** @type {Record<string, number[]>} */
  const parts = {};
  const add = (/** @type {string} */ name, /** @type {number} */ value) => (parts[name] ??= []).push(value);
  for (const step of ledger) {
    for (const [name, value] of Object.entries(step.ms)) if (!["full", "cached"].includes(name)) add(name, value);
    add(step.full ? "full" : "cached", sum(step.ms));
  }
  add(loop, loopMs(result));
  if (loop === "loop") {
    for (const [name, value] of Object.entries(stages)) add(name, value);
    if (Object.keys(stages).length) add("picture", ms);
  }
  return parts;
}

/** @param {number[]} sorted @param {number} share */
function quantile(sorted, share) {
  const at = share * (sorted.length - 1),
    low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

/** Median, 10th and 90th percentile. @param {number[]} samples @returns {[number, number, number]} */
function spread(samples) {
  const sorted = [...samples].sort((a, b) => a - b);
  return [quantile(sorted, 0.5), quantile(sorted, 0.1), quantile(sorted, 0.9)];
}

/** @param {number} value */
const rounded = (value) => Math.round(1e4 * value) / 1e4;

/**
 * @param {object} run
 * @param {{clocked: ResultMessage, always: ResultMessage}[]} run.rounds
 * @param {any} run.opened what the worker said of the bundle
 * @param {{steps: number, clock: string, guidance: number}} run.settings
 */
export function benchLedger({ rounds, opened, settings }) {
  const backend = BACKENDS[/** @type {"wasm" | "webgpu"} */ (opened.backend)],
    bundle = opened.model;
  /** @type {Record<string, number[]>} */
  const parts = { load: [opened.ms] };
  for (const { clocked, always } of rounds) {
    for (const found of [partsOf(clocked, "loop"), partsOf(always, "loop_clock1")])
      for (const [name, samples] of Object.entries(found)) (parts[name] ??= []).push(...samples);
  }
  const saved = rounds.map(({ clocked, always }) => 1 - loopMs(clocked) / loopMs(always));
  const [time, low, high] = spread(saved);
  const { macs, mask, ledger } = rounds[0].clocked;
  const flops = 1 - macs.done / macs.uncached;
  const rows = Object.entries(parts).map(([part, samples]) => {
    const [median, p10, p90] = spread(samples).map(rounded);
    return {
      bundle,
      backend,
      part,
      median_ms: median,
      p10_ms: p10,
      p90_ms: p90,
      samples_ms: samples.map(rounded),
      peak_mib: null,
    };
  });
  return {
    machine: describeMachine(opened.versions),
    settings: {
      steps: settings.steps,
      clock: settings.clock,
      num_images: 1,
      guidance_scale: settings.guidance,
      rounds: rounds.length,
      threads: opened.threads,
    },
    peak_gflops: null,
    contenders: [
      {
        bundle,
        backend,
        model_sha256: opened.source,
        status: "measured",
        says: "",
        psnr_db: null,
        mask,
        rows: ledger[ledger.length - 1].rows,
        peak_mib: null,
        undivided: "own",
        flops_saved: rounded(flops),
        time_saved: rounded(time),
        time_saved_spread: [rounded(low), rounded(high)],
        share_of_peak: {},
      },
    ],
    rows,
    time_saved_over_flops_saved: flops > 0 ? { [backend]: rounded(time / flops) } : {},
    imported: [],
    format: 1,
  };
}

/** @param {Record<string, string>} versions */
function describeMachine(versions) {
  const known = /** @type {any} */ (navigator),
    brands = known.userAgentData?.brands ?? [];
  const brand = brands.find((/** @type {any} */ each) => !/not.a.brand/i.test(each.brand));
  return {
    processor: known.userAgentData?.platform || known.platform || "unknown",
    flags: [],
    cores: known.hardwareConcurrency ?? 0,
    memory_mib: 1024 * (known.deviceMemory ?? 0),
    system: known.userAgent,
    python: "",
    versions: { ...versions, ...(brand ? { [brand.brand]: brand.version } : {}) },
  };
}
