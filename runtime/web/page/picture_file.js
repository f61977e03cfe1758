// A file that is to be a picture: looked at before the browser decodes it, then decoded.
import { refusal } from "./elements.js";

const MOST_BYTES = 2 ** 26,
  // Of four bytes each, once they are decoded.
  MOST_PIXELS = 100e6;
const WORD = new TextDecoder();

/**
 * Decodes one picture, turned as its EXIF says.
 * @param {File} file
 * @param {string} what for messages: "picture", "mask"
 */
export async function openPicture(file, what) {
  const name = `${what} ${JSON.stringify(file.name.slice(0, 60))}`;
  if (file.size > MOST_BYTES)
    throw refusal(`${name} has ${(file.size / 1e6).toFixed(0)} MB; expected ${MOST_BYTES / 2 ** 20} MiB at most`);
  let bytes;
  try {
    bytes = new Uint8Array(await file.arrayBuffer());
  } catch {
    throw refusal(`${name} cannot be read; it may have been moved, or it is a folder`);
  }
  const { frames, pixels } = look(bytes);
  if (frames > 1) throw refusal(`${name} is animated; save one of its pictures and choose that`);
  if (pixels > MOST_PIXELS)
    throw refusal(`${name} has ${(pixels / 1e6).toFixed(0)} million pixels; expected ${MOST_PIXELS / 1e6} at most`);
  try {
    return await createImageBitmap(new Blob([bytes], { type: file.type }));
  } catch {
    throw refusal(`${name} is damaged, or no picture that this browser reads; expected PNG, JPEG or WebP`);
  }
}

/**
 * How many pictures a file has (2: more than one) and how many pixels it says it has, for formats that may be animated or
 * that cameras write; of others one, and 0.
 * @param {Uint8Array} bytes
 */
export function look(bytes) {
  const data = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength),
    word = (/** @type {number} */ at, /** @type {number} */ length = 4) => WORD.decode(bytes.subarray(at, at + length));
  let frames = 1,
    pixels = 0;
  try {
    if (bytes[0] === 0x89 && word(1, 7) === "PNG\r\n\x1a\n") {
      pixels = data.getUint32(16) * data.getUint32(20);
      frames = hasChunk(data, word) ? 2 : 1;
    } else if (/^GIF8[79]a/.test(word(0, 6))) {
      pixels = data.getUint16(6, true) * data.getUint16(8, true);
      frames = gifFrames(bytes);
    } else if (word(0) === "RIFF" && word(8) === "WEBP" && word(12) === "VP8X") {
      const side = (/** @type {number} */ at) => 1 + (data.getUint32(at, true) & 0xffffff);
      frames = bytes[20] & 2 ? 2 : 1;
      pixels = side(24) * side(27);
    } else if (word(4) === "ftyp") {
      // A sequence says so among the brands of its first box.
      frames = /avis|msf1/.test(word(8, Math.min(data.getUint32(0), 256) - 8)) ? 2 : 1;
    } else if (data.getUint16(0) === 0xffd8) pixels = jpegPixels(data);
  } catch (e) {
    if (!(e instanceof RangeError)) throw e; // it ends too soon: the browser says what it is
  }
  return { frames, pixels };
}

/** Whether a PNG has acTL, an animation's chunk, before its pixels. @param {DataView} data @param {(at: number) => string} word */
function hasChunk(data, word) {
  for (let at = 8; word(at + 4) !== "IDAT"; at += 12 + data.getUint32(at)) if (word(at + 4) === "acTL") return true;
  return false;
}

/** @param {Uint8Array} bytes */
function gifFrames(bytes) {
  const table = (/** @type {number} */ flags) => (flags & 0x80 ? 3 * 2 ** ((flags & 7) + 1) : 0);
  let at = 13 + table(bytes[10]),
    frames = 0;
  const skipBlocks = () => {
    while (bytes[at]) at += 1 + bytes[at];
    at++;
  };
  while (at < bytes.length && frames < 2) {
    const kind = bytes[at];
    if (kind === 0x2c) {
      frames++;
      at += 11 + table(bytes[at + 9]);
    } else if (kind === 0x21) at += 2;
    else break; // the end, or what is none of a GIF's blocks
    skipBlocks();
  }
  return frames;
}

/** Pixels as the frame header says. @param {DataView} data */
function jpegPixels(data) {
  for (let at = 2; data.getUint8(at) === 0xff; at += 2 + data.getUint16(at + 2)) {
    const marker = data.getUint8(at + 1);
    // Every start of a frame, but not DHT, JPG and DAC among them.
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker))
      return data.getUint16(at + 5) * data.getUint16(at + 7);
  }
  return 0;
}
