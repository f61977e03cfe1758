// The pipeline, in a thread of its own: WebAssembly holds its thread while a graph runs.
import { CacheStore, EdgePipeline, SCHEDULER_NAMES, toRgba } from "../src/index.js";
import { nameOf, withSampler } from "../src/schedulers.js";

/**
 * @typedef {{type: "open", url: string, backend?: "wasm" | "webgpu", threads?: number, lowMemory?: boolean,
 *   warms?: boolean}} Open
 * @typedef {{type: "draw", id: number, request: import("../src/pipeline.js").Arguments, shows: boolean}} Draw
 * @typedef {{type: "cancel", id: number}} Cancel
 */

/** @type {EdgePipeline | null} */
let pipe = null;
/** @type {Promise<void> | null} */
let warming = null;
// Multiply-adds of a step of one row.
const LIGHT = 2e9;
/** @type {Map<number, AbortController>} */
const running = new Map();

addEventListener("message", async ({ data }) => {
  try {
    if (data.type === "open") await open(data);
    else if (data.type === "draw") await draw(data);
    else if (data.type === "cancel") running.get(data.id)?.abort();
  } catch (e) {
    const error = /** @type {Error} */ (e);
    postMessage({ type: "error", id: data.id, name: error.name, message: error.message || String(e) });
  }
});

/** @param {Open} options */
async function open({ url, backend, threads, lowMemory, warms = true }) {
  await pipe?.close();
  pipe = null;
  const wasmPaths = new URL("ort/", location.href).href; // beside the worker
  // Of this address alone; null where the browser keeps nothing for it.
  const store = await CacheStore.open(`edgediff ${new URL(url, location.href).pathname}`).catch(() => null);
  pipe = await EdgePipeline.fromUrl(url, {
    backend,
    threads,
    lowMemory,
    store,
    wasmPaths,
    onProgress: (progress) => postMessage({ type: "progress", ...progress }),
  });
  const { manifest } = pipe;
  const { conditioning, operating_point: point, scheduler, source, adaptor, evidence } = manifest;
  postMessage({
    type: "opened",
    backend: pipe.backend,
    canControl: pipe.controls === 1, // the page has a place for one picture
    canDecode: pipe.canDecode,
    canEdit: pipe.canEdit,
    canEncode: pipe.canEncode,
    canPreview: pipe.canPreview,
    concat: manifest.sample.concat,
    size: pipe.usualSize,
    conditioning: { kind: conditioning.kind, labels: conditioning.labels },
    model: source.name,
    adaptor: adaptor.kind === "learned" ? adaptor.name : adaptor.kind,
    point,
    bundle: pipe.bundle.sha256,
    prompt: evidence.prompt?.[0] ?? "",
    source: source.sha256,
    threads: pipe.backend === "wasm" ? pipe.threads : null,
    sampler: nameOf(scheduler),
    samplers: SCHEDULER_NAMES.filter((name) => takes(scheduler, name)),
    versions: { "onnxruntime-web": ORT_VERSION },
    isLight: isLight(pipe),
  });
  const draws = manifest.conditioning.kind !== "text" || pipe.canEncode;
  if (warms && draws && isLight(pipe)) warming = warm(pipe).catch(() => {}); // what is wrong there is said at a drawing
  await store?.prune(new Set(Object.values(manifest.files).map((file) => file.sha256))).catch(() => {}); // no matter here
}

/** Whether a sampler takes what the model predicts. @param {import("../src/schedulers.js").SchedulerConfig} config @param {string} name */
function takes(config, name) {
  try {
    return Boolean(withSampler(config, name));
  } catch {
    return false;
  }
}

/** Whether a step takes milliseconds: then the page may run some more. @param {EdgePipeline} pipe */
const isLight = ({ manifest: { cost } }) => cost.full.macs + cost.full.macs_attention < LIGHT;

/** Runs each graph once, so that the first picture's times are those of any other. @param {EdgePipeline} pipe */
async function warm(pipe) {
  const { kind, labels } = pipe.manifest.conditioning;
  if (pipe.manifest.sample.concat.length) return; // it needs a picture
  const point = pipe.manifest.operating_point;
  const asked = kind === "text" ? { prompt: "" } : kind === "class" ? { label: labels[0] ?? 0 } : {};
  await pipe.generate({ ...asked, clock: point.mask, numInferenceSteps: point.num_inference_steps });
}

/** @param {EdgePipeline} pipe @param {Float32Array} latents */
async function formed(pipe, latents) {
  if (pipe.canPreview) return toRgba(await pipe.preview(latents));
  return pipe.canDecode ? toRgba(await pipe.decode(latents)) : null;
}

/** @param {Draw} job */
async function draw({ id, request, shows }) {
  if (!pipe) throw new Error("no bundle is open");
  const controller = new AbortController();
  running.set(id, controller);
  try {
    await warming;
    for await (const event of pipe.stream({ ...request, signal: controller.signal })) {
      if (event.type === "step") {
        const { done, count, full, ms } = event;
        // What the step predicts, decoded: the picture as it forms. It is not part of the ledger.
        const image = shows ? await formed(pipe, event.predicted) : null;
        postMessage({ type: "step", id, done, count, full, ms, image }, { transfer: image ? [image.data.buffer] : [] });
      } else if (event.type === "result") {
        const { images, latents, ledger, mask, stages, ms, macs, warnings, seed } = event.result;
        const image = images && toRgba(images);
        postMessage(
          {
            type: "result",
            id,
            image,
            latents: images ? null : latents.data,
            ledger,
            mask,
            stages,
            ms,
            macs,
            warnings,
            seed,
          },
          { transfer: image ? [image.data.buffer] : [] },
        );
      } else postMessage({ ...event, id });
    }
  } finally {
    running.delete(id);
  }
}
