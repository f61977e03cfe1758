// The manifest: read strictly, then checked for what types cannot say. Targets of formats that edgediff does not have
// are left out; those that it has are checked, though this runtime runs ONNX alone.
import { clockMask } from "./clock.js";
import { BundleError, oneLine, shown } from "./errors.js";
import { readScheduler } from "./schedulers.js";

/**
 * @typedef {{name: string, dtype: string, shape: (number | string)[], stored_as: string | null}} Tensor
 * @typedef {{name: string, file: string | null, frequency: string | null, inputs: Tensor[], outputs: Tensor[], external_data: string[]}} Graph
 * @typedef {{component: string, max_length: number, bos: number, eos: number, pad: number, hidden: string[], pooled: string | null,
 *   expansions?: number[][]}} Encoder
 * @typedef {{scaling_factor: number, downscale: number, mean: number[] | null, std: number[] | null}} Vae
 * @typedef {{stage: string, dtype: string, batch: number | null, graphs: Graph[], tokenizer: string | null,
 *   further: {height: number, width: number, graphs: Graph[]}[], [more: string]: any}} Component
 * @typedef {{target: string, components: Record<string, Component>}} Target
 * @typedef {{num_inference_steps: number, scheduler: string, clock: number | string, mask: number[], guidance_scale: number}} TrainedFor
 * @typedef {{channels: number, in_channels: number, height: number, width: number, space: string, multiple: number, concat: string[]}} Sample
 * @typedef {{format_version: number, targets: Target[], sample: Sample, files: Record<string, {size: number, sha256: string}>,
 *   conditioning: {kind: string, tensors: Tensor[], labels: string[], null_label: number | null},
 *   scheduler: import("./schedulers.js").SchedulerConfig, operating_point: TrainedFor & {seed: string, num_images: number},
 *   adaptor: {kind: string, name: string | null, sha256: string | null, trained_for: TrainedFor | null}, prompt: {encoders: Encoder[], zeros_without_negative: boolean} | null,
 *   vae: Vae | null, preview: Vae | null, cost: Record<string, {macs: number, macs_attention: number}>, [more: string]: any}} Manifest
 */

/** The graph of a ControlNet, whose residuals the UNet's graphs take. */
export const CONTROLNET = "controlnet";
/** Of which row each row takes queries and keys, and of which features. */
export const ATTENTION_ROWS = "attention_rows",
  FEATURE_ROWS = "feature_rows";
/** The component that makes features of a picture, which steps are then handed as `t2i_adapter_0` and so on. */
export const T2I_ADAPTER = "t2i_adapter";
/** Whether a tensor has a row for each row of the sample; the timestep and low-rank factors are there once. @param {string} name */
export const hasRows = (name) => name !== "timestep" && !/^lora_(down|up)_/.test(name);
const FORMAT = 2;
/** @type {Record<string, string>} */
const STAGE_OF = {
  text_encoder: "prompt",
  text_encoder_2: "prompt",
  unet: "step",
  vae_decoder: "decode",
  vae_encoder: "image",
  preview_decoder: "preview",
  t2i_adapter: "image",
};
/** @type {Record<string, number>} */
const SPECIFICATIONS = { iOS16: 7, iOS17: 8, iOS18: 9 };

/** @typedef {(value: any, at: string) => any} Kind reads a value, or refuses it */
/** @type {(expected: string, holds: (v: any) => boolean) => Kind} */
const is = (expected, holds) => (v, at) => (must(holds(v), at, v, expected), v);
const text = is("text", (v) => typeof v === "string"),
  flag = is("true or false", (v) => typeof v === "boolean");
const whole = is("a whole number from 0", (v) => Number.isInteger(v) && v >= 0),
  count = is("a whole number above 0", (v) => Number.isInteger(v) && v > 0);
// Of float32's range.
const number = is("a finite number", (v) => Number.isFinite(v) && Number.isFinite(Math.fround(v))),
  above = is("a number above 0", (v) => v > 0 && number(v, "") > 0);
const hash = is("64 hexadecimal digits", (v) => /^[0-9a-f]{64}$/.test(v));
const seed = is(
  "0 to 2^64 - 1 as decimal text",
  (v) => typeof v === "string" && /^(0|[1-9]\d{0,19})$/.test(v) && BigInt(v) < 1n << 64n,
);
// Provenance, and what this runtime leaves alone.
const any = is("a value", (v) => v !== undefined);
/** @type {(...words: string[]) => Kind} */
const one = (...words) => is(words.join(", "), (v) => words.includes(v));
/** @type {(kind: Kind) => Kind} */
const list = (kind) => (v, at) => (
  must(Array.isArray(v), at, v, "a list"),
  v.map((/** @type {any} */ each, /** @type {number} */ i) => kind(each, `${at}[${i}]`))
);
/** A list of things with names, each once. @type {(kind: Kind, name?: (v: any) => any) => Kind} */
const unique =
  (kind, name = (v) => v) =>
  (v, at) => {
    const read = list(kind)(v, at);
    must(distinct(read.map(name)), at, read.map(name), "names, each once");
    return read;
  };
const isObject = (/** @type {any} */ v) => typeof v === "object" && v !== null && !Array.isArray(v);
/** An object without a prototype, so that any key is only a key. @type {(kind: Kind) => Kind} */
const map = (kind) => (v, at) => {
  must(isObject(v), at, v, "an object");
  const made = Object.create(null);
  for (const name of Object.keys(v)) made[name] = kind(v[name], `${at}.${name}`);
  return made;
};
/** @type {(kind: Kind) => Kind} */
const or = (kind) => (v, at) => (v === null ? v : kind(v, at));
/** A field that may be left out. @type {(kind: Kind, usual?: any) => [Kind, any]} */
const maybe = (kind, usual = null) => [usual === null ? or(kind) : kind, usual];
/** @type {(fields: Record<string, Kind | [Kind, any]>) => Kind} */
const struct = (fields) => (v, at) => {
  must(isObject(v), at, v, "an object");
  const extra = Object.keys(v).find((name) => !Object.hasOwn(fields, name));
  must(extra === undefined, at || "a key", extra, Object.keys(fields).join(", "));
  return Object.fromEntries(
    Object.entries(fields).map(([name, field]) => {
      const [kind, usual] = Array.isArray(field) ? field : [field, undefined];
      return [name, v[name] === undefined && usual !== undefined ? usual : kind(v[name], at ? `${at}.${name}` : name)];
    }),
  );
};

const size = is(
  "a size",
  (v) => Number.isInteger(v) || /^(batch|images|tokens|([1-9]\d*\*)?(height|width)(\/[1-9]\d*)?)$/.test(v),
);
const tensors = list(
  struct({ name: text, dtype: one("float32", "float16", "int64", "int32"), shape: list(size), stored_as: maybe(text) }),
);
const graph = struct({
  name: text,
  file: or(text),
  frequency: or(one("step", "full_step", "cached_step")),
  inputs: tensors,
  outputs: tensors,
  external_data: maybe(list(text), []),
  function: maybe(text),
  simplified: maybe(any),
  kept_fp32: maybe(any),
});
const graphs = unique(graph, (g) => g.name);
const component = struct({
  stage: one("prompt", "image", "step", "decode", "preview"),
  dtype: one("fp32", "fp16", "int8"),
  batch: or(count),
  floors: map(or(above)),
  graphs,
  layout: maybe(one("split", "pair")),
  model: maybe(graph),
  files: maybe(list(text), []),
  tokenizer: maybe(text),
  peak_bytes: maybe(any),
  further: maybe(list(struct({ height: count, width: count, graphs })), []),
  weights: maybe(map(count), {}),
});
const target = { target: text, components: map(component) };
/** @type {Record<string, Kind>} */
const TARGETS = {
  onnx: struct({ ...target, opset: whole, ir_version: whole }),
  coreml: struct({ ...target, deployment_target: one(...Object.keys(SPECIFICATIONS)), specification_version: whole }),
  openvino: struct(target),
  executorch: struct(target),
  litert: struct(target),
};
const trained = { num_inference_steps: whole, scheduler: text, clock: any, mask: list(whole), guidance_scale: above };
const point = (/** @type {any} */ fields) => (/** @type {any} */ v, /** @type {string} */ at) => {
  const read = struct(fields)(v, at),
    mask = clockMask(read.clock, read.num_inference_steps, read.scheduler).map(Number);
  must(same(read.mask, mask), `${at}.mask`, read.mask, `the mask of clock ${read.clock}`);
  return read;
};
const vae = struct({ scaling_factor: above, downscale: count, mean: maybe(list(number)), std: maybe(list(above)) });
const manifest = struct({
  format_version: whole,
  generator: any,
  license: any,
  source: any,
  cut: any,
  evidence: any,
  config: any,
  versions: any,
  cache_bytes: any,
  adaptor: struct({
    kind: one("identity", "resnet", "unet", "unet-light"),
    name: maybe(text),
    path: maybe(text),
    sha256: maybe(hash),
    trained_for: maybe(point(trained)),
  }),
  sample: struct({
    channels: count,
    in_channels: count,
    height: count,
    width: count,
    space: one("pixel", "latent"),
    multiple: maybe(count, 1),
    concat: maybe(list(one("mask", "masked_image", "image", "depth")), []),
  }),
  conditioning: struct({
    kind: one("none", "class", "text"),
    tensors: maybe(tensors, []),
    labels: maybe(list(text), []),
    null_label: maybe(whole),
  }),
  scheduler: (v, at) => (must(isObject(v), at, v, "an object"), readScheduler(v)),
  operating_point: point({ ...trained, seed, num_images: count }),
  cost: map(struct({ parameters: whole, macs: whole, macs_attention: whole })),
  targets: list(
    (v, at) => (must(isObject(v) && typeof v.target === "string", at, v, "a target"), TARGETS[v.target](v, at)),
  ),
  files: map(struct({ size: whole, sha256: hash })),
  prompt: maybe(
    struct({
      encoders: unique(
        struct({
          component: text,
          max_length: whole,
          bos: whole,
          eos: whole,
          pad: whole,
          hidden: unique(text),
          pooled: maybe(text),
          expansions: maybe(
            unique(
              (v, at) => (must(Array.isArray(v) && v.length > 1, at, v, "two token ids or more"), list(whole)(v, at)),
              (ids) => ids[0],
            ),
            [],
          ),
        }),
        (each) => each.component,
      ),
      zeros_without_negative: maybe(flag, false),
    }),
  ),
  vae: maybe(vae),
  preview: maybe(vae),
  lora: maybe(
    struct({ rank: count, layers: map(unique(struct({ name: text, inputs: count, outputs: count }), (v) => v.name)) }),
  ),
});

/** @param {boolean} holds @param {string} name @param {unknown} given @param {string} expected */
function must(holds, name, given, expected) {
  if (!holds)
    throw new BundleError(
      `manifest.json: ${name} is ${given === undefined ? "missing" : shown(given)}; expected ${expected}`,
    );
}

/**
 * Reads a manifest.
 * @param {Uint8Array} bytes
 * @returns {Manifest}
 */
export function parseManifest(bytes) {
  let document;
  try {
    document = JSON.parse(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes));
  } catch (e) {
    throw new BundleError(`manifest.json is not JSON: ${oneLine(e)}; expected a bundle that export wrote`);
  }
  const version = document?.format_version;
  if (!isObject(document) || !Number.isInteger(version)) {
    throw new BundleError(
      "manifest.json is not the manifest of a bundle: it has no format_version; expected a bundle that export wrote",
    );
  }
  if (version !== FORMAT) {
    const way = version > FORMAT ? "update the page that runs it" : "export the model again";
    throw new BundleError(
      `manifest.json is of format version ${version}, this runtime reads version ${FORMAT}; ${way}`,
    );
  }
  if (Array.isArray(document.targets)) {
    document.targets = document.targets.filter(
      (/** @type {any} */ each) => typeof each?.target !== "string" || Object.hasOwn(TARGETS, each.target),
    );
  }
  try {
    const read = manifest(document, "");
    check(read);
    return read;
  } catch (e) {
    throw e instanceof BundleError
      ? e
      : new BundleError(`manifest.json is not a manifest: ${oneLine(e)}; export again`);
  }
}

/** @type {(values: unknown[]) => boolean} */
const distinct = (values) => new Set(values).size === values.length;
/** @type {(a: unknown, b: unknown) => boolean} */
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/** How many channels a part of `concat` has. @param {Sample} sample @param {string} name */
const channelsOf = (sample, name) => (["mask", "depth"].includes(name) ? 1 : sample.channels);

/** What fields say of each other. @param {Manifest} m */
function check(m) {
  const { sample, conditioning: known, adaptor, evidence } = m;
  const learned = adaptor.kind !== "identity";
  must(
    [adaptor.name, adaptor.sha256, adaptor.trained_for].every((value) => (value !== null) === learned),
    "adaptor",
    adaptor,
    "name, sha256 and trained_for of a learned one, null for identity",
  );
  for (const sides of [[sample.height, sample.width], ...(evidence?.sizes ?? [])]) {
    must(
      sides.every((/** @type {number} */ side) => side % sample.multiple === 0),
      "size of a latent",
      sides,
      `multiples of ${sample.multiple}`,
    );
  }
  must(sample.in_channels >= sample.channels, "in_channels", sample.in_channels, `${sample.channels} or more`);
  const { concat } = sample,
    total = sample.channels + concat.reduce((sum, name) => sum + channelsOf(sample, name), 0);
  must(
    !concat.length || sample.in_channels === total,
    "in_channels",
    sample.in_channels,
    `${total}, with ${concat.join(", ")}`,
  );
  must(distinct(concat), "sample.concat", concat, "each once");
  must(
    concat.includes("mask") === concat.includes("masked_image"),
    "sample.concat",
    concat,
    "a mask with a masked image",
  );
  must(known.kind !== "class" || known.labels.length > 0, "labels", known.labels, "the names of the classes");
  must(
    (known.kind !== "none") === known.tensors.length > 0,
    "conditioning.tensors",
    known.tensors,
    "tensors where there is a condition alone",
  );
  known.tensors.forEach(checkSizes);
  must((known.null_label ?? 0) <= known.labels.length, "null_label", known.null_label, `0 to ${known.labels.length}`);
  if (m.prompt) {
    const { encoders } = m.prompt,
      first = encoders[0]?.max_length,
      pooled = encoders.filter((each) => each.pooled !== null).length;
    const fits =
      known.kind === "text" &&
      encoders.length > 0 &&
      encoders.every(
        (each) => STAGE_OF[each.component] === "prompt" && each.max_length === first && each.hidden.length > 0,
      );
    must(
      fits && first > 2,
      "prompt",
      m.prompt,
      "text encoders of a text model, all of one max_length above 2, with their hidden states",
    );
    must(
      pooled === Number(known.tensors.some((t) => t.name === "text_embeds")),
      "pooled",
      pooled,
      "one text encoder where the UNet takes text_embeds, else none",
    );
  }
  for (const name of ["vae", "preview"]) {
    const { mean, std } = m[name] ?? {},
      lengths = [mean, std].map((values) => values?.length ?? sample.channels);
    must(
      !m[name] || (sample.space === "latent" && !mean === !std && lengths.every((n) => n === sample.channels)),
      name,
      m[name],
      `null where the space is pixel; mean and std with ${sample.channels} numbers, or neither`,
    );
  }
  const kinds = m.targets.map((each) => each.target);
  must(kinds.length > 0 && distinct(kinds), "targets", kinds, "one of a kind, one at least that this runtime knows");
  for (const each of m.targets) checkTarget(each, m);
}

/** @param {any} target @param {Manifest} m */
function checkTarget(target, m) {
  const { deployment_target: system, specification_version: version } = target;
  must(
    !system || version === 0 || version === SPECIFICATIONS[system],
    "specification_version",
    version,
    `that of ${system}`,
  );
  must("unet" in target.components, "components", Object.keys(target.components), "a unet");
  for (const [name, each] of Object.entries(/** @type {Record<string, Component>} */ (target.components))) {
    const half = each.dtype === "fp16",
      looped = each.stage === "step",
      rounded = half || Object.keys(each.weights).length > 0;
    must(
      each.stage === STAGE_OF[name],
      `stage of ${name}`,
      each.stage,
      `a component of ${Object.keys(STAGE_OF).join(", ")} in its own stage`,
    );
    must(
      (each.floors.program != null) === rounded,
      "floors.program",
      each.floors.program,
      "dB for fp16 and for weights in fewer bits alone",
    );
    must(half || all(each.graphs).every((t) => t.dtype !== "float16"), "dtype", each.dtype, "fp16 for float16 tensors");
    const listed = (/** @type {string} */ file) => file in m.files || !Object.keys(m.files).length;
    must(each.files.every(listed), `files of ${name}`, each.files, "files of the bundle");
    must(
      each.tokenizer === null || (each.stage === "prompt" && listed(each.tokenizer)),
      `tokenizer of ${name}`,
      each.tokenizer,
      "a file of the bundle where it is a text encoder, else null",
    );
    must(
      (each.layout !== null) === looped && each.graphs.every((g) => (g.frequency !== null) === looped),
      `layout of ${name}`,
      each.layout,
      "a layout and frequencies for the unet alone",
    );
    checkGraphs(name, each, m);
    checkFurther(name, each, m);
  }
  checkWidths(target, m);
}

/** All tensors of graphs. @param {Graph[]} graphs */
export const all = (graphs) => graphs.flatMap((g) => [...g.inputs, ...g.outputs]);
/** Whether a tensor has a height and a width. @param {Tensor} t */
const isMap = (t) => t.shape.length === 4 && t.name !== "encoder_hidden_states";
const isAny = (/** @type {Graph[]} */ graphs) =>
  all(graphs).some((t) => isMap(t) && t.shape.slice(2).some((side) => typeof side === "string"));

/** A tensor's shape for a latent of this size. @param {Tensor} t @param {number} height @param {number} width */
function shapeAt(t, height, width) {
  return t.shape.map((side) => {
    const found = /^(?:(\d+)\*)?(height|width)(?:\/(\d+))?$/.exec(String(side));
    return found
      ? Math.floor((Number(found[1] ?? 1) * (found[2] === "height" ? height : width)) / Number(found[3] ?? 1))
      : side;
  });
}

/**
 * A component's graphs for a latent of this size; null where it has none.
 * @param {Component} component
 * @param {Sample} sample
 * @param {number} height
 * @param {number} width
 */
export function graphsAt(component, sample, height, width) {
  const { graphs, further } = component,
    usual = height === sample.height && width === sample.width;
  if (isAny(graphs)) {
    if (height % sample.multiple || width % sample.multiple) return null;
    const sized = (/** @type {Tensor} */ t) => ({ ...t, shape: shapeAt(t, height, width) });
    return graphs.map((g) => ({ ...g, inputs: g.inputs.map(sized), outputs: g.outputs.map(sized) }));
  }
  if (usual || !all(graphs).some(isMap)) return graphs;
  return further.find((each) => each.height === height && each.width === width)?.graphs ?? null;
}

/** @param {string} name @param {Component} component @param {Manifest} m */
function checkGraphs(name, component, m) {
  const maps = all(component.graphs).filter(isMap);
  must(
    new Set(maps.flatMap((t) => t.shape.slice(2).map((side) => typeof side))).size < 2,
    `shapes in ${name}`,
    maps.map((t) => t.shape),
    "all of one size, or all of any",
  );
  all(component.graphs).forEach(checkSizes);
  if (component.stage === "step") checkUnet(component, m);
  else checkBeside(name, component, m);
}

/** @param {string} name @param {Component} component @param {Manifest} m */
function checkFurther(name, component, m) {
  const { graphs, further } = component,
    { sample } = m,
    key = (/** @type {any} */ g) => g.function ?? g.name;
  must(
    distinct([sample, ...further].map((s) => `${s.height}x${s.width}`)),
    `further of ${name}`,
    further.length,
    "other sizes than the usual one, each once",
  );
  must(!further.length || !isAny(graphs), `further of ${name}`, further.length, "none where graphs take any size");
  const keys = [...graphs, ...further.flatMap((each) => each.graphs)].filter((g) => g.file !== null).map(key);
  must(
    !further.length || distinct(keys),
    `functions of ${name}`,
    keys,
    "a function of its own for each graph and size",
  );
  for (const { height, width, graphs: sized } of further) {
    must(
      height % sample.multiple === 0 && width % sample.multiple === 0,
      `further of ${name}`,
      [height, width],
      `multiples of ${sample.multiple}`,
    );
    const [said, expected] = [sized, graphs].map((each) => each.map((g) => [g.name, g.frequency]));
    must(same(said, expected), `further of ${name}`, said, "the graphs of the usual size");
    checkGraphs(name, { ...component, graphs: sized, further: [] }, { ...m, sample: { ...sample, height, width } });
  }
}

/** @param {string} name @param {Component} component @param {Manifest} m */
function checkBeside(name, { stage, batch, graphs }, m) {
  must(
    graphs.length === 1 && graphs[0].file !== null,
    `graphs of ${name}`,
    graphs.map((g) => g.name),
    "one, with a file",
  );
  const [{ inputs, outputs }] = graphs,
    rows = batch ?? "batch",
    { sample } = m;
  for (const t of all(graphs)) must(t.shape[0] === rows, `shape of ${t.name} in ${name}`, t.shape, `${rows} first`);
  must(
    inputs.length === 1,
    `inputs of ${name}`,
    inputs.map((t) => t.name),
    "one",
  );
  if (stage === "prompt") {
    const encoder = m.prompt?.encoders.find((each) => each.component === name);
    if (!encoder) return must(false, "prompt.encoders", m.prompt, `an entry for ${name}`);
    must(
      inputs[0].name === "input_ids" && same(inputs[0].shape.slice(1), [encoder.max_length]),
      `inputs of ${name}`,
      inputs[0],
      `input_ids of max_length ${encoder.max_length}`,
    );
    const shapes = new Map(outputs.map((t) => [t.name, t.shape]));
    for (const hidden of encoder.hidden) {
      const shape = shapes.get(hidden);
      must(
        shape?.length === 3 && shape[1] === encoder.max_length,
        `${hidden} of ${name}`,
        shape,
        `an output with a row for each of ${encoder.max_length} tokens`,
      );
    }
    must(
      encoder.pooled === null || shapes.get(encoder.pooled)?.length === 2,
      `${encoder.pooled} of ${name}`,
      [...shapes.keys()],
      "an output with a row for each text",
    );
    return;
  }
  if (name === T2I_ADAPTER) {
    const [t] = inputs,
      told = (/** @type {Tensor[]} */ list) => list.map((each) => [each.name, each.shape[1]]),
      known = told(featuresAmong(m.conditioning.tensors));
    must(
      t.name === "control_image" && isMap(t) && [1, 3].includes(Number(t.shape[1])),
      `inputs of ${name}`,
      t,
      "control_image, of 1 or 3 channels",
    );
    must(
      known.length > 0 && same(told(outputs.filter(isMap)), known),
      `outputs of ${name}`,
      told(outputs),
      `those of conditioning.tensors: ${shown(known)}`,
    );
    return;
  }
  const vae = stage === "preview" ? m.preview : m.vae;
  if (!vae) return must(false, stage === "preview" ? "preview" : "vae", vae, `a value where there is a ${name}`);
  const picture = [3, vae.downscale * sample.height, vae.downscale * sample.width],
    latent = [sample.channels, sample.height, sample.width];
  must(
    outputs.length === 1,
    `outputs of ${name}`,
    outputs.map((t) => t.name),
    "one",
  );
  const fits = (/** @type {Tensor} */ t, /** @type {number[]} */ shape) =>
    must(
      same(shapeAt(t, sample.height, sample.width).slice(1), shape),
      `shape of ${t.name} in ${name}`,
      t.shape,
      shown(shape),
    );
  fits(inputs[0], stage === "image" ? picture : latent);
  if (stage !== "image") fits(outputs[0], picture);
}

/** What a target's text encoders give together is what the UNet takes. @param {Target} target @param {Manifest} m */
function checkWidths({ components }, m) {
  const encoders = m.prompt?.encoders ?? [];
  if (!encoders.length || !encoders.every((each) => each.component in components)) return;
  /** @type {Record<string, number>} */
  const given = { encoder_hidden_states: 0 };
  for (const { component, hidden, pooled } of encoders) {
    const widths = new Map(components[component].graphs[0].outputs.map((t) => [t.name, Number(t.shape.at(-1))]));
    const states = hidden.map((name) => widths.get(name) ?? 0);
    must(new Set(states).size === 1, `widths of hidden in ${component}`, states, "the same for all");
    given.encoder_hidden_states += states[0];
    if (pooled !== null) given.text_embeds = widths.get(pooled) ?? 0;
  }
  for (const { name, shape } of m.conditioning.tensors) {
    must(
      !(name in given) || shape.at(-1) === given[name],
      `width of ${name}`,
      shape,
      `${given[name]}, as the encoders give it`,
    );
  }
}

/** @param {Component} unet @param {Manifest} m */
function checkUnet({ graphs, batch }, m) {
  const { sample } = m,
    rows = batch ?? "batch",
    factors = factorShapes(m);
  for (const name of [...graphs.map((g) => g.name), "full", "cached"])
    must(name in m.cost, "cost", Object.keys(m.cost), `an entry for ${name}`);
  for (const g of graphs.filter((each) => each.name === "adaptor")) {
    must(
      (g.file === null) === (m.adaptor.kind === "identity"),
      "file of adaptor",
      g.file,
      "null for the identity alone",
    );
  }
  for (const full of [true, false]) checkWiring(graphs, m, full);
  /** @type {Record<string, number[]>} */
  const images = {
    sample: [sample.in_channels, sample.height, sample.width],
    out_sample: [sample.channels, sample.height, sample.width],
  };
  for (const t of all(graphs)) {
    if (!hasRows(t.name)) {
      const shape = factors[t.name] ?? [1];
      must(same(t.shape, shape), `shape of ${t.name}`, t.shape, shown(shape));
      continue;
    }
    must(
      t.shape[0] === rows || (t.name === "sample" && t.shape[0] === "images"),
      `shape of ${t.name}`,
      t.shape,
      `${rows} first`,
    );
    must(
      !(t.name in images) || same(shapeAt(t, sample.height, sample.width).slice(1), images[t.name]),
      `shape of ${t.name}`,
      t.shape,
      shown(images[t.name]),
    );
  }
  for (const g of graphs) {
    const can =
      batch === null &&
      g.inputs.some((t) => t.name !== "sample" && hasRows(t.name)) &&
      g.outputs.every((t) => t.name !== "sample");
    must(
      can || !sharesRows(g),
      `shape of sample in ${g.name}`,
      "images",
      `${rows}: graphs share rows where the batch is symbolic and something else has all rows`,
    );
  }
}

/** A T2I-Adapter's features among tensors. @param {Tensor[]} tensors */
export const featuresAmong = (tensors) => tensors.filter(({ name }) => name.startsWith(T2I_ADAPTER));
/** The shapes of the low-rank factors that graphs take, by name. @param {Manifest} m @returns {Record<string, number[]>} */
function factorShapes({ lora }) {
  if (!lora) return {};
  const sides = /** @type {const} */ (["inputs", "outputs"]);
  return Object.fromEntries(
    Object.entries(/** @type {Record<string, {inputs: number, outputs: number}[]>} */ (lora.layers)).flatMap(
      ([part, layers]) =>
        sides.map((side) => [
          `lora_${side === "inputs" ? "down" : "up"}_${part}`,
          [1, lora.rank * layers.reduce((sum, layer) => sum + layer[side], 0)],
        ]),
    ),
  );
}

/** Whether a graph takes a sample once for each image. @param {Graph} g */
export const sharesRows = (g) => g.inputs.some((t) => t.name === "sample" && t.shape[0] === "images");
/** Whether a graph belongs to a full or a cached step. @param {Graph} g @param {boolean} full */
export const runsIn = (g, full) => g.frequency === "step" || g.frequency === (full ? "full_step" : "cached_step");

/**
 * Follows the tensors through one step: each is there when a graph wants it.
 * @param {Graph[]} graphs
 * @param {Manifest} m
 * @param {boolean} full
 */
function checkWiring(graphs, m, full) {
  const there = new Set([
    "sample",
    "timestep",
    ...m.conditioning.tensors.map((t) => t.name),
    ...Object.keys(factorShapes(m)),
    ...(full ? [] : ["cache", "lowres_feature"]),
    // A ControlNet's residuals stay.
    ...(full ? [] : graphs.filter((g) => g.name === CONTROLNET).flatMap((g) => g.outputs.map((t) => t.name))),
  ]);
  for (const g of graphs) {
    // Where nothing runs, the cache keeps the name that the last step gave it.
    const stays = g.inputs.map((t) => (t.name === "cache" ? "lowres_feature" : t.name));
    must(
      g.file !== null || g.outputs.every((t) => stays.includes(t.name)),
      `file of ${g.name}`,
      g.file,
      "a file: what it makes does not come in",
    );
    if (!runsIn(g, full)) continue;
    const missing = g.inputs.find((t) => !there.has(t.name));
    must(!missing, `inputs of ${g.name}`, missing?.name, "tensors that a step has by then");
    for (const t of g.outputs) there.add(t.name);
  }
  must(
    there.has("out_sample") && there.has("lowres_feature"),
    "outputs of a step",
    [...there],
    "out_sample, lowres_feature",
  );
}

/** Only the rows, a text's length, and a map's height and width may be symbols. @param {Tensor} t */
function checkSizes(t) {
  const shape = isMap(t) ? shapeAt(t, 2 ** 20, 2 ** 20) : t.shape;
  const symbolic = (/** @type {number} */ i) =>
    i === 0 || (i === 1 && t.name === "encoder_hidden_states" && t.shape[1] === "tokens");
  must(
    shape.every((side, i) => (typeof side === "number" ? side > 0 : symbolic(i))),
    `shape of ${t.name}`,
    t.shape,
    "sizes",
  );
}
