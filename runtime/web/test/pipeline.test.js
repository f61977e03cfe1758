import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { BundleError, RequestError } from "../src/errors.js";
import { toRgba, toUint8 } from "../src/images.js";
import { noises } from "../src/noise.js";
import { EdgePipeline } from "../src/pipeline.js";
import { OrtSession } from "../src/sessions.js";
import { changed } from "./changed_bundle.js";
import { closeTo, GOLDEN, readGolden } from "./golden.js";
import { serve } from "./server.js";

const golden = readGolden("bundle.json"),
  options = { backend: "wasm" };
let server, pipe;
before(async () => {
  server = await serve(new URL("bundle/", GOLDEN));
  pipe = await EdgePipeline.fromUrl(server.url, options);
});
after(async () => {
  await pipe.close();
  await server.close();
});

/** The contract's request in this runtime's words. */
const request = {
  numImages: golden.request.num_images,
  label: golden.request.label,
  seed: golden.request.seed,
  guidanceScale: golden.request.guidance_scale,
};

const rows = (...dims) => ({ data: new Float32Array(dims.reduce((a, b) => a * b)), dims });

const refused = (pattern) => (e) => {
  assert.ok(e instanceof RequestError, e.stack);
  assert.match(e.message, pattern);
  assert.ok(!e.message.includes("\n") && e.message.includes(";"), e.message);
  return true;
};

test("uint8 conversion", () => {
  const { values, bytes } = readGolden("uint8.json");
  assert.deepEqual([...toUint8({ data: Float32Array.from(values), dims: [1, 1, 1, values.length] }).data], bytes);
  assert.deepEqual(
    [...toUint8({ data: Float32Array.of(-1, -1, 0, 0, 1, 1, 1, 1, 0, 0, -1, -1), dims: [2, 3, 1, 2] }).data],
    [0, 128, 255, 0, 128, 255, 255, 128, 0, 255, 128, 0],
  );
});

test("a canvas takes pictures of one and of three channels", () => {
  const images = { data: Uint8Array.of(1, 2, 3, 4, 5, 6), dims: [2, 1, 1, 3] };
  assert.deepEqual(toRgba(images, 1), { data: Uint8ClampedArray.of(4, 5, 6, 255), width: 1, height: 1 });
  assert.deepEqual([...toRgba({ data: Uint8Array.of(7, 8), dims: [1, 1, 2, 1] }).data], [7, 7, 7, 255, 8, 8, 8, 255]);
  assert.throws(() => toRgba(images, 2), RequestError);
});

test("the golden bundle's pictures", async () => {
  const { images, mask, latents, ledger, ms, macs, warnings, seed } = await pipe.generate(request);
  assert.deepEqual(images.dims, [2, 8, 8, 3]);
  closeTo(images.data, golden.images, 1);
  assert.deepEqual(mask, golden.mask);
  assert.deepEqual(latents.dims, [2, 3, 8, 8]);
  assert.deepEqual(
    ledger.map((step) => Object.keys(step.ms)),
    mask.map((full) => [full ? "full" : "cached", "guidance", "scheduler", "other"]),
  );
  assert.ok(ms > 0 && ms >= ledger[0].ms.full);
  const { full, cached } = pipe.manifest.cost,
    each = (part) => 4 * (part.macs + part.macs_attention);
  assert.deepEqual(macs, { done: 2 * each(full) + 2 * each(cached), uncached: 4 * each(full) });
  assert.deepEqual([warnings, seed], [[], "5"]);
});

test("with little memory, and by text instead of numbers, the pictures are the same", async () => {
  const small = await EdgePipeline.fromUrl(server.url, { ...options, lowMemory: true });
  const { images } = await small.generate({ ...request, seed: "5", clock: "1,0,1,0", guidanceScale: [2, 2, 2, 2] });
  closeTo(images.data, golden.images, 1);
});

test("an image is the same alone", async () => {
  const { images } = await pipe.generate({ ...request, numImages: 1, label: "square", firstImage: 1 });
  closeTo(images.data, golden.images.slice(192), 1);
});

test("generations side by side do not meet", async () => {
  const [one, other, third] = await Promise.all([
    pipe.generate(request),
    pipe.generate({ ...request, clock: 1, seed: 9n }),
    pipe.generate(request),
  ]);
  for (const { images } of [one, third]) closeTo(images.data, golden.images, 1);
  assert.deepEqual(other.mask, [1, 1, 1, 1]);
});

test("a stream tells its steps, then its result", async () => {
  const events = [];
  for await (const event of pipe.stream(request)) events.push(event);
  assert.deepEqual(
    events.map((event) => event.type),
    ["stage", "step", "step", "step", "step", "result"],
  );
  const steps = events.slice(1, 5),
    { result } = events[5];
  assert.deepEqual(
    steps.map(({ index, full, count }) => [index, full, count]),
    [
      [0, true, 4],
      [1, false, 4],
      [2, true, 4],
      [3, false, 4],
    ],
  );
  assert.deepEqual(steps[3].latents, result.latents.data);
  // The last step of dpmpp_2m ends at what it predicts.
  closeTo(steps[3].predicted, result.latents.data, 1e-5);
  assert.deepEqual((await pipe.preview(steps[3].latents)).data, result.images.data);
});

test("latents that are given take the place of the seed's", async () => {
  const { latents } = await pipe.generate({ ...request, numInferenceSteps: 1 });
  const given = { data: Float32Array.from({ length: 384 }, (_, k) => Math.sin(k)), dims: [2, 3, 8, 8] },
    copy = structuredClone(given);
  const made = await pipe.generate({ ...request, numInferenceSteps: 1, latents: given });
  assert.deepEqual(given, copy);
  assert.notDeepEqual(made.latents.data, latents.data);
  assert.deepEqual(
    (await pipe.generate({ ...request, numInferenceSteps: 1, latents: given, seed: 6 })).latents.data,
    made.latents.data,
  );
});

test("latents of one's own are what a seed would draw, for any sampler, and one may be for all images", async () => {
  for (const scheduler of [undefined, "euler_karras"]) {
    const asked = { ...request, scheduler, label: null },
      own = { data: noises(5n, 2, 192, 0, 0), dims: [2, 3, 8, 8] };
    const { latents } = await pipe.generate({ ...asked, numImages: null, latents: own });
    assert.deepEqual(latents, (await pipe.generate({ ...asked, numImages: 2, seed: 5n })).latents);
    const one = { data: own.data.slice(192), dims: [1, 3, 8, 8] };
    const both = await pipe.generate({ ...asked, label: "square", numImages: 2, latents: one });
    closeTo(both.latents.data.slice(192), both.latents.data.slice(0, 192), 1e-5);
  }
});

test("another sampler draws fresh noise, calls the model more often, and has its own clock", async () => {
  const heun = await pipe.generate({ ...request, scheduler: "heun" });
  assert.deepEqual(heun.mask, [1, 0, 1, 0, 1, 0, 1]);
  const { latents } = await pipe.generate({ ...request, scheduler: "dpmpp_2m" });
  assert.deepEqual(latents, (await pipe.generate(request)).latents);
  const ancestral = (seed) =>
    pipe.generate({ ...request, scheduler: "euler_ancestral", latents: rows(1, 3, 8, 8), seed });
  assert.notDeepEqual((await ancestral(1)).latents, (await ancestral(2)).latents);
  const image = { data: new Uint8Array(192), dims: [8, 8, 3] };
  assert.deepEqual((await pipe.generate({ ...request, scheduler: "heun", image, strength: 0.5 })).mask, [1, 0, 1]);
});

test("aborting ends a generation between steps, and the pipeline goes on", async () => {
  const controller = new AbortController();
  let count = 0;
  await assert.rejects(
    async () => {
      for await (const event of pipe.stream({ ...request, signal: controller.signal }))
        if (event.type === "step" && ++count === 2) controller.abort();
    },
    { name: "AbortError" },
  );
  assert.equal(count, 2);
  await assert.rejects(pipe.generate({ ...request, signal: AbortSignal.abort() }), { name: "AbortError" });
  for await (const event of pipe.stream(request)) if (event.type === "step") break;
  closeTo((await pipe.generate(request)).images.data, golden.images, 1);
});

for (const [bad, why] of [
  [{ seed: -1 }, /^seed is -1/],
  [{ seed: "x" }, /^seed/],
  [{ seed: 2n ** 64n }, /^seed/],
  [{ numInferenceSteps: 0 }, /^numInferenceSteps is 0/],
  [{ numInferenceSteps: "4" }, /^numInferenceSteps/],
  [{ numInferenceSteps: 1001 }, /1 to 1000/],
  [{ clock: 0 }, /^clock is 0/],
  [{ clock: "1,0" }, /^clock mask "1,0" has 2 entries for 4 steps/],
  [{ clock: [0, 1, 1, 1] }, /begins with 0/],
  [{ clock: {} }, /^clock/],
  [{ guidanceScale: -1 }, /^guidanceScale is -1/],
  [{ guidanceScale: NaN }, /^guidanceScale/],
  [{ guidanceScale: Infinity }, /^guidanceScale/],
  [{ guidanceScale: 1e39 }, /^guidanceScale/],
  [{ guidanceScale: "2" }, /^guidanceScale/],
  [{ guidanceScale: [2] }, /^guidanceScale has 1 entries for 4 steps/],
  [{ numImages: 0 }, /^numImages is 0/],
  [{ numImages: 4097 }, /^numImages/],
  [{ numImages: 1.5 }, /^numImages/],
  [{ label: "triangle" }, /^no label "triangle"; choices: round, square/],
  [{ label: 2 }, /^no label 2/],
  [{ label: -1 }, /^no label/],
  [{ label: ["round"] }, /^label has 1 entries for 2 images/],
  [{ label: true }, /^no label/],
  [{ prompt: "a dog" }, /^a prompt was given, but the model is conditioned on classes/],
  [{ promptEmbeds: { data: new Float32Array(1), dims: [1] } }, /^a prompt was given/],
  [{ height: 7 }, /^unet: it has no graphs for 8 x 7/],
  [{ width: 0 }, /^width is 0/],
  [{ height: "8" }, /^height/],
  [{ firstImage: -1 }, /^firstImage/],
  [{ latents: new Float32Array(3) }, /^latents are .*; expected \{data, dims\} of float32 \[N, 3, 8, 8\]$/],
  [
    { latents: rows(2, 4, 8, 8) },
    /^latents are Float32Array \[2, 4, 8, 8\]; expected \{data, dims\} of float32 \[N, 3, 8, 8\]$/,
  ],
  [{ latents: { data: new Float32Array(5), dims: [2, 3, 8, 8] } }, /^latents are Float32Array \[2, 3, 8, 8\]/],
  [{ latents: { data: new Float64Array(384), dims: [2, 3, 8, 8] } }, /^latents are Float64Array/],
  [{ latents: rows(2, 3, 4, 4) }, /^latents are \[2, 3, 4, 4\]; expected \[N, 3, 8, 8\] with 1 or 2 rows$/],
  [{ latents: rows(3, 3, 8, 8) }, /^latents are \[3, 3, 8, 8\]; expected \[N, 3, 8, 8\] with 1 or 2 rows$/],
  [
    { latents: { data: new Float32Array(384).fill(NaN), dims: [2, 3, 8, 8] } },
    /^latents hold NaN or infinity; expected finite numbers$/,
  ],
  [{ concatLatents: {} }, /^concatLatents/],
  [{ tile: 64 }, /^tile/],
  [{ outputType: "png" }, /^outputType/],
]) {
  test(`refused: ${Object.keys(bad)} ${String(Object.values(bad)[0])?.slice(0, 30)}`, async () => {
    await assert.rejects(pipe.generate({ ...request, ...bad }), refused(why));
  });
}

test("an argument that there is not is refused, and null is left out", async () => {
  await assert.rejects(
    pipe.generate({ ...request, steps: 4 }),
    refused(/^there is no argument "steps"; expected some of prompt, .*numInferenceSteps/),
  );
  const nothing = {
    prompt: null,
    clock: null,
    numInferenceSteps: null,
    height: null,
    tile: null,
    outputType: null,
    firstImage: null,
    signal: null,
    latents: null,
  };
  closeTo((await pipe.generate({ ...request, ...nothing })).images.data, golden.images, 1);
});

test("options that do not fit are refused", async () => {
  await assert.rejects(
    EdgePipeline.fromUrl(server.url, { backend: "cuda" }),
    refused(/^backend is "cuda"; expected wasm or webgpu/),
  );
  await assert.rejects(
    EdgePipeline.fromUrl(server.url, { backend: "webgpu" }),
    refused(/^backend webgpu: this browser has no adapter/),
  );
  await assert.rejects(EdgePipeline.fromUrl(server.url, { threads: 0 }), refused(/^threads is 0/));
  await assert.rejects(pipe.preview(new Float32Array(5)), refused(/^latents are 5 numbers/));
});

test("a bundle without ONNX graphs, and graphs that are none, are refused", async () => {
  const bundleError = (pattern) => (e) => e instanceof BundleError && pattern.test(e.message);
  const text = readGolden("manifests/text.json");
  await assert.rejects(
    changed((manifest) => Object.assign(manifest, text, { files: manifest.files })),
    bundleError(/no onnx target; it has: coreml/),
  );
  await assert.rejects(
    changed(() => {}, { "onnx/unet/full.onnx": Buffer.from("no graph") }),
    bundleError(/^onnx\/unet\/full.onnx cannot be loaded/),
  );
  const cached = readFileSync(new URL("bundle/onnx/unet/cached.onnx", GOLDEN));
  await assert.rejects(
    changed(() => {}, { "onnx/unet/full.onnx": cached }),
    bundleError(/^onnx\/unet\/full.onnx has the inputs .*; the manifest says sample/),
  );
});

test("what the adaptor was not trained for is told before the first step", async () => {
  const learned = await changed((manifest) => {
    const { num_inference_steps, scheduler, clock, mask, guidance_scale } = manifest.operating_point;
    const trained_for = { num_inference_steps, scheduler, clock, mask, guidance_scale };
    manifest.adaptor = { kind: "resnet", name: "small", path: null, sha256: "0".repeat(64), trained_for };
  });
  const warnings = async (asked) => (await learned.generate({ ...request, ...asked })).warnings;
  for (const fits of [{}, { clock: "1,0,1,0" }, { clock: 1, numInferenceSteps: 2, guidanceScale: 1 }])
    assert.deepEqual(await warnings(fits), []);
  const point = "adaptor small was trained for 4 steps of dpmpp_2m, clock 2, guidance 2; this is ";
  const image = { data: new Uint8Array(192), dims: [8, 8, 3] };
  // In editing the steps are those of the whole schedule, and the period begins where the loop does.
  for (const fits of [
    { image, strength: 0.75 },
    { image, strength: 0.5, clock: "1,0" },
  ])
    assert.deepEqual(await warnings(fits), []);
  for (const [asked, differs] of [
    [{ image, strength: 0.75, clock: "1,0,0" }, "clock 1,0,0"],
    [{ image, strength: 0.5, numInferenceSteps: 8 }, "8 steps"],
    [{ numInferenceSteps: 6 }, "6 steps"],
    [{ scheduler: "ddim" }, "ddim"],
    [{ scheduler: "heun", clock: 3 }, "heun, clock 3"],
    [{ clock: "1,0,0,0" }, "clock 1,0,0,0"],
    [{ clock: 3, guidanceScale: [2, 2, 1, 0.5] }, "clock 3, guidance 2, 1, 0.5"],
  ]) {
    assert.deepEqual(await warnings(asked), [`${point}${differs}: images may be worse`]);
  }
  const types = [];
  for await (const { type } of learned.stream({ ...request, clock: 4 })) types.push(type);
  assert.deepEqual(types, ["warning", "stage", "step", "step", "step", "step", "result"]);
  await learned.close();
});

test("with little memory nothing stays open, also when the caller leaves in the middle", async () => {
  const small = await EdgePipeline.fromUrl(server.url, { ...options, lowMemory: true }),
    { open } = OrtSession,
    { release } = OrtSession.prototype;
  const events = [];
  OrtSession.open = async (...args) => (events.push("open"), open(...args));
  OrtSession.prototype.release = function () {
    events.push("release");
    return release.call(this);
  };
  try {
    await small.generate(request);
    for await (const event of small.stream(request)) if (event.type === "step") break;
    await assert.rejects(async () => {
      for await (const event of small.stream(request)) if (event.type === "step") throw new Error("mine");
    }, /mine/);
  } finally {
    OrtSession.open = open;
    OrtSession.prototype.release = release;
  }
  assert.deepEqual(events, ["open", "release", "open", "release", "open", "release"]);
});

test("the loop's own time is small beside a graph's", async () => {
  await pipe.generate({ ...request, numImages: 64, label: "round" });
  const { ledger } = await pipe.generate({ ...request, numImages: 64, label: "round" });
  const sum = (pick) => ledger.reduce((total, { ms }) => total + pick(ms), 0);
  const graphs = sum((ms) => (ms.full ?? 0) + (ms.cached ?? 0)),
    own = sum((ms) => ms.guidance + ms.scheduler + ms.other);
  assert.ok(own < graphs, `${own} ms beside ${graphs} ms`);
});
