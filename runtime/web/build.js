// Builds the page into edgediff/site/page: two bundles, the service worker, ONNX Runtime Web's own files.
import { createHash } from "node:crypto";
import { copyFile, mkdir, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { basename, join, relative, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

const HERE = fileURLToPath(new URL(".", import.meta.url));
const PAGE = join(HERE, "page");
const OUT = process.argv[2] ?? join(HERE, "../../edgediff/site/page");
const ORT = join(HERE, "node_modules/onnxruntime-web/dist");
const ENGINES = {
  "onnxruntime-web/wasm": ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"],
  "onnxruntime-web/webgpu": [
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
  ],
};
// What the page loads at its first use, and keeps from then on.
const PARTS = ["pictures.js", "control.js", "measure.js"],
  LATER = [...PARTS, ...ENGINES["onnxruntime-web/webgpu"].map((name) => `ort/${name}`)];

const made = `${OUT}.new`;
await rm(made, { recursive: true, force: true });
await mkdir(join(made, "ort"), { recursive: true });
// The worker is built apart, into one file: of several, Chromium often let no new version of the page take over.
/** @param {string[]} names */
const bundled = async (...names) =>
  (
    await build({
      entryPoints: names.map((name) => join(PAGE, name)),
      bundle: true,
      splitting: true,
      metafile: true,
      format: "esm",
      target: "es2022",
      outdir: made,
      charset: "utf8",
      define: { ORT_VERSION: JSON.stringify(await version("onnxruntime-web")) },
      plugins: [
        {
          name: "engines",
          setup(steps) {
            steps.onResolve({ filter: /^onnxruntime-web\// }, ({ path }) => ({
              path: `./ort/${ENGINES[path][0]}`,
              external: true,
            }));
          },
        },
      ],
    })
  ).metafile.outputs;
const outputs = new Map(
  Object.entries({ ...(await bundled("main.js", ...PARTS)), ...(await bundled("worker.js")) }).map(([path, made]) => [
    basename(path),
    made,
  ]),
);
for (const name of Object.values(ENGINES).flat()) await copyFile(join(ORT, name), join(made, "ort", name));
for (const name of ["style.css", "icon.svg"]) await copyFile(join(PAGE, name), join(made, name));
// What main.js imports is asked for together with it.
const early = withImports("main.js")
  .slice(1)
  .map((name) => `<link rel="modulepreload" href="${name}" />\n    `);
const html = await readFile(join(PAGE, "index.html"), "utf8");
await writeFile(join(made, "index.html"), html.replace("<script", `${early.join("")}<script`));

const files = (await list(made)).sort();
const hash = createHash("sha256");
for (const name of files) hash.update(`${name}\0`).update(await readFile(join(made, name)));
const worker = (await readFile(join(PAGE, "sw.js"), "utf8"))
  .replace("@BUILD@", hash.digest("hex").slice(0, 16))
  .replace("/* @FILES@ */ []", JSON.stringify(["./", ...files.filter((name) => !LATER.includes(name))]))
  .replace("/* @LATER@ */ []", JSON.stringify(LATER));
await writeFile(join(made, "sw.js"), worker);
// A server that is asked for them compressed need not compress them each time.
for (const name of [...files, "sw.js"]) {
  const bytes = await readFile(join(made, name));
  if (bytes.length > 2048) await writeFile(join(made, `${name}.gz`), gzipSync(bytes, { level: 9 }));
}
await rm(OUT, { recursive: true, force: true });
await rename(made, OUT);
console.log(`page: ${relative(process.cwd(), OUT) || OUT}; ${await sizes()}`);

/** Scripts that some scripts import, and these. @param {string[]} names */
function withImports(...names) {
  const found = new Set(names);
  for (const name of found)
    for (const { path, kind } of outputs.get(name)?.imports ?? [])
      if (kind === "import-statement" && outputs.has(basename(path))) found.add(basename(path));
  return [...found];
}

/** What the page's own code weighs as it is, without the library and ONNX Runtime Web. */
async function sizes() {
  const kB = (/** @type {number[]} */ bytes) => `${(bytes.reduce((a, b) => a + b, 0) / 1e3).toFixed(1)} kB`,
    own = (/** @type {string[]} */ names) =>
      names.flatMap((name) =>
        Object.entries(outputs.get(name)?.inputs ?? {}).flatMap(([file, { bytesInOutput }]) =>
          resolve(file).startsWith(PAGE) ? [bytesInOutput] : [],
        ),
      ),
    bytesOf = async (/** @type {string} */ name) => (await stat(join(OUT, name))).size;
  const first = withImports("main.js", "worker.js"),
    later = withImports(...PARTS).filter((name) => !first.includes(name)),
    scripts = [...own(first), await bytesOf("sw.js")],
    rest = [await bytesOf("index.html"), await bytesOf("style.css")];
  return `its own code at first ${kB([...scripts, ...rest])} (scripts ${kB(scripts)}, HTML and CSS ${kB(rest)}), ${kB(own(later))} later`;
}

/** @param {string} folder @param {string} [inside] @returns {Promise<string[]>} */
async function list(folder, inside = "") {
  const found = [];
  for (const entry of await readdir(join(folder, inside), { withFileTypes: true })) {
    const name = inside ? `${inside}/${entry.name}` : entry.name;
    if (entry.isDirectory()) found.push(...(await list(folder, name)));
    else found.push(name);
  }
  return found;
}

/** @param {string} name */
async function version(name) {
  return JSON.parse(await readFile(join(HERE, "node_modules", name, "package.json"), "utf8")).version;
}
