// Where files are kept between visits, by their hashes. What comes out of a store is checked like a download.

/**
 * @typedef {object} Store
 * @property {(hash: string) => Promise<Uint8Array<ArrayBuffer> | null>} get
 * @property {(hash: string, bytes: Uint8Array<ArrayBuffer>) => Promise<void>} put
 * @property {(hash: string) => Promise<unknown>} delete
 */

const PREFIX = "/.edgediff/",
  SLICE = 2 ** 20;

/** Files in the browser's Cache API. @implements {Store} */
export class CacheStore {
  /** @param {Cache} cache */
  constructor(cache) {
    this.cache = cache;
  }

  /** Opens the page's store; null where there is none, as on pages that are not secure. @param {string} [name] */
  static async open(name = "edgediff") {
    return globalThis.caches ? new CacheStore(await caches.open(name)) : null;
  }

  /** @param {string} hash */
  async get(hash) {
    const found = await this.cache.match(PREFIX + hash);
    return found ? new Uint8Array(await found.arrayBuffer()) : null;
  }

  /**
   * Given in slices, so that the bytes are not in memory twice.
   * @param {string} hash
   * @param {Uint8Array<ArrayBuffer>} bytes
   */
  async put(hash, bytes) {
    let at = 0;
    const body = new ReadableStream({
      pull(controller) {
        if (at < bytes.length) controller.enqueue(bytes.slice(at, (at += SLICE)));
        else controller.close();
      },
    });
    await this.cache.put(
      PREFIX + hash,
      new Response(body, { headers: { "content-type": "application/octet-stream" } }),
    );
  }

  /** Leaves these files alone; those of a bundle that was exported anew would stay for ever. @param {Set<string>} hashes */
  async prune(hashes) {
    for (const { url } of await this.cache.keys()) {
      const hash = url.slice(url.lastIndexOf("/") + 1);
      if (!hashes.has(hash)) await this.delete(hash);
    }
  }

  /** @param {string} hash */
  delete(hash) {
    return this.cache.delete(PREFIX + hash);
  }
}
