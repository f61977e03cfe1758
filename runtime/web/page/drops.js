// Files that are dropped on the page: who takes them.

/**
 * @typedef {object} Taker
 * @property {HTMLElement} place shown as the one that takes what is held over the page
 * @property {(target: EventTarget | null) => boolean} takesDrop whether what is dropped on an element is its
 * @property {(files: FileList) => void} choose
 */

/** Gives what is dropped to the first that takes it. @param {() => Taker[]} takers those there are by then */
export function takeDrops(takers) {
  /** @param {Taker} [shown] */
  const show = (shown) => takers().forEach((each) => each.place.classList.toggle("over", each === shown));
  document.addEventListener("dragover", (event) => {
    const taker = takers().find((each) => event.dataTransfer?.types.includes("Files") && each.takesDrop(event.target));
    show(taker);
    if (taker) event.preventDefault();
  });
  document.addEventListener("dragleave", (event) => !event.relatedTarget && show());
  document.addEventListener("drop", (event) => {
    const { target, dataTransfer } = event,
      taker = takers().find((each) => dataTransfer?.files.length && each.takesDrop(target));
    show();
    // On a field for files the browser itself puts it there.
    if (!taker || !dataTransfer || (target instanceof HTMLInputElement && target.type === "file")) return;
    event.preventDefault();
    taker.choose(dataTransfer.files);
  });
}
