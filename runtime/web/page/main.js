// The page: what is asked for, the picture as it forms, what it cost.
import { ClockBoxes, maskOf, periodOf } from "./clock_boxes.js";
import { differenceMap, psnr } from "./compare.js";
import { Engine } from "./engine.js";
import { isolate, keepFiles, limits, missing } from "./isolation.js";
import { duration, ledgerChart, sum } from "./ledger_chart.js";
import { fromHash, isGuidance, isSeed, MOST_GUIDANCE, MOST_STEPS, toHash } from "./link.js";
import { benchLedger, spread } from "./measure.js";

/**
 * @typedef {import("./engine.js").Image} Image
 * @typedef {import("./engine.js").ResultMessage} ResultMessage
 * @typedef {import("./link.js").Settings} Settings
 * @typedef {{settings: Settings, result: ResultMessage, always: ResultMessage | null}} Drawn
 */

/** @template {HTMLElement} T @param {string} id @param {new () => T} kind @returns {T} */
function part(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`the page has no ${id}`);
  return found;
}
const input = (/** @type {string} */ id) => part(id, HTMLInputElement);
const button = (/** @type {string} */ id) => part(id, HTMLButtonElement);
const element = (/** @type {string} */ id) => part(id, HTMLElement);

const prompt = part("prompt", HTMLTextAreaElement),
  label = part("label", HTMLSelectElement),
  period = part("period", HTMLSelectElement),
  progress = part("progress", HTMLProgressElement);
const MOST_THREADS = 64;
const boxes = new ClockBoxes(element("boxes"), () => {
  chosen = periodOf(boxes.mask);
  showPeriod();
});
/** @type {Engine} */
let engine;
/** What the worker said of the bundle. @type {any} */
let opened = null;
/** @type {AbortController | null} */
let running = null;
/** @type {Drawn | null} */
let shown = null;
let loadMs = 0;
/** The period that was chosen; null where boxes were clicked. @type {number | null} */
let chosen = null;
/** A link that was followed while something ran. @type {string | null} */
let wanted = null;
/** Whether the form was filled, so that what the user switched off stays off. */
let isFilled = false;

// --- Words

/** @param {string} text */
function say(text) {
  element("status").textContent = text;
  element("now").textContent = "";
}

/** @param {unknown} error */
function fail(error) {
  element("error").textContent = sentence(error);
  element("error").hidden = false;
}

/** @param {unknown} error */
function sentence(error) {
  const { name = "", message = String(error) } = /** @type {Error} */ (error),
    said = message.replace(/\.+$/, ""),
    words = `${said.charAt(0).toUpperCase()}${said.slice(1)}.`;
  if (outOfMemory(error)) return `The browser has no memory left for this: ${said}. Close other tabs and try again.`;
  return name === "BundleError" || name === "RequestError" ? words : `Something went wrong: ${words}`;
}

/** What the user can correct. @param {string} message */
const refusal = (message) => Object.assign(new Error(message), { name: "RequestError" });

/** @param {unknown} error */
const outOfMemory = (error) =>
  error instanceof RangeError ||
  /out of memory|allocate memory|bad_alloc|memory access out of bounds|allocation failed/i.test(String(error));

// --- Opening

async function start() {
  const lacks = missing();
  if (lacks) return fail(Object.assign(new Error(lacks), { name: "RequestError" }));
  engine = new Engine();
  const { kept, again } = await isolate();
  if (again) return;
  const { wrong } = fromHash(location.hash);
  element("notes").textContent = [...limits(kept), ...wrong].join(" ");
  await open();
}

/** @param {boolean} [lowMemory] */
async function open(lowMemory = false) {
  say("Loading the bundle");
  progress.hidden = false;
  progress.removeAttribute("value");
  const before = performance.now();
  const asked = new URLSearchParams(location.search),
    threads = asked.get("threads");
  try {
    if (threads !== null && !(/^\d+$/.test(threads) && +threads >= 1 && +threads <= MOST_THREADS))
      throw refusal(`threads is ${JSON.stringify(threads)} in the address; expected 1 to ${MOST_THREADS}`);
    const options = {
      url: new URL("bundle/", location.href).href,
      backend: asked.get("backend") ?? undefined,
      threads: threads === null ? undefined : Number(threads),
      lowMemory,
    };
    opened = await engine.open(options, ({ loaded, total }) => {
      progress.value = total ? loaded / total : 0;
      element("now").textContent = `${(loaded / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`;
    });
  } catch (e) {
    say("");
    if (!lowMemory && outOfMemory(e)) {
      engine.restart();
      return open(true);
    }
    return fail(e);
  } finally {
    progress.hidden = true;
  }
  loadMs = performance.now() - before;
  fill();
  const draws = opened.conditioning.kind !== "text" || opened.canEncode;
  button("draw").disabled = button("measure").disabled = !draws;
  if (!draws)
    fail(refusal("this bundle has no text encoder, so the page cannot draw with it; export a whole pipeline"));
  else if (!opened.canDecode)
    fail(refusal("this bundle has no decoder, so there are no pictures; export it with its autoencoder"));
  say(`Ready: opened in ${duration(loadMs)}${lowMemory ? ", with one component in memory at a time" : ""}.`);
  document.documentElement.dataset.ready = "yes";
  // For the next visit without a network; where the browser keeps nothing, nothing is lost now.
  keepFiles(["bundle/manifest.json", "bundle/SHA256SUMS"]).then(
    () => (document.documentElement.dataset.kept = "yes"),
    () => {},
  );
}

/** After a failure that the worker does not outlive. @param {unknown} error */
async function recover(error) {
  if (!outOfMemory(error) && !engine.isDead) return;
  engine.restart();
  await open(true);
}

function fill() {
  const { conditioning, backend, threads, model, adaptor } = opened;
  element("prompt-field").hidden = element("negative-field").hidden = !opened.canEncode;
  element("label-field").hidden = conditioning.kind !== "class";
  element("guidance-field").hidden = conditioning.kind === "none";
  label.replaceChildren(...conditioning.labels.map((/** @type {string} */ name) => new Option(name, name)));
  if (!isFilled) {
    input("compare").checked = opened.isLight;
    input("forming").checked = opened.isLight || opened.canPreview;
    set({ ...defaults(), ...fromHash(location.hash).settings });
  }
  isFilled = true;
  const where = backend === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  element("about").textContent =
    `${model} with adaptor ${adaptor}, in ${where}, in this browser. Nothing leaves the device.`;
}

// --- Settings

/** What the bundle is drawn with where nothing else is said. @returns {Settings} */
function defaults() {
  const { point, conditioning, prompt } = opened;
  return {
    prompt,
    negative: "",
    label: conditioning.labels[0] ?? "",
    seed: "0",
    steps: point.num_inference_steps,
    guidance: point.guidance_scale,
    mask: point.mask,
  };
}

/** @param {Settings} settings */
function set(settings) {
  prompt.value = settings.prompt;
  input("negative").value = settings.negative;
  if (settings.label && opened.conditioning.kind === "class") {
    label.value = settings.label;
    if (label.selectedIndex < 0) {
      label.selectedIndex = 0;
      element("notes").append(` The bundle has no class ${JSON.stringify(settings.label)}; the first one is chosen.`);
    }
  }
  input("seed").value = settings.seed;
  input("steps").value = String(settings.steps);
  input("guidance").value = String(settings.guidance);
  chosen = periodOf(settings.mask);
  const calls = opened.calls[settings.steps - 1];
  if (settings.mask.length !== calls && chosen === null)
    element("notes").append(
      ` The link's clock is for ${settings.mask.length} calls of the model; here there are ${calls}.`,
    );
  boxes.show(fitted(settings.mask, calls));
  showPeriod();
}

/** A mask for another number of calls: the period goes on, clicked boxes stay and full ones follow. @param {number[]} mask @param {number} calls */
function fitted(mask, calls) {
  if (mask.length === calls) return mask;
  return chosen === null ? Array.from({ length: calls }, (_, at) => mask[at] ?? 1) : maskOf(chosen, calls);
}

/** @returns {Settings} */
function settings() {
  const steps = Number(input("steps").value),
    seed = input("seed").value.trim();
  const guidance = input("guidance").value;
  if (!(Number.isInteger(steps) && steps >= 1 && steps <= MOST_STEPS))
    throw refusal(`steps is ${JSON.stringify(input("steps").value)}; expected 1 to ${MOST_STEPS}`);
  if (opened.conditioning.kind !== "none" && !isGuidance(guidance))
    throw refusal(`guidance is ${JSON.stringify(guidance)}; expected a number from 0 to ${MOST_GUIDANCE}`);
  if (!isSeed(seed)) throw refusal(`seed is ${JSON.stringify(seed.slice(0, 40))}; expected a whole number below 2^64`);
  return {
    prompt: prompt.value,
    negative: input("negative").value,
    label: label.value,
    seed,
    steps,
    guidance: Number(guidance),
    mask: [...boxes.mask],
  };
}

/** @param {Settings} settings @returns {import("../src/pipeline.js").Arguments} */
function requestOf({ prompt, negative, label, seed, steps, guidance, mask }) {
  const { kind } = opened.conditioning;
  return {
    seed,
    numInferenceSteps: steps,
    clock: mask,
    guidanceScale: kind === "none" ? 1 : guidance,
    ...(kind === "text" ? { prompt, ...(negative ? { negativePrompt: negative } : {}) } : {}),
    ...(kind === "class" ? { label } : {}),
  };
}

function showPeriod() {
  const words = ["every step full", "each second full", "each third full", "each fourth full", "each fifth full"];
  const isListed = chosen !== null && chosen <= words.length;
  period.replaceChildren(
    ...words.map((text, k) => new Option(`${k + 1}: ${text}`, String(k + 1))),
    ...(isListed ? [] : [new Option("as clicked", "own")]),
  );
  period.value = isListed ? String(chosen) : "own";
}

// --- Drawing

/** Runs a job that Cancel ends; one at a time. @param {(signal: AbortSignal) => Promise<void>} job */
async function run(job) {
  if (running) return;
  const controller = (running = new AbortController()),
    before = document.activeElement;
  element("error").hidden = true;
  setRunning(true);
  try {
    await job(controller.signal);
  } catch (e) {
    // What is on the page is the last picture again, not one that was never finished.
    if (shown) show(shown);
    else element("pictures").hidden = true;
    if (controller.signal.aborted) say("Cancelled.");
    else {
      say("");
      fail(e);
      await recover(e);
    }
  } finally {
    running = null;
    boxes.mark(null);
    progress.hidden = true;
    setRunning(false);
    if (before === button("draw")) button("draw").focus();
    if (wanted !== null) follow();
  }
}

/** @param {boolean} isRunning */
function setRunning(isRunning) {
  for (const name of ["measure", "download", "share", "export"]) button(name).disabled = isRunning;
  const hadFocus = document.activeElement === button("draw");
  button("draw").hidden = isRunning;
  button("cancel").hidden = !isRunning;
  if (isRunning && hadFocus) button("cancel").focus();
}

function draw() {
  return run(async (signal) => {
    const asked = settings();
    remember(asked);
    say("Drawing");
    const result = await engine.draw(requestOf(asked), { signal, shows: input("forming").checked, told });
    /** @type {ResultMessage | null} */
    let always = null;
    if (input("compare").checked && asked.mask.includes(0)) {
      say("Drawing again with every step full, to compare");
      always = await engine.draw(requestOf({ ...asked, mask: asked.mask.map(() => 1) }), { signal });
    }
    signal.throwIfAborted();
    element("notes").textContent = result.warnings.join(" ");
    const drawn = { settings: asked, result, always };
    show(drawn);
    keep(drawn);
    say(`Drawn in ${duration(result.ms)}.`);
  });
}

/** Puts settings into the address. @param {Settings} asked */
function remember(asked) {
  try {
    history.replaceState(null, "", toHash(asked));
  } catch (e) {
    console.info(String(e)); // a browser that limits how often; Copy link makes its own
  }
}

/** @param {any} event */
function told(event) {
  if (event.type === "step") {
    const { index, count, full, ms, image } = event;
    boxes.mark(index + 1 < count ? index + 1 : null);
    progress.hidden = false;
    progress.value = (index + 1) / count;
    element("now").textContent = `Step ${index + 1} of ${count}: ${full ? "full" : "cached"}, ${duration(sum(ms))}`;
    if (image) {
      element("pictures").hidden = false;
      element("other").hidden = element("map").hidden = true;
      paint("picture", image);
      element("picture-caption").textContent = `after step ${index + 1} of ${count}`;
    }
  } else if (event.type === "stage" && event.stage === "decode") say("Decoding the picture");
}

/** @param {string} id @param {Image} image */
function paint(id, { data, width, height }) {
  const canvas = part(id, HTMLCanvasElement);
  canvas.width = width;
  canvas.height = height;
  canvas.classList.toggle("small", width < 200);
  canvas.getContext("2d")?.putImageData(new ImageData(data, width, height), 0, 0);
}

/** @param {ResultMessage} result */
const loopMs = ({ ledger }) => ledger.reduce((total, step) => total + sum(step.ms), 0);
const percent = (/** @type {number} */ share) => `${(100 * share).toFixed(0)} %`;

/** @param {Drawn} drawn */
function show(drawn) {
  shown = drawn;
  const { settings, result, always } = drawn;
  const steps = result.mask.map((full) => (full ? "F" : "c")).join(""),
    letters = steps.length > 20 ? `${result.mask.filter(Boolean).length} of ${steps.length} steps full` : steps;
  element("pictures").hidden = !result.image;
  if (result.image) {
    paint("picture", result.image);
    part("picture", HTMLCanvasElement).setAttribute("aria-label", settings.prompt || settings.label || "The picture");
    element("picture-caption").textContent = `${letters}, seed ${result.seed}, ${duration(result.ms)}`;
  }
  const both = result.image && always?.image ? { one: result.image, other: always.image } : null;
  element("other").hidden = element("map").hidden = !both;
  if (both && always) {
    paint("uncached", both.other);
    element("uncached-caption").textContent = `every step full, ${duration(always.ms)}`;
    paint("difference", differenceMap(both.one, both.other));
    const db = psnr(both.one, both.other);
    element("difference-caption").textContent = `difference: ${db === Infinity ? "none" : `${db.toFixed(1)} dB PSNR`}`;
  }
  const flops = 1 - result.macs.done / result.macs.uncached;
  const time = always ? 1 - loopMs(result) / loopMs(always) : null;
  element("totals").textContent = [
    `${duration(result.ms)} in all, ${duration(loopMs(result))} of it in the steps.`,
    `Multiply-adds saved: ${percent(flops)}.`,
    time === null ? "" : `Time of the steps saved: ${percent(time)}.`,
  ].join(" ");
  element("ledger").hidden = element("keep").hidden = false;
  button("download").hidden = !result.image;
  element("chart").replaceChildren(ledgerChart(result, Math.max(element("chart").clientWidth, 240)));
}

/** Bytes of each picture in the gallery, the newest first. @type {number[]} */
const kept = [],
  MOST_KEPT = 48,
  MOST_KEPT_BYTES = 2 ** 26;

/** A thumbnail that brings a picture of this session back. @param {Drawn} drawn */
function keep(drawn) {
  const { image } = drawn.result;
  if (!image) return;
  const canvas = document.createElement("canvas");
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d")?.putImageData(new ImageData(image.data, image.width, image.height), 0, 0);
  const item = document.createElement("li"),
    back = document.createElement("button"),
    picture = document.createElement("img");
  picture.src = canvas.toDataURL();
  picture.alt = `${drawn.settings.prompt || drawn.settings.label || "picture"}, seed ${drawn.settings.seed}`;
  picture.classList.toggle("small", image.width < 200);
  back.type = "button";
  back.append(picture);
  back.addEventListener("click", () => {
    if (running) return;
    set(drawn.settings);
    show(drawn);
    remember(drawn.settings);
  });
  item.append(back);
  element("gallery").prepend(item);
  // The tab's memory stays flat: the oldest pictures go.
  kept.unshift(image.data.length * (drawn.always ? 2 : 1));
  while (kept.length > 1 && (kept.length > MOST_KEPT || kept.reduce((a, b) => a + b) > MOST_KEPT_BYTES)) {
    kept.pop();
    element("gallery").lastElementChild?.remove();
  }
  element("gallery-section").hidden = false;
}

// --- Measuring

function measure() {
  return run(async (signal) => {
    const rounds = Math.min(Math.max(Number(input("rounds").value) || 8, 2), 50);
    input("rounds").value = String(rounds);
    element("status").scrollIntoView({ block: "center" });
    const asked = settings();
    const clocked = requestOf(asked),
      always = requestOf({ ...asked, mask: asked.mask.map(() => 1) });
    const one = (/** @type {import("../src/pipeline.js").Arguments} */ request) => engine.draw(request, { signal });
    say("Warming up");
    await one(always);
    await one(clocked);
    const found = [];
    for (let k = 0; k < rounds; k++) {
      say(`Round ${k + 1} of ${rounds}`);
      progress.hidden = false;
      progress.value = k / rounds;
      found.push({ always: await one(always), clocked: await one(clocked) });
    }
    const ledger = benchLedger({
      rounds: found,
      opened,
      settings: { steps: asked.steps, clock: asked.mask.join(","), guidance: asked.guidance },
      threads: opened.backend === "wasm" ? opened.threads : null,
      once: { load: loadMs },
    });
    const rows = ["loop", "loop_clock1", "full", "cached", "picture"].flatMap(
      (name) => ledger.rows.find((row) => row.part === name) ?? [],
    );
    const table = document.createElement("table");
    table.innerHTML = "<thead><tr><th>milliseconds</th><th>median</th><th>10 to 90 %</th></tr></thead>";
    for (const { part: name, median_ms, p10_ms, p90_ms } of rows) {
      const line = table.insertRow();
      for (const text of [
        name.replace("_", ", "),
        median_ms.toFixed(1),
        `${p10_ms.toFixed(1)} to ${p90_ms.toFixed(1)}`,
      ])
        line.insertCell().textContent = text;
    }
    element("measured").replaceChildren(table);
    save(
      `${opened.model}-${opened.backend}.json`,
      new Blob([JSON.stringify(ledger, null, 1)], { type: "application/json" }),
    );
    const [time] = spread(found.map((round) => 1 - loopMs(round.clocked) / loopMs(round.always)));
    say(`Measured: the steps take ${percent(time)} less time than with every step full.`);
  });
}

/** @param {string} name @param {Blob} blob */
function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// --- Listening

part("form", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) part("form", HTMLFormElement).requestSubmit();
});
button("cancel").addEventListener("click", () => running?.abort());
button("measure").addEventListener("click", measure);
button("another").addEventListener("click", () => {
  input("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
});
input("steps").addEventListener("change", () => {
  const calls = opened?.calls[Number(input("steps").value) - 1];
  if (!calls) return;
  boxes.show(fitted(boxes.mask, calls));
  showPeriod();
});
period.addEventListener("change", () => {
  if (period.value === "own") return;
  chosen = Number(period.value);
  boxes.show(maskOf(chosen, boxes.mask.length));
  showPeriod();
});
button("download").addEventListener("click", () => {
  part("picture", HTMLCanvasElement).toBlob((blob) => {
    if (blob && shown)
      save(
        `${(shown.settings.prompt || shown.settings.label || "picture").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}-${shown.settings.seed}.png`,
        blob,
      );
  });
});
button("share").addEventListener("click", async () => {
  if (!shown) return;
  const link = new URL(toHash(shown.settings), location.href).href;
  try {
    await navigator.clipboard.writeText(link);
    say("The link is copied; with it, Draw makes the same picture again.");
  } catch {
    say(`The browser copies nothing here; the link is ${link}`);
  }
});
button("export").addEventListener("click", () => {
  if (!shown) return;
  const { settings, result, always } = shown;
  const strip = (/** @type {ResultMessage | null} */ each) =>
    each && { ...each, image: undefined, latents: undefined, type: undefined, id: undefined };
  const text = JSON.stringify(
    {
      bundle: opened.bundle,
      model: opened.model,
      backend: opened.backend,
      settings,
      result: strip(result),
      always: strip(always),
    },
    null,
    1,
  );
  save("ledger.json", new Blob([text], { type: "application/json" }));
});
addEventListener("hashchange", () => {
  wanted = location.hash;
  if (opened && !running) follow();
});

function follow() {
  const { settings, wrong } = fromHash(wanted ?? "");
  wanted = null;
  element("notes").textContent = wrong.join(" ");
  set({ ...defaults(), ...settings });
}

start().catch(fail);
