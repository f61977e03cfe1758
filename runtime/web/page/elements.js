// The page's elements by their ids, and what the page says in them.

/** @template {HTMLElement} T @param {string} id @param {new () => T} kind @returns {T} */
export function part(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`the page has no ${id}`);
  return found;
}
export const input = (/** @type {string} */ id) => part(id, HTMLInputElement);
export const button = (/** @type {string} */ id) => part(id, HTMLButtonElement);
export const element = (/** @type {string} */ id) => part(id, HTMLElement);
const progress = part("progress", HTMLProgressElement);

/** @param {string} text */
export function say(text) {
  element("status").textContent = text;
  element("now").textContent = "";
}

/** How far it is: a share, or null where that is not known yet. @param {number | null} share @param {string} [now] */
export function sayProgress(share, now) {
  progress.hidden = false;
  if (share === null) progress.removeAttribute("value");
  else progress.value = share;
  if (now !== undefined) element("now").textContent = now;
}

/** How much of the files is there. @param {{loaded: number, total: number}} progress */
export function sayLoading({ loaded, total }) {
  sayProgress(total ? loaded / total : 0, `${(loaded / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`);
}

export function hideProgress() {
  progress.hidden = true;
}

/** @param {unknown} error */
export function fail(error) {
  element("error").textContent = sentence(error);
  element("error").hidden = false;
}

/** Does what may fail for a reason that the user can correct, and says that. @param {() => Promise<void>} job */
export async function said(job) {
  element("error").hidden = true;
  try {
    await job();
  } catch (e) {
    fail(e);
  }
}

/** @param {unknown} error */
function sentence(error) {
  const { name = "", message = String(error) } = /** @type {Error} */ (error),
    said = message.replace(/\.+$/, ""),
    words = `${said.charAt(0).toUpperCase()}${said.slice(1)}.`;
  if (outOfMemory(error)) return `The browser has no memory left for this: ${said}. Close other tabs and try again.`;
  return name === "BundleError" || name === "RequestError" ? words : `Something went wrong: ${words}`;
}

/** What the user can correct. @param {string} message */
export const refusal = (message) => Object.assign(new Error(message), { name: "RequestError" });

/** A part of the page that is loaded when it is first used. @template T @param {Promise<T>} part */
export const loaded = (part) =>
  part.catch(() => {
    throw refusal("this part of the page cannot be loaded; connect to the network, and load the page again");
  });

/** @param {unknown} error */
export const outOfMemory = (error) =>
  error instanceof RangeError ||
  /out of memory|allocate memory|bad_alloc|memory access out of bounds|allocation failed/i.test(String(error));

/** Saves a file where the browser puts downloads. @param {string} name @param {Blob} blob */
export function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** @param {string} name @param {unknown} value */
export function saveJson(name, value) {
  save(name, new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
}
