// Arrays whose first dimension is rows: of images, or of unconditional and conditional ones.

/**
 * @typedef {Float32Array | Uint16Array | BigInt64Array | Int32Array} Data Uint16Array is float16
 * @typedef {{data: Data, dims: number[]}} Rows in C order
 */

/** A new array of the same kind and of another length. @param {Data} data @param {number} length @returns {any} */
const like = (data, length) => new /** @type {any} */ (data.constructor)(length);

/** Rows by their numbers. @param {Rows} rows @param {number[]} numbers @returns {Rows} */
export function take({ data, dims }, numbers) {
  const size = data.length / dims[0],
    made = like(data, size * numbers.length);
  numbers.forEach((number, i) => made.set(data.subarray(number * size, (number + 1) * size), i * size));
  return { data: made, dims: [numbers.length, ...dims.slice(1)] };
}

/** One array after the other, of the same shape but for the rows. @param {...Rows} parts @returns {Rows} */
export function joined(...parts) {
  const made = like(
    parts[0].data,
    parts.reduce((sum, { data }) => sum + data.length, 0),
  );
  let at = 0;
  for (const { data } of parts) {
    made.set(data, at);
    at += data.length;
  }
  return { data: made, dims: [parts.reduce((sum, { dims }) => sum + dims[0], 0), ...parts[0].dims.slice(1)] };
}

/**
 * Features side by side: [N, S, a] and [N, S, b] give [N, S, a + b]. Channels too, their maps being the features.
 * @param {Rows[]} parts
 * @param {number} axis
 * @returns {Rows}
 */
export function beside(parts, axis) {
  const count = parts[0].dims.slice(0, axis).reduce((a, b) => a * b, 1),
    sizes = parts.map(({ data }) => data.length / count);
  const width = sizes.reduce((a, b) => a + b),
    made = like(parts[0].data, width * count);
  let at = 0;
  parts.forEach(({ data }, k) => {
    for (let i = 0; i < count; i++) made.set(data.subarray(i * sizes[k], (i + 1) * sizes[k]), i * width + at);
    at += sizes[k];
  });
  const dims = [...parts[0].dims];
  dims[axis] = parts.reduce((sum, each) => sum + each.dims[axis], 0);
  return { data: made, dims };
}

/** @param {number} count */
export const range = (count) => Array.from({ length: count }, (_, i) => i);

/** Whole numbers as a graph takes them, [count]. @param {string | undefined} dtype @param {number[]} values @returns {Rows} */
export const wholeNumbers = (dtype, values) => ({
  data: dtype === "int64" ? BigInt64Array.from(values, BigInt) : Int32Array.from(values),
  dims: [values.length],
});

/** A row for each of so many images, of one or as many. @param {Rows} rows @param {number} count */
export const repeated = (rows, count) => (rows.dims[0] === count ? rows : take(rows, Array(count).fill(0)));
