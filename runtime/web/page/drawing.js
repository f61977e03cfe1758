// Drawing: the picture as it forms, the finished one and what it cost, the pictures before it.
import { differenceMap, psnr } from "./compare.js";
import { button, element, input, part, save, saveJson, say, sayLoading, sayProgress } from "./elements.js";
import { duration, ledgerChart, loopMs, percent, sum } from "./ledger_chart.js";
import { toHash } from "./link.js";

/**
 * @typedef {import("./engine.js").Image} Image
 * @typedef {import("./engine.js").ResultMessage} ResultMessage
 * @typedef {import("./engine.js").StepMessage} StepMessage
 * @typedef {import("./link.js").Settings} Settings
 * @typedef {{settings: Settings, result: ResultMessage, always: ResultMessage | null}} Drawn `always`: every step full
 */

// Of the gallery.
const MOST_KEPT = 48,
  MOST_KEPT_BYTES = 2 ** 26;

export class Drawing {
  /** What is on the page. @type {Drawn | null} */
  #shown = null;
  /** Bytes of each picture in the gallery, the newest first. @type {number[]} */
  #kept = [];

  /**
   * @param {import("./engine.js").Engine} engine
   * @param {import("./form.js").Form} form
   * @param {() => boolean} isBusy whether something runs, so that nothing else may be shown
   */
  constructor(engine, form, isBusy) {
    this.engine = engine;
    this.form = form;
    this.isBusy = isBusy;
    button("download").addEventListener("click", () => this.#download());
    button("share").addEventListener("click", () => this.#share());
    button("export").addEventListener("click", () => this.#export());
    button("edit-this").addEventListener("click", () => this.#shown && this.#edit(this.#shown));
  }

  /** Draws what the form asks for. @param {AbortSignal} signal */
  async draw(signal) {
    const { engine, form } = this,
      settings = form.settings();
    remember(settings);
    say("Drawing");
    const told = (/** @type {any} */ event) => this.#told(event);
    const result = await engine.draw(form.request(settings), { signal, shows: input("forming").checked, told });
    /** @type {ResultMessage | null} */
    let always = null;
    if (input("compare").checked && settings.mask.includes(0)) {
      say("Drawing again with every step full, to compare");
      always = await engine.draw(form.requestOfFull(settings), { signal });
    }
    signal.throwIfAborted();
    element("notes").textContent = result.warnings.join(" ");
    const drawn = { settings, result, always };
    this.#show(drawn);
    this.#keep(drawn);
    say(`Drawn in ${duration(result.ms)}.`);
  }

  /** @param {StepMessage | {type: "stage", stage: string} | {type: "progress", loaded: number, total: number}} event */
  #told(event) {
    if (event.type === "step") {
      const { done, count, full, ms, image } = event;
      this.form.boxes.mark(done < count ? done : null);
      sayProgress(done / count, `Step ${done} of ${count}: ${full ? "full" : "cached"}, ${duration(sum(ms))}`);
      if (image) {
        element("pictures").hidden = false;
        element("other").hidden = element("map").hidden = true;
        paint(canvas("picture"), image);
        element("picture-caption").textContent = `after step ${done} of ${count}`;
      }
    } else if (event.type === "stage" && event.stage in STAGES) say(STAGES[event.stage]);
    else if (event.type === "progress") sayLoading(event); // of what is loaded at its first use
  }

  /** After one that was not finished: the last picture is on the page again. */
  restore() {
    if (this.#shown) this.#show(this.#shown);
    else element("pictures").hidden = true;
  }

  /** @param {Drawn} drawn */
  #show(drawn) {
    this.#shown = drawn;
    const { settings, result, always } = drawn;
    const steps = result.mask.map((full) => (full ? "F" : "c")).join(""),
      letters = steps.length > 20 ? `${result.mask.filter(Boolean).length} of ${steps.length} steps full` : steps;
    element("pictures").hidden = !result.image;
    if (result.image) {
      paint(canvas("picture"), result.image);
      canvas("picture").setAttribute("aria-label", settings.prompt || settings.label || "The picture");
      element("picture-caption").textContent = [
        ...(settings.edit?.picture ? [`from ${settings.edit.picture.name}`] : []),
        ...(settings.strength === null ? [] : [`strength ${settings.strength}`]),
        ...(settings.control ? [`by ${settings.control.picture.name}`] : []),
        ...(settings.sampler ? [settings.sampler] : []),
        letters,
        `seed ${result.seed}`,
        duration(result.ms),
      ].join(", ");
    }
    button("edit-this").hidden = !result.image || !this.form.editing.canEdit;
    const both = result.image && always?.image ? { one: result.image, other: always.image } : null;
    element("other").hidden = element("map").hidden = !both;
    if (both && always) {
      paint(canvas("uncached"), both.other);
      element("uncached-caption").textContent = `every step full, ${duration(always.ms)}`;
      paint(canvas("difference"), differenceMap(both.one, both.other));
      const db = psnr(both.one, both.other);
      element("difference-caption").textContent =
        `difference: ${db === Infinity ? "none" : `${db.toFixed(1)} dB PSNR`}`;
    }
    element("totals").textContent = [
      `${duration(result.ms)} in all, ${duration(loopMs(result))} of it in the steps.`,
      `Multiply-adds saved: ${percent(1 - result.macs.done / result.macs.uncached)}.`,
      always ? `Time of the steps saved: ${percent(1 - loopMs(result) / loopMs(always))}.` : "",
    ].join(" ");
    element("ledger").hidden = element("keep").hidden = false;
    button("download").hidden = !result.image;
    element("chart").replaceChildren(ledgerChart(result, Math.max(element("chart").clientWidth, 240)));
  }

  /** Adds a thumbnail that brings a picture of this session back. @param {Drawn} drawn */
  #keep(drawn) {
    const { settings, result, always } = drawn;
    if (!result.image) return;
    const whole = document.createElement("canvas"),
      item = document.createElement("li"),
      back = document.createElement("button"),
      picture = document.createElement("img");
    paint(whole, result.image);
    picture.src = whole.toDataURL();
    picture.alt = `${titleOf(settings)}, seed ${settings.seed}`;
    picture.className = whole.className;
    back.type = "button";
    back.append(picture);
    back.addEventListener("click", () => {
      if (this.isBusy()) return;
      this.form.set(settings);
      this.#show(drawn);
      remember(settings);
    });
    item.append(back);
    if (this.form.editing.canEdit) {
      const again = document.createElement("button");
      again.type = "button";
      again.className = "again";
      again.textContent = "Edit";
      again.setAttribute("aria-label", `Edit ${picture.alt}`);
      again.addEventListener("click", () => !this.isBusy() && this.#edit(drawn));
      item.append(again);
    }
    element("gallery").prepend(item);
    // The tab's memory stays flat: the oldest pictures go.
    const kept = this.#kept;
    const begun = [
      settings.edit?.picture?.pixels.data,
      settings.edit?.mask?.data,
      settings.control?.picture.pixels.data,
    ];
    kept.unshift(
      result.image.data.length * (always ? 2 : 1) + begun.reduce((total, data) => total + (data?.length ?? 0), 0),
    );
    while (kept.length > 1 && (kept.length > MOST_KEPT || kept.reduce((a, b) => a + b) > MOST_KEPT_BYTES)) {
      kept.pop();
      element("gallery").lastElementChild?.remove();
    }
    element("gallery-section").hidden = false;
  }

  /** Begins the next picture with this one. @param {Drawn} drawn */
  #edit({ settings, result }) {
    if (result.image) this.form.editing.begin(result.image, `${titleOf(settings).slice(0, 40)}, seed ${settings.seed}`);
  }

  #download() {
    const shown = this.#shown;
    if (!shown) return;
    const title = titleOf(shown.settings).replace(/[^\p{L}\p{N}]+/gu, "-");
    canvas("picture").toBlob((blob) => {
      if (blob) save(`${title.slice(0, 60)}-${shown.settings.seed}.png`, blob);
    });
  }

  async #share() {
    if (!this.#shown) return;
    const link = new URL(toHash(this.#shown.settings), location.href).href;
    try {
      await navigator.clipboard.writeText(link);
      const isAll = !this.#shown.settings.edit && !this.#shown.settings.control;
      say(
        isAll
          ? "The link is copied; with it, Draw makes the same picture again."
          : "The link is copied. It has all but the pictures that this one was made of: whoever opens it chooses the same files again.",
      );
    } catch {
      say(`The browser copies nothing here; the link is ${link}`);
    }
  }

  #export() {
    if (!this.#shown) return;
    const { settings, result, always } = this.#shown,
      { bundle, model, backend } = this.engine.opened;
    const strip = (/** @type {ResultMessage | null} */ each) =>
      each && { ...each, image: undefined, latents: undefined, type: undefined, id: undefined };
    const told = { ...settings, edit: undefined, control: undefined };
    saveJson("ledger.json", { bundle, model, backend, settings: told, result: strip(result), always: strip(always) });
  }
}

/** @type {Record<string, string>} */
const STAGES = { image: "Encoding the picture", step: "Drawing", decode: "Decoding the picture" };
const canvas = (/** @type {string} */ id) => part(id, HTMLCanvasElement);
const titleOf = (/** @type {Settings} */ { prompt, label }) => prompt || label || "picture";

/** @param {HTMLCanvasElement} place @param {Image} image */
function paint(place, { data, width, height }) {
  place.width = width;
  place.height = height;
  place.classList.toggle("small", width < 200);
  place.getContext("2d")?.putImageData(new ImageData(data, width, height), 0, 0);
}

/** Puts settings into the address. @param {Settings} settings */
function remember(settings) {
  try {
    history.replaceState(null, "", toHash(settings));
  } catch (e) {
    console.info(String(e)); // a browser that limits how often; Copy link makes its own
  }
}
