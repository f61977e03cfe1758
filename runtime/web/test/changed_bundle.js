import { createHash } from "node:crypto";
import { EdgePipeline } from "../src/pipeline.js";
import { GOLDEN, readGolden } from "./golden.js";
import { serve } from "./server.js";

/** Opens the golden bundle with some files changed, and everything that follows from them; it is served until closed. */
export async function changed(change, files = {}) {
  const hash = (bytes) => createHash("sha256").update(bytes).digest("hex"),
    manifest = readGolden("bundle/manifest.json");
  for (const [name, bytes] of Object.entries(files)) manifest.files[name] = { size: bytes.length, sha256: hash(bytes) };
  change(manifest);
  const text = JSON.stringify(manifest),
    hashes = { "manifest.json": hash(text) };
  for (const [name, { sha256 }] of Object.entries(manifest.files)) hashes[name] = sha256;
  const sums = Object.keys(hashes)
    .sort()
    .map((name) => `${hashes[name]}  ${name}\n`)
    .join("");
  const all = { "manifest.json": text, SHA256SUMS: sums, ...files };
  const other = await serve(
    new URL("bundle/", GOLDEN),
    (path, _, response) => path in all && !!response.end(all[path]),
  );
  try {
    const pipe = await EdgePipeline.fromUrl(other.url, { backend: "wasm" }),
      close = pipe.close.bind(pipe);
    pipe.close = async () => {
      await close();
      await other.close();
    };
    return pipe;
  } catch (e) {
    await other.close();
    throw e;
  }
}
