// The page: opens the bundle, and runs one thing at a time, a drawing or a measurement.
import { Drawing } from "./drawing.js";
import {
  button,
  element,
  fail,
  hideProgress,
  loaded,
  outOfMemory,
  part,
  refusal,
  say,
  sayLoading,
  sayProgress,
} from "./elements.js";
import { Engine } from "./engine.js";
import { Form } from "./form.js";
import { isolate, keepFiles, limits, missing } from "./isolation.js";
import { duration } from "./ledger_chart.js";

const MOST_THREADS = 64;
const engine = new Engine(),
  form = new Form(),
  drawing = new Drawing(engine, form, () => running !== null);
/** @type {AbortController | null} */
let running = null;
/** A link that was followed while something ran. @type {string | null} */
let wanted = null;

// --- Opening

async function start() {
  const lacks = missing();
  if (lacks) return fail(refusal(lacks));
  engine.start();
  const { kept, again } = await isolate();
  if (again) return;
  element("notes").textContent = limits(kept).join(" ");
  await open();
}

/** @param {boolean} [lowMemory] */
async function open(lowMemory = false) {
  say("Loading the bundle");
  sayProgress(null);
  let opened;
  try {
    opened = await engine.open({ ...asked(), lowMemory }, sayLoading);
  } catch (e) {
    say("");
    if (!lowMemory && outOfMemory(e)) {
      engine.start();
      return await open(true);
    }
    return fail(e);
  } finally {
    hideProgress();
  }
  await form.fill(opened);
  const draws = opened.conditioning.kind !== "text" || opened.canEncode;
  button("draw").disabled = button("measure").disabled = !draws;
  if (!draws)
    fail(refusal("this bundle has no text encoder, so the page cannot draw with it; export a whole pipeline"));
  else if (!opened.canDecode)
    fail(refusal("this bundle has no decoder, so there are no pictures; export it with its autoencoder"));
  say(`Ready: opened in ${duration(opened.ms)}${lowMemory ? ", with one component in memory at a time" : ""}.`);
  document.documentElement.dataset.ready = "yes";
  // For the next visit without a network; where the browser keeps nothing, nothing is lost now.
  const parts = ["measure.js", ...(form.takesPictures ? ["pictures.js"] : []), ...(form.control ? ["control.js"] : [])];
  keepFiles(["bundle/manifest.json", "bundle/SHA256SUMS", ...parts]).then(
    () => (document.documentElement.dataset.kept = "yes"),
    () => {},
  );
}

/** What the address asks for. */
function asked() {
  const words = new URLSearchParams(location.search),
    threads = words.get("threads");
  if (threads !== null && !(/^\d+$/.test(threads) && +threads >= 1 && +threads <= MOST_THREADS))
    throw refusal(`threads is ${JSON.stringify(threads)} in the address; expected 1 to ${MOST_THREADS}`);
  return {
    url: new URL("bundle/", location.href).href,
    backend: words.get("backend") ?? undefined,
    threads: threads === null ? undefined : Number(threads),
  };
}

/** After a failure that the worker does not outlive. @param {unknown} error */
async function recover(error) {
  if (!outOfMemory(error) && !engine.isDead) return;
  engine.start();
  await open(true);
}

// --- Running

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
    drawing.restore();
    say(controller.signal.aborted ? "Cancelled." : "");
    if (!controller.signal.aborted) fail(e);
    await recover(e);
  } finally {
    running = null;
    form.boxes.mark(null);
    hideProgress();
    setRunning(false);
    if (before === button("draw")) button("draw").focus();
    if (wanted !== null) follow(wanted);
  }
}

/** @param {boolean} isRunning */
function setRunning(isRunning) {
  for (const name of ["measure", "download", "edit-this", "share", "export"]) button(name).disabled = isRunning;
  const hadFocus = document.activeElement === button("draw");
  button("draw").hidden = isRunning;
  button("cancel").hidden = !isRunning;
  if (isRunning && hadFocus) button("cancel").focus();
}

/** @param {AbortSignal} signal */
async function measured(signal) {
  const { measure } = await loaded(import("./measure.js"));
  await measure(engine, form, signal);
}

/** @param {string} hash */
function follow(hash) {
  wanted = null;
  element("notes").textContent = "";
  form.follow(hash);
}

part("form", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  run((signal) => drawing.draw(signal));
});
button("measure").addEventListener("click", () => run(measured));
button("cancel").addEventListener("click", () => running?.abort());
addEventListener("hashchange", () => {
  if (running) wanted = location.hash;
  else if (form.isFilled) follow(location.hash); // where nothing is open yet, the form is filled from the address then
});

start().catch(fail);
