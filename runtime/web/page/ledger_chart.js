// The ledger as bars: one for each step, and one for each component around the loop.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 140,
  BOTTOM = 22,
  TOP = 18;

/** @typedef {import("./engine.js").ResultMessage} ResultMessage */

/** @param {Record<string, number>} ms */
export const sum = (ms) => Object.values(ms).reduce((a, b) => a + b, 0);

/** Milliseconds of all steps. @param {Pick<ResultMessage, "ledger">} result */
export const loopMs = ({ ledger }) => ledger.reduce((total, step) => total + sum(step.ms), 0);

/** @type {Record<string, string>} */
const SHORT = { text_encoder: "text", text_encoder_2: "text 2", vae_encoder: "encoder", vae_decoder: "decoder" };

/** @param {string} name @param {Record<string, string | number>} attributes @param {string} [text] */
function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  if (text !== undefined) made.textContent = text;
  return made;
}

/** @param {Pick<ResultMessage, "ledger" | "stages">} result @param {number} width pixels that it is shown in */
export function ledgerChart({ ledger, stages }, width) {
  const before = ["text_encoder", "text_encoder_2", "vae_encoder"].filter((name) => name in stages);
  const after = Object.keys(stages).filter((name) => !before.includes(name));
  const component = (/** @type {string} */ name) => ({
    kind: "component",
    name: SHORT[name] ?? name,
    ms: stages[name],
  });
  const bars = [
    ...before.map(component),
    // Numbered as the boxes are: of the steps that run.
    ...ledger.map((step, k) => ({ kind: step.full ? "full" : "cached", name: String(k + 1), ms: sum(step.ms) })),
    ...after.map(component),
  ];
  const most = Math.max(...bars.map((bar) => bar.ms), 1e-6);
  // Components have words under them, steps a number.
  const widths = bars.map((bar) => (bar.kind === "component" ? 3 : 1));
  const unit = width / widths.reduce((a, b) => a + b, 0);
  const words = bars.map(
    (bar) => `${bar.kind === "component" ? bar.name : `step ${bar.name} (${bar.kind})`} ${bar.ms.toFixed(1)} ms`,
  );
  const chart = element("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`,
    role: "img",
    "aria-label": `Bars of ${ledger.length} steps and ${bars.length - ledger.length} components; the longest ${duration(most)}`,
  });
  let x = 0;
  for (const [k, bar] of bars.entries()) {
    const wide = unit * widths[k],
      high = Math.max((bar.ms / most) * (HEIGHT - BOTTOM - TOP), 1),
      thick = Math.max(Math.min(wide - 3, 48), 1),
      left = x + (wide - thick) / 2;
    const group = element("g", {});
    group.append(
      element("rect", {
        class: `bar-${bar.kind}`,
        x: left,
        y: HEIGHT - BOTTOM - high,
        width: thick,
        height: high,
        rx: 2,
      }),
      element("title", {}, words[k]),
    );
    if (unit > 16 || bar.kind === "component") {
      const middle = x + wide / 2;
      group.append(
        element("text", { x: middle, y: HEIGHT - 6, "text-anchor": "middle" }, bar.name),
        element("text", { x: middle, y: HEIGHT - BOTTOM - high - 4, "text-anchor": "middle" }, short(bar.ms)),
      );
    }
    chart.append(group);
    x += wide;
  }
  return chart;
}

/** @param {number} ms */
const short = (ms) => (ms < 9.95 ? ms.toFixed(1) : ms < 9950 ? ms.toFixed(0) : `${(ms / 1000).toFixed(1)} s`);

/** Milliseconds in words. @param {number} ms */
export const duration = (ms) => (ms < 995 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`);

/** @param {number} share */
export const percent = (share) => `${(100 * share).toFixed(0)} %`;
