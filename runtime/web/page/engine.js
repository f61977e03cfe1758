// The worker, as the page calls it.

/**
 * @typedef {{width: number, height: number, data: Uint8ClampedArray<ArrayBuffer>}} Image
 * @typedef {{type: "step", done: number, count: number, full: boolean, ms: Record<string, number>,
 *   image: Image | null}} StepMessage
 * @typedef {{type: "result", image: Image | null, ledger: {index: number, full: boolean, guided: boolean, rows: number,
 *   ms: Record<string, number>}[], mask: number[], stages: Record<string, number>, ms: number,
 *   macs: {done: number, uncached: number}, warnings: string[], seed: string}} ResultMessage
 */

export class Engine {
  #last = 0;
  /** @type {Map<number | string, {resolve: (value: any) => void, reject: (error: Error) => void, told: (event: any) => void}>} */
  #jobs = new Map();
  /** What the worker said of the bundle, and the milliseconds until then. @type {any} */
  opened = null;
  /** Why the worker answers no more, until `start` begins another; null while it does. @type {string | null} */
  #dead = null;
  /** @type {Worker | null} */
  worker = null;

  /** Begins with a worker, or anew with another one, whose memory is empty. */
  start() {
    this.worker?.terminate();
    this.#end("the worker was started anew");
    this.#dead = null;
    this.worker = new Worker(new URL("worker.js", location.href), { type: "module" });
    this.worker.addEventListener("message", ({ data }) => this.#hear(data));
    this.worker.addEventListener("error", (event) => {
      event.preventDefault();
      this.#dead = event.message || "the worker cannot be started; load the page again";
      this.#end(this.#dead);
    });
  }

  get isDead() {
    return this.#dead !== null;
  }

  /** @param {string} why */
  #end(why) {
    for (const job of this.#jobs.values()) job.reject(new Error(why));
    this.#jobs.clear();
  }

  /** @param {any} data */
  #hear(data) {
    const key = data.id ?? "open";
    const job = this.#jobs.get(key);
    if (data.type === "opened" || data.type === "result") job?.resolve(data);
    else if (data.type === "error") job?.reject(Object.assign(new Error(data.message), { name: data.name }));
    // What is loaded while a picture is drawn.
    else if (data.type === "progress" && !job) return this.#jobs.forEach((each) => each.told(data));
    else return job?.told(data);
    this.#jobs.delete(key);
  }

  /** @param {number | string} key @param {any} message @param {(event: any) => void} told @returns {Promise<any>} */
  #ask(key, message, told) {
    return new Promise((resolve, reject) => {
      if (this.#dead !== null) throw new Error(this.#dead);
      this.#jobs.set(key, { resolve, reject, told });
      this.worker?.postMessage(message);
    });
  }

  /** Opens the bundle at an address. @param {object} options @param {(progress: {loaded: number, total: number}) => void} told */
  async open(options, told) {
    const before = performance.now(),
      opened = await this.#ask("open", { type: "open", ...options }, told);
    return (this.opened = { ...opened, ms: performance.now() - before });
  }

  /**
   * Draws; told of stages, warnings and steps.
   * @param {import("../src/pipeline.js").Arguments} request
   * @param {{signal?: AbortSignal, shows?: boolean, told?: (event: any) => void}} [options]
   * @returns {Promise<ResultMessage>}
   */
  async draw(request, { signal, shows = false, told = () => {} } = {}) {
    signal?.throwIfAborted();
    const id = ++this.#last,
      cancel = () => this.worker?.postMessage({ type: "cancel", id });
    signal?.addEventListener("abort", cancel);
    const done = this.#ask(id, { type: "draw", id, request, shows }, told);
    return done.finally(() => signal?.removeEventListener("abort", cancel));
  }
}
