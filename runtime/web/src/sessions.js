// ONNX Runtime Web behind the loop's interface.
import { BundleError, oneLine, refuse, RequestError, shown } from "./errors.js";

/**
 * @typedef {import("./manifest.js").Graph} Graph
 * @typedef {import("./manifest.js").Tensor} Tensor
 * @typedef {import("./rows.js").Rows} Rows
 * @typedef {"wasm" | "webgpu"} Backend
 * @typedef {{backend: Backend, threads?: number, lowMemory?: boolean, wasmPaths?: any}} SessionOptions
 */

const OUT = "out_sample";
// One module holds one run at a time, whatever the session.
let running = Promise.resolve();

/** @template T @param {() => Promise<T>} job @returns {Promise<T>} */
function alone(job) {
  const done = running.then(job);
  running = done.then(
    () => {},
    () => {},
  );
  return done;
}

/**
 * What runs the graphs: the caller's choice, or WebGPU where there is an adapter that takes them.
 * @param {string | undefined} asked
 * @param {boolean} half whether graphs compute in float16
 * @returns {Promise<Backend>}
 */
export async function chooseBackend(asked, half) {
  refuse(
    asked !== undefined && asked !== "wasm" && asked !== "webgpu",
    `backend is ${shown(asked)}; expected wasm or webgpu`,
  );
  if (asked === "wasm") return asked;
  const adapter = await /** @type {any} */ (globalThis.navigator)?.gpu?.requestAdapter().catch(() => null);
  if (adapter && (!half || adapter.features.has("shader-f16"))) return "webgpu";
  refuse(
    asked,
    `backend webgpu: this browser has no adapter for it${adapter ? " that computes in float16" : ""}; take wasm`,
  );
  return "wasm";
}

/**
 * Threads of WebAssembly: what was asked for, else one for each core, four at most; one where the page may have no more.
 * Of more than four a phone's would be its slow cores.
 * @param {number} [asked]
 */
export function threadsOf(asked) {
  const { crossOriginIsolated, navigator } = globalThis;
  if (crossOriginIsolated === false) return 1;
  return asked ?? (crossOriginIsolated ? Math.min(4, navigator?.hardwareConcurrency || 1) : 1);
}

/** A component's graphs, loaded. @implements {Session} @typedef {import("./loop.js").Session} Session */
export class OrtSession {
  /**
   * @param {typeof import("onnxruntime-web")} ort
   * @param {Map<string, import("onnxruntime-web").InferenceSession>} loaded
   * @param {number | null} batch
   */
  constructor(ort, loaded, batch) {
    this.ort = ort;
    this.loaded = loaded;
    this.batch = batch;
  }

  /**
   * Loads and checks a component of the ONNX target.
   * @param {import("./bundle.js").Bundle} bundle
   * @param {import("./manifest.js").Component} component
   * @param {SessionOptions} options
   */
  static async open(bundle, component, { backend, threads, wasmPaths, lowMemory = false }) {
    const stored = component.dtype !== "int8" && Object.keys(component.weights).length > 0;
    const ort = /** @type {typeof import("onnxruntime-web")} */ (
      await (backend === "wasm" ? import("onnxruntime-web/wasm") : import("onnxruntime-web/webgpu"))
    );
    // Both hold from the module's first session on.
    ort.env.wasm.numThreads = threadsOf(threads);
    if (wasmPaths !== undefined) ort.env.wasm.wasmPaths = wasmPaths;
    /** Weights that graphs share are loaded once. @type {Map<string, Uint8Array>} */
    const weights = new Map();
    const loaded = new Map();
    try {
      for (const graph of component.graphs) {
        if (graph.file === null) continue;
        const folder = graph.file.slice(0, graph.file.lastIndexOf("/") + 1);
        /** @type {{path: string, data: Uint8Array}[]} */
        const externalData = [];
        for (const name of graph.external_data) {
          if (!name.startsWith(folder))
            throw new BundleError(`${name} does not lie beside ${graph.file}; export again`);
          const data = weights.get(name) ?? (await bundle.file(name));
          weights.set(name, data);
          externalData.push({ path: name.slice(folder.length), data });
        }
        // The cache and the skip connections stay on the GPU. Outputs are not preallocated: those stay unwritten.
        const place = (/** @type {Tensor} */ t) =>
          backend === "webgpu" && component.stage === "step" && t.name !== OUT ? "gpu-buffer" : "cpu";
        const preferredOutputLocation = /** @type {any} */ (
          Object.fromEntries(graph.outputs.map((t) => [t.name, place(t)]))
        );
        const model = await bundle.file(graph.file);
        // Weights that are stored in fewer bits are made once; with little memory in each run, where ONNX Runtime would
        // else round the features to eight bits.
        const extra = stored
          ? { session: lowMemory ? { qdq_matmulnbits_accuracy_level: "1" } : { disable_quant_qdq: "1" } }
          : {};
        const made = await alone(() =>
          ort.InferenceSession.create(model, {
            executionProviders: [backend],
            externalData,
            preferredOutputLocation,
            extra,
          }),
        ).catch((e) => {
          throw new BundleError(`${graph.file} cannot be loaded: ${oneLine(e)}; take another backend or export again`);
        });
        loaded.set(graph.name, made);
        check(graph, "inputs", made.inputMetadata);
        check(graph, "outputs", made.outputMetadata);
      }
    } catch (e) {
      await release(loaded);
      throw e;
    }
    return new OrtSession(ort, loaded, component.batch);
  }

  /** @param {Rows} rows */
  put({ data, dims }) {
    const dtype =
      data instanceof Float32Array
        ? "float32"
        : data instanceof BigInt64Array
          ? "int64"
          : data instanceof Int32Array
            ? "int32"
            : "float16";
    return new this.ort.Tensor(/** @type {any} */ (dtype), /** @type {any} */ (data), dims);
  }

  /** @param {import("onnxruntime-web").Tensor} value @returns {Promise<Rows>} */
  async get(value) {
    return { data: /** @type {any} */ (await value.getData()), dims: [...value.dims] };
  }

  /** @param {Graph} graph @param {Map<string, any>} table */
  async run(graph, table) {
    const session = /** @type {import("onnxruntime-web").InferenceSession} */ (this.loaded.get(graph.name));
    const feeds = Object.fromEntries(graph.inputs.map((t) => [t.name, table.get(t.name)]));
    return alone(() => session.run(feeds)).catch((e) => {
      throw new RequestError(`${graph.name} cannot run: ${oneLine(e)}; ask for fewer images at once`);
    });
  }

  /** @param {import("onnxruntime-web").Tensor} value */
  drop(value) {
    if (value.location === "gpu-buffer") value.dispose();
  }

  release() {
    return release(this.loaded);
  }
}

/** @param {Map<string, import("onnxruntime-web").InferenceSession>} loaded */
async function release(loaded) {
  for (const session of loaded.values()) await alone(() => session.release());
}

/**
 * Compares what a graph's file says of its tensors with the manifest.
 * @param {Graph} graph
 * @param {"inputs" | "outputs"} side
 * @param {readonly any[]} found
 */
function check(graph, side, found) {
  const said = graph[side];
  const fits = (/** @type {Tensor} */ t, /** @type {any} */ other) =>
    other?.name === t.name &&
    other.type === t.dtype &&
    other.shape.length === t.shape.length &&
    // `images` must be on both sides or on neither: only such a graph shares rows.
    t.shape.every(
      (want, i) =>
        other.shape[i] === want ||
        (typeof other.shape[i] !== "number" && want !== "images" && other.shape[i] !== "images"),
    );
  if (said.length !== found.length || !said.every((t, i) => fits(t, found[i]))) {
    const spell = (/** @type {any} */ t) => `${t.name} ${t.type ?? t.dtype} [${t.shape}]`;
    throw new BundleError(
      `${graph.file} has the ${side} ${found.map(spell).join(", ")}; the manifest says ${said.map(spell).join(", ")}; export again`,
    );
  }
}

/**
 * Runs one row through a graph outside of the loop: outputs by name, of one row.
 * @param {Session} session
 * @param {Graph} graph
 * @param {Rows} row
 * @returns {Promise<Record<string, Rows>>}
 */
export async function runOne(session, graph, row) {
  const [input] = graph.inputs,
    { batch } = session;
  // A graph of a fixed batch is given the row as often as it takes.
  const given = batch ? { data: row.data, dims: row.dims } : row;
  if (batch && batch > 1) {
    given.data = new /** @type {any} */ (row.data.constructor)(row.data.length * batch);
    for (let i = 0; i < batch; i++) /** @type {any} */ (given.data).set(row.data, i * row.data.length);
    given.dims = [batch, ...row.dims.slice(1)];
  }
  const made = await session.run(graph, new Map([[input.name, session.put(given)]]));
  /** @type {Record<string, Rows>} */
  const found = {};
  for (const { name } of graph.outputs) {
    const { data, dims } = await session.get(made[name]),
      values = /** @type {Float32Array} */ (data).slice(0, data.length / dims[0]);
    session.drop(made[name]);
    if (!values.every(Number.isFinite))
      throw new BundleError(`${graph.name}: its ${name} holds NaN or infinity; export it in fp32`);
    found[name] = { data: values, dims: [1, ...dims.slice(1)] };
  }
  return found;
}
