// CLIP's tokenizer, read from a `tokenizer.json`: byte-level BPE on lower-case words.
import { BundleError, oneLine } from "./errors.js";

// Unicode's White_Space, which JavaScript's \s is not quite.
export const SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const SPACES = new RegExp(`[${SPACE}]+`, "gu");
const WORD = `'s|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^${SPACE}\\p{L}\\p{N}]+`;
// A mark that is written in capitals is no mark, but what follows it is a word of its own.
const WORDS = new RegExp(`<\\|(?:start|end)oftext\\|>|${WORD}`, "gu"),
  PARTS = new RegExp(WORD, "gu");
const SUFFIX = "</w>";

/** The character that stands for each byte: itself where it is printable, else one from 256 on. */
const BYTES = (() => {
  let next = 256;
  const printable = (/** @type {number} */ b) => (b > 32 && b < 127) || (b > 160 && b !== 173);
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : next++));
})();

/** As words are looked up; a character at a time, since a whole text would give a word's last sigma another form. */
const normalized = (/** @type {string} */ text) =>
  Array.from(text.normalize("NFC").replace(SPACES, " "), (char) => char.toLowerCase()).join("");

/** Tokens that were added to a vocabulary: each is found wherever it stands, also within a word. */
class Added {
  /** @type {Map<string, number>} */
  #ids;
  /** @type {RegExp} */
  #pattern;

  /** @param {{content: string, id: number}[]} tokens */
  constructor(tokens) {
    this.#ids = new Map(tokens.map(({ content, id }) => [content, id]));
    // Of those that begin at the same place the longest.
    const contents = [...this.#ids.keys()].filter(Boolean).sort((a, b) => b.length - a.length);
    const escaped = contents.map((content) => content.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
    this.#pattern = new RegExp(`(${escaped.join("|") || "$.^"})`);
  }

  /** The tokens' ids, and the texts between them. @param {string} text @returns {(string | number)[]} */
  divide(text) {
    return text
      .split(this.#pattern)
      .map((part, i) => (i % 2 ? /** @type {number} */ (this.#ids.get(part)) : part));
  }
}

export class Tokenizer {
  /** @type {Map<string, number>} */
  #vocabulary;
  /** By both parts' ids: the merge's rank, and the id of what it makes. @type {Map<number, [number, number]>} */
  #merges = new Map();
  /** Marks such as <|endoftext|>, taken as they are written. @type {Added} */
  #marks;
  /** Tokens that textual inversion learnt, for one, which may be written in any case. @type {Added} */
  #learnt;

  /** @param {Uint8Array} bytes of a `tokenizer.json` @param {string} [name] for messages */
  constructor(bytes, name = "tokenizer.json") {
    try {
      const { model, added_tokens: added } = JSON.parse(new TextDecoder().decode(bytes));
      if (model.type !== "BPE" || model.end_of_word_suffix !== SUFFIX) throw new Error("it is not CLIP's");
      this.#vocabulary = new Map(Object.entries(model.vocab));
      model.merges.forEach((/** @type {string | string[]} */ merge, /** @type {number} */ rank) => {
        const [a, b] = typeof merge === "string" ? merge.split(" ") : merge;
        this.#merges.set(this.#key(this.#id(a), this.#id(b)), [rank, this.#id(a + b)]);
      });
      this.#marks = new Added(added.filter((/** @type {any} */ each) => !each.normalized));
      this.#learnt = new Added(
        added
          .filter((/** @type {any} */ each) => each.normalized)
          .map((/** @type {any} */ each) => ({ ...each, content: normalized(each.content) })),
      );
    } catch (e) {
      throw new BundleError(`${name}: it cannot be read as a tokenizer (${oneLine(e)}); export again`);
    }
  }

  /** @param {string} token */
  #id(token) {
    const id = this.#vocabulary.get(token);
    if (id === undefined) throw new Error(`${token} is not in its vocabulary`);
    return id;
  }

  /** @param {number} a @param {number} b */
  #key(a, b) {
    return a * 2 ** 24 + b;
  }

  /** Token ids, without the marks of beginning and end. @param {string} text @returns {number[]} */
  encode(text) {
    /** @type {number[]} */
    const ids = [];
    for (const part of this.#marks.divide(text))
      if (typeof part === "number") ids.push(part);
      else
        for (const plain of this.#learnt.divide(normalized(part)))
          if (typeof plain === "number") ids.push(plain);
          else
            for (const [words] of plain.matchAll(WORDS))
              for (const [word] of words.matchAll(PARTS)) ids.push(...this.#word(word));
    return ids;
  }

  /** @param {string} word */
  #word(word) {
    const chars = Array.from(new TextEncoder().encode(word), (byte) => BYTES[byte]);
    chars[chars.length - 1] += SUFFIX;
    let ids = chars.map((char) => this.#id(char));
    const rankAt = (/** @type {number} */ i) => this.#merges.get(this.#key(ids[i], ids[i + 1]))?.[0] ?? Infinity;
    for (;;) {
      let best = Infinity;
      for (let i = 0; i + 1 < ids.length; i++) best = Math.min(best, rankAt(i));
      if (best === Infinity) return ids;
      /** @type {number[]} */
      const merged = [];
      for (let i = 0; i < ids.length; i++) {
        if (i + 1 < ids.length && rankAt(i) === best)
          merged.push(/** @type {[number, number]} */ (this.#merges.get(this.#key(ids[i], ids[++i])))[1]);
        else merged.push(ids[i]);
      }
      ids = merged;
    }
  }
}
