// A picture that was chosen: read from a file at the size that is drawn, and shown with its name and size.
import { element, input, loaded, part, said } from "./elements.js";

/**
 * @typedef {import("./engine.js").Image} Image
 * @typedef {{name: string, width: number, height: number, pixels: Image}} Picture its name and size before, and what is left of it
 * @typedef {typeof import("./pictures.js")} Tools
 */

/** What reads and changes pictures. */
export const tools = () => loaded(import("./pictures.js"));

/** Pictures that are chosen in a field, one after the other: the last one counts, however long each takes to read. */
export class Choice {
  #turn = 0;
  #field;
  #what;

  /** @param {string} field @param {string} what a picture of it is, for messages */
  constructor(field, what) {
    this.#field = field;
    this.#what = what;
  }

  /** Forgets what is still being read. */
  drop() {
    this.#turn++;
  }

  /**
   * Shows a picture once it is made, unless another was chosen meanwhile.
   * @param {(tools: Tools) => Picture | Promise<Picture>} make
   * @param {(picture: Picture, tools: Tools) => void} show
   */
  async latest(make, show) {
    const turn = ++this.#turn,
      made = await tools(),
      picture = await make(made);
    if (turn === this.#turn) show(picture, made);
  }

  /**
   * @param {FileList} files of the field, or of what was dropped or pasted
   * @param {{width: number, height: number}} size that is drawn
   * @param {(picture: Picture, tools: Tools) => void} show
   */
  read(files, size, show) {
    const field = input(this.#field);
    return said(async () => {
      if (field.files !== files) field.files = files;
      try {
        await this.latest(({ readPicture }) => readPicture(files[0], this.#what, size), show);
      } catch (e) {
        field.value = ""; // it may be mended and chosen again
        throw e;
      }
    });
  }
}

/** @param {Picture} picture @param {string} canvas @param {string} caption */
export function showPicture({ name, width, height, pixels }, canvas, caption) {
  const place = part(canvas, HTMLCanvasElement);
  Object.assign(place, { width: pixels.width, height: pixels.height });
  place.classList.toggle("small", pixels.width < 200);
  place.getContext("2d")?.putImageData(new ImageData(pixels.data, pixels.width, pixels.height), 0, 0);
  const spelt = (/** @type {number} */ w, /** @type {number} */ h) => `${w}\u00a0x\u00a0${h}`,
    drawn = spelt(pixels.width, pixels.height),
    cut = spelt(width, height) === drawn ? "" : `, cut to ${drawn}`;
  element(caption).textContent = `${name}: ${spelt(width, height)}${cut}`;
}
