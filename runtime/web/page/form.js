// The form: what is asked for.
import { callOf, samplerOf } from "../src/schedulers.js";
import { ClockBoxes, maskOf, periodOf } from "./clock_boxes.js";
import { takeDrops } from "./drops.js";
import { editArguments, Editing } from "./edit.js";
import { button, element, input, loaded, part, refusal } from "./elements.js";
import { fromHash, isGuidance, isSeed, MOST_GUIDANCE, MOST_STEPS } from "./link.js";

/** @typedef {import("./link.js").Settings} Settings */

const prompt = part("prompt", HTMLTextAreaElement),
  label = part("label", HTMLSelectElement),
  period = part("period", HTMLSelectElement),
  sampler = part("sampler", HTMLSelectElement);
const PERIODS = ["every step full", "each second full", "each third full", "each fourth full", "each fifth full"];

/** @param {number} steps */
const isSteps = (steps) => Number.isInteger(steps) && steps >= 1 && steps <= MOST_STEPS;

export class Form {
  /** What the worker said of the bundle. @type {any} */
  #opened = null;
  /** The period that was chosen; null where boxes were clicked. @type {number | null} */
  #chosen = null;
  /** Whether the form was filled, so that what the user switched off stays off. */
  #isFilled = false;
  /** A link's clock, until its picture is chosen, without which more steps run. @type {number[]} */
  #later = [];

  /** Of a bundle with a ControlNet. @type {import("./control.js").Control | null} */
  control = null;

  constructor() {
    this.editing = new Editing(() => this.#refit());
    takeDrops(() => (this.control ? [this.control, this.editing] : [this.editing]));
    this.boxes = new ClockBoxes(element("boxes"), () => {
      this.#chosen = periodOf(this.boxes.mask);
      this.#later = [];
      this.#showPeriod();
    });
    button("another").addEventListener("click", () => {
      input("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    });
    input("steps").addEventListener("change", () => this.#refit());
    sampler.addEventListener("change", () => this.#refit());
    period.addEventListener("change", () => {
      if (period.value === "own") return;
      this.#later = [];
      this.#chosen = Number(period.value);
      this.#showMask([], this.boxes.mask.length);
    });
    prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) part("form", HTMLFormElement).requestSubmit();
    });
  }

  /** Shows the fields that a bundle has and, at the first time, what its link asks for. @param {any} opened */
  async fill(opened) {
    if (opened.canControl) this.control ??= new (await loaded(import("./control.js"))).Control();
    this.#opened = opened;
    const { conditioning, backend, threads, model, adaptor } = opened;
    element("prompt-field").hidden = element("negative-field").hidden = !opened.canEncode;
    element("label-field").hidden = conditioning.kind !== "class";
    element("guidance-field").hidden = conditioning.kind === "none";
    const before = sampler.value; // of a bundle that is opened again
    sampler.replaceChildren(
      new Option(`${opened.sampler}, the bundle's`, opened.sampler),
      ...opened.samplers
        .filter((/** @type {string} */ name) => name !== opened.sampler)
        .map((/** @type {string} */ name) => new Option(name, name, false, name === before)),
    );
    this.control?.fill(opened);
    this.editing.fill(opened);
    const chosen = label.value;
    label.replaceChildren(
      ...conditioning.labels.map((/** @type {string} */ name) => new Option(name, name, false, name === chosen)),
    );
    if (!this.#isFilled) {
      input("compare").checked = opened.isLight;
      input("forming").checked = opened.isLight || opened.canPreview;
      this.follow(location.hash);
    }
    this.#isFilled = true;
    const where = backend === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
    element("about").textContent =
      `${model} with adaptor ${adaptor}, in ${where}, in this browser. Nothing leaves the device.`;
  }

  /** Whether the bundle begins with pictures, or draws by some. */
  get takesPictures() {
    return this.control !== null || !element("edit").hidden;
  }

  get isFilled() {
    return this.#isFilled;
  }

  /** How many calls of the model run in so many steps, of which an edit leaves some out; undefined where there are none. @param {number} steps */
  #calls(steps) {
    if (!this.#opened || !isSteps(steps)) return undefined;
    return samplerOf(sampler.value).calls(steps) - callOf(sampler.value, this.editing.leftOut(steps));
  }

  /** Shows the boxes of the steps that run now. */
  #refit() {
    const calls = this.#calls(Number(input("steps").value));
    this.control?.offer(this.editing.picture);
    if (calls) this.#showMask(this.#later.length === calls ? this.#later : this.boxes.mask, calls);
  }

  /** Fills the fields as a link says; what the link lacks is the bundle's. @param {string} hash */
  follow(hash) {
    const { settings, wrong } = fromHash(hash);
    element("notes").append(...wrong.map((text) => ` ${text}`));
    this.set({ ...this.#defaults(), ...settings }, false);
  }

  /** What the bundle is drawn with where nothing else is said. @returns {Settings} */
  #defaults() {
    const { point, conditioning, prompt } = this.#opened;
    return {
      prompt,
      negative: "",
      label: conditioning.labels[0] ?? "",
      seed: "0",
      steps: Math.min(point.num_inference_steps, MOST_STEPS),
      guidance: point.guidance_scale,
      mask: point.mask,
      strength: null,
      imageGuidance: null,
      edit: null,
      sampler: null,
      controlScale: null,
      control: null,
    };
  }

  /** @param {Settings} settings @param {boolean} [hasPicture] whether what it begins with is among them, as in no link */
  set(settings, hasPicture = true) {
    prompt.value = settings.prompt;
    input("negative").value = settings.negative;
    if (settings.label && this.#opened.conditioning.kind === "class") {
      label.value = settings.label;
      if (label.selectedIndex < 0) {
        label.selectedIndex = 0;
        element("notes").append(` The bundle has no class ${JSON.stringify(settings.label)}; the first one is chosen.`);
      }
    }
    input("seed").value = settings.seed;
    input("steps").value = String(settings.steps);
    input("guidance").value = String(settings.guidance);
    this.#setSampler(settings.sampler);
    this.#setControl(settings, hasPicture);
    this.#later = [];
    const { strength, imageGuidance } = settings,
      isOfPicture = strength !== null || imageGuidance !== null;
    // If a link is of a picture, the one that was chosen stays.
    if (hasPicture || !isOfPicture) this.editing.set(settings.edit);
    else this.editing.setNumbers(settings);
    const waits = isOfPicture && !this.editing.hasPicture;
    if (waits)
      element("notes").append(
        this.editing.canEdit
          ? " The link begins with a picture, which no link holds: choose that one, then Draw."
          : " The link begins with a picture, and this bundle begins with none; that was left out.",
      );
    this.#chosen = periodOf(settings.mask);
    this.control?.offer(this.editing.picture);
    const calls = this.#calls(settings.steps) ?? settings.mask.length;
    if (waits && settings.mask.length < calls) this.#later = settings.mask;
    else if (settings.mask.length !== calls && this.#chosen === null)
      element("notes").append(` The clock is for ${settings.mask.length} calls of the model; here there are ${calls}.`);
    this.#showMask(settings.mask, calls);
  }

  /** @param {string | null} name */
  #setSampler(name) {
    const { sampler: own, samplers } = this.#opened,
      isThere = name === null || samplers.includes(name);
    if (!isThere)
      element("notes").append(
        ` The link's sampler is ${name}, which does not take what this model predicts; that was left out.`,
      );
    sampler.value = isThere ? (name ?? own) : own;
    if (sampler.value !== own) part("more", HTMLDetailsElement).open = true;
  }

  /** @param {Settings} settings @param {boolean} hasPicture */
  #setControl({ control, controlScale }, hasPicture) {
    // If a link is drawn by one, the one that was chosen stays.
    if (hasPicture || controlScale === null) this.control?.set(control);
    else this.control?.setScale(controlScale);
    if (controlScale !== null && !this.control?.hasPicture)
      element("notes").append(
        this.control
          ? " The link draws by a control picture, which no link holds: choose that one, then Draw."
          : " The link draws by a control picture, and this bundle takes none; that was left out.",
      );
  }

  /**
   * Shows a mask, fitted to a number of calls: a period goes on, clicked boxes stay and full ones follow.
   * @param {number[]} mask
   * @param {number} calls
   */
  #showMask(mask, calls) {
    const chosen = this.#chosen;
    this.boxes.show(chosen === null ? Array.from({ length: calls }, (_, at) => mask[at] ?? 1) : maskOf(chosen, calls));
    this.#showPeriod();
  }

  #showPeriod() {
    const chosen = this.#chosen,
      isListed = chosen !== null && chosen <= PERIODS.length;
    period.replaceChildren(
      ...PERIODS.map((text, k) => new Option(`${k + 1}: ${text}`, String(k + 1))),
      ...(isListed ? [] : [new Option("as clicked", "own")]),
    );
    period.value = isListed ? String(chosen) : "own";
  }

  /** What the fields say, or why that cannot be drawn. @returns {Settings} */
  settings() {
    const { kind } = this.#opened.conditioning,
      steps = Number(input("steps").value),
      seed = input("seed").value.trim(),
      guidance = input("guidance").value;
    if (!isSteps(steps)) throw refusal(`steps is ${JSON.stringify(input("steps").value)}; expected 1 to ${MOST_STEPS}`);
    if (kind !== "none" && !isGuidance(guidance))
      throw refusal(`guidance is ${JSON.stringify(guidance)}; expected a number from 0 to ${MOST_GUIDANCE}`);
    if (!isSeed(seed))
      throw refusal(`seed is ${JSON.stringify(seed.slice(0, 40))}; expected a whole number below 2^64`);
    const edit = this.editing.settings(),
      control = this.control?.settings() ?? null;
    return {
      // A link may have filled what the bundle does not take.
      prompt: kind === "text" ? prompt.value : "",
      negative: kind === "text" ? input("negative").value : "",
      label: label.value,
      seed,
      steps,
      guidance: Number(guidance),
      mask: [...this.boxes.mask],
      strength: edit?.strength ?? null,
      imageGuidance: edit?.imageGuidance ?? null,
      edit,
      sampler: sampler.value === this.#opened.sampler ? null : sampler.value,
      controlScale: control?.scale ?? null,
      control,
    };
  }

  /** Settings as the pipeline takes them. @param {Settings} settings @returns {import("../src/pipeline.js").Arguments} */
  request({ prompt, negative, label, seed, steps, guidance, mask, edit, sampler, control }) {
    const { kind } = this.#opened.conditioning;
    return {
      seed,
      numInferenceSteps: steps,
      clock: mask,
      guidanceScale: kind === "none" ? 1 : guidance,
      ...(kind === "text" ? { prompt, ...(negative ? { negativePrompt: negative } : {}) } : {}),
      ...(kind === "class" ? { label } : {}),
      ...(sampler === null ? {} : { scheduler: sampler }),
      ...editArguments(edit),
      ...(control ? { controlImage: control.picture.pixels, controlnetConditioningScale: control.scale } : {}),
    };
  }

  /** The same with every step full, to compare with. @param {Settings} settings */
  requestOfFull(settings) {
    return this.request({ ...settings, mask: settings.mask.map(() => 1) });
  }
}
