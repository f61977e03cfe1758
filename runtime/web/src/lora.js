// LoRA: from files of `edgediff lora` to the low-rank factors that a bundle's graphs take.
import { refuse, shown } from "./errors.js";

/**
 * @typedef {import("./rows.js").Rows} Rows
 * @typedef {{rank: number, layers: Record<string, {name: string, inputs: number, outputs: number}[]>}} LoraInputs
 * @typedef {{data: Float32Array, dims: number[]}} Factor
 * @typedef {Map<string, [Factor, Factor]>} Lora `down` [r, in] and `up` [out, r] by layers
 */

const PREFIX = "unet.",
  ENDS = [".lora_A.weight", ".lora_B.weight"];
const FORMAT = "edgediff lora";
const AGAIN = "write it again with `edgediff lora`";

/**
 * The factors that graphs take, of one LoRA or several, whose ranks add up; zeros where there is none.
 * @param {LoraInputs | null} inputs what the bundle says of them
 * @param {Uint8Array | Uint8Array[] | undefined} lora files, as bytes
 * @param {number | number[] | undefined} scale what updates are multiplied by, for all or for each; left out, 1
 * @param {import("./manifest.js").Graph[]} graphs
 * @returns {Record<string, Rows>}
 */
export function factorsOf(inputs, lora, scale, graphs) {
  const files = lora == null ? [] : Array.isArray(lora) ? lora : [lora];
  refuse(scale != null && !files.length, "loraScale was given without a lora; give one");
  const scales = Array.isArray(scale) ? scale : files.map(() => scale ?? 1);
  refuse(scales.length !== files.length, `loraScale has ${scales.length} entries for ${files.length} files`);
  const bad = scales.find((each) => !Number.isFinite(each));
  refuse(bad !== undefined, `loraScale is ${shown(bad)}; expected a finite number`);
  refuse(
    files.length && !inputs,
    "the bundle's graphs take no LoRA; export with --lora-inputs RANK, or with --lora FILE to fuse it into the weights",
  );
  if (!inputs) return {};
  const loras = files.map((file) => checked(readLora(file), inputs)),
    taken = new Map(graphs.flatMap((g) => g.inputs.map((t) => [t.name, t.dtype])));
  /** @type {Record<string, Rows>} */
  const made = {};
  for (const [part, layers] of Object.entries(inputs.layers)) {
    if (!taken.has(`lora_down_${part}`)) continue;
    for (const [side, name] of [`lora_down_${part}`, `lora_up_${part}`].entries()) {
      const width = side ? "outputs" : "inputs",
        data = new Float32Array(inputs.rank * layers.reduce((sum, layer) => sum + layer[width], 0));
      let start = 0;
      for (const layer of layers) {
        fill(data, start, side, layer, inputs.rank, loras, scales);
        start += inputs.rank * layer[width];
      }
      refuse(!data.every(Number.isFinite), "lora times its scale is beyond the numbers of float32; give less");
      made[name] = { data: taken.get(name) === "float16" ? halves(data) : data, dims: [1, data.length] };
    }
  }
  return made;
}

/**
 * Puts a layer's factors of all LoRAs, one after the other along the rank, where they belong.
 * @param {Float32Array} data
 * @param {number} start
 * @param {number} side 0 for `down`, [in, rank] there; 1 for `up`, [rank, out]
 * @param {{name: string, inputs: number, outputs: number}} layer
 * @param {number} rank
 * @param {Lora[]} loras
 * @param {number[]} scales
 */
function fill(data, start, side, { name, inputs, outputs }, rank, loras, scales) {
  let at = 0;
  loras.forEach((lora, k) => {
    const pair = lora.get(name);
    if (!pair) return;
    const own = pair[0].dims[0],
      values = pair[side].data,
      scale = scales[k];
    refuse(
      at + own > rank,
      `the ${loras.length} LoRAs have more rank together than the ${rank} that the bundle's graphs take; give fewer`,
    );
    for (let r = 0; r < own; r++) {
      if (side) for (let o = 0; o < outputs; o++) data[start + (at + r) * outputs + o] = scale * values[o * own + r];
      else for (let i = 0; i < inputs; i++) data[start + i * rank + at + r] = values[r * inputs + i];
    }
    at += own;
  });
}

/** A LoRA that fits a bundle. @param {Lora} lora @param {LoraInputs} inputs */
function checked(lora, { rank, layers }) {
  const known = new Map(Object.values(layers).flatMap((each) => each.map((layer) => [layer.name, layer])));
  for (const [name, [down, up]] of lora) {
    const layer = known.get(name),
      own = down.dims[0];
    refuse(
      !layer && /\.(to_[qkv]|to_out\.0)$/.test(name),
      `lora: the bundle's UNet has no layer ${name}; take a LoRA of the same base`,
    );
    refuse(!layer, `lora: layer ${name} is not an input of this bundle; export with --lora FILE to fuse it`);
    const wanted = [own, layer?.inputs, layer?.outputs, own];
    refuse(
      String([...down.dims, ...up.dims]) !== String(wanted),
      `lora: the factors of ${name} are ${shown(down.dims)} and ${shown(up.dims)}, which are not of the bundle's layer; ` +
        "take a LoRA of the same base",
    );
    refuse(own > rank, `lora has rank ${own}, the bundle's graphs take ${rank}; export with --lora-inputs ${own}`);
    const finite = [down, up].every(({ data }) => data.every(Number.isFinite));
    refuse(!finite, `lora: the factors of ${name} are not finite`);
  }
  return lora;
}

/** What is in a file of `edgediff lora`. @param {Uint8Array} bytes @returns {Lora} */
function readLora(bytes) {
  refuse(!(bytes instanceof Uint8Array), `lora is ${shown(bytes)}; expected the bytes of a file, or a list of those`);
  /** @type {Map<string, Factor>} */
  const tensors = new Map();
  let format;
  try {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength),
      start = 8 + Number(view.getBigUint64(0, true)),
      text = new TextDecoder("utf-8", { fatal: true }).decode(bytes.slice(8, start)),
      { __metadata__: said, ...header } = JSON.parse(text);
    format = said?.format;
    for (const [name, { dtype, shape, data_offsets: ends }] of Object.entries(header)) {
      const [begin, end] = ends.map((/** @type {number} */ each) => start + each),
        data = READ[dtype](bytes.slice(begin, end).buffer),
        length = shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1);
      if (end > bytes.length || data.length !== length) throw new Error("another size");
      tensors.set(name, { data, dims: shape });
    }
  } catch {
    refuse(true, `lora is damaged, or no .safetensors file; ${AGAIN}`);
  }
  refuse(format !== FORMAT, "lora was not written by `edgediff lora`; convert it with that");
  /** @type {Lora} */
  const found = new Map();
  for (const name of tensors.keys()) {
    const end = ENDS.find((each) => name.endsWith(each)) ?? "",
      layer = name.slice(PREFIX.length, name.length - end.length),
      [down, up] = ENDS.map((each) => tensors.get(`${PREFIX}${layer}${each}`));
    refuse(
      !end || !name.startsWith(PREFIX) || !down || !up,
      `lora has ${name}, which no file of \`edgediff lora\` has; ${AGAIN}`,
    );
    if (down && up) found.set(layer, [down, up]);
  }
  refuse(!found.size, "lora has no layers of the UNet; convert a LoRA that has some with `edgediff lora`");
  return found;
}

/** @type {Record<string, (data: ArrayBuffer) => Float32Array>} */
const READ = {
  F64: (data) => Float32Array.from(new Float64Array(data)),
  F32: (data) => new Float32Array(data),
  F16: (data) => Float32Array.from(new Uint16Array(data), ofHalf),
  BF16: (data) => new Float32Array(Uint32Array.from(new Uint16Array(data), (bits) => bits << 16).buffer),
};

/** @param {number} bits of a float16 */
function ofHalf(bits) {
  const power = (bits >> 10) & 31,
    fraction = bits & 1023,
    finite = power ? 2 ** (power - 25) * (1024 + fraction) : 2 ** -24 * fraction,
    size = power < 31 ? finite : fraction ? NaN : Infinity;
  return bits & 0x8000 ? -size : size;
}

const FLOAT = new Float32Array(1),
  BITS = new Uint32Array(FLOAT.buffer);

/** Rounded to float16, halves to even. @param {Float32Array} values */
function halves(values) {
  return Uint16Array.from(values, (value) => {
    FLOAT[0] = value;
    const sign = (BITS[0] >>> 16) & 0x8000,
      size = BITS[0] & 0x7fffffff;
    // 65520 and more round to infinity.
    refuse(size >= 0x477ff000, "lora times its scale is beyond the numbers of float16; give less");
    if (size >= 0x38800000) return sign | ((size + 0xfff + ((size >>> 13) & 1) - 0x38000000) >>> 13);
    const steps = Math.abs(value) * 2 ** 24,
      down = Math.floor(steps),
      rest = steps - down;
    return sign | (down + Number(rest > 0.5 || (rest === 0.5 && down % 2 === 1)));
  });
}
