// A bundle at an address, which may come from anybody. manifest.json lists size and hash of every other file, and the
// text of SHA256SUMS follows from it; every file that is loaded is checked, and no path leaves the bundle.
import { BundleError, oneLine, shown } from "./errors.js";
import { parseManifest } from "./manifest.js";
import { Sha256, sha256 } from "./sha256.js";

/**
 * @typedef {{file: string, loaded: number, total: number}} Progress bytes of all files that are wanted
 * @typedef {object} BundleOptions
 * @property {typeof globalThis.fetch} [fetch] in place of the global one
 * @property {import("./store.js").Store | null} [store] where files are kept between visits
 * @property {(progress: Progress) => void} [onProgress]
 * @property {AbortSignal} [signal] ends a download
 */

const MANIFEST = "manifest.json",
  SUMS = "SHA256SUMS",
  AGAIN = "download or copy the bundle again",
  TRIES = 3;
// Of manifest.json and SHA256SUMS, whose sizes nobody tells.
const MAX_BYTES = 2 ** 26;

export class Bundle {
  /** Bytes of each file that is wanted, and how many are there. @type {Map<string, {size: number, loaded: number}>} */
  #wanted = new Map();
  /** What went wrong and does not matter to a generation: one line each. @type {string[]} */
  warnings = [];

  /** @param {URL} url @param {BundleOptions} options @param {import("./manifest.js").Manifest} manifest @param {string} sha256 */
  constructor(url, options, manifest, sha256) {
    /** Of manifest.json, in which all other files have theirs: it names the bundle. */
    this.sha256 = sha256;
    this.url = url;
    this.options = options;
    this.manifest = manifest;
  }

  /** Announces files that are going to be loaded, so that progress has a total. @param {string[]} names */
  expect(names) {
    for (const name of names) this.#wanted.set(name, { size: this.#entry(name).size, loaded: 0 });
  }

  /** @param {string} name */
  #entry(name) {
    address(this.url, name);
    const { files } = this.manifest;
    if (!(name in files)) throw new BundleError(`${name} is not listed in ${MANIFEST}; export again`);
    return files[name];
  }

  /**
   * Loads a file and checks it.
   * @param {string} name its path in the bundle
   * @returns {Promise<Uint8Array<ArrayBuffer>>}
   */
  async file(name) {
    const { size, sha256: hash } = this.#entry(name),
      { store } = this.options;
    this.expect([name]);
    try {
      const kept = await store?.get(hash);
      if (kept && kept.length === size && (await sha256(kept)) === hash) {
        this.#told(name, size);
        return kept;
      }
      if (kept) await store?.delete(hash);
    } catch (e) {
      this.#warn(`${name} cannot be looked for in what was kept: ${oneLine(e)}`);
    }
    const bytes = await this.#download(name, size, hash);
    try {
      await store?.put(hash, bytes);
    } catch (e) {
      this.#warn(`${name} is not kept for the next visit: ${oneLine(e)}`);
    }
    return bytes;
  }

  /** Once, though with little memory a file is loaded in each generation. @param {string} warning */
  #warn(warning) {
    if (!this.warnings.includes(warning)) this.warnings.push(warning);
  }

  /** @param {string} name @param {number} loaded */
  #told(name, loaded) {
    /** @type {any} */ (this.#wanted.get(name)).loaded = loaded;
    const sum = (/** @type {"size" | "loaded"} */ key) =>
      [...this.#wanted.values()].reduce((total, file) => total + file[key], 0);
    this.options.onProgress?.({ file: name, loaded: sum("loaded"), total: sum("size") });
  }

  /**
   * Streams a file into its place; goes on where a connection has ended.
   * @param {string} name
   * @param {number} size
   * @param {string} hash
   */
  async #download(name, size, hash) {
    const bytes = new Uint8Array(size);
    let at = 0,
      sum = new Sha256(),
      why = "";
    for (let tries = 0; tries < TRIES && (at < size || !tries); tries++) {
      const response = await get(this.url, name, this.options, at ? { range: `bytes=${at}-` } : {}).catch((e) => {
        if (!at || this.options.signal?.aborted) throw e; // it never began, or nobody wants it any more
        why = oneLine(e);
      });
      if (!response) continue;
      if (at && response.status !== 206) {
        at = 0; // the server sends it from its beginning
        sum = new Sha256();
      } else if (at && !(response.headers.get("content-range") ?? "").startsWith(`bytes ${at}-`)) {
        throw new BundleError(
          `${name} cannot be resumed: the server sent ${shown(response.headers.get("content-range"))}; try again`,
        );
      }
      try {
        for await (const chunk of chunks(response)) {
          if (at + chunk.length > size)
            throw new BundleError(`${name} has more than the ${size} bytes in ${MANIFEST}: it is damaged; ${AGAIN}`);
          bytes.set(chunk, at);
          sum.update(chunk);
          at += chunk.length;
          this.#told(name, at);
        }
      } catch (e) {
        if (e instanceof BundleError || this.options.signal?.aborted) throw e;
        why = oneLine(e);
      }
    }
    if (at < size) {
      throw new BundleError(
        `${name} ended after ${at} of ${size} bytes, and could not be resumed${why && ` (${why})`}; check the connection, or ${AGAIN}`,
      );
    }
    if (sum.hex() !== hash)
      throw new BundleError(`${name} does not have the hash in ${MANIFEST}: it is damaged; ${AGAIN}`);
    return bytes;
  }
}

/**
 * Opens the bundle at an address and checks its manifest against SHA256SUMS; other files are checked when they are loaded.
 * @param {string | URL} url the bundle's folder, or its manifest.json
 * @param {BundleOptions} [options]
 */
export async function openBundle(url, options = {}) {
  let base;
  try {
    base = new URL(url, globalThis.location?.href);
  } catch {
    throw new BundleError(`no bundle at ${shown(url)}: it is no address; expected that of a folder that export wrote`);
  }
  if (base.pathname.endsWith(`/${MANIFEST}`)) base = new URL(".", base);
  else if (!base.pathname.endsWith("/")) base.pathname += "/";
  const [data, sums] = await Promise.all([MANIFEST, SUMS].map((name) => whole(base, name, options)));
  const manifest = parseManifest(data);
  const targets = manifest.targets.flatMap((each) => Object.values(each.components));
  const graphs = targets.flatMap((each) => [
    ...each.graphs,
    ...each.further.flatMap((sized) => sized.graphs),
    ...(each.model ? [each.model] : []),
  ]);
  for (const name of [
    ...Object.keys(manifest.files),
    ...graphs.flatMap((g) => [g.file ?? MANIFEST, ...g.external_data]),
  ])
    address(base, name);
  const hashes = new Map(Object.entries(manifest.files).map(([name, file]) => [name, file.sha256]));
  const hash = await sha256(data);
  hashes.set(MANIFEST, hash);
  // Sorted as Python sorts, by code points and not by UTF-16.
  const lines = [...hashes].map(([name, hash]) => ({
    key: Array.from(name, (char) => String(char.codePointAt(0)).padStart(7, "0")).join(),
    line: `${hash}  ${name}\n`,
  }));
  const rendered = lines
    .sort((a, b) => (a.key < b.key ? -1 : 1))
    .map(({ line }) => line)
    .join("");
  if (new TextDecoder().decode(sums) !== rendered)
    throw new BundleError(`${SUMS} does not agree with ${MANIFEST}: one of the two is damaged; ${AGAIN}`);
  return new Bundle(base, options, manifest, hash);
}

/** The address of a path in a bundle, never out of it. @param {URL} base @param {string} name */
export function address(base, name) {
  const parts = name.split("/");
  if (parts.some((part) => ["", ".", ".."].includes(part)) || /[\\:\0\n\r]/.test(name) || /\p{Cs}/u.test(name)) {
    throw new BundleError(`the path ${shown(name)} leaves the bundle or is not plain; expected a relative path inside`);
  }
  // Encoded, `%2e%2e`, `?` and `#` are characters of a name. A query, such as a signature, belongs to every file.
  const url = new URL(parts.map(encodeURIComponent).join("/"), base);
  url.search = base.search;
  return url;
}

/** @param {URL} base @param {string} name @param {BundleOptions} options @param {Record<string, string>} [headers] */
async function get(base, name, { fetch = globalThis.fetch, signal }, headers = {}) {
  let response;
  try {
    // A host may let browsers keep files for a while: a bundle that was exported anew has others under the same names.
    response = await fetch(address(base, name), { headers, signal, cache: "no-cache" });
  } catch (e) {
    if (signal?.aborted) throw e;
    throw new BundleError(
      `${name} cannot be fetched from ${base.href}: ${oneLine(e)}; check the address and the connection`,
    );
  }
  if (response.ok) return response;
  await response.body?.cancel();
  if (response.status === 404 && [MANIFEST, SUMS].includes(name)) {
    throw new BundleError(
      `${base.href} is not a bundle: ${name} is missing; expected the address of a folder that export wrote`,
    );
  }
  throw new BundleError(
    `${name} cannot be fetched from ${base.href}: the server answered ${response.status}; ${AGAIN}`,
  );
}

/** @param {URL} base @param {string} name @param {BundleOptions} options */
async function whole(base, name, options) {
  const parts = [];
  let size = 0;
  const response = await get(base, name, options);
  try {
    for await (const chunk of chunks(response)) {
      parts.push(chunk);
      if ((size += chunk.length) > MAX_BYTES)
        throw new BundleError(
          `${name} has more than ${MAX_BYTES} bytes: ${base.href} is not a bundle; check the address`,
        );
    }
  } catch (e) {
    if (e instanceof BundleError || options.signal?.aborted) throw e;
    throw new BundleError(`${name} ended after ${size} bytes: ${oneLine(e)}; check the connection`);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** What a response gives; Safari's streams are not iterable. @param {Response} response */
async function* chunks(response) {
  if (!response.body) return;
  const reader = /** @type {ReadableStream<Uint8Array<ArrayBuffer>>} */ (response.body).getReader();
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) yield read.value;
  } finally {
    reader.cancel().catch(() => {}); // it has ended, or nobody wants the rest
  }
}
