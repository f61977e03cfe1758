// A control picture, which a bundle's ControlNet or T2I-Adapter draws by; loaded where a bundle has one.
import { Choice, showPicture } from "./chosen_picture.js";
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

  place = element("control");

  constructor() {
    const field = input("control-file");
    field.addEventListener("change", () => this.choose(field.files));
    button("edges-of-start").addEventListener("click", () => this.#takeEdges(this.#start));
    button("edges").addEventListener("click", () => this.#takeEdges(this.#picture));
    button("no-control").addEventListener("click", () => {
      this.set(null);
      field.focus();
    });
  }

  /** Dropped anywhere else, a picture is what the next one begins with, where the bundle has that. @param {EventTarget | null} target */
  takesDrop(target) {
    return !this.#opened.canEdit || (target instanceof Node && this.place.contains(target));
  }

  get hasPicture() {
    return this.#picture !== null;
  }

  /** @param {any} opened a bundle with a ControlNet */
  fill(opened) {
    this.#opened = opened;
    this.place.hidden = false;
  }

  /** Offers the edges of what the next picture begins with. @param {Picture | null} start */
  offer(start) {
    this.#start = start;
    button("edges-of-start").hidden = !start;
  }

  /** @param {FileList | null} files */
  choose(files) {
    if (!files?.length) return;
    return this.#choice.read(files, this.#opened.size, (picture) => this.#show(picture));
  }

  /** @param {Picture | null} of */
  #takeEdges(of) {
    return said(async () => {
      if (!of) return;
      await this.#choice.latest(
        ({ edgesOf }) => {
          const pixels = edgesOf(of.pixels),
            { width, height } = pixels;
          return { name: `edges of ${of.name}`, width, height, pixels };
        },
        (picture) => {
          input("control-file").value = "";
          this.#show(picture);
        },
      );
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
    if (!picture) return null;
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
