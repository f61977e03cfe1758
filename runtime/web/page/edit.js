// Starting from a picture: which, how much of it changes, and where.
import { stepsLeftOut } from "../src/schedulers.js";
import { Choice, showPicture, tools } from "./chosen_picture.js";
import { button, element, input, part, refusal, said } from "./elements.js";
import { isGuidance, MOST_GUIDANCE } from "./link.js";

/**
 * @typedef {import("./engine.js").Image} Image
 * @typedef {import("./chosen_picture.js").Picture} Picture
 * @typedef {object} Edit what a generation begins with
 * @property {Picture | null} picture
 * @property {{data: Uint8Array, dims: number[]} | null} mask 1 or 0, [1, h, w]
 * @property {Picture | null} depth
 * @property {number | null} strength null where the model begins from noise alone
 * @property {number | null} imageGuidance of a model that follows instructions
 * @property {boolean} paste
 * @property {number} feather
 */

const STRENGTH = 0.8,
  STRENGTH_WITH_MASK = 1,
  STEP = 0.05,
  MOST_FEATHER = 256;

export class Editing {
  /** What the worker said of the bundle. @type {any} */
  #opened = null;
  /** @type {Picture | null} */
  #picture = null;
  /** @type {Picture | null} */
  #depth = null;
  /** Whether the strength is what somebody chose. */
  #isChosen = false;
  #steps = 1;
  /** Of the picture; null until the first one. @type {import("./mask.js").Mask | null} */
  #mask = null;
  /** Number of the file that was chosen last. */
  #choice = new Choice("image", "picture");

  place = element("edit");

  /** @param {() => void} changed called where the number of steps that run may be another */
  constructor(changed) {
    this.changed = changed;
    input("image").addEventListener("change", () => this.choose(input("image").files));
    input("depth").addEventListener("change", () => this.#readDepth());
    input("mask-file").addEventListener("change", () => this.#readMask());
    input("strength").addEventListener("input", () => {
      this.#isChosen = true;
      this.#showStrength();
    });
    button("no-image").addEventListener("click", () => {
      this.#takeAway();
      input("image").focus();
    });
    document.addEventListener("paste", (event) => {
      if (!this.canEdit || !event.clipboardData?.files.length) return;
      // Words that come with a picture of themselves are meant for a field of text.
      const { target, clipboardData } = event,
        isText = target instanceof HTMLTextAreaElement || target instanceof HTMLInputElement;
      if (isText && clipboardData.types.includes("text/plain")) return;
      event.preventDefault();
      this.choose(clipboardData.files);
    });
  }

  get canEdit() {
    return Boolean(this.#opened?.canEdit);
  }

  /** A picture that is dropped anywhere is what the next one begins with. */
  takesDrop() {
    return this.canEdit;
  }

  get picture() {
    return this.#picture;
  }

  get hasPicture() {
    return this.#picture !== null;
  }

  /** What the model takes beside the latent. @param {string} name */
  #takes(name) {
    return this.#opened.concat.includes(name);
  }

  /** Shows what a bundle can do. @param {any} opened */
  fill(opened) {
    this.#opened = opened;
    element("edit").hidden = !opened.canEdit && !this.#takes("depth");
    element("image-field").hidden = !opened.canEdit;
    element("depth-field").hidden = !this.#takes("depth");
    const instructed = this.#takes("image"),
      needs = instructed || this.#takes("masked_image");
    element("edit-title").textContent = needs ? "Picture, which this model needs" : "Start from a picture";
    element("strength-field").hidden = instructed;
    element("image-guidance-field").hidden = !instructed;
    element("mask-section").hidden = instructed;
    if (this.#takes("mask")) part("mask-section", HTMLDetailsElement).open = true;
    element("cut-to").textContent = `It is scaled and cut to ${opened.size.width} x ${opened.size.height} pixels.`;
  }

  /** How many of so many steps are left out at the beginning. @param {number} steps */
  leftOut(steps) {
    this.#steps = steps;
    if (!this.hasPicture || this.#takes("image")) return 0;
    // With few steps a small strength would leave none.
    const least = Math.ceil(1 / steps / STEP - 1e-9) * STEP;
    input("strength").min = least.toFixed(2);
    this.#sayStrength();
    return stepsLeftOut(Number(input("strength").value), steps);
  }

  #showStrength() {
    if (!this.#isChosen) input("strength").value = String(this.#mask?.share ? STRENGTH_WITH_MASK : STRENGTH);
    this.changed();
  }

  #sayStrength() {
    const strength = Number(input("strength").value),
      run = this.#steps - stepsLeftOut(strength, this.#steps),
      words = `${run} of ${this.#steps} steps run`;
    element("strength-says").textContent = `${strength}: ${words}`;
    input("strength").setAttribute("aria-valuetext", `${strength}, ${words}`);
  }

  /** Begins with a finished picture of the page. @param {Image} image @param {string} name */
  begin({ data, width, height }, name) {
    const picture = { name, width, height, pixels: { data: data.slice(), width, height } };
    return said(() =>
      this.#choice.latest(
        () => picture,
        (_, made) => {
          input("image").value = "";
          this.#show(picture, made);
          element("edit").scrollIntoView({ block: "nearest" });
          input(this.#takes("image") ? "image-guidance" : "strength").focus();
        },
      ),
    );
  }

  /** @param {FileList | null} files of a field, of what was dropped or pasted */
  choose(files) {
    if (!files?.length || !this.#opened) return;
    return this.#choice.read(files, this.#opened.size, (picture, made) => this.#show(picture, made));
  }

  #readDepth() {
    const file = input("depth").files?.[0];
    return said(async () => {
      this.#depth = null;
      if (!file) return;
      const { readDepth } = await tools();
      this.#depth = await readDepth(file, this.#opened.size);
    });
  }

  #readMask() {
    const file = input("mask-file").files?.[0],
      picture = this.#picture;
    if (!file || !picture) return;
    return said(async () => {
      const { readMask } = await tools();
      this.#mask?.set(await readMask(file, picture, this.#opened.size));
    });
  }

  /** @param {Picture} picture @param {import("./chosen_picture.js").Tools} [made] for the first one */
  #show(picture, made) {
    if (made) this.#mask ??= new made.Mask(() => this.#showStrength());
    this.#picture = picture;
    const { pixels } = picture;
    showPicture(picture, "source", "source-caption");
    element("chosen").hidden = false;
    input("feather").value = String(Math.round(pixels.width / 64));
    input("mask-file").value = "";
    this.#mask?.resize(pixels.width, pixels.height);
  }

  #takeAway() {
    this.#choice.drop();
    this.#picture = null;
    this.#isChosen = false;
    input("image").value = "";
    element("chosen").hidden = true;
    this.changed();
  }

  /** What a generation begins with, or why that cannot be drawn; null where it begins from noise. @returns {Edit | null} */
  settings() {
    const picture = this.#picture,
      instructed = this.#takes("image");
    if (!picture && (instructed || this.#takes("masked_image")))
      throw refusal("this model changes a picture; choose one first");
    if (this.#takes("depth") && !this.#depth) throw refusal("this model follows a depth map; choose one first");
    if (!picture && !this.#depth) return null;
    const mask = (picture && !instructed && this.#mask?.get()) || null;
    if (this.#takes("mask") && !mask)
      throw refusal("this model draws a part of the picture anew; paint over it where that is to be");
    const feather = input("feather").value,
      guidance = input("image-guidance").value;
    if (mask && !(/^\d+$/.test(feather) && +feather <= MOST_FEATHER))
      throw refusal(`feather is ${JSON.stringify(feather)}; expected 0 to ${MOST_FEATHER} pixels`);
    if (instructed && !isGuidance(guidance))
      throw refusal(`image guidance is ${JSON.stringify(guidance)}; expected a number from 0 to ${MOST_GUIDANCE}`);
    return {
      picture,
      mask,
      depth: this.#depth,
      strength: picture && !instructed ? Number(input("strength").value) : null,
      imageGuidance: instructed ? Number(guidance) : null,
      paste: mask !== null && input("paste").checked,
      feather: mask && input("paste").checked ? Number(feather) : 0,
    };
  }

  /** Shows what a generation began with. @param {Edit | null} edit */
  set(edit) {
    if (!edit?.picture) this.#takeAway();
    else {
      this.#isChosen = true;
      this.setNumbers(edit);
      this.#show(edit.picture);
      input("paste").checked = edit.paste || !edit.mask;
      if (edit.paste) input("feather").value = String(edit.feather);
      if (edit.mask) this.#mask?.set(edit.mask);
    }
    this.#depth = edit?.depth ?? this.#depth;
  }

  /** What a link has of an edit. @param {{strength?: number | null, imageGuidance?: number | null}} numbers */
  setNumbers({ strength = null, imageGuidance = null }) {
    if (strength !== null) {
      input("strength").min = String(STEP);
      input("strength").value = String(strength);
      this.#isChosen = true;
    }
    if (imageGuidance !== null) input("image-guidance").value = String(imageGuidance);
  }
}

/** An edit as the pipeline takes it. @param {Edit | null} edit @returns {import("../src/pipeline.js").Arguments} */
export function editArguments(edit) {
  if (!edit) return {};
  const { picture, mask, depth, strength, imageGuidance, paste, feather } = edit;
  return {
    ...(picture ? { image: picture.pixels } : {}),
    ...(mask ? { maskImage: { data: mask.data.map((inside) => 255 * inside), dims: mask.dims }, paste, feather } : {}),
    ...(depth ? { depthMap: depth.pixels } : {}),
    ...(strength === null ? {} : { strength }),
    ...(imageGuidance === null ? {} : { imageGuidanceScale: imageGuidance }),
  };
}
