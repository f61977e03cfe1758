// The public face.
export { openBundle } from "./bundle.js";
export { clockMask } from "./clock.js";
export { BundleError, EdgeRuntimeError, RequestError } from "./errors.js";
export { toRgba, toUint8 } from "./images.js";
export { coveringBox, fitted } from "./pictures.js";
export { EdgePipeline } from "./pipeline.js";
export { SCHEDULER_NAMES } from "./schedulers.js";
export { CacheStore } from "./store.js";
