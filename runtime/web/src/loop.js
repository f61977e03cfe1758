// The denoising loop. Each step runs the graphs of a full or of a cached step on a table of tensors that lives from
// step to step; what the last one left under `lowres_feature` is this one's `cache`. All state belongs to the generator.
import { BundleError } from "./errors.js";
import { ATTENTION_ROWS, CONTROLNET, FEATURE_ROWS, runsIn, sharesRows } from "./manifest.js";
import { noises } from "./noise.js";
import { beside, joined, range, take, wholeNumbers } from "./rows.js";

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
 * @property {number | null} [imageGuidance] how far results go towards the image in `concat` (Brooks et al. 2023,
 *   equation 3): guided steps have three rows for an image. null has two
 * @property {Kept | null} [kept] what does not change
 * @property {Record<string, Rows>} [fixed] what graphs take that is the same for all rows and steps: low-rank factors
 * @property {Source | null} [source] an inverted picture that is drawn along, for graphs that take other rows' features
 * @typedef {object} Source an inverted picture, of which others take (Tumanyan et al. 2022, section 4)
 * @property {Rows[]} latents what the UNet sees of it at each call, [N, C, H, W]
 * @property {Record<string, Rows>} cond its rows of each conditioning tensor
 * @property {Record<string, number>} calls for how many calls, from the first, others take its `attention_rows` and its
 *   `feature_rows`
 * @typedef {"source" | "uncond" | "image" | "cond"} Part what a row of an image is: the inverted picture; without text; so
 *   beside an image; with text
 * @typedef {object} Kept what stays as it was while the rest is drawn anew
 * @property {Float32Array} mask [N, 1, H, W], 1 where the picture is drawn anew, 0 where it stays
 * @property {Float32Array} latents [N, C, H, W], finished, of what stays
 * @property {Float32Array} noise what they are under at every step, the same shape
 * @typedef {object} Step
 * @property {number} index
 * @property {number} timestep
 * @property {boolean} full
 * @property {boolean} guided
 * @property {number} rows of an image: 1, 2 where guided, 3 where the image guides too; with an inverted picture one more
 * @property {Float32Array} latents after the step; the caller's own
 * @property {Float32Array} predicted finished latents as this step predicts them; the caller's own
 * @property {Record<string, number>} ms of each graph, `guidance`, `scheduler` and `other`
 * @typedef {{rows: number[], whole: boolean, table: Map<string, any>}} Group rows that go through the graphs together: their
 *   numbers, and whether they are all there are
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
  const { scheduler, graphs, clock, guidance, latents, concat, kept, start = 0, firstImage = 0 } = request;
  const { imageGuidance = null, source = null } = request;
  const [count, ...shape] = latents.dims,
    size = latents.data.length / count;
  // Rows of one image begin with the same sample: graphs that can repeat it take it once.
  const taking = graphs.filter((g) => g.inputs.some((t) => t.name === "sample")),
    shared = taking.length > 0 && taking.every(sharesRows) && imageGuidance === null;
  let x = /** @type {Float32Array} */ (latents.data),
    state = /** @type {Float32Array[] | null} */ (null),
    parts = /** @type {Part[]} */ ([]),
    groups = /** @type {Group[]} */ ([]);
  const takesRows = graphs.flatMap((g) => g.inputs).find((t) => t.name === ATTENTION_ROWS);
  try {
    for (let i = start; i < scheduler.timesteps.length; i++) {
      await breathe();
      signal?.throwIfAborted();
      const begin = performance.now(),
        first = i === start;
      const before = parts;
      parts = partsOf(request, i);
      const guided = guidance[i] > 1;
      // Full, since there is no cache yet, or none for rows that join.
      const full = clock[i] || first || !parts.every((part) => before.includes(part));
      if (String(parts) !== String(before)) groups = await regrouped(request, session, groups, parts, before, !full);
      const input = { data: scheduler.scaleModelInput(i, x), dims: latents.dims },
        sampled = shared && parts[0] !== "source" ? parts.slice(-1) : parts,
        rows = sampleRows(input, concat ?? null, source && source.latents[i], sampled);
      for (const { rows: numbers, whole, table } of groups) {
        set(session, table, "sample", session.put(whole ? rows : take(rows, numbers)));
        set(session, table, "timestep", session.put({ data: scheduler.timesteps.slice(i, i + 1), dims: [1] }));
        if (table.has(FEATURE)) set(session, table, CACHE, table.get(FEATURE));
        for (const name of takesRows ? [ATTENTION_ROWS, FEATURE_ROWS] : []) {
          const taken = numbers.map((number, k) =>
            source && i < source.calls[name] ? numbers.indexOf(number % count) : k,
          );
          set(session, table, name, session.put(wholeNumbers(takesRows?.dtype, taken)));
        }
      }
      const ms = await run(
        session,
        graphs.filter((g) => runsIn(g, full)),
        groups,
      );
      const made = await gathered(session, groups, "out_sample", parts.length * count),
        out = /** @type {Float32Array} */ (made.data);
      let output = parts[0] === "source" ? out.subarray(out.length / parts.length) : out;
      if (guided) {
        const began = performance.now();
        output = guidedBy(output, imageGuidance === null ? 2 : 3, guidance[i], imageGuidance ?? 0);
        ms.guidance = performance.now() - began;
      }
      const began = performance.now(),
        fresh = scheduler.needsNoise ? noises(request.seed, count, size, firstImage, i + 1) : null;
      const [next, after] = scheduler.step(i, x, output, state, fresh, first);
      if (kept) keep(next, scheduler.addNoise(i + 1, kept.latents, kept.noise), kept.mask, count);
      ms.scheduler = performance.now() - began;
      const predicted = scheduler.predicted(i, x, output);
      if (kept) keep(predicted, kept.latents, kept.mask, count);
      x = next;
      state = after;
      if (!isBounded(x)) {
        throw new BundleError(
          `the model's output is not finite at step ${i}: latents hold NaN, infinity or more than ${OVERFLOW}; export it in fp32`,
        );
      }
      ms.other = performance.now() - begin - Object.values(ms).reduce((a, b) => a + b, 0);
      yield {
        index: i,
        timestep: scheduler.timesteps[i],
        full,
        guided,
        rows: parts.length,
        latents: x.slice(),
        predicted,
        ms,
      };
    }
  } finally {
    for (const { table } of groups) for (const value of new Set(table.values())) session.drop(value);
  }
}

/** What an image's rows are in a step, in their order. @param {Request} request @param {number} i @returns {Part[]} */
function partsOf({ guidance, imageGuidance = null, source }, i) {
  /** @type {Part[]} */
  const guided = imageGuidance === null ? ["uncond"] : ["uncond", "image"],
    isDrawn = source && Object.values(source.calls).some((calls) => i < calls);
  return [...(isDrawn ? /** @type {Part[]} */ (["source"]) : []), ...(guidance[i] > 1 ? guided : []), "cond"];
}

/**
 * The sample of every row; without an image for a row that sees none in the concatenated channels.
 * @param {Rows} input
 * @param {Rows | null} concat
 * @param {Rows | null} source
 * @param {Part[]} parts
 */
function sampleRows(input, concat, source, parts) {
  const rows = parts.map((part) => {
    const x = part === "source" && source ? source : input;
    if (!concat) return x;
    const isBlank = part === "uncond" && parts.includes("image");
    return beside([x, isBlank ? { data: new Float32Array(concat.data.length), dims: concat.dims } : concat], 1);
  });
  return rows.length > 1 ? joined(...rows) : rows[0];
}

/**
 * What guidance makes of the rows' outputs, a new array.
 * @param {Float32Array} out
 * @param {number} parts
 * @param {number} scale
 * @param {number} imageScale
 */
function guidedBy(out, parts, scale, imageScale) {
  const size = out.length / parts,
    made = out.slice(0, size),
    [g, h] = [scale, imageScale].map(Math.fround);
  if (parts === 2) for (let k = 0; k < size; k++) made[k] += g * (out[size + k] - made[k]);
  else
    for (let k = 0; k < size; k++) made[k] += h * (out[size + k] - made[k]) + g * (out[2 * size + k] - out[size + k]);
  return made;
}

/**
 * Puts back what stays, where the mask is 0.
 * @param {Float32Array} drawn [N, C, H, W], changed
 * @param {Float32Array} stays
 * @param {Float32Array} mask [N, 1, H, W]
 * @param {number} count
 */
function keep(drawn, stays, mask, count) {
  const area = mask.length / count,
    size = drawn.length / count;
  for (let k = 0; k < drawn.length; k++) if (!mask[Math.floor(k / size) * area + (k % area)]) drawn[k] = stays[k];
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
 * Rearranges the rows: those of all images for the first part, then those for the next, the conditional ones last. A graph
 * of a fixed batch gets the rows of an image together, padded with the last one.
 * @param {Request} request
 * @param {Session} session
 * @param {Group[]} old
 * @param {Part[]} parts
 * @param {Part[]} before those of the old groups
 * @param {boolean} keepCache keeps what cached steps take, of the rows that go on
 */
async function regrouped(request, session, old, parts, before, keepCache) {
  const { latents, cond, uncond, source, graphs, fixed = {} } = request,
    count = latents.dims[0],
    { batch } = session;
  // What cached steps take from the last full one: the cache, and a ControlNet's residuals.
  /** @type {Record<string, Rows>} */
  const kept = {},
    residuals = graphs
      .filter(({ name }) => name === CONTROLNET)
      .flatMap(({ outputs }) => outputs.map(({ name }) => name));
  if (keepCache && old.length) {
    const going = parts.flatMap((part) => range(count).map((n) => before.indexOf(part) * count + n));
    for (const name of [FEATURE, ...residuals])
      kept[name] = take(await gathered(session, old, name, before.length * count), going);
  }
  for (const { table } of old) for (const value of new Set(table.values())) session.drop(value);
  const order = range(count).flatMap((n) => parts.map((_, part) => part * count + n));
  if (batch) while (order.length % batch) order.push(order[order.length - 1]);
  const groups = batch
    ? range(order.length / batch).map((k) => order.slice(k * batch, (k + 1) * batch))
    : [range(order.length)];
  return groups.map((numbers) => {
    const table = new Map();
    for (const name of Object.keys(cond)) {
      const rows = parts.map(
        (part) => (part === "cond" ? cond : part === "source" && source ? source.cond : uncond)[name],
      );
      table.set(name, session.put(take(joined(...rows), numbers)));
    }
    for (const [name, rows] of Object.entries(kept)) table.set(name, session.put(take(rows, numbers)));
    for (const [name, rows] of Object.entries(fixed)) table.set(name, session.put(rows));
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
