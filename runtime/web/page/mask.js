// The mask: painted over the picture, filled with rectangles, or read from a file. It has the size that is drawn.
import { button, element, input, part, refusal, said } from "./elements.js";

export class Mask {
  #canvas = part("mask", HTMLCanvasElement);
  #context = /** @type {CanvasRenderingContext2D} */ (this.#canvas.getContext("2d", { willReadFrequently: true }));
  /** Where the brush was. @type {{x: number, y: number} | null} */
  #last = null;
  /** Share of the picture that is drawn anew. */
  share = 0;

  /** @param {() => void} changed */
  constructor(changed) {
    this.changed = changed;
    const canvas = this.#canvas;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      event.preventDefault();
      canvas.setPointerCapture(event.pointerId);
      this.#last = this.#place(event);
      this.#stroke(event);
    });
    canvas.addEventListener("pointermove", (event) => this.#last && this.#stroke(event));
    for (const end of ["pointerup", "pointercancel"])
      canvas.addEventListener(end, () => {
        if (!this.#last) return;
        this.#last = null;
        this.#count();
      });
    button("erase").addEventListener("click", () => {
      button("erase").setAttribute("aria-pressed", String(!this.#erases()));
    });
    button("clear-mask").addEventListener("click", () => {
      input("mask-file").value = "";
      this.#clear();
    });
    button("rectangle").addEventListener("click", () => said(async () => this.#fillRectangle()));
    element("rectangle-fields").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.target === button("rectangle")) return;
      event.preventDefault(); // which would draw
      button("rectangle").click();
    });
    // The picture takes strokes only while the mask's tools are open: else a finger scrolls there.
    const tools = part("mask-section", HTMLDetailsElement);
    const show = () => canvas.classList.toggle("paints", tools.open);
    tools.addEventListener("toggle", show);
    show();
  }

  /** Begins with an empty mask of another size. @param {number} width @param {number} height */
  resize(width, height) {
    Object.assign(this.#canvas, { width, height });
    this.#canvas.classList.toggle("small", width < 200);
    const most = Math.max(2, Math.round(width / 2));
    Object.assign(input("brush"), { min: "1", max: String(most) });
    input("brush").value = String(Math.max(1, Math.round(width / 8)));
    for (const [name, value] of Object.entries({ left: 0, top: 0, width, height })) {
      input(`mask-${name}`).value = String(value);
    }
    this.#count();
  }

  #clear() {
    this.#context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    this.#count();
  }

  /** Adds the rectangle of the four fields, or takes it away while Erase is pressed. */
  #fillRectangle() {
    const { width, height } = this.#canvas;
    const [left, top, wide, high] = ["left", "top", "width", "height"].map((name) => {
      const { value } = input(`mask-${name}`);
      if (!/^\d+$/.test(value)) throw refusal(`the rectangle's ${name} is ${JSON.stringify(value)}; expected pixels`);
      return Number(value);
    });
    if (!wide || !high || left >= width || top >= height)
      throw refusal(`the rectangle covers nothing of the picture; expected a part of ${width} x ${height} pixels`);
    this.#drawing(() => this.#context.fillRect(left, top, wide, high));
    this.#count();
  }

  /** Takes a mask: white, half and more, is drawn anew. @param {{data: Uint8Array, dims: number[]}} mask 1 or 0, [1, h, w] */
  set({ data, dims: [, height, width] }) {
    const image = new ImageData(width, height);
    const [r, g, b] = this.#colour();
    data.forEach((inside, k) => inside && image.data.set([r, g, b, 255], 4 * k));
    this.#context.putImageData(image, 0, 0);
    this.#count();
  }

  /** Where the picture is drawn anew, 1 or 0, [1, h, w]; null where nothing is painted. */
  get() {
    const { width, height } = this.#canvas,
      { data } = this.#context.getImageData(0, 0, width, height),
      mask = new Uint8Array(width * height);
    for (let k = 0; k < mask.length; k++) mask[k] = Number(data[4 * k + 3] >= 128);
    return mask.includes(1) ? { data: mask, dims: [1, height, width] } : null;
  }

  #count() {
    const mask = this.get();
    this.share = mask ? mask.data.reduce((a, b) => a + b, 0) / mask.data.length : 0;
    const words = mask
      ? `${Math.max(1, Math.round(100 * this.share))} % of it is drawn anew`
      : "all of it is drawn anew";
    this.#canvas.setAttribute("aria-label", `Mask of the picture: ${words}`);
    element("mask-says").textContent = mask ? `${words.replace("it", "the picture")}.` : "Nothing is painted yet.";
    this.changed();
  }

  /** A pointer's place in the picture. @param {PointerEvent} event */
  #place({ clientX, clientY }) {
    const box = this.#canvas.getBoundingClientRect();
    return {
      x: ((clientX - box.left) / box.width) * this.#canvas.width,
      y: ((clientY - box.top) / box.height) * this.#canvas.height,
    };
  }

  /** Paints from where the brush was. @param {PointerEvent} event */
  #stroke(event) {
    const from = this.#last ?? this.#place(event),
      to = this.#place(event),
      size = Number(input("brush").value),
      context = this.#context;
    this.#drawing(() => {
      context.lineWidth = size;
      context.lineCap = "round";
      context.beginPath();
      context.moveTo(from.x, from.y);
      context.lineTo(to.x, to.y + 0.01); // a line of no length is not drawn everywhere
      context.stroke();
    });
    this.#last = to;
  }

  /** @param {() => void} job paints, or takes away */
  #drawing(job) {
    const context = this.#context;
    context.save();
    context.globalCompositeOperation = this.#erases() ? "destination-out" : "source-over";
    context.fillStyle = context.strokeStyle = `rgb(${this.#colour()})`;
    job();
    context.restore();
  }

  #erases() {
    return button("erase").getAttribute("aria-pressed") === "true";
  }

  /** The same in light and dark: it lies over a picture. */
  #colour() {
    return [233, 162, 59];
  }
}
