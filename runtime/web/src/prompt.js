// From a prompt to token ids: emphasis, chunks, padding. No encoder runs here.
import { refuse, shown } from "./errors.js";
import { SPACE } from "./tokenizer.js";

/**
 * @typedef {import("./manifest.js").Encoder} Encoder
 * @typedef {{ids: number[], weights: number[]}} Chunk both of the encoder's length
 */

const MAX_WEIGHT = 10,
  MAX_CHUNKS = 64,
  MAX_CHARACTERS = 100000;
// What Python takes for spaces, which JavaScript's \s is not quite.
const GAP = `[${SPACE}\\x1c-\\x1f]*`;
const FACTOR = new RegExp(`:${GAP}([+-]?(?:\\d+\\.?\\d*|\\.\\d+))${GAP}$`);
/** @type {Record<string, string>} */
const OPENING = { ")": "(", "]": "[" };

/**
 * Reads the emphasis out of a prompt: pieces of text with weights. Brackets that do not match stand for themselves.
 * @param {string} prompt
 * @returns {[string, number][]}
 */
export function parsePrompt(prompt) {
  /**
   * Start and end of each mark, and what it is: a text, the factor of a bracket that opens, null where it closes.
   * @type {[number, number, string | number | null][]}
   */
  const marks = [];
  const opened = [];
  for (const found of prompt.matchAll(/\\[()[\]\\]|[()[\]]/g)) {
    const [char] = found,
      start = found.index,
      end = start + char.length;
    if (char === "(" || char === "[") {
      opened.push(marks.length);
      marks.push([start, end, char]); // a text until it has closed
    } else if (char.length === 2) {
      marks.push([start, end, char[1]]);
    } else if (opened.length && marks[opened[opened.length - 1]][2] === OPENING[char]) {
      const mark = marks[/** @type {number} */ (opened.pop())],
        first = Math.max(mark[1] + 1, start - 40); // a factor follows a text
      const factor = char === ")" ? FACTOR.exec(prompt.slice(first, start)) : null;
      mark[2] = factor ? Number(factor[1]) : char === ")" ? 1.1 : 1 / 1.1;
      marks.push([factor ? first + factor.index : start, end, null]);
    }
  }
  /** @type {[string, number][]} */
  const pieces = [];
  const weights = [1];
  let at = 0;
  const add = (/** @type {string} */ text) => {
    const weight = weights[weights.length - 1],
      last = pieces[pieces.length - 1];
    if (last?.[1] === weight) last[0] += text;
    else if (text) pieces.push([text, weight]);
  };
  for (const [start, end, what] of marks) {
    add(prompt.slice(at, start));
    at = end;
    if (typeof what === "string") add(what);
    else if (what === null) weights.pop();
    else weights.push(weights[weights.length - 1] * what);
  }
  add(prompt.slice(at));
  const bad = pieces.find(([, weight]) => !(weight >= 0 && weight <= MAX_WEIGHT));
  refuse(bad, `prompt: the weight of ${shown(bad?.[0].slice(0, 40))} is ${bad?.[1]}; expected 0 to ${MAX_WEIGHT}`);
  return pieces.length ? pieces : [["", 1]];
}

/**
 * The chunks of a prompt, one at least.
 * @param {string} prompt
 * @param {(text: string) => number[]} tokenize without the marks of beginning and end
 * @param {Encoder} encoder
 * @param {boolean} [emphasis] false takes brackets as characters
 * @returns {Chunk[]}
 */
export function tokenized(prompt, tokenize, encoder, emphasis = true) {
  refuse(prompt.length > MAX_CHARACTERS, `prompt: ${prompt.length} characters; expected ${MAX_CHARACTERS} at most`);
  refuse(/\p{Cs}/u.test(prompt), "prompt: it holds a lone surrogate; expected valid Unicode");
  /** @type {number[]} */
  const ids = [],
    weights = /** @type {number[]} */ ([]),
    size = encoder.max_length - 2,
    expansions = new Map(encoder.expansions?.map((run) => [run[0], run]));
  for (const [text, weight] of emphasis ? parsePrompt(prompt) : [/** @type {[string, number]} */ ([prompt, 1])]) {
    for (const token of tokenize(text))
      for (const id of expansions.get(token) ?? [token]) {
        ids.push(id);
        weights.push(weight);
      }
  }
  refuse(
    ids.length > MAX_CHUNKS * size,
    `prompt: ${ids.length} tokens; expected ${MAX_CHUNKS * size} at most; shorten the prompt`,
  );
  return Array.from({ length: Math.max(1, Math.ceil(ids.length / size)) }, (_, i) =>
    makeChunk(encoder, ids.slice(i * size, (i + 1) * size), weights.slice(i * size, (i + 1) * size)),
  );
}

/**
 * Ids between the marks of beginning and end, padded; without ids, what lengthens a prompt to another's length.
 * @param {Encoder} encoder
 * @param {number[]} [ids]
 * @param {number[]} [weights]
 * @returns {Chunk}
 */
export function makeChunk({ bos, eos, pad, max_length }, ids = [], weights = []) {
  const rest = max_length - 2 - ids.length;
  return { ids: [bos, ...ids, eos, ...Array(rest).fill(pad)], weights: [1, ...weights, ...Array(rest + 1).fill(1)] };
}

/**
 * Multiplies each token's state by its weight and restores the mean of the whole.
 * @param {Float32Array} hidden a row for each token
 * @param {number[]} weights
 */
export function emphasize(hidden, weights) {
  if (weights.every((weight) => weight === 1)) return hidden;
  const width = hidden.length / weights.length,
    made = hidden.map((value, k) => value * weights[Math.floor(k / width)]);
  const sum = (/** @type {Float32Array} */ values) => values.reduce((total, value) => total + value, 0);
  const total = sum(made),
    scale = total ? sum(hidden) / total : 1;
  return made.map((value) => value * scale);
}
