// The clock as a row of boxes, one for each call of the UNet: full or cached.

export class ClockBoxes {
  /** @param {HTMLElement} place @param {() => void} changed */
  constructor(place, changed) {
    this.place = place;
    /** @type {number[]} */
    this.mask = [];
    // The box that Tab comes to.
    this.at = 0;
    place.addEventListener("click", (event) => {
      const box = /** @type {Element} */ (event.target).closest("button");
      if (!box || box.getAttribute("aria-disabled") === "true") return;
      const at = Number(box.dataset.step);
      this.mask[at] = 1 - this.mask[at];
      this.at = at;
      this.#paint();
      changed();
    });
    // Arrows go from box to box, as in a toolbar.
    place.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const boxes = [...place.querySelectorAll("button")];
      const at = boxes.indexOf(/** @type {HTMLButtonElement} */ (document.activeElement));
      if (way === undefined || at < 0) return;
      event.preventDefault();
      this.at = Math.min(Math.max(at + way, 0), boxes.length - 1);
      this.#paint();
      boxes[this.at].focus();
    });
  }

  /** @param {number[]} mask */
  show(mask) {
    this.mask = [...mask];
    this.at = Math.min(this.at, mask.length - 1);
    if (this.place.childElementCount !== mask.length) {
      this.place.replaceChildren(
        ...mask.map((_, at) => {
          const box = document.createElement("button");
          box.type = "button";
          box.dataset.step = String(at);
          box.textContent = String(at + 1);
          return box;
        }),
      );
    }
    this.#paint();
  }

  #paint() {
    for (const [at, box] of [...this.place.children].entries()) {
      const full = this.mask[at] === 1;
      /** @type {HTMLButtonElement} */ (box).tabIndex = at === this.at ? 0 : -1;
      box.setAttribute("aria-pressed", String(full));
      box.setAttribute("aria-label", `Step ${at + 1}: ${full ? "full" : "cached"}${at ? "" : ", always"}`);
      if (!at) box.setAttribute("aria-disabled", "true");
    }
  }

  /** Marks the step that runs; null marks none. @param {number | null} at */
  mark(at) {
    for (const [k, box] of [...this.place.children].entries()) box.classList.toggle("now", k === at);
  }
}

/** The mask of a period. @param {number} period @param {number} length */
export function maskOf(period, length) {
  return Array.from({ length }, (_, at) => Number(at % period === 0));
}

/** The period that a mask is of, or null. @param {number[]} mask */
export function periodOf(mask) {
  const second = mask.indexOf(1, 1);
  const period = second < 0 ? mask.length : second;
  return mask.every((full, at) => full === Number(at % period === 0)) ? period : null;
}
