// Keeps the page for offline use, and isolates it where the host sets no headers. Files of the bundle are kept by the
// page itself, by their hashes; here only what names them.
const BUILD = "@BUILD@"; // put in by the build: the hash of the page's files
const CACHE = `edgediff-page-${BUILD}`;
const FILES = /** @type {string[]} */ (/* @FILES@ */ []);
const NAMES = /\/bundle\/(manifest\.json|SHA256SUMS)$/;

self.addEventListener("install", (event) => {
  event.waitUntil(
    caches
      .open(CACHE)
      .then((cache) => cache.addAll(FILES))
      .then(() => self.skipWaiting()),
  );
});

self.addEventListener("activate", (event) => {
  event.waitUntil(
    caches
      .keys()
      .then((names) =>
        Promise.all(
          names
            .filter((name) => name.startsWith("edgediff-page-") && name !== CACHE)
            .map((name) => caches.delete(name)),
        ),
      )
      .then(() => self.clients.claim()),
  );
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  const home = new URL("./", self.location.href);
  if (request.method !== "GET" || url.origin !== home.origin || !url.pathname.startsWith(home.pathname)) return;
  const inside = url.pathname.slice(home.pathname.length);
  if (NAMES.test(url.pathname)) event.respondWith(freshOrKept(request));
  else if (!inside.startsWith("bundle/")) event.respondWith(keptOrFresh(request).then(isolated));
});

/** @param {Request} request */
async function keptOrFresh(request) {
  const cache = await caches.open(CACHE);
  const found = await cache.match(request, { ignoreSearch: true });
  if (found) return found;
  const response = await fetch(request);
  if (response.ok && /\/ort\/[^/]+$/.test(request.url)) await cache.put(request, response.clone());
  return response;
}

/** @param {Request} request */
async function freshOrKept(request) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(request, response.clone());
    return response;
  } catch (e) {
    const found = await cache.match(request);
    if (found) return found;
    throw e;
  }
}

/** @param {Response} response */
function isolated(response) {
  if (response.type === "opaque" || response.status === 0) return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
