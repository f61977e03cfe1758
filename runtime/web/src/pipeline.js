// From a bundle to pictures: a request is checked, the prompt encoded, the loop run, the latents decoded. A pipeline
// holds nothing of any generation.
import { openBundle } from "./bundle.js";
import { callsInWords, clockMask } from "./clock.js";
import { checkCount, classRows, countOf, encodeTexts, guidanceEmbedding, rowsOf, timeIds } from "./conditioning.js";
import {
  asPixels,
  begin,
  beginsWithNoise,
  checkPictures,
  encode,
  fromVae,
  inWords,
  pasted,
  picturesOf,
  readEdit,
} from "./editing.js";
import { BundleError, refuse, RequestError, shown } from "./errors.js";
import { decode, toUint8 } from "./images.js";
import { injectionOf, readInverted, sourceOf } from "./injection.js";
import { DDIM, inverseScheduler } from "./inversion.js";
import { breathe, denoise } from "./loop.js";
import { factorsOf } from "./lora.js";
import { all, ATTENTION_ROWS, CONTROLNET, graphsAt, T2I_ADAPTER } from "./manifest.js";
import { noises, readSeed } from "./noise.js";
import { imagesOf } from "./pictures.js";
import { callOf, makeScheduler, samplerOf, stepsLeftOut, withSampler } from "./schedulers.js";
import { chooseBackend, OrtSession, runOne, threadsOf } from "./sessions.js";
import { steer } from "./steering.js";
import { joined, range, repeated, take } from "./rows.js";
import { Tokenizer } from "./tokenizer.js";

/**
 * @typedef {import("./rows.js").Rows} Rows
 * @typedef {import("./manifest.js").Manifest} Manifest
 * @typedef {import("./manifest.js").Graph} Graph
 * @typedef {import("./manifest.js").Vae} Vae
 * @typedef {import("./loop.js").Session} Session
 * @typedef {import("./loop.js").Step} Step
 * @typedef {import("./images.js").Images} Images
 *
 * @typedef {object} PipelineOptions
 * @property {"wasm" | "webgpu"} [backend] what runs the graphs; left out, WebGPU where there is an adapter
 * @property {number} [threads] of WebAssembly, where the page is cross-origin isolated
 * @property {boolean} [lowMemory] one component open at a time, each loaded when its stage comes
 * @property {any} [wasmPaths] where ONNX Runtime's .wasm and .mjs files lie, as its `env.wasm.wasmPaths` has it
 *
 * @typedef {object} Arguments What is left out comes from the bundle's operating point.
 * @property {string | string[] | null} [prompt] one for all images, or one for each; so are the other texts
 * @property {string | string[] | null} [negativePrompt]
 * @property {string | string[] | null} [prompt2] what the second text encoder is told instead
 * @property {string | string[] | null} [negativePrompt2]
 * @property {boolean} [emphasis] false takes brackets in prompts as characters
 * @property {number} [clipSkip] layers left out at the text encoder's end
 * @property {Rows} [promptEmbeds] [1 or N, S, D] instead of a prompt
 * @property {Rows} [negativePromptEmbeds]
 * @property {Record<string, Rows>} [addedCond] `text_embeds`, `time_ids`
 * @property {Record<string, Rows>} [negativeAddedCond]
 * @property {string | number | (string | number)[] | null} [label] class by name or index
 * @property {Rows} [concatLatents] [1 or N, C', H, W] of an inpainting or editing UNet
 * @property {Uint8Array | Uint8Array[]} [lora] a file of `edgediff lora` as bytes, for a bundle whose graphs take low-rank
 *   factors; of several the ranks add up
 * @property {number | number[]} [loraScale] what a LoRA is multiplied by; left out, 1
 * @property {import("./pictures.js").Pictures} [image] what editing begins with, of the size that is drawn: ImageData or
 *   a list of it, or {data, dims} of bytes [N, h, w, 3]; `fitted` scales and cuts one
 * @property {import("./pictures.js").Pictures} [maskImage] where it is drawn anew: half white and more
 * @property {number} [strength] share of the steps that run, 0 to 1; left out, 0.8, or 1 with a mask
 * @property {number} [imageGuidanceScale] how far a UNet that follows instructions keeps to the image; left out, 1.5
 * @property {import("./pictures.js").Depths} [depthMap] for a UNet of depth, larger where nearer; numbers of any size
 * @property {import("./pictures.js").Pictures | (import("./pictures.js").Pictures | null)[]} [controlImage] what a bundle's
 *   ControlNet or T2I-Adapter draws by: as `image`; left out, it does not run. Of several ControlNets a list, where null
 *   leaves one out
 * @property {number | number[]} [controlnetConditioningScale] how strongly, from 0; left out, 1; of several also a list
 * @property {Inverted} [inverted] a picture that `invert` found, which the images are drawn beside, with DDIM from its latents:
 *   they take its layout (plug-and-play, Tumanyan et al. 2022), from bundles exported with `--injection`
 * @property {number} [injectAttention] share of the steps, 0 to 1, in which they take its self-attention; left out, 0.5
 * @property {number} [injectFeatures] the same of its features; left out, 0.8
 * @property {boolean} [paste] whether the finished pictures have the image's own pixels outside of the mask
 * @property {number} [feather] pixels inside of the mask's edge over which a pasted picture fades in
 * @property {number} [numInferenceSteps]
 * @property {string} [scheduler] another sampler than the bundle's, one of `SCHEDULER_NAMES`
 * @property {number | string | number[]} [clock] a period, or a mask with an entry for each call of the UNet that is run
 * @property {number | number[]} [guidanceScale] one, or one for each call; 1 or less is off
 * @property {bigint | string | number} [seed]
 * @property {number} [numImages] left out, the number of labels, prompts, embeddings, pictures or latents given, or 1
 * @property {number} [firstImage] number of the first image
 * @property {number} [height] of the picture in pixels
 * @property {number} [width]
 * @property {Rows} [latents] [1 or N, C, H, W], what a generation begins with in place of the seed's noise; standard normal,
 *   as of `invert`
 * @property {number} [tile] side in pixels of the tiles that a larger picture is decoded in
 * @property {"image" | "latent"} [outputType] `latent` leaves the decoder out
 * @property {AbortSignal} [signal]
 *
 * @typedef {object} Result
 * @property {Images | null} images bytes [N, H, W, C]; null where latents were asked for, or nothing decodes them
 * @property {Rows} latents [N, C, H, W]
 * @property {{index: number, timestep: number, full: boolean, guided: boolean, rows: number, ms: Record<string, number>}[]} ledger
 *   `index` is of the whole schedule, `rows` of an image
 * @property {number[]} mask the steps as they were run, 1 = full
 * @property {Record<string, number>} stages milliseconds of each component outside of the loop
 * @property {number} ms of all steps and stages
 * @property {{done: number, uncached: number}} macs multiply-adds of the loop, and of one whose steps are all full
 * @property {string[]} warnings one line each
 * @property {string} seed as decimal text
 *
 * @typedef {object} Inverted
 * @property {Rows} latents [N, C, H, W], which `generate({ latents, scheduler: "ddim" })` begins with
 * @property {Rows} trajectory what the UNet sees of the pictures in each step of drawing them, [steps, N, C, H, W], the
 *   noisiest first; what `generate({ inverted })` draws along
 * @property {Rows} timesteps DDIM's, [steps], in the same order
 * @property {Record<string, Rows>} cond what the pictures were inverted with, [N, ...] of each conditioning tensor
 * @property {Result["ledger"]} ledger each call of the UNet
 * @property {number[]} mask the calls as they were run, 1 = full
 * @property {Record<string, number>} stages milliseconds of each component outside of the loop
 * @property {Result["macs"]} macs
 *
 * @typedef {{type: "step", done: number, count: number} & Step} StepEvent `done` of `count` steps that run
 * @typedef {{type: "stage", stage: string}} StageEvent a component that begins
 * @typedef {{type: "warning", warning: string}} WarningEvent comes before the first step
 * @typedef {{type: "result", result: Result}} ResultEvent
 */

const DECODER = "vae_decoder",
  ENCODER = "vae_encoder",
  PREVIEW = "preview_decoder";
// What says what a picture shows, and its size.
const CONDITION = (
  "prompt negativePrompt prompt2 negativePrompt2 emphasis clipSkip promptEmbeds negativePromptEmbeds addedCond " +
  "negativeAddedCond label concatLatents lora loraScale height width"
).split(" ");
const ARGUMENTS = (
  `${CONDITION.join(" ")} latents image maskImage strength imageGuidanceScale depthMap controlImage ` +
  "controlnetConditioningScale inverted injectAttention injectFeatures paste feather numInferenceSteps scheduler clock " +
  "guidanceScale seed numImages firstImage tile outputType signal"
).split(" ");
const INVERSION = [...CONDITION, ..."numInferenceSteps refinements clock guidanceScale onStep signal".split(" ")];
// WebAssembly addresses no more than 4 GiB.
const memory = () => 2 ** 30 * Math.min(4, /** @type {any} */ (globalThis.navigator)?.deviceMemory ?? 4);

export class EdgePipeline {
  /** @type {Map<string, Promise<OrtSession>>} */
  #open = new Map();
  /** @type {Promise<Tokenizer[]> | null} */
  #tokenizers = null;

  /**
   * @param {import("./bundle.js").Bundle} bundle
   * @param {"wasm" | "webgpu"} backend
   * @param {PipelineOptions} options
   */
  constructor(bundle, backend, options) {
    const target = bundle.manifest.targets.find((each) => each.target === "onnx");
    if (!target)
      throw new BundleError(
        `the bundle has no onnx target; it has: ${bundle.manifest.targets.map((each) => each.target).join(", ")}; export it with --target onnx`,
      );
    this.bundle = bundle;
    this.manifest = bundle.manifest;
    this.backend = backend;
    this.components = target.components;
    this.options = { ...options, backend };
  }

  /**
   * Opens the bundle at an address, and its components.
   * @param {string | URL} url
   * @param {PipelineOptions & import("./bundle.js").BundleOptions} [options]
   */
  static async fromUrl(url, options = {}) {
    const { threads } = options;
    refuse(
      threads !== undefined && !(Number.isInteger(threads) && threads > 0),
      `threads is ${shown(threads)}; expected a whole number above 0`,
    );
    const bundle = await openBundle(url, options),
      onnx = bundle.manifest.targets.find((each) => each.target === "onnx");
    const half = Object.values(onnx?.components ?? {}).some((each) => each.dtype === "fp16");
    const pipe = new EdgePipeline(bundle, await chooseBackend(options.backend, half), options);
    if (options.lowMemory) return pipe;
    // What encodes pictures is loaded at the first edit, unless nothing can be drawn without it.
    const { concat } = bundle.manifest.sample,
      stages = ["prompt", "step", "decode", ...(concat.some((part) => /image/.test(part)) ? ["image"] : [])];
    const wanted = Object.keys(pipe.components).filter((name) => stages.includes(pipe.components[name].stage));
    const files = wanted.flatMap((name) =>
      pipe.components[name].graphs.flatMap((g) => (g.file === null ? [] : [g.file, ...g.external_data])),
    );
    bundle.expect([...files, ...wanted.flatMap((name) => pipe.components[name].tokenizer ?? [])]);
    try {
      if (pipe.canEncode) await pipe.#readTokenizers();
      for (const name of wanted) await pipe.#session(name);
    } catch (e) {
      await pipe.close();
      throw e;
    }
    return pipe;
  }

  /** Threads of WebAssembly. */
  get threads() {
    return threadsOf(this.options.threads);
  }

  /** Pixels of a picture where a request says nothing. */
  get usualSize() {
    const { width, height } = this.manifest.sample;
    return { width: this.#pixels * width, height: this.#pixels * height };
  }

  /** Whether latents can be made into pictures. */
  get canDecode() {
    return this.manifest.sample.space === "pixel" || DECODER in this.components;
  }

  /** Whether `preview` has something to make pictures with. */
  get canPreview() {
    return this.manifest.sample.space === "pixel" || PREVIEW in this.components;
  }

  /** Whether a generation can begin with a picture: latents are pictures, or there is an encoder for them. */
  get canEdit() {
    const { sample, vae } = this.manifest;
    return sample.space === "pixel" ? sample.channels === 3 : vae !== null && ENCODER in this.components;
  }

  /** How many control pictures draw a generation: one for each ControlNet, or for a T2I-Adapter. */
  get controls() {
    const net = this.components.unet.graphs.find(({ name }) => name === CONTROLNET),
      taking = net ? [net] : (this.components[T2I_ADAPTER]?.graphs ?? []);
    return taking.flatMap(({ inputs }) => inputs).filter(({ name }) => name.startsWith("control_image")).length;
  }

  /** Whether a generation can be drawn by a control picture: there is a ControlNet, or a T2I-Adapter. */
  get canControl() {
    return this.controls > 0;
  }

  /** Whether a generation can take of an inverted picture that is drawn along: `inverted`. */
  get canInject() {
    return this.components.unet.graphs.some(({ inputs }) => inputs.some((t) => t.name === ATTENTION_ROWS));
  }

  /** Whether prompts can be made into embeddings. */
  get canEncode() {
    const { prompt } = this.manifest;
    return !!prompt && prompt.encoders.every((each) => this.components[each.component]?.tokenizer);
  }

  /** Gives the memory of all components back; the pipeline opens them again where it is used. */
  async close() {
    const opened = [...this.#open.values()];
    this.#open.clear();
    for (const session of await Promise.allSettled(opened))
      if (session.status === "fulfilled") await session.value.release();
  }

  /** @param {string} name */
  #session(name) {
    const session = this.#open.get(name) ?? OrtSession.open(this.bundle, this.components[name], this.options);
    if (!this.#open.has(name)) {
      this.#open.set(name, session);
      session.catch(() => this.#open.delete(name)); // the next use tries again
    }
    return session;
  }

  /** A component while a stage lasts. @template T @param {string} name @param {(session: Session) => Promise<T>} job */
  async #use(name, job) {
    const session = await this.#lent(name);
    try {
      return await job(session);
    } finally {
      await this.#returned(session);
    }
  }

  /** @param {string} name */
  #lent(name) {
    return this.options.lowMemory
      ? OrtSession.open(this.bundle, this.components[name], this.options)
      : this.#session(name);
  }

  /** @param {OrtSession} session */
  async #returned(session) {
    if (this.options.lowMemory) await session.release();
  }

  #readTokenizers() {
    this.#tokenizers ??= Promise.all(
      (this.manifest.prompt?.encoders ?? []).map(async ({ component }) => {
        const file = /** @type {string} */ (this.components[component].tokenizer);
        return new Tokenizer(await this.bundle.file(file), file);
      }),
    ).catch((e) => {
      this.#tokenizers = null;
      throw e;
    });
    return this.#tokenizers;
  }

  /** Makes pictures. @param {Arguments & {onStep?: (step: StepEvent) => void}} request @returns {Promise<Result>} */
  async generate({ onStep, ...request }) {
    for await (const event of this.stream(request)) {
      if (event.type === "result") return event.result;
      if (event.type === "step") onStep?.(event);
    }
    throw new Error("a stream ends with its result");
  }

  /**
   * Makes pictures step by step; leaving the loop, or `signal`, cancels. Everything is checked before anything runs.
   * @param {Arguments} [given] null is left out
   * @returns {AsyncGenerator<StageEvent | WarningEvent | StepEvent | ResultEvent, void, void>}
   */
  async *stream(given = {}) {
    /** @type {Arguments} */
    const request = named(given, ARGUMENTS);
    const { signal, tile, outputType = "image" } = request;
    refuse(
      outputType !== "image" && outputType !== "latent",
      `outputType is ${shown(outputType)}; expected image or latent`,
    );
    refuse(
      request.paste === true && (outputType === "latent" || !this.canDecode),
      "paste was given, but there will be latents and no picture; leave it out",
    );
    const plan = this.#plan(request),
      { size, scheduler, clock, seed, edit } = plan,
      { manifest } = this,
      [height, width] = size;
    const side = this.#tile(tile),
      decodes = outputType === "image" && manifest.sample.space === "latent" && DECODER in this.components;
    if (decodes) this.#checkDecoder(height, width, side);
    /** @type {Record<string, number>} */
    const stages = {};
    const timed = timer(stages, signal);
    if (plan.texts) yield { type: "stage", stage: "prompt" };
    const [cond, uncond] = await this.#conditioning(request, plan, timed),
      source = plan.injection && sourceOf(plan.injection, cond, plan.count);
    const { warning } = plan,
      warnings = [...this.bundle.warnings, ...(warning ? [warning] : [])];
    if (edit.image && manifest.vae) yield { type: "stage", stage: "image" };
    const begun = await begin(edit, manifest.vae, scheduler, plan.start, this.#noise(plan), (batches) =>
      manifest.vae && batches.length ? timed(ENCODER, () => this.#encoded(batches, signal)) : Promise.resolve(batches),
    );
    /** @type {Result["ledger"]} */
    const ledger = [];
    let { latents } = begun;
    for (const text of warnings) yield { type: "warning", warning: text };
    yield { type: "stage", stage: "step" };
    for await (const step of this.#steps(plan, { ...begun, source }, cond, uncond, signal)) {
      ledger.push(lineOf(step));
      latents = { data: step.latents.slice(), dims: latents.dims };
      yield { type: "step", done: ledger.length, count: clock.length, ...step };
    }
    let pixels = null;
    if (outputType === "image" && manifest.sample.space === "pixel") pixels = latents;
    if (decodes) {
      yield { type: "stage", stage: "decode" };
      const vae = /** @type {Vae} */ (manifest.vae);
      const graphAt = (/** @type {number} */ h, /** @type {number} */ w) =>
        graphsAt(this.components[DECODER], manifest.sample, h, w)?.[0] ?? null;
      pixels = await timed(DECODER, () =>
        this.#use(DECODER, (opened) => decode(opened, graphAt, vae, latents, side, signal)),
      );
    }
    const images = pixels && toUint8(pasted(edit, pixels));
    yield {
      type: "result",
      result: {
        images,
        latents,
        ledger,
        stages,
        warnings,
        seed: String(seed),
        mask: ledger.map((step) => Number(step.full)),
        ms: sum([...ledger.flatMap((step) => Object.values(step.ms)), ...Object.values(stages)]),
        macs: this.#macs(ledger, plan),
      },
    };
  }

  /** Multiply-adds of a loop, and of one whose steps are all full. @param {Result["ledger"]} ledger @param {any} plan */
  #macs(ledger, { graphs, count }) {
    const { cost } = this.manifest,
      each = (/** @type {string} */ name) => (cost[name]?.macs ?? 0) + (cost[name]?.macs_attention ?? 0),
      // A full step's has the ControlNet's, which may not have run.
      left = graphs.some((/** @type {Graph} */ g) => g.name === CONTROLNET) ? 0 : each(CONTROLNET),
      [whole, part] = [each("full") - left, each("cached")];
    return {
      done: sum(ledger.map(({ full, rows }) => count * rows * (full ? whole : part))),
      uncached: sum(ledger.map(({ rows }) => count * rows * whole)),
    };
  }

  /**
   * Finds the latents that DDIM draws pictures from (Song et al. 2020, section 4.3): `generate({ latents, scheduler: "ddim" })`
   * with the same prompt and steps, and the guidance that was inverted, draws them again; with another prompt it edits them,
   * and `generate({ inverted })` keeps their layout. Everything is checked before anything runs.
   * @param {import("./pictures.js").Pictures} image as of a generation
   * @param {Pick<Arguments, "prompt" | "negativePrompt" | "prompt2" | "negativePrompt2" | "emphasis" | "clipSkip" | "promptEmbeds"
   *   | "negativePromptEmbeds" | "addedCond" | "negativeAddedCond" | "label" | "concatLatents" | "height" | "width"
   *   | "numInferenceSteps" | "clock" | "guidanceScale" | "signal"> & {refinements?: number,
   *   onStep?: (step: StepEvent) => void}} [given] `refinements`: how often each step is taken again, closer to the picture for
   *   as many more calls of the UNet; `clock`, 1 if left out, and `guidanceScale`, 1 if left out, which is more exact, are of
   *   all calls; `onStep` is called after each
   * @returns {Promise<Inverted>}
   */
  async invert(image, given = {}) {
    const { manifest } = this,
      { refinements = 0, onStep, signal, clock = 1, guidanceScale = 1, ...request } = named(given, INVERSION);
    const size = this.#size(request.height, request.width),
      [height, width] = size.map((side) => this.#pixels * side),
      images = imagesOf(image, height, width);
    this.#checkEncoder(size);
    const { numInferenceSteps = manifest.operating_point.num_inference_steps } = request,
      inverse = inverseScheduler(manifest.scheduler, numInferenceSteps, refinements),
      { concat } = manifest.sample;
    refuse(
      concat.length && !request.concatLatents,
      `the bundle's UNet takes ${inWords(concat)} beside the latent, which an inversion does not make; give concatLatents`,
    );
    const plan = this.#plan({ ...request, clock, guidanceScale, numImages: images.dims[0] }, inverse);
    /** @type {Record<string, number>} */
    const stages = {};
    const timed = timer(stages, signal);
    const [cond, uncond] = await this.#conditioning(request, plan, timed);
    const { vae } = manifest,
      pixels = asPixels(images);
    /** @type {Rows} */
    let latents = vae ? fromVae(vae, (await timed(ENCODER, () => this.#encoded([pixels], signal)))[0]) : pixels;
    /** @type {Result["ledger"]} */
    const ledger = [],
      found = /** @type {Rows[]} */ ([]),
      calls = refinements + 1;
    for await (const step of this.#steps(plan, { latents }, cond, uncond, signal)) {
      ledger.push(lineOf(step));
      latents = { data: step.latents.slice(), dims: latents.dims };
      if (ledger.length % calls === 0) found.unshift(latents);
      onStep?.({ type: "step", done: ledger.length, count: plan.clock.length, ...step });
    }
    return {
      latents,
      trajectory: { data: joined(...found).data, dims: [found.length, ...latents.dims] },
      timesteps: { data: inverse.timesteps.filter((_, i) => i % calls === 0).reverse(), dims: [found.length] },
      cond,
      ledger,
      stages,
      mask: ledger.map((step) => Number(step.full)),
      macs: this.#macs(ledger, plan),
    };
  }

  /**
   * Quick pictures of latents: of a step's `predicted`, what the picture is going to be. Changes nothing in a generation.
   * @param {Float32Array} latents N * C * H * W
   * @param {{height?: number, width?: number}} [size] of the picture; left out, the usual one
   */
  preview(latents, size = {}) {
    const { preview } = this.manifest;
    refuse(
      !this.canPreview,
      "the bundle has no preview decoder; export it with --preview DIR, an AutoencoderTiny of the same latents",
    );
    return this.#decoded(PREVIEW, preview, latents, size);
  }

  /**
   * Pictures of latents, by the decoder that a generation ends with; `preview` is quicker where there is one.
   * @param {Float32Array} latents N * C * H * W
   * @param {{height?: number, width?: number}} [size] of the picture; left out, the usual one
   */
  decode(latents, size = {}) {
    refuse(!this.canDecode, "the bundle has no decoder; take the latents");
    return this.#decoded(DECODER, this.manifest.vae, latents, size);
  }

  /** @param {string} name @param {Vae | null} vae @param {Float32Array} latents @param {{height?: number, width?: number}} size */
  async #decoded(name, vae, latents, size) {
    const { sample } = this.manifest,
      [height, width] = this.#size(size.height, size.width),
      each = sample.channels * height * width;
    const rows = { data: latents, dims: [latents.length / each, sample.channels, height, width] };
    refuse(
      !(latents instanceof Float32Array) || !latents.length || latents.length % each,
      `latents are ${latents?.length} numbers; expected a multiple of ${each}`,
    );
    if (sample.space === "pixel") return toUint8(rows);
    const [graph] = this.#graphs(name, height, width);
    return toUint8(await this.#use(name, (session) => decode(session, () => graph, /** @type {Vae} */ (vae), rows)));
  }

  /** Noise that images begin with, or what was given in its place, [N, C, H, W]. @param {any} plan @returns {Rows} */
  #noise({ count, size, seed, firstImage, latents }) {
    const dims = [count, this.manifest.sample.channels, ...size],
      each = dims.slice(1).reduce((a, b) => a * b);
    return latents ? repeated(latents, count) : { data: noises(seed, count, each, firstImage, 0), dims };
  }

  /**
   * The loop, with the UNet open while it lasts.
   * @param {any} plan
   * @param {{latents: Rows, concat?: Rows | null, kept?: import("./loop.js").Kept | null,
   *   source?: import("./loop.js").Source | null}} begun
   * @param {Record<string, Rows>} cond
   * @param {Record<string, Rows>} uncond
   * @param {AbortSignal} [signal]
   */
  async *#steps(plan, { latents, concat, kept, source }, cond, uncond, signal) {
    const { graphs, scheduler, seed, firstImage, start, clock, guidance, edit, fixed } = plan,
      session = await this.#lent("unet");
    try {
      yield* denoise(
        {
          graphs,
          scheduler,
          latents,
          cond,
          uncond,
          seed,
          concat: concat ?? plan.concat,
          firstImage,
          start,
          imageGuidance: edit.imageGuidance,
          kept,
          source,
          fixed,
          // Of the steps before the first that runs, nothing is asked.
          clock: [...Array(start).fill(true), ...clock],
          guidance: [...Array(start).fill(1), ...guidance],
        },
        session,
        signal,
      );
    } finally {
      await this.#returned(session);
    }
  }

  /**
   * Everything of a request that needs no graph, checked.
   * @param {Arguments} request
   * @param {import("./schedulers.js").Scheduler | null} [inverse] the steps of an inversion, in place of the sampler's
   */
  #plan(request, inverse = null) {
    const { manifest } = this,
      inverted = readInverted(request),
      { operating_point: point, conditioning: known, sample } = manifest,
      chosen = request.scheduler ?? (inverted ? DDIM : undefined),
      config = chosen === undefined ? manifest.scheduler : withSampler(manifest.scheduler, chosen),
      sampler = config.name;
    const {
      numInferenceSteps: steps = inverted?.timesteps.dims[0] ?? point.num_inference_steps,
      firstImage = 0,
      guidanceScale = point.guidance_scale,
    } = request;
    const seed = readSeed(request.seed ?? 0),
      scheduler = inverse ?? makeScheduler(config, steps),
      asked = request.clock ?? point.clock;
    refuse(
      !Number.isInteger(firstImage) || firstImage < 0 || firstImage >= 2 ** 32,
      `firstImage is ${shown(firstImage)}; expected a whole number from 0`,
    );
    const size = this.#size(request.height, request.width),
      edit = readEdit(sample, size, this.#pixels, request);
    if (edit.image) this.#checkEncoder(size);
    const start = inverse ? 0 : callOf(sampler, stepsLeftOut(edit.strength, steps)),
      calls = inverse?.timesteps.length,
      clock = calls ? clockMask(asked, calls, DDIM) : clockMask(asked, steps, sampler, start);
    let guidance = Array.isArray(guidanceScale) ? guidanceScale : clock.map(() => guidanceScale);
    refuse(
      guidance.length !== clock.length,
      `guidanceScale has ${guidance.length} entries for ${calls ? `${calls} calls` : callsInWords(steps, sampler, start)}; expected one each`,
    );
    const wrong = guidance.find(
      (scale) => !Number.isFinite(scale) || scale < 0 || !Number.isFinite(Math.fround(scale)),
    );
    refuse(wrong !== undefined, `guidanceScale is ${shown(wrong)}; expected a finite number from 0; 1 or less is off`);
    const warning = inverse ? null : departure(manifest, clock, guidance, asked, start, chosen),
      graphs = this.#graphs("unet", ...size),
      given = inverted?.latents ?? request.latents,
      latents = given == null ? null : this.#latents(given);
    refuse(
      latents && !beginsWithNoise(edit),
      "latents and an image were given, and a generation begins with one of them; give one",
    );
    const tensors = new Map(graphs.flatMap((g) => g.inputs).map((t) => [t.name, t]));
    /** What a latent consistency model is told of the guidance. @type {number | null} */
    let told = null;
    if (tensors.has("timestep_cond")) {
      refuse(
        new Set(guidance).size > 1,
        "guidanceScale differs between steps, but the model is told one; give one number",
      );
      told = guidance[0];
      guidance = clock.map(() => 1);
    }
    const guided = guidance.some((scale) => scale > 1),
      injection = inverted && injectionOf(inverted, graphs, scheduler, sampler, guided, request);
    const texts = [request.prompt, request.negativePrompt, request.prompt2, request.negativePrompt2].some(
      (text) => text != null,
    )
      ? request
      : null;
    const what = `the model is conditioned on ${{ none: "nothing", class: "classes (label)", text: "text (prompt, or promptEmbeds)" }[known.kind]}; leave it out`;
    const { promptEmbeds, negativePromptEmbeds, addedCond, negativeAddedCond, label } = request,
      embeds = promptEmbeds ?? negativePromptEmbeds;
    refuse(known.kind !== "class" && label != null, `label ${shown(label)} was given, but ${what}`);
    refuse(
      known.kind !== "text" && (texts || embeds || addedCond || negativeAddedCond),
      `a prompt was given, but ${what}`,
    );
    refuse(known.kind === "none" && guided, "guidanceScale is above 1, but the model has no condition; give 1");
    if (texts) {
      refuse(!this.canEncode, "the bundle has no text encoder; give embeddings (promptEmbeds), not a prompt");
      refuse(embeds, "a prompt and its embeddings were given; give one of them");
      refuse(texts.prompt == null, "a negative prompt or a second one was given without a prompt; give one");
    }
    const adapter = T2I_ADAPTER in this.components ? this.#graphs(T2I_ADAPTER, ...size)[0] : undefined,
      steering = steer(graphs, request.controlImage, request.controlnetConditioningScale, adapter),
      several = Math.max(picturesOf(edit), steering.count, latents?.dims[0] ?? 1);
    const count =
      request.numImages ??
      (several > 1 ? several : null) ??
      (texts ? countOf(texts) : Array.isArray(label) ? label.length : (promptEmbeds?.dims?.[0] ?? 1));
    checkCount(count);
    const guiding = guided ? (edit.imageGuidance === null ? 2 : 3) : 1;
    this.#checkMemory(graphs, count, guiding + Number(inverted !== null), size);
    checkPictures(edit, count);
    const beside = steering.tensors(count);
    const shape = [sample.channels, ...size];
    refuse(
      latents && (String(latents.dims.slice(1)) !== String(shape) || ![1, count].includes(latents.dims[0])),
      `latents are ${spelled(latents?.dims ?? [])}; expected ${spelled(["N", ...shape])} with 1 or ${count} rows`,
    );
    const channels = sample.in_channels - sample.channels,
      { concatLatents } = request;
    refuse(!channels && concatLatents, "concatLatents were given, but the UNet takes the latent alone; leave them out");
    const tensor = { name: "concatLatents", dtype: "float32", shape: ["batch", channels, ...size], stored_as: null };
    // With `takes` they are made of the request's pictures.
    const concat =
      channels && !edit.takes.length
        ? rowsOf(new Map([[tensor.name, tensor]]), concatLatents ? { concatLatents } : {}, count).concatLatents
        : null;
    return {
      seed,
      scheduler,
      clock,
      guidance,
      guided,
      warning,
      size,
      graphs: steering.graphs,
      steering: beside,
      injection,
      adapts: steering.adapts,
      latents,
      edit,
      start,
      tensors,
      told,
      texts,
      count,
      concat,
      firstImage,
      fixed: factorsOf(manifest.lora, request.lora, request.loraScale, steering.graphs),
    };
  }

  /**
   * Rows of every tensor that the graphs are handed beside the sample, conditional and unconditional.
   * @param {Arguments} request
   * @param {any} plan
   * @param {(name: string, job: () => Promise<any>) => Promise<any>} timed
   * @returns {Promise<[Record<string, Rows>, Record<string, Rows>]>}
   */
  async #conditioning(request, plan, timed) {
    const [cond, uncond] = await this.#condition(request, plan, timed),
      { guided, adapts } = plan;
    const steering = adapts ? await timed(T2I_ADAPTER, () => this.#features(plan)) : plan.steering;
    return [{ ...cond, ...steering }, guided ? { ...uncond, ...steering } : {}];
  }

  /** What the T2I-Adapter makes of the control pictures, multiplied by their scale. @param {any} plan @returns {Promise<Record<string, Rows>>} */
  #features({ steering, adapts: { scale, features }, size, count }) {
    const [graph] = this.#graphs(T2I_ADAPTER, size[0], size[1]),
      pictures = steering.control_image;
    return this.#use(T2I_ADAPTER, async (session) => {
      /** @type {Record<string, Rows>[]} */
      const made = [];
      for (const n of range(pictures.dims[0])) made.push(await runOne(session, graph, take(pictures, [n])));
      const given = graph.outputs.map(({ name }) => {
        const { data, dims } = joined(made[0][name], ...made.slice(1).map((each) => each[name]));
        return [name, { data: /** @type {Float32Array} */ (data).map((value) => value * Math.fround(scale)), dims }];
      });
      return rowsOf(
        new Map(features.map((/** @type {import("./manifest.js").Tensor} */ t) => [t.name, t])),
        Object.fromEntries(given),
        count,
      );
    });
  }

  /**
   * What says what a picture shows, the same way.
   * @param {Arguments} request
   * @param {any} plan
   * @param {(name: string, job: () => Promise<any>) => Promise<any>} timed
   * @returns {Promise<[Record<string, Rows>, Record<string, Rows>]>}
   */
  async #condition(request, { tensors, count, guided, texts, told, size }, timed) {
    const { manifest } = this,
      { conditioning: known, prompt } = manifest;
    if (known.kind === "none") return [{}, {}];
    if (known.kind === "class")
      return classRows(known, request.label, count, guided, tensors.get("class_labels")?.dtype ?? "int64");
    const needed = new Map(
      ["encoder_hidden_states", "text_embeds", "time_ids", "class_labels"].flatMap((name) => {
        const tensor = tensors.get(name);
        return tensor ? [[name, tensor]] : [];
      }),
    );
    /** @param {Rows | undefined} embeds @param {Record<string, Rows>} [added] @returns {Record<string, Rows>} */
    const named = (embeds, added = {}) => ({ ...(embeds ? { encoder_hidden_states: embeds } : {}), ...added });
    const given = named(request.promptEmbeds, request.addedCond),
      negative = named(request.negativePromptEmbeds, request.negativeAddedCond);
    for (const same of ["time_ids", "class_labels"]) if (given[same]) negative[same] ??= given[same];
    if (texts && prompt) {
      const tokenizers = (await this.#readTokenizers()).map(
        (each) => (/** @type {string} */ text) => each.encode(text),
      );
      const any = needed.get("encoder_hidden_states")?.shape.includes("tokens") ?? true;
      const made = await encodeTexts(
        prompt,
        tokenizers,
        (name, job) => timed(name, () => this.#use(name, (session) => job(session, this.components[name].graphs[0]))),
        texts,
        count,
        guided,
        any,
      );
      [given, negative].forEach((to, k) => {
        for (const [name, rows] of Object.entries(made[k])) if (needed.has(name)) to[name] ??= rows;
      });
    }
    const ids = needed.get("time_ids"),
      each = this.#pixels;
    if (ids) {
      for (const to of [given, negative])
        to.time_ids ??= timeIds(Number(ids.shape[1]), each * size[0], each * size[1], to === negative);
    }
    const cond = rowsOf(needed, given, count),
      uncond = guided ? rowsOf(needed, negative, count, "negative ") : {};
    for (const name of Object.keys(uncond)) {
      refuse(
        String(cond[name].dims) !== String(uncond[name].dims),
        `${name} has shape ${shown(cond[name].dims)} and negative ${name} ${shown(uncond[name].dims)}; expected the same`,
      );
    }
    if (told !== null)
      cond.timestep_cond = guidanceEmbedding(told, Number(tensors.get("timestep_cond")?.shape[1]), count);
    return [cond, uncond];
  }

  /** Refuses a picture that nothing encodes. @param {[number, number]} size */
  #checkEncoder(size) {
    const { sample, vae } = this.manifest;
    refuse(
      !this.canEdit && sample.space === "pixel",
      `image was given, but the model's pictures have ${sample.channels} channels; supported: 3`,
    );
    refuse(
      !this.canEdit,
      "image was given, but the bundle has no vae_encoder for this backend; export it with that component",
    );
    if (vae) this.#graphs(ENCODER, ...size);
  }

  /** What the encoder gives for pictures, float32 [N, 3, h, w] each batch. @param {Rows[]} batches @param {AbortSignal} [signal] */
  #encoded(batches, signal) {
    const each = this.#pixels,
      [graph] = this.#graphs(ENCODER, batches[0].dims[2] / each, batches[0].dims[3] / each);
    return this.#use(ENCODER, async (session) => {
      const made = [];
      for (const batch of batches) made.push(await encode(session, graph, batch, signal));
      return made;
    });
  }

  /** Latents of the model's channels. @param {any} given @returns {Rows} */
  #latents(given) {
    const { channels, height, width } = this.manifest.sample,
      { data, dims } = given ?? {};
    const fits =
      data instanceof Float32Array &&
      Array.isArray(dims) &&
      dims.length === 4 &&
      dims[1] === channels &&
      data.length > 0 &&
      data.length === dims.reduce((a, b) => a * b);
    const found = ArrayBuffer.isView(data) ? `${data.constructor.name} ${spelled([dims].flat())}` : shown(given);
    refuse(!fits, `latents are ${found}; expected {data, dims} of float32 ${spelled(["N", channels, height, width])}`);
    refuse(!data.every(Number.isFinite), "latents hold NaN or infinity; expected finite numbers");
    return given;
  }

  /** Pixels of a side for one of the latent. */
  get #pixels() {
    return this.manifest.vae?.downscale ?? 1;
  }

  /**
   * Height and width of the latent for a picture of these.
   * @param {unknown} height
   * @param {unknown} width
   * @returns {[number, number]}
   */
  #size(height, width) {
    const { sample } = this.manifest,
      each = this.#pixels;
    const [h, w] = Object.entries({ height, width }).map(([name, given]) => {
      if (given == null) return name === "height" ? sample.height : sample.width;
      refuse(
        !Number.isInteger(given) || Number(given) < 1 || Number(given) % each,
        `${name} is ${shown(given)}; expected a multiple of ${each * sample.multiple}`,
      );
      return Number(given) / each;
    });
    return [h, w];
  }

  /**
   * A component's graphs for a latent of this size.
   * @param {string} name
   * @param {number} height
   * @param {number} width
   */
  #graphs(name, height, width) {
    const { sample } = this.manifest,
      each = this.#pixels,
      component = this.components[name],
      found = graphsAt(component, sample, height, width);
    if (found) return found;
    const sizes = [sample, ...component.further].map((s) => `${each * s.width} x ${each * s.height}`).join(", ");
    const any = graphsAt(component, sample, 2 * sample.height, 2 * sample.width);
    throw new RequestError(
      `${name}: it has no graphs for ${each * width} x ${each * height} (width x height); it takes ${any ? `multiples of ${each * sample.multiple}` : sizes}; ask for one of these`,
    );
  }

  /** @param {unknown} tile */
  #tile(tile) {
    if (tile == null) return null;
    const each = 4 * this.#pixels;
    refuse(!(DECODER in this.components), "tile was given, but the bundle has no decoder; leave it out");
    refuse(
      !Number.isInteger(tile) || Number(tile) < 1 || Number(tile) % each,
      `tile is ${shown(tile)}; expected a multiple of ${each} pixels`,
    );
    return Number(tile) / this.#pixels;
  }

  /** @param {number} height @param {number} width @param {number | null} tile */
  #checkDecoder(height, width, tile) {
    this.#graphs(DECODER, Math.min(height, tile ?? height), Math.min(width, tile ?? width));
  }

  /**
   * Refuses images whose known tensors alone do not fit.
   * @param {Graph[]} graphs
   * @param {number} count
   * @param {number} parts rows of an image
   * @param {[number, number]} size
   */
  #checkMemory(graphs, count, parts, size) {
    const bytes = new Map(
      all(graphs).map((t) => [
        t.name,
        t.shape
          .slice(1)
          .reduce(
            (/** @type {number} */ sum, n) => sum * (typeof n === "number" ? n : 1),
            t.dtype === "float16" ? 2 : t.dtype === "int64" ? 8 : 4,
          ),
      ]),
    );
    const rows = [...bytes.values()].reduce((a, b) => a + b, 0) * parts,
      picture = this.manifest.vae ? 12 * this.#pixels ** 2 * size[0] * size[1] : 0;
    const needed = count * (rows + picture),
      there = memory();
    refuse(
      needed > there,
      `numImages is ${count}: they take ${(needed / 1e9).toFixed(1)} GB of memory at least, ${(there / 1e9).toFixed(1)} GB can be had; ask for fewer at a time`,
    );
  }
}

/**
 * What a request names, without nulls, which mean the same as what is left out.
 * @param {Record<string, any>} given
 * @param {string[]} known
 */
function named(given, known) {
  const unknown = Object.keys(given).find((name) => !known.includes(name));
  refuse(unknown !== undefined, `there is no argument ${shown(unknown)}; expected some of ${known.join(", ")}`);
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== null));
}

/**
 * Times components outside of the loop, between which the signal may end it all.
 * @param {Record<string, number>} stages
 * @param {AbortSignal} [signal]
 */
function timer(stages, signal) {
  return async (/** @type {string} */ name, /** @type {() => Promise<any>} */ job) => {
    const before = performance.now();
    signal?.throwIfAborted();
    const made = await job();
    stages[name] = performance.now() - before;
    await breathe();
    signal?.throwIfAborted();
    return made;
  };
}

/** A step's line of the ledger. @param {Step} step */
const lineOf = ({ index, timestep, full, guided, rows, ms }) => ({ index, timestep, full, guided, rows, ms });
/** @param {number[]} values */
const sum = (values) => values.reduce((a, b) => a + b, 0);
/** @param {(number | string)[]} shape */
const spelled = (shape) => `[${shape.join(", ")}]`;

/**
 * In what a generation differs from what the adaptor was trained for: one line, or null.
 * @param {Manifest} manifest
 * @param {boolean[]} clock
 * @param {number[]} guidance
 * @param {number | string | number[]} asked
 * @param {number} start first call that is run: the steps after it are those of a whole generation
 * @param {string} [scheduler] the sampler, where it is not the bundle's
 */
function departure({ adaptor, operating_point: point }, clock, guidance, asked, start, scheduler = point.scheduler) {
  const trained = adaptor.trained_for;
  if (!trained || clock.every(Boolean)) return null;
  const sampler = samplerOf(scheduler);
  let steps = 1;
  while (sampler.calls(steps) < start + clock.length) steps++;
  let mask = trained.mask;
  try {
    if (mask.length !== clock.length) mask = clockMask(trained.clock, steps, scheduler, start).map(Number);
  } catch {
    mask = []; // a mask for another number of calls
  }
  const differs = [
    steps !== trained.num_inference_steps && `${steps} steps`,
    scheduler !== trained.scheduler && scheduler,
    String(mask) !== String(clock.map(Number)) && `clock ${asked}`,
    guidance.some((scale) => Math.max(scale, 1) !== Math.max(trained.guidance_scale, 1)) &&
      `guidance ${[...new Set(guidance)].join(", ")}`,
  ].filter(Boolean);
  if (!differs.length) return null;
  const told = `${trained.num_inference_steps} steps of ${trained.scheduler}, clock ${trained.clock}, guidance ${trained.guidance_scale}`;
  return `adaptor ${adaptor.name} was trained for ${told}; this is ${differs.join(", ")}: images may be worse`;
}
