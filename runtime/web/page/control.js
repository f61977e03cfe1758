// A control picture, which a bundle's ControlNet or T2I-Adapter draws by.
import { Choice, showPicture } from "./chosen_picture.js";
import { edgesOf } from "./edges.js";
import { button, element, input, refusal, said } from "./elements.js";
import { isGuidance, MOST_GUIDANCE } from "./link.js";

/**
 * @typedef {import("./chosen_picture.js").Picture} Picture
 * @typedef {{picture: Picture, scale: number}} Steered
 */

export class Control {
  /** What the worker said of the bundle. @type {any} */
  #opened = null;
  /** @type {Picture | null} */
  #picture = null;
  /** What the next picture begins with. @type {Picture | null} */
  #start = null;
  /** Number of the file that was chosen last. */
  #choice = new Choice("control-file", "control picture");

  constructor() {
    const place = element("control"),
      field = input("control-file");
    field.addEventListener("change", () => this.#choose(field.files));
    button("edges-of-start").addEventListener("click", () => this.#takeEdges(this.#start));
    button("edges").addEventListener("click", () => this.#takeEdges(this.#picture));
    button("no-control").addEventListener("click", () => {
      this.set(null);
      field.focus();
    });
    // Dropped anywhere else, a picture is what the next one begins with, where the bundle has that.
    const isHere = (/** @type {DragEvent} */ { target }) =>
      this.canControl && (!this.#opened.canEdit || (target instanceof Node && place.contains(target)));
    document.addEventListener(
      "dragover",
      (event) => {
        place.classList.toggle("over", isHere(event) && Boolean(event.dataTransfer?.types.includes("Files")));
        if (!isHere(event) || !event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        event.stopPropagation();
        element("edit").classList.remove("over");
      },
      { capture: true },
    );
    document.addEventListener("dragleave", (event) => !event.relatedTarget && place.classList.remove("over"));
    document.addEventListener(
      "drop",
      (event) => {
        place.classList.remove("over");
        if (!isHere(event) || !event.dataTransfer?.files.length) return;
        event.stopPropagation();
        // On a field for files the browser itself puts it there.
        if (event.target instanceof HTMLInputElement && event.target.type === "file") return;
        event.preventDefault();
        this.#choose(event.dataTransfer.files);
      },
      { capture: true },
    );
  }

  get canControl() {
    return Boolean(this.#opened?.canControl);
  }

  get hasPicture() {
    return this.#picture !== null;
  }

  /** Shows what a bundle can do. @param {any} opened */
  fill(opened) {
    this.#opened = opened;
    element("control").hidden = !opened.canControl;
  }

  /** Offers the edges of what the next picture begins with. @param {Picture | null} start */
  offer(start) {
    this.#start = start;
    button("edges-of-start").hidden = !start;
  }

  /** @param {FileList | null} files */
  #choose(files) {
    if (!files?.length || !this.canControl) return;
    return this.#choice.read(files, this.#opened.size, (picture) => this.#show(picture));
  }

  /** @param {Picture | null} of */
  #takeEdges(of) {
    return said(async () => {
      if (!of) return;
      const pixels = edgesOf(of.pixels);
      this.#choice.drop();
      input("control-file").value = "";
      this.#show({ name: `edges of ${of.name}`, width: pixels.width, height: pixels.height, pixels });
    });
  }

  /** @param {Picture} picture */
  #show(picture) {
    this.#picture = picture;
    showPicture(picture, "control-picture", "control-caption");
    element("control-chosen").hidden = false;
  }

  /** What a generation is drawn by, or why that cannot be; null without a control picture. @returns {Steered | null} */
  settings() {
    const picture = this.#picture,
      scale = input("control-scale").value;
    if (!picture || !this.canControl) return null;
    if (!isGuidance(scale))
      throw refusal(`control scale is ${JSON.stringify(scale)}; expected a number from 0 to ${MOST_GUIDANCE}`);
    return { picture, scale: Number(scale) };
  }

  /** Shows what a generation was drawn by. @param {Steered | null} steered */
  set(steered) {
    this.#choice.drop();
    this.#picture = null;
    input("control-file").value = "";
    element("control-chosen").hidden = true;
    this.setScale(steered?.scale ?? 1);
    if (steered) this.#show(steered.picture);
  }

  /** @param {number} scale */
  setScale(scale) {
    input("control-scale").value = String(scale);
  }
}

/** A control picture as the pipeline takes it. @param {Steered | null} steered @returns {import("../src/pipeline.js").Arguments} */
export function controlArguments(steered) {
  return steered ? { controlImage: steered.picture.pixels, controlnetConditioningScale: steered.scale } : {};
}
