// Keeps the page for offline use, and isolates it where the host sets no headers. Files of the bundle are kept by the
// page itself, by their hashes; here only what names them.
const BUILD = "@BUILD@"; // put in by the build: the hash of the page's files
// Of this path alone: several sites may share an origin.
const HOME = new URL("./", self.location.href);
const PAGES = `edgediff-page ${HOME.pathname} `;
const CACHE = PAGES + BUILD;
// Not of one version of the page: the next one needs them too.
const BUNDLE = `edgediff-bundle ${HOME.pathname}`;
const FILES = /** @type {string[]} */ (/* @FILES@ */ []);
// Kept from their first use on.
const LATER = /** @type {string[]} */ (/* @LATER@ */ []);
const NAMES = ["bundle/manifest.json", "bundle/SHA256SUMS"];

self.addEventListener("install", (event) => event.waitUntil(install()));

async function install() {
  const files = [...FILES];
  for (const file of LATER) if (await caches.match(file)) files.push(file); // the version before uses it
  const cache = await caches.open(CACHE);
  await cache.addAll(files.map((file) => new Request(file, { cache: "reload" })));
}

// A new version becomes active when no page of the old one is open: until then, those need the old one's files.
self.addEventListener("activate", (event) => event.waitUntil(activate()));

async function activate() {
  const old = (await caches.keys()).filter((name) => name.startsWith(PAGES) && name !== CACHE);
  await Promise.all(old.map((name) => caches.delete(name)));
  await self.clients.claim();
}

// A page of the old version that was just loaded gives way, unless another one is open. It asks first: a page that has
// waited too long for the answer goes on with the old version's files, which must not go then.
self.addEventListener("message", (event) => {
  if (event.data === "take over") event.waitUntil(self.skipWaiting());
  else event.waitUntil(isAlone().then((alone) => event.ports[0].postMessage(alone)));
});

async function isAlone() {
  const pages = await self.clients.matchAll({ type: "window", includeUncontrolled: true });
  return pages.filter(({ url }) => url.startsWith(HOME.href)).length < 2;
}

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (request.method !== "GET" || url.origin !== HOME.origin || !url.pathname.startsWith(HOME.pathname)) return;
  const inside = url.pathname.slice(HOME.pathname.length);
  if (NAMES.includes(inside)) event.respondWith(freshOrKept(request));
  else if (!inside.startsWith("bundle/"))
    event.respondWith(keptOrFresh(request, LATER.includes(inside)).then(isolated));
});

/** @param {Request} request @param {boolean} keeps whether to keep what is fetched */
async function keptOrFresh(request, keeps) {
  const cache = await caches.open(CACHE);
  const found = await cache.match(request, { ignoreSearch: true });
  if (found) return found;
  const response = await fetch(request);
  if (response.ok && keeps) await keep(cache, request, response);
  return response;
}

/** @param {Request} request */
async function freshOrKept(request) {
  const cache = await caches.open(BUNDLE);
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
