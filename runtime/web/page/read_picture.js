// Files that are to be pictures, at the size that is drawn.
import { toRgba } from "../src/images.js";
import { depthsOf, fitted, imagesOf, masksOf } from "../src/pictures.js";
import { refusal } from "./elements.js";
import { openPicture } from "./picture_file.js";

/** @typedef {import("./chosen_picture.js").Picture} Picture */

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

/** A depth map, refused where it is the same everywhere. @param {File} file @param {{width: number, height: number}} size */
export async function readDepth(file, size) {
  const depth = await readPicture(file, "depth map", size);
  depthsOf(depth.pixels, depth.pixels.height, depth.pixels.width);
  return depth;
}

/**
 * A mask of a picture, 1 or 0, [1, h, w].
 * @param {File} file
 * @param {Picture} picture whose size the file's must be
 * @param {{width: number, height: number}} size that is drawn
 */
export async function readMask(file, picture, { width, height }) {
  const bitmap = await openPicture(file, "mask");
  try {
    if (bitmap.width !== picture.width || bitmap.height !== picture.height)
      throw refusal(
        `the mask has ${bitmap.width} x ${bitmap.height} pixels, the picture ${picture.width} x ${picture.height}; expected the same`,
      );
    return masksOf(fitted(bitmap, width, height, { nearest: true }), height, width);
  } finally {
    bitmap.close();
  }
}
