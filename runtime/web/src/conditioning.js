// What a request says of the condition, checked and made into rows: labels, texts, embeddings.
import { refuse, shown } from "./errors.js";
import { emphasize, makeChunk, tokenized } from "./prompt.js";
import { beside, joined, range, repeated, take, wholeNumbers } from "./rows.js";
import { runOne } from "./sessions.js";

/**
 * @typedef {import("./rows.js").Rows} Rows
 * @typedef {import("./manifest.js").Tensor} Tensor
 * @typedef {string | string[] | null | undefined} Text one for all images, or one for each
 * @typedef {{prompt?: Text, prompt2?: Text, negativePrompt?: Text, negativePrompt2?: Text, clipSkip?: number, emphasis?: boolean}} Texts
 * @typedef {Record<string, Rows>} Named
 */

const TEXT = "encoder_hidden_states",
  MAX_IMAGES = 4096;

/** @param {unknown} count */
export function checkCount(count) {
  refuse(
    !Number.isInteger(count) || Number(count) < 1 || Number(count) > MAX_IMAGES,
    `numImages is ${shown(count)}; expected a whole number above 0, ${MAX_IMAGES} at most`,
  );
}

/**
 * Classes of every image, and those of guidance.
 * @param {import("./manifest.js").Manifest["conditioning"]} known
 * @param {string | number | (string | number)[] | null | undefined} label
 * @param {number} count
 * @param {boolean} guided
 * @param {string} dtype
 * @returns {[Named, Named]}
 */
export function classRows({ labels, null_label: none }, label, count, guided, dtype) {
  const given = Array.isArray(label) ? label : Array(count).fill(label);
  refuse(given.length !== count, `label has ${given.length} entries for ${count} images; expected one each`);
  const rows = (/** @type {number[]} */ values) => ({ class_labels: wholeNumbers(dtype, values) });
  const cond = rows(
    given.map((each, i) => {
      const index =
        each === null || each === undefined
          ? i % labels.length
          : typeof each === "number"
            ? each
            : labels.indexOf(each);
      refuse(
        !Number.isInteger(index) || index < 0 || index >= labels.length,
        `no label ${shown(each)}; choices: ${labels.join(", ")}`,
      );
      return index;
    }),
  );
  refuse(guided && none === null, "guidanceScale is above 1, but the model has no null class; give 1");
  return [cond, guided ? rows(Array(count).fill(none)) : {}];
}

/** The number of images that a list of texts is for; 1 where one text is for all. @param {Texts} texts */
export function countOf({ prompt, prompt2 }) {
  const list = [prompt, prompt2].find(Array.isArray);
  refuse(list && !list.length, "prompt is an empty list; expected a text, or a list with one for each image");
  return list?.length ?? 1;
}

/**
 * The UNet's inputs of every image's texts and, where guidance needs them, of what it leads away from.
 * @param {NonNullable<import("./manifest.js").Manifest["prompt"]>} spec
 * @param {((text: string) => number[])[]} tokenizers
 * @param {<T>(component: string, job: (session: import("./loop.js").Session, graph: import("./manifest.js").Graph) => Promise<T>) => Promise<T>} use
 * @param {Texts} texts
 * @param {number} count
 * @param {boolean} guided
 * @param {boolean} anyLength whether the UNet takes more than one chunk
 * @returns {Promise<[Named, Named]>}
 */
export async function encodeTexts(
  { encoders, zeros_without_negative: zeros },
  tokenizers,
  use,
  texts,
  count,
  guided,
  anyLength,
) {
  const { prompt, prompt2, negativePrompt, negativePrompt2, clipSkip = 0, emphasis = true } = texts;
  /** For each image, the text of each encoder. @param {string} name @param {Text} first @param {Text} second */
  const each = (name, first, second) => {
    refuse(
      encoders.length < 2 && second != null,
      `${name}2 was given, but the bundle has one text encoder; leave it out`,
    );
    const columns = encoders.map((_, k) => {
      const text = k && second != null ? second : first,
        list = Array.isArray(text) ? text : Array(count).fill(text);
      refuse(
        !list.every((one) => typeof one === "string"),
        `${name} is ${shown(text)}; expected a text, or a list with one for each image`,
      );
      refuse(list.length !== count, `${name} has ${list.length} entries for ${count} images; expected one each`);
      return list;
    });
    return range(count).map((n) => columns.map((column) => String(column[n])));
  };
  const positive = each("prompt", prompt, prompt2),
    away = guided && !(zeros && negativePrompt == null && negativePrompt2 == null);
  const rows = [...positive, ...(away ? each("negativePrompt", negativePrompt ?? "", negativePrompt2) : [])];
  const chunks = encoders.map((encoder, k) => {
    refuse(
      !Number.isInteger(clipSkip) || clipSkip < 0 || clipSkip >= encoder.hidden.length,
      `clipSkip is ${shown(clipSkip)}; expected a whole number from 0 to ${encoder.hidden.length - 1}`,
    );
    return rows.map((row) => tokenized(row[k], tokenizers[k], encoder, emphasis));
  });
  const length = Math.max(...chunks.flat().map((list) => list.length));
  refuse(
    length > 1 && !anyLength,
    `prompt: it is longer than ${encoders[0].max_length - 2} tokens, the most that the graphs take; shorten it`,
  );
  const states = [];
  /** @type {Rows | null} */
  let pooled = null;
  for (const [k, encoder] of encoders.entries()) {
    /** Each distinct chunk runs once. @type {Map<string, Named>} */
    const made = new Map();
    const hidden = await use(encoder.component, async (session, graph) => {
      const found = [];
      for (const list of chunks[k]) {
        const parts = [];
        for (const { ids, weights } of [...list, ...Array(length - list.length).fill(makeChunk(encoder))]) {
          const key = ids.join(),
            { dtype, shape } = graph.inputs[0],
            { data } = wholeNumbers(dtype, ids);
          const run = made.get(key) ?? (await runOne(session, graph, { data, dims: [1, Number(shape[1])] }));
          made.set(key, run);
          const { data: values, dims } = run[encoder.hidden[clipSkip]];
          parts.push({ data: emphasize(/** @type {Float32Array} */ (values), weights), dims });
        }
        found.push(beside(parts, 1));
      }
      return joined(...found);
    });
    states.push(hidden);
    const { pooled: name } = encoder;
    if (name !== null)
      pooled = joined(...chunks[k].map(([{ ids }]) => /** @type {Named} */ (made.get(ids.join()))[name]));
  }
  /** @type {Named} */
  const all = { [TEXT]: beside(states, 2), ...(pooled ? { text_embeds: pooled } : {}) };
  const part = (/** @type {number} */ from) =>
    Object.fromEntries(
      Object.entries(all).map(([name, each]) => [
        name,
        take(
          each,
          range(count).map((n) => from + n),
        ),
      ]),
    );
  const cond = part(0);
  if (!guided) return [cond, {}];
  return [
    cond,
    away
      ? part(count)
      : Object.fromEntries(
          Object.entries(cond).map(([name, { data, dims }]) => [name, { data: new Float32Array(data.length), dims }]),
        ),
  ];
}

/**
 * What SDXL is told of a picture's size.
 * @param {number} width 6, or 5 of the refiner
 * @param {number} high
 * @param {number} wide
 * @param {boolean} negative
 * @returns {Rows}
 */
export function timeIds(width, high, wide, negative) {
  /** @type {Record<number, number[]>} */
  const known = { 6: [high, wide], 5: [negative ? 2.5 : 6] },
    ends = known[width];
  refuse(!ends, `the model needs addedCond with time_ids of width ${width}; only 6 and 5 have a usual form`);
  return { data: Float32Array.of(high, wide, 0, 0, ...ends), dims: [1, width] };
}

/**
 * What a latent consistency model is told of the guidance (Luo et al. 2023, section 4.2).
 * @param {number} scale
 * @param {number} width
 * @param {number} count
 * @returns {Rows}
 */
export function guidanceEmbedding(scale, width, count) {
  const half = Math.floor(width / 2),
    data = new Float32Array(width * count);
  for (let k = 0; k < width * count; k++) {
    const at = k % width,
      angle = (scale - 1) * 1000 * Math.exp(((at % half) * -Math.log(10000)) / (half - 1));
    if (at < 2 * half) data[k] = at < half ? Math.sin(angle) : Math.cos(angle);
  }
  return { data, dims: [count, width] };
}

/**
 * Checks arrays against the graphs' inputs and repeats single rows for every image.
 * @param {Map<string, Tensor>} needed
 * @param {Named} given
 * @param {number} count
 * @param {string} [which]
 */
export function rowsOf(needed, given, count, which = "") {
  const unknown = Object.keys(given).find((name) => !needed.has(name));
  refuse(unknown, `${which}${unknown} is not an input of this model; it takes ${[...needed.keys()].join(", ")}`);
  /** @type {Named} */
  const rows = {};
  for (const [name, { shape, dtype }] of needed) {
    const array = given[name],
      spelt = `[${shape.join(", ")}]`;
    refuse(
      !array,
      `the model needs ${name === TEXT ? `a prompt, or ${which}promptEmbeds` : which + name} of shape ${spelt}`,
    );
    const { data, dims } = array,
      kind = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array }[dtype];
    const fits =
      Array.isArray(dims) &&
      dims.length === shape.length &&
      dims.every((n, k) => (k ? (shape[k] === "tokens" ? n > 0 : n === shape[k]) : n === 1 || n === count));
    refuse(
      !fits || !kind || !(data instanceof kind) || data.length !== dims.reduce((a, b) => a * b, 1),
      `${which}${name} has shape ${shown(dims)}; expected {data, dims} of ${dtype} ${spelt} with 1 or ${count} rows`,
    );
    refuse(data instanceof Float32Array && !data.every(Number.isFinite), `${which}${name} holds NaN or infinity`);
    rows[name] = repeated(array, count);
  }
  return rows;
}
