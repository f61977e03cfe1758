// Keeps the page for offline use, and isolates it where the host sets no headers. Files of the bundle are kept by the
// page itself, by their hashes; here only what names them.
const BUILD = "@BUILD@"; // put in by the build: the hash of the page's files
// Of this path alone: several sites may share an origin.
const HOME = new URL("./", self.location.href);
const PAGES = `edgediff-page ${HOME.pathname} `;
const CACHE = PAGES + BUILD;
const FILES = /** @type {string[]} */ (/* @FILES@ */ []);
const NAMES = ["bundle/manifest.json", "bundle/SHA256SUMS"];

self.addEventListener("install", (event) => {
  event.waitUntil(
    caches
      .open(CACHE)
      .then((cache) => cache.addAll(FILES.map((file) => new Request(file, { cache: "reload" }))))
      .then(() => self.skipWaiting()),
  );
});

self.addEventListener("activate", (event) => {
  event.waitUntil(
    caches
      .keys()
      .then((names) =>
        Promise.all(
          names.filter((name) => name.startsWith(PAGES) && name !== CACHE).map((name) => caches.delete(name)),
        ),
      )
      .then(() => self.clients.claim()),
  );
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== "GET" || url.origin !== HOME.origin || !url.pathname.startsWith(HOME.pathname)) return;
  const inside = url.pathname.slice(HOME.pathname.length);
  if (NAMES.includes(inside)) event.respondWith(freshOrKept(request));
  else if (!inside.startsWith("bundle/")) event.respondWith(keptOrFresh(request).then(isolated));
});

/** @param {Request} request */
async function keptOrFresh(request) {
  const cache = await caches.open(CACHE);
  const found = await cache.match(request, { ignoreSearch: true });
  if (found) return found;
  const response = await fetch(request);
  if (response.ok && /\/ort\/[^/]+$/.test(request.url)) await keep(cache, request, response);
  return response;
}

/** @param {Request} request */
async function freshOrKept(request) {
  const cache = await caches.open(CACHE);
  let response;
  try {
    response = await fetch(request);
  } catch (e) {
    const found = await cache.match(request);
    if (found) return found;
    throw e;
  }
  if (response.ok) await keep(cache, request, response);
  return response;
}

/** Keeps a copy; where there is no room, an older one goes, and the page works all the same. */
async function keep(cache, request, response) {
  try {
    await cache.put(request, response.clone());
  } catch {
    await cache.delete(request);
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
