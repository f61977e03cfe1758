// The denoising loop. Each step runs the graphs of a full or of a cached step on a table of tensors that lives from
// step to step; what the last one left under `lowres_feature` is this one's `cache`. All state belongs to the generator.
import { BundleError } from "./errors.js";
import { runsIn, sharesRows } from "./manifest.js";
import { noises } from "./noise.js";
import { beside, joined, range, take } from "./rows.js";

/**
 * @typedef {import("./rows.js").Rows} Rows
 * @typedef {import("./manifest.js").Graph} Graph
 * @typedef {object} Session runs graphs on tensors that it holds in its own form
 * @property {number | null} batch rows that each graph takes; null where any number will do
 * @property {(rows: Rows) => any} put
 * @property {(value: any) => Promise<Rows>} get
 * @property {(graph: Graph, table: Map<string, any>) => Promise<Record<string, any>>} run
 * @property {(value: any) => void} drop gives a tensor's memory back
 * @typedef {object} Request one generation, completely described
 * @property {Graph[]} graphs in the order of a step
 * @property {import("./schedulers.js").Scheduler} scheduler
 * @property {boolean[]} clock
 * @property {number[]} guidance scale of each step; 1 or less runs the conditional rows alone
 * @property {Rows} latents [N, C, H, W], at the noise level of step `start`
 * @property {Record<string, Rows>} cond
 * @property {Record<string, Rows>} uncond
 * @property {bigint} seed
 * @property {Rows | null} [concat] channels after the latent's, which the scheduler does not scale
 * @property {number} [start] first step that is run
 * @property {number} [firstImage]
 * @typedef {object} Step
 * @property {number} index
 * @property {number} timestep
 * @property {boolean} full
 * @property {boolean} guided
 * @property {Float32Array} latents after the step; the caller's own
 * @property {Float32Array} predicted finished latents as this step predicts them; the caller's own
 * @property {Record<string, number>} ms of each graph, `guidance`, `scheduler` and `other`
 * @typedef {{rows: number[], whole: boolean, table: Map<string, any>}} Group rows that go through the graphs together
 */

const CACHE = "cache",
  FEATURE = "lowres_feature";
// A normalization squares its input: above this float32 overflows.
const OVERFLOW = 1e18;

/**
 * Denoises step by step; leaving the generator, or aborting, cancels.
 * @param {Request} request
 * @param {Session} session
 * @param {AbortSignal} [signal]
 * @returns {AsyncGenerator<Step, void, void>}
 */
export async function* denoise(request, session, signal) {
  const { scheduler, graphs, clock, guidance, latents, start = 0, firstImage = 0 } = request;
  const [count, ...shape] = latents.dims,
    size = latents.data.length / count;
  // Rows of one image begin with the same sample: graphs that can repeat it take it once.
  const taking = graphs.filter((g) => g.inputs.some((t) => t.name === "sample")),
    shared = taking.length > 0 && taking.every(sharesRows);
  let x = /** @type {Float32Array} */ (latents.data),
    state = /** @type {Float32Array[] | null} */ (null),
    guided = false;
  /** @type {Group[]} */
  let groups = [];
  try {
    for (let i = start; i < scheduler.timesteps.length; i++) {
      await breathe();
      signal?.throwIfAborted();
      const begin = performance.now(),
        first = i === start;
      /** @type {boolean} */
      const was = guided;
      guided = guidance[i] > 1;
      // Full, since there is no cache yet, or none for unconditional rows that join.
      const full = clock[i] || first || (guided && !was);
      if (first || guided !== was) groups = await regrouped(request, session, groups, guided, !full);
      let input = { data: scheduler.scaleModelInput(i, x), dims: latents.dims };
      if (request.concat) input = /** @type {any} */ (beside([input, request.concat], 1));
      const rows = guided && !shared ? joined(input, input) : input;
      for (const { rows: numbers, whole, table } of groups) {
        set(session, table, "sample", session.put(whole ? rows : take(rows, numbers)));
        set(session, table, "timestep", session.put({ data: scheduler.timesteps.slice(i, i + 1), dims: [1] }));
        if (table.has(FEATURE)) set(session, table, CACHE, table.get(FEATURE));
      }
      const ms = await run(
        session,
        graphs.filter((g) => runsIn(g, full)),
        groups,
      );
      const out = /** @type {Float32Array} */ (
        (await gathered(session, groups, "out_sample", guided ? 2 * count : count)).data
      );
      let output = out;
      if (guided) {
        const before = performance.now(),
          scale = Math.fround(guidance[i]),
          half = out.length / 2;
        output = out.slice(0, half);
        for (let k = 0; k < half; k++) output[k] += scale * (out[half + k] - output[k]);
        ms.guidance = performance.now() - before;
      }
      const before = performance.now(),
        fresh = scheduler.needsNoise ? noises(request.seed, count, size, firstImage, i + 1) : null;
      const [next, kept] = scheduler.step(i, x, output, state, fresh, first);
      ms.scheduler = performance.now() - before;
      const predicted = scheduler.predicted(i, x, output);
      x = next;
      state = kept;
      if (!isBounded(x)) {
        throw new BundleError(
          `the model's output is not finite at step ${i}: latents hold NaN, infinity or more than ${OVERFLOW}; export it in fp32`,
        );
      }
      ms.other = performance.now() - begin - Object.values(ms).reduce((a, b) => a + b, 0);
      yield { index: i, timestep: scheduler.timesteps[i], full, guided, latents: x.slice(), predicted, ms };
    }
  } finally {
    for (const { table } of groups) for (const value of new Set(table.values())) session.drop(value);
  }
}

/** Lets the page, or the worker's messages, have their turn: graphs in WebAssembly leave none. */
export function breathe() {
  return new Promise((done) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      done(undefined);
    };
    port2.postMessage(0);
  });
}

/** @param {Float32Array} values */
function isBounded(values) {
  for (let k = 0; k < values.length; k++) if (!(Math.abs(values[k]) < OVERFLOW)) return false; // so that NaN is refused too
  return true;
}

/**
 * Puts a tensor into a table; what was there goes, unless it has another name too.
 * @param {Session} session
 * @param {Map<string, any>} table
 * @param {string} name
 * @param {any} value
 */
function set(session, table, name, value) {
  const old = table.get(name);
  table.set(name, value);
  if (old && ![...table.values()].includes(old)) session.drop(old);
}

/**
 * Runs a step's graphs for all rows; the milliseconds that each took.
 * @param {Session} session
 * @param {Graph[]} graphs
 * @param {Group[]} groups
 */
async function run(session, graphs, groups) {
  /** @type {Record<string, number>} */
  const ms = Object.fromEntries(graphs.map((g) => [g.name, 0]));
  for (const { table } of groups) {
    for (const graph of graphs) {
      if (graph.file === null) continue;
      const before = performance.now(),
        made = await session.run(graph, table);
      for (const [name, value] of Object.entries(made)) set(session, table, name, value);
      ms[graph.name] += performance.now() - before;
    }
  }
  return ms;
}

/**
 * Rearranges the rows: [unconditional x N, conditional x N] if guided, else the conditional ones alone. A graph of a
 * fixed batch gets the rows of an image together, padded with the last one.
 * @param {Request} request
 * @param {Session} session
 * @param {Group[]} old
 * @param {boolean} guided
 * @param {boolean} keepCache keeps the conditional half, where guidance has just ended
 */
async function regrouped({ latents, cond, uncond }, session, old, guided, keepCache) {
  const count = latents.dims[0],
    { batch } = session;
  let cache = keepCache && old.length ? await gathered(session, old, FEATURE, 2 * count) : null;
  if (cache)
    cache = take(
      cache,
      range(count).map((n) => count + n),
    );
  for (const { table } of old) for (const value of new Set(table.values())) session.drop(value);
  const order = range(count).flatMap((n) => (guided ? [n, count + n] : [n]));
  if (batch) while (order.length % batch) order.push(order[order.length - 1]);
  const groups = batch
    ? range(order.length / batch).map((k) => order.slice(k * batch, (k + 1) * batch))
    : [range(order.length)];
  return groups.map((numbers) => {
    const table = new Map();
    for (const [name, rows] of Object.entries(cond))
      table.set(name, session.put(take(guided ? joined(uncond[name], rows) : rows, numbers)));
    if (cache) table.set(FEATURE, session.put(take(cache, numbers)));
    return { rows: numbers, whole: !batch, table };
  });
}

/**
 * All rows of a tensor in their order, however they are grouped.
 * @param {Session} session
 * @param {Group[]} groups
 * @param {string} name
 * @param {number} count
 * @returns {Promise<Rows>}
 */
async function gathered(session, groups, name, count) {
  const parts = await Promise.all(groups.map(({ table }) => session.get(table.get(name))));
  if (groups[0].whole) return parts[0];
  const order = groups.flatMap(({ rows }) => rows);
  return take(
    joined(...parts),
    range(count).map((n) => order.indexOf(n)),
  );
}
