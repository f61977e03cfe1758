// Low-rank factors: what the graphs of a bundle that was exported with --lora-inputs take beside the conditioning.
import { hasRows } from "./manifest.js";

/**
 * Zeros for all factors that graphs take: the model as it is.
 * @param {import("./manifest.js").Graph[]} graphs
 * @returns {Record<string, import("./rows.js").Rows>}
 */
export function noLora(graphs) {
  const taken = graphs.flatMap(({ inputs }) => inputs).filter(({ name }) => name !== "timestep" && !hasRows(name));
  return Object.fromEntries(
    taken.map(({ name, dtype, shape }) => {
      const dims = shape.map(Number),
        length = dims.reduce((a, b) => a * b);
      return [name, { data: dtype === "float16" ? new Uint16Array(length) : new Float32Array(length), dims }];
    }),
  );
}
