// A picture that was chosen: read from a file at the size that is drawn, and shown with its name and size.
import { toRgba } from "../src/images.js";
import { fitted, imagesOf } from "../src/pictures.js";
import { element, input, part, said } from "./elements.js";
import { openPicture } from "./picture_file.js";

/**
 * @typedef {import("./engine.js").Image} Image
 * @typedef {{name: string, width: number, height: number, pixels: Image}} Picture its name and size before, and what is left of it
 */

/**
 * @param {File} file
 * @param {string} what it is, for messages
 * @param {{width: number, height: number}} size that is drawn
 * @returns {Promise<Picture>}
 */
export async function readPicture(file, what, { width, height }) {
  const bitmap = await openPicture(file, what);
  try {
    // What is transparent is laid on white.
    const pixels = toRgba(imagesOf(fitted(bitmap, width, height), height, width));
    return { name: file.name, width: bitmap.width, height: bitmap.height, pixels };
  } finally {
    bitmap.close();
  }
}

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
   * @param {FileList} files of the field, or of what was dropped or pasted
   * @param {{width: number, height: number}} size that is drawn
   * @param {(picture: Picture) => void} show
   */
  read(files, size, show) {
    const field = input(this.#field);
    return said(async () => {
      if (field.files !== files) field.files = files;
      const turn = ++this.#turn;
      try {
        const picture = await readPicture(files[0], this.#what, size);
        if (turn === this.#turn) show(picture); // else another was chosen meanwhile
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
