// Threads need a page that is cross-origin isolated; what works offline needs a service worker. A host that sets no
// headers is helped by the service worker, once the page is loaded again.

const AGAIN = `edgediff-loaded-again ${location.pathname}`;

/**
 * Registers the service worker: `kept` is whether it keeps the page, `again` whether the page is about to be loaded again.
 * @returns {Promise<{kept: boolean, again: boolean}>}
 */
export async function isolate() {
  if (!("serviceWorker" in navigator)) return { kept: false, again: false };
  /** @type {ServiceWorkerRegistration} */
  let registration;
  try {
    registration = await navigator.serviceWorker.register("sw.js");
  } catch {
    // A certificate that the browser does not trust, or private browsing; `limits` says what is missing.
    return { kept: false, again: false };
  }
  const { active, waiting, installing } = registration;
  if (waiting && (await takesOver(waiting))) {
    location.reload();
    return { kept: true, again: true };
  }
  if (crossOriginIsolated || sessionStorage.getItem(AGAIN)) return { kept: true, again: false };
  if (!active && !(await activated(waiting ?? installing))) return { kept: false, again: false };
  sessionStorage.setItem(AGAIN, "1");
  location.reload();
  return { kept: true, again: true };
}

/** Whether a new version of the page takes over from this one, which it does where no other page is open. @param {ServiceWorker} waiting */
async function takesOver(waiting) {
  const { port1, port2 } = new MessageChannel();
  const alone = new Promise((resolve) => (port1.onmessage = ({ data }) => resolve(data)));
  waiting.postMessage("alone?", [port2]);
  if (!(await within(2000, alone))) return false;
  waiting.postMessage("take over");
  // A browser first lets the old one end what it does, for minutes where that hangs.
  return within(10_000, activated(waiting));
}

/** What a promise gives, or false after some milliseconds. @param {number} ms @param {Promise<any>} promise */
function within(ms, promise) {
  return Promise.race([promise, new Promise((resolve) => setTimeout(resolve, ms, false))]);
}

/** Lets the service worker keep files that were loaded before it was there. @param {string[]} files */
export async function keepFiles(files) {
  const { serviceWorker } = navigator;
  if (!serviceWorker) return;
  if (!serviceWorker.controller) {
    const there = new Promise((resolve) => serviceWorker.addEventListener("controllerchange", resolve, { once: true }));
    await within(10_000, there);
  }
  if (!serviceWorker.controller) throw new Error("the browser runs no service worker here");
  await Promise.all(files.map((file) => fetch(file)));
}

/** Waits until a service worker is at work; false where it could not be installed. @param {ServiceWorker | null} worker */
function activated(worker) {
  if (!worker) return Promise.resolve(false);
  return new Promise((resolve) => {
    const look = () => ["activated", "redundant"].includes(worker.state) && resolve(worker.state === "activated");
    worker.addEventListener("statechange", look);
    look();
  });
}

/** What this browser lacks, in sentences. @param {boolean} kept whether a service worker keeps the page */
export function limits(kept) {
  const found = [];
  if (!isSecureContext)
    found.push(
      "This address is not secure (http): one thread, no WebGPU, and nothing is kept for the next visit. Use https.",
    );
  else if (!crossOriginIsolated) found.push("The page is not isolated from other sites, so it computes in one thread.");
  if (isSecureContext && !kept) found.push("The browser keeps no page for offline use here.");
  return found;
}

/** Why this browser cannot draw at all, in a sentence; null where it can. */
export function missing() {
  if (typeof WebAssembly === "undefined") return "This browser has no WebAssembly; use a newer one.";
  // A module with one SIMD instruction.
  const simd = new Uint8Array([
    0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
  ]);
  if (!WebAssembly.validate(simd)) return "This browser's WebAssembly has no SIMD instructions; use a newer one.";
  if (typeof Worker === "undefined") return "This browser has no workers; use a newer one.";
  return null;
}
