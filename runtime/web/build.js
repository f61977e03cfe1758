// Builds the page into edgediff/site/page: two bundles, the service worker, ONNX Runtime Web's own files.
import { createHash } from "node:crypto";
import { copyFile, mkdir, readdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { join, relative } from "node:path";
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
// Loaded where WebGPU is chosen, and kept from then on.
const LATER = ENGINES["onnxruntime-web/webgpu"].map((name) => `ort/${name}`);

const made = `${OUT}.new`;
await rm(made, { recursive: true, force: true });
await mkdir(join(made, "ort"), { recursive: true });
await build({
  entryPoints: [join(PAGE, "main.js"), join(PAGE, "worker.js")],
  bundle: true,
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
});
for (const name of Object.values(ENGINES).flat()) await copyFile(join(ORT, name), join(made, "ort", name));
for (const name of ["index.html", "style.css", "icon.svg"]) await copyFile(join(PAGE, name), join(made, name));

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
console.log(`page: ${relative(process.cwd(), OUT) || OUT}`);

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
