// The page: what is asked for, the picture as it forms, what it cost.
import { ClockBoxes, maskOf, periodOf } from "./clock_boxes.js";
import { differenceMap, psnr } from "./compare.js";
import { Engine } from "./engine.js";
import { isolate, keepFiles, limits, missing } from "./isolation.js";
import { duration, ledgerChart, sum } from "./ledger_chart.js";
import { fromHash, isSeed, MOST_STEPS, toHash } from "./link.js";
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
const box = (/** @type {string} */ id) => part(id, HTMLElement);

const prompt = part("prompt", HTMLTextAreaElement),
  label = part("label", HTMLSelectElement),
  period = part("period", HTMLSelectElement),
  progress = part("progress", HTMLProgressElement);
const boxes = new ClockBoxes(box("boxes"), () => showPeriod());
/** @type {Engine} */
let engine;
/** What the worker said of the bundle. @type {any} */
let opened = null;
/** @type {AbortController | null} */
let running = null;
/** @type {Drawn | null} */
let shown = null;
let loadMs = 0;

// --- Words

/** @param {string} text */
function say(text) {
  box("status").textContent = text;
}

/** @param {unknown} error */
function fail(error) {
  box("error").textContent = sentence(error);
  box("error").hidden = false;
}

/** @param {unknown} error */
function sentence(error) {
  const { name = "", message = String(error) } = /** @type {Error} */ (error);
  const words = message.charAt(0).toUpperCase() + message.slice(1);
  if (outOfMemory(error)) return `The browser has no memory left for this: ${message}. Close other tabs and try again.`;
  if (name === "BundleError" || name === "RequestError") return words.endsWith(".") ? words : `${words}.`;
  return `Something went wrong: ${message}.`;
}

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
  box("notes").textContent = [...limits(kept), ...wrong].join(" ");
  await open();
}

/** @param {boolean} [lowMemory] */
async function open(lowMemory = false) {
  say("Loading the bundle");
  progress.hidden = false;
  progress.removeAttribute("value");
  const before = performance.now();
  const asked = new URLSearchParams(location.search);
  const number = Number(asked.get("threads"));
  const options = {
    url: new URL("bundle/", location.href).href,
    backend: asked.get("backend") ?? undefined,
    threads: asked.has("threads") ? number : undefined,
    lowMemory,
  };
  try {
    opened = await engine.open(options, ({ loaded, total }) => {
      progress.value = total ? loaded / total : 0;
      say(`Loading the bundle: ${(loaded / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`);
    });
  } catch (e) {
    say("");
    return fail(e);
  } finally {
    progress.hidden = true;
  }
  loadMs = performance.now() - before;
  fill();
  button("draw").disabled = button("measure").disabled = false;
  document.documentElement.dataset.ready = "yes";
  keepFiles(["bundle/manifest.json", "bundle/SHA256SUMS"]).then(
    () => (document.documentElement.dataset.kept = "yes"),
    () => {},
  ); // offline: they are kept
}

function fill() {
  const { conditioning, point, backend, threads, model, adaptor } = opened;
  box("prompt-field").hidden = box("negative-field").hidden = !opened.canEncode;
  box("label-field").hidden = conditioning.kind !== "class";
  box("guidance-field").hidden = conditioning.kind === "none";
  label.replaceChildren(...conditioning.labels.map((/** @type {string} */ name) => new Option(name, name)));
  if (conditioning.kind === "text" && !opened.canEncode)
    fail(
      Object.assign(
        new Error("This bundle has no text encoder, so the page cannot draw with it; export a whole pipeline."),
        { name: "RequestError" },
      ),
    );
  const { settings } = fromHash(location.hash);
  prompt.value ||= opened.prompt ?? "";
  input("compare").checked = opened.isLight;
  input("forming").checked = opened.isLight || opened.canPreview;
  set({
    prompt: prompt.value,
    negative: "",
    label: conditioning.labels[0] ?? "",
    seed: "0",
    steps: point.num_inference_steps,
    guidance: Math.max(point.guidance_scale, 0),
    mask: point.mask,
    ...settings,
  });
  const where = backend === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  box("about").textContent =
    `${model} with adaptor ${adaptor}, in ${where}, in this browser. Nothing leaves the device.`;
  say(`Ready: opened in ${duration(loadMs)}.`);
}

// --- Settings

/** @param {Settings} settings */
function set(settings) {
  prompt.value = settings.prompt;
  input("negative").value = settings.negative;
  if (settings.label && opened.conditioning.kind === "class") {
    label.value = settings.label;
    if (label.selectedIndex < 0) {
      label.selectedIndex = 0;
      box("notes").append(` The bundle has no class ${JSON.stringify(settings.label)}; the first one is chosen.`);
    }
  }
  input("seed").value = settings.seed;
  input("steps").value = String(settings.steps);
  input("guidance").value = String(settings.guidance);
  const calls = opened.calls[settings.steps - 1];
  boxes.show(settings.mask.length === calls ? settings.mask : maskOf(periodOf(settings.mask) ?? 2, calls));
  showPeriod();
}

/** @returns {Settings} */
function settings() {
  const steps = Number(input("steps").value),
    seed = input("seed").value.trim();
  const refuse = (/** @type {string} */ message) => {
    throw Object.assign(new Error(message), { name: "RequestError" });
  };
  if (!(Number.isInteger(steps) && steps >= 1 && steps <= MOST_STEPS))
    refuse(`steps is ${JSON.stringify(input("steps").value)}; expected 1 to ${MOST_STEPS}`);
  if (!isSeed(seed)) refuse(`seed is ${JSON.stringify(seed.slice(0, 40))}; expected a whole number below 2^64`);
  return {
    prompt: prompt.value,
    negative: input("negative").value,
    label: label.value,
    seed,
    steps,
    guidance: Number(input("guidance").value),
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
  const now = periodOf(boxes.mask);
  const names = [1, 2, 3, 4, 5].map(
    (n) =>
      new Option(
        n === 1 ? "1: every step full" : `${n}: each ${["second", "third", "fourth", "fifth"][n - 2]} full`,
        String(n),
      ),
  );
  period.replaceChildren(...names, ...(now === null || now > 5 ? [new Option("as clicked", "own")] : []));
  period.value = now === null || now > 5 ? "own" : String(now);
}

// --- Drawing

async function draw() {
  if (running) return;
  box("error").hidden = true;
  const controller = (running = new AbortController());
  button("draw").hidden = true;
  button("cancel").hidden = button("measure").disabled = false;
  button("measure").disabled = true;
  try {
    const asked = settings();
    history.replaceState(null, "", toHash(asked));
    say("Drawing");
    const result = await engine.draw(requestOf(asked), {
      signal: controller.signal,
      shows: input("forming").checked,
      told: (event) => told(event),
    });
    show({ settings: asked, result, always: null });
    box("notes").textContent = result.warnings.join(" ");
    /** @type {ResultMessage | null} */
    let always = null;
    if (input("compare").checked && asked.mask.includes(0)) {
      say("Drawing again with every step full, to compare");
      always = await engine.draw(requestOf({ ...asked, mask: asked.mask.map(() => 1) }), { signal: controller.signal });
    }
    show({ settings: asked, result, always });
    keep(/** @type {Drawn} */ (shown));
    say(`Drawn in ${duration(result.ms)}.`);
  } catch (e) {
    if (controller.signal.aborted) say("Cancelled.");
    else {
      say("");
      fail(e);
      if (outOfMemory(e)) {
        engine.restart();
        await open(true);
      }
    }
  } finally {
    running = null;
    boxes.mark(null);
    progress.hidden = true;
    button("draw").hidden = false;
    button("cancel").hidden = true;
    button("measure").disabled = false;
  }
}

/** @param {any} event */
function told(event) {
  if (event.type === "step") {
    const { index, count, full, ms, image } = event;
    boxes.mark(index + 1 < count ? index + 1 : null);
    progress.hidden = false;
    progress.value = (index + 1) / count;
    say(`Step ${index + 1} of ${count}: ${full ? "full" : "cached"}, ${duration(sum(ms))}`);
    if (image) {
      box("pictures").hidden = false;
      box("other").hidden = box("map").hidden = true;
      paint("picture", image);
      box("picture-caption").textContent = `after step ${index + 1} of ${count}`;
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
  const letters = result.mask.map((full) => (full ? "F" : "c")).join("");
  box("pictures").hidden = !result.image;
  if (result.image) {
    paint("picture", result.image);
    part("picture", HTMLCanvasElement).setAttribute("aria-label", settings.prompt || settings.label || "The picture");
    box("picture-caption").textContent = `${letters}, seed ${result.seed}, ${duration(result.ms)}`;
  }
  const both = result.image && always?.image ? { one: result.image, other: always.image } : null;
  box("other").hidden = box("map").hidden = !both;
  if (both && always) {
    paint("uncached", both.other);
    box("uncached-caption").textContent = `every step full, ${duration(always.ms)}`;
    paint("difference", differenceMap(both.one, both.other));
    const db = psnr(both.one, both.other);
    box("difference-caption").textContent = `difference: ${db === Infinity ? "none" : `${db.toFixed(1)} dB PSNR`}`;
  }
  const flops = 1 - result.macs.done / result.macs.uncached;
  const time = always ? 1 - loopMs(result) / loopMs(always) : null;
  box("totals").textContent = [
    `${duration(result.ms)} in all, ${duration(loopMs(result))} of it in the steps.`,
    `Multiply-adds saved: ${percent(flops)}.`,
    time === null ? "" : `Time of the steps saved: ${percent(time)}.`,
  ].join(" ");
  box("ledger").hidden = box("keep").hidden = false;
  box("chart").replaceChildren(ledgerChart(result, Math.max(box("chart").clientWidth, 240)));
}

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
    set(drawn.settings);
    show(drawn);
    history.replaceState(null, "", toHash(drawn.settings));
  });
  item.append(back);
  box("gallery").prepend(item);
  // The tab's memory stays flat: the oldest pictures go.
  while (box("gallery").childElementCount > 48) box("gallery").lastElementChild?.remove();
  box("gallery-section").hidden = false;
}

// --- Measuring

async function measure() {
  if (running) return;
  box("error").hidden = true;
  const controller = (running = new AbortController()),
    rounds = Math.min(Math.max(Number(input("rounds").value) || 8, 2), 50);
  button("measure").disabled = button("draw").disabled = true;
  button("cancel").hidden = false;
  try {
    const asked = settings();
    const clocked = requestOf(asked),
      always = requestOf({ ...asked, mask: asked.mask.map(() => 1) });
    const run = (/** @type {import("../src/pipeline.js").Arguments} */ request) =>
      engine.draw(request, { signal: controller.signal });
    say("Warming up");
    await run(always);
    await run(clocked);
    const found = [];
    for (let k = 0; k < rounds; k++) {
      say(`Round ${k + 1} of ${rounds}`);
      progress.hidden = false;
      progress.value = k / rounds;
      found.push({ always: await run(always), clocked: await run(clocked) });
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
    box("measured").replaceChildren(table);
    save(
      `${opened.model}-${opened.backend}.json`,
      new Blob([JSON.stringify(ledger, null, 1)], { type: "application/json" }),
    );
    const [time] = spread(found.map((round) => 1 - loopMs(round.clocked) / loopMs(round.always)));
    say(`Measured: the steps take ${percent(time)} less time than with every step full.`);
  } catch (e) {
    if (controller.signal.aborted) say("Cancelled.");
    else {
      say("");
      fail(e);
    }
  } finally {
    running = null;
    progress.hidden = true;
    button("measure").disabled = button("draw").disabled = false;
    button("cancel").hidden = true;
  }
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
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw();
});
button("cancel").addEventListener("click", () => running?.abort());
button("measure").addEventListener("click", measure);
button("another").addEventListener("click", () => {
  input("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
});
input("steps").addEventListener("change", () => {
  const calls = opened?.calls[Number(input("steps").value) - 1];
  if (!calls) return;
  boxes.show(maskOf(periodOf(boxes.mask) ?? 2, calls));
  showPeriod();
});
period.addEventListener("change", () => {
  if (period.value === "own") return;
  boxes.show(maskOf(Number(period.value), boxes.mask.length));
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
  const link = location.href;
  try {
    await navigator.clipboard.writeText(link);
    say("The link is copied; it draws the same picture again.");
  } catch {
    say(`The browser copies nothing here; the link is ${link}`);
  }
});
button("export").addEventListener("click", () => {
  if (!shown) return;
  const { settings, result, always } = shown;
  const strip = (/** @type {ResultMessage | null} */ each) =>
    each && { ...each, image: undefined, type: undefined, id: undefined };
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
  if (!opened || running) return;
  const { settings: wanted, wrong } = fromHash(location.hash);
  box("notes").textContent = wrong.join(" ");
  set({ ...settings(), ...wanted });
});

start().catch(fail);
