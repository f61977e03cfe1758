// What only pictures that somebody chooses need: the page loads it at the first one.
export { edgesOf } from "./edges.js";
export { Mask } from "./mask.js";
export { readDepth, readMask, readPicture } from "./read_picture.js";
