import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { begin, encode, feathered, fromVae, latentMask, pasted, readEdit } from "../src/editing.js";
import { stepsLeftOut } from "../src/schedulers.js";
import { BundleError, RequestError } from "../src/errors.js";
import { toUint8 } from "../src/images.js";
import { parseManifest } from "../src/manifest.js";
import { noises } from "../src/noise.js";
import { coveringBox, imagesOf, masksOf } from "../src/pictures.js";
import { EdgePipeline } from "../src/pipeline.js";
import { makeScheduler, readScheduler } from "../src/schedulers.js";
import { OrtSession } from "../src/sessions.js";
import { closeTo, GOLDEN, readGolden } from "./golden.js";
import { serve } from "./server.js";

// What the Python runtime makes of the same: tests/test_web_edits.py writes it.
const python = JSON.parse(readFileSync(new URL("edits.json", import.meta.url), "utf8"), (_, value) =>
  typeof value?.base64 === "string" ? Uint8Array.from(Buffer.from(value.base64, "base64")) : value,
);
const { images: BOTH, mask: MASK } = python.bundle;
const picture = (count = 1) => ({ data: BOTH.slice(0, 192 * count), dims: [count, 8, 8, 3] });
const mask = () => ({ data: MASK.slice(), dims: [8, 8] });
const black = () => ({ data: new Uint8Array(64), dims: [8, 8] });

let server, pipe;
before(async () => {
  server = await serve(new URL("bundle/", GOLDEN));
  pipe = await EdgePipeline.fromUrl(server.url, { backend: "wasm" });
});
after(async () => {
  await pipe.close();
  await server.close();
});

for (const { asked, pictures, index, mask: steps, images } of python.bundle.cases) {
  test(`an edit with the golden bundle: ${JSON.stringify(asked)}, ${pictures}`, async () => {
    const { steps: numInferenceSteps = 4, guidance: guidanceScale = 2, label = "square", ...more } = asked;
    const given = pictures.includes("images") ? picture(2) : picture(),
      maskImage = pictures.includes("mask") ? mask() : null;
    const request = { ...more, label, numInferenceSteps, guidanceScale, seed: 7, image: given, maskImage };
    const events = [];
    for await (const event of pipe.stream(request)) events.push(event);
    const { result } = events.at(-1),
      ran = events.filter(({ type }) => type === "step");
    assert.deepEqual(result.images.dims, [pictures.includes("images") ? 2 : 1, 8, 8, 3]);
    closeTo(result.images.data, images, 1);
    assert.deepEqual(result.mask, steps);
    assert.deepEqual(
      ran.map((step) => [step.index, step.done, step.count]),
      steps.map((_, k) => [index + k, k + 1, steps.length]),
    );
    if (more.paste)
      result.images.data.forEach((value, k) => {
        if (!MASK[Math.floor(k / 3) % 64]) assert.equal(value, given.data[k % given.data.length]);
      });
  });
}

test("pictures of a canvas give what their bytes give", async () => {
  const canvas = (n) => {
    const data = new Uint8ClampedArray(256).fill(255);
    for (let k = 0; k < 64; k++) data.set(BOTH.subarray(192 * n + 3 * k, 192 * n + 3 * k + 3), 4 * k);
    return { data, width: 8, height: 8 };
  };
  const covered = { data: new Uint8ClampedArray(256), width: 8, height: 8 };
  MASK.forEach((value, k) => covered.data.set([value, value, value, 255], 4 * k));
  const asked = { seed: 7, label: "square", paste: true };
  const want = await pipe.generate({ ...asked, image: picture(2), maskImage: mask() });
  assert.deepEqual(want.images.dims, [2, 8, 8, 3]);
  const got = await pipe.generate({ ...asked, image: [canvas(0), canvas(1)], maskImage: covered });
  assert.deepEqual(got.images, want.images);
});

test("every byte of a picture comes back", () => {
  const data = Uint8Array.from({ length: 768 }, (_, k) => Math.floor(k / 3)),
    edit = { image: { data, dims: [1, 16, 16, 3] }, mask: { data: new Uint8Array(256), dims: [1, 16, 16] } };
  const { data: pixels, dims } = pasted(
    { ...edit, paste: true, feather: 0 },
    { data: new Float32Array(768).fill(NaN), dims: [1, 3, 16, 16] },
  );
  assert.deepEqual(toUint8({ data: pixels, dims }).data, data);
});

test("feathered masks", () => {
  const { shape, masks, alpha } = python.feather;
  for (const [pixels, want] of Object.entries(alpha))
    closeTo(feathered({ data: masks, dims: shape }, Number(pixels)), want, 1e-6);
  const everywhere = feathered({ data: new Uint8Array(12).fill(1), dims: [1, 3, 4] }, 256);
  assert.ok(everywhere.every((share) => share === 1)); // the picture's edge is none
});

test("a feather is as wide as it says, in rows and columns alike", () => {
  const data = new Uint8Array(15 * 15).fill(1);
  data[7 * 15 + 7] = 0;
  const alpha = feathered({ data, dims: [1, 15, 15] }, 4);
  for (let y = 0; y < 15; y++)
    for (let x = 0; x < 15; x++)
      closeTo([alpha[15 * y + x]], [Math.min(5, Math.max(Math.abs(y - 7), Math.abs(x - 7))) / 5], 1e-6);
});

const DEPTH = { channels: 4, in_channels: 5, concat: ["depth"] };

test("depth at the latent's size", () => {
  const { map, size, scaled } = python.depth,
    depthMap = { data: Float32Array.from(map.flat()), dims: [5, 7] };
  const { depth } = readEdit(DEPTH, size, 8, { depthMap });
  assert.deepEqual(depth.dims, [1, 1, 4, 6]);
  closeTo(depth.data, scaled, 1e-5);
  closeTo([Math.min(...depth.data), Math.max(...depth.data)], [-1, 1], 0);
});

test("what is transparent, and grey, as in Python", () => {
  const { data, width, height, image, mask: covered } = python.rgba;
  assert.deepEqual(imagesOf({ data, width, height }, height, width).data, image);
  assert.deepEqual(masksOf({ data, width, height }, height, width).data, covered);
  const line = { data: Uint8Array.of(1, 2), dims: [1, 2] };
  assert.deepEqual(imagesOf(line, 1, 2), { data: Uint8Array.of(1, 1, 1, 2, 2, 2), dims: [1, 1, 2, 3] });
});

test("latents of a picture are moved and scaled as the decoder's are moved back", () => {
  const { given, shape, cases } = python.latents;
  for (const { vae, scaled } of cases)
    closeTo(fromVae(vae, { data: Float32Array.from(given), dims: shape }).data, scaled, 1e-5);
});

test("a mask at the latent's size is each square's upper left pixel", () => {
  const data = Uint8Array.of(1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1);
  assert.deepEqual(latentMask({ data, dims: [1, 4, 4] }, 2), { data: Float32Array.of(1, 0, 0, 1), dims: [1, 1, 2, 2] });
});

test("how many steps a strength leaves", () => {
  for (const [strength, steps, out] of [
    [0.6, 8, 4],
    [1, 8, 0],
    [0.8, 4, 1],
    [0.29, 100, 72],
    [1, 1, 0],
  ])
    assert.equal(stepsLeftOut(strength, steps), out);
});

test("a picture that is scaled covers the size, its middle is kept", () => {
  assert.deepEqual(coveringBox(200, 100, 50, 50), { left: 50, top: 0, width: 100, height: 100 });
  assert.deepEqual(coveringBox(64, 128, 32, 16), { left: 0, top: 48, width: 64, height: 32 });
  assert.deepEqual(coveringBox(8, 8, 64, 64), { left: 0, top: 0, width: 8, height: 8 });
});

const refused = (pattern) => (e) => {
  assert.ok(e instanceof RequestError, e.stack);
  assert.match(e.message, pattern);
  assert.ok(!e.message.includes("\n") && e.message.includes(";"), e.message);
  return true;
};

// --- What the loop is given

const VAE = { scaling_factor: 0.5, downscale: 2, mean: null, std: null };
const scheduler = makeScheduler(readScheduler({ name: "ddim" }), 4);
const noise = { data: Float32Array.from({ length: 8 }, (_, k) => Math.sin(k)), dims: [2, 1, 2, 2] };
const small = { data: Uint8Array.from({ length: 48 }, (_, k) => 5 * k), dims: [1, 4, 4, 3] };
const corner = { data: Uint8Array.from({ length: 16 }, (_, k) => (k < 2 ? 255 : 0)), dims: [4, 4] };

/** Runs `begin`, with an encoder that gives each batch's number as every mean. */
async function begun(concat, request, { channels = 1 } = {}) {
  const sample = { channels, in_channels: 9, concat },
    batches = [];
  const edit = readEdit(sample, [2, 2], 2, request);
  const made = await begin(edit, VAE, scheduler, 1, noise, async (given) => {
    batches.push(...given);
    return given.map((each, k) => ({
      data: new Float32Array(each.dims[0] * channels * 4).fill(k + 1),
      dims: [each.dims[0], channels, 2, 2],
    }));
  });
  return { ...made, batches };
}

test("without a mask the picture shows through the noise", async () => {
  const { latents, concat, kept, batches } = await begun([], { image: small });
  assert.deepEqual([concat, kept, batches.length], [null, null, 1]);
  assert.deepEqual(latents.data, scheduler.addNoise(1, new Float32Array(8).fill(0.5), noise.data));
  closeTo(batches[0].data.slice(0, 2), [-1, 15 / 127.5 - 1], 1e-6);
});

test("a mask keeps what is around it; with a strength of 1 the loop begins with noise", async () => {
  for (const [strength, from] of [
    [0.5, scheduler.addNoise(1, new Float32Array(8).fill(0.5), noise.data)],
    [undefined, noise.data],
  ]) {
    const { latents, kept } = await begun([], { image: small, maskImage: corner, strength });
    assert.deepEqual(latents.data, from);
    assert.deepEqual(kept.mask, Float32Array.of(1, 0, 0, 0, 1, 0, 0, 0));
    assert.deepEqual(kept.latents, new Float32Array(8).fill(0.5));
    assert.equal(kept.noise, noise.data);
  }
});

test("a UNet that takes the mask sees it with the masked picture, and nothing is kept", async () => {
  const takes = ["mask", "masked_image"];
  const { latents, concat, kept, batches } = await begun(takes, { image: small, maskImage: corner });
  assert.deepEqual([latents.data, kept, batches.length], [noise.data, null, 1]);
  assert.deepEqual(concat.dims, [2, 2, 2, 2]);
  assert.deepEqual(concat.data.slice(0, 8), Float32Array.of(1, 0, 0, 0, 0.5, 0.5, 0.5, 0.5));
  assert.deepEqual([...batches[0].data.slice(0, 3)], [0, 0, Math.fround(Math.fround(30 / 127.5) - 1)]);
  assert.equal((await begun(takes, { image: small, maskImage: corner, strength: 0.9 })).batches.length, 2);
});

test("a UNet that follows instructions sees the encoder's mean as it is, and begins with noise", async () => {
  const { latents, concat, kept } = await begun(["image"], { image: small });
  assert.deepEqual([latents.data, kept], [noise.data, null]);
  assert.deepEqual(concat, { data: new Float32Array(8).fill(1), dims: [2, 1, 2, 2] });
});

test("a UNet of depth sees it, with a picture to begin with or without", async () => {
  const depthMap = { data: Float32Array.of(0, 1, 2, 3), dims: [2, 2] };
  const alone = await begun(["depth"], { depthMap }),
    both = await begun(["depth"], { depthMap, image: small });
  closeTo(alone.concat.data.slice(0, 4), [-1, -1 / 3, 1 / 3, 1], 1e-6);
  assert.deepEqual(alone.concat, both.concat);
  assert.deepEqual([alone.latents.data, alone.batches.length, both.batches.length], [noise.data, 0, 1]);
});

test("channels that the caller gives take the place of the pictures'", async () => {
  const concatLatents = { data: new Float32Array(4), dims: [1, 1, 2, 2] };
  const { concat, kept } = await begun(["mask", "masked_image"], { image: small, maskImage: corner, concatLatents });
  assert.equal(concat, null);
  assert.ok(kept);
});

test("an encoder that gives latents of another size is the bundle's fault", async () => {
  await assert.rejects(begun([], { image: small }, { channels: 3 }), BundleError);
});

test("of what the encoder gives the mean is taken, a picture at a time", async () => {
  const session = {
    batch: null,
    put: (rows) => rows,
    get: async (value) => value,
    drop() {},
    async run(graph, table) {
      const { data, dims } = table.get("sample");
      assert.equal(dims[0], 1);
      return { [graph.outputs[0].name]: { data: Float32Array.of(data[0], 2, 3, 4), dims: [1, 4, 1, 1] } };
    },
  };
  const pixels = { data: Float32Array.of(7, 0, 0, 8, 0, 0), dims: [2, 3, 1, 1] };
  const graph = (name) => ({ name: "vae_encoder", inputs: [{ name: "sample" }], outputs: [{ name }] });
  const half = await encode(session, graph("latent_parameters"), pixels);
  assert.deepEqual(half, { data: Float32Array.of(7, 2, 8, 2), dims: [2, 2, 1, 1] });
  assert.deepEqual((await encode(session, graph("latent_sample"), pixels)).dims, [2, 4, 1, 1]);
  await assert.rejects(encode(session, graph("latent_sample"), pixels, AbortSignal.abort()), { name: "AbortError" });
});

// --- A pipeline of latents, whose graphs give zeros

/** Opens the golden pipeline's manifest with a UNet that takes something beside the latent; `events` has what was opened, run and released. */
async function fake(job, { concat = [], inChannels = 4, lowMemory = true, change = () => {}, of = "pipeline" } = {}) {
  const document = readGolden(`manifests/${of}.json`),
    { components } = document.targets[0];
  if (of === "pipeline") Object.assign(document.sample, { concat, in_channels: inChannels });
  for (const graph of components.unet.graphs)
    if (of === "pipeline") graph.inputs.find(({ name }) => name === "sample").shape[1] = inChannels;
  change(document);
  const manifest = parseManifest(new TextEncoder().encode(JSON.stringify(document)));
  const { open } = OrtSession,
    events = [];
  OrtSession.open = async (_, component) => {
    const [{ name: first }] = component.graphs,
      name = component.stage === "step" ? "unet" : first;
    events.push(`open ${name}`);
    return {
      batch: null,
      put: (rows) => rows,
      get: async (value) => value,
      drop() {},
      async run(graph, table) {
        const { dims } = table.get(graph.inputs[0].name);
        events.push(`${graph.name} ${dims}`);
        return Object.fromEntries(
          graph.outputs.map(({ name, shape }) => {
            const made = [dims[0], ...shape.slice(1).map((side) => (typeof side === "number" ? side : 4))];
            return [name, { data: new Float32Array(made.reduce((a, b) => a * b)), dims: made }];
          }),
        );
      },
      release: async () => void events.push(`release ${name}`),
    };
  };
  try {
    await job(new EdgePipeline({ manifest, warnings: [] }, "wasm", { lowMemory }), events);
  } finally {
    OrtSession.open = open;
  }
}

/** Makes a model of pixels one of grey pictures. */
function grey({ sample, targets: [{ components }] }) {
  Object.assign(sample, { channels: 1, in_channels: 1 });
  for (const { inputs, outputs } of components.unet.graphs)
    for (const { name, shape } of [...inputs, ...outputs]) if (/sample/.test(name)) shape[1] = 1;
}

const rows = (...dims) => ({ data: new Float32Array(dims.reduce((a, b) => a * b)), dims });
const told = {
  promptEmbeds: rows(1, 77, 64),
  negativePromptEmbeds: rows(1, 77, 64),
  addedCond: { text_embeds: rows(1, 32) },
  negativeAddedCond: { text_embeds: rows(1, 32) },
  height: 8,
  width: 8,
  clock: 1,
};

test("with little memory what encodes a picture is opened before the loop, and dropped", async () => {
  await fake(async (pipe, events) => {
    const stages = [];
    for await (const event of pipe.stream({
      ...told,
      image: picture(2),
      strength: 0.5,
      guidanceScale: 1,
      numImages: 2,
    }))
      if (event.type === "stage") stages.push(event.stage);
      else if (event.type === "result") assert.ok(event.result.stages.vae_encoder >= 0);
    assert.deepEqual(stages, ["image", "step", "decode"]);
    const encoder = ["open vae_encoder", "vae_encoder 1,3,8,8", "vae_encoder 1,3,8,8", "release vae_encoder"];
    const unet = ["open unet", "full 2,4,4,4", "full 2,4,4,4", "release unet"];
    const decoder = ["open vae_decoder", "vae_decoder 1,4,4,4", "vae_decoder 1,4,4,4", "release vae_decoder"];
    assert.deepEqual(events, [...encoder, ...unet, ...decoder]);
    const controller = new AbortController();
    events.length = 0;
    await assert.rejects(
      async () => {
        for await (const { stage } of pipe.stream({ ...told, image: picture(), signal: controller.signal }))
          if (stage === "image") controller.abort();
      },
      { name: "AbortError" },
    );
    assert.deepEqual(events, []);
  });
});

test("an inversion encodes its pictures, then runs the loop; a model that is told its guidance has one row", async () => {
  const inverted = async (pipe, events, more) => {
    events.length = 0;
    const { latents, stages, mask } = await pipe.invert(picture(2), { ...told, numInferenceSteps: 2, ...more });
    assert.deepEqual([latents.dims, Object.keys(stages), mask], [[2, 4, 4, 4], ["vae_encoder"], [1, 0]]);
    return events.filter((event) => !event.startsWith("vae_encoder"));
  };
  const ran = (rows) => [
    "open vae_encoder",
    "release vae_encoder",
    "open unet",
    `full ${rows},4,4,4`,
    `cached ${rows},4,4,4`,
    "release unet",
  ];
  await fake(async (pipe, events) => {
    assert.deepEqual(await inverted(pipe, events, { clock: 2 }), ran(2));
    assert.deepEqual(await inverted(pipe, events, { clock: 2, guidanceScale: 3 }), ran(4));
  });
  const isTold = ({ conditioning, targets: [{ components }] }) => {
    const tensor = { name: "timestep_cond", dtype: "float32", shape: ["batch", 8] };
    conditioning.tensors.push(tensor);
    for (const { inputs } of components.unet.graphs) inputs.push(tensor);
  };
  await fake(
    async (pipe, events) => {
      assert.deepEqual(await inverted(pipe, events, { clock: 2, guidanceScale: 3 }), ran(2));
      await assert.rejects(
        pipe.invert(picture(), { ...told, numInferenceSteps: 2, guidanceScale: [3, 2] }),
        refused(/^guidanceScale differs between steps, but the model is told one; give one number$/),
      );
    },
    { change: isTold },
  );
  await fake(
    async (pipe) =>
      assert.rejects(
        pipe.invert(picture(), told),
        refused(/^image was given, but the bundle has no vae_encoder for this backend; export it with that component$/),
      ),
    { change: (document) => delete document.targets[0].components.vae_encoder },
  );
});

test("with guidance by an image there are three rows, and their cost is counted", async () => {
  await fake(
    async (pipe, events) => {
      const { ledger, macs } = await pipe.generate({ ...told, image: picture(), guidanceScale: [2, 2, 1, 1] });
      assert.deepEqual(
        events.filter((event) => event.startsWith("full")),
        ["full 3,8,4,4", "full 3,8,4,4", "full 1,8,4,4", "full 1,8,4,4"],
      );
      assert.deepEqual(
        ledger.map(({ rows: of }) => of),
        [3, 3, 1, 1],
      );
      const { macs: one, macs_attention: more } = pipe.manifest.cost.full;
      assert.equal(macs.uncached, 8 * (one + more));
      await assert.rejects(
        pipe.generate(told),
        refused(/^the bundle's UNet takes image beside the latent; give image$/),
      );
    },
    { concat: ["image"], inChannels: 8 },
  );
});

test("as many images as pictures or latents are given, also beside embeddings and lists", async () => {
  await fake(async (pipe) => {
    for (const [more, count] of [
      [{ image: picture(2) }, 2],
      [{ latents: rows(3, 4, 4, 4) }, 3],
      [{ latents: rows(1, 4, 4, 4), promptEmbeds: rows(2, 77, 64) }, 2],
      [{ image: picture(2), numImages: 2, guidanceScale: 1 }, 2],
    ])
      assert.equal((await pipe.generate({ ...told, numInferenceSteps: 2, ...more })).latents.dims[0], count);
    await assert.rejects(
      pipe.generate({ ...told, image: picture(2), promptEmbeds: rows(3, 77, 64) }),
      refused(/^encoder_hidden_states has shape \[3,77,64\]; expected .* with 1 or 2 rows$/),
    );
  });
  const labels = ["square", "round"];
  assert.equal((await pipe.generate({ latents: rows(1, 3, 8, 8), label: labels })).images.dims[0], 2);
  assert.equal((await pipe.generate({ image: picture(2), label: labels })).images.dims[0], 2);
});

test("where an edit begins with noise it may be given", async () => {
  const asked = { label: "square", numInferenceSteps: 4, seed: 5, image: picture(), maskImage: mask() },
    own = { data: noises(5n, 1, 192, 0, 0), dims: [1, 3, 8, 8] },
    twice = { ...own, data: own.data.map((value) => 2 * value) };
  const want = (await pipe.generate(asked)).latents;
  assert.deepEqual((await pipe.generate({ ...asked, latents: own })).latents, want);
  assert.notDeepEqual((await pipe.generate({ ...asked, latents: twice })).latents, want);
  await fake(
    async (instructed) => {
      const { latents } = await instructed.generate({ ...told, image: picture(), latents: rows(2, 4, 4, 4) });
      assert.deepEqual(latents.dims, [2, 4, 4, 4]);
    },
    { concat: ["image"], inChannels: 8 },
  );
});

test("a paste is refused where nothing decodes the latents", async () => {
  await fake(
    async (pipe) =>
      assert.rejects(
        pipe.generate({ ...told, image: picture(), maskImage: mask(), paste: true }),
        refused(/^paste was given, but there will be latents and no picture; leave it out$/),
      ),
    { change: (document) => delete document.targets[0].components.vae_decoder },
  );
});

test("what stands beside the latent is given to an inversion", async () => {
  await fake(
    async (pipe) => {
      const asked = { ...told, numInferenceSteps: 2 };
      await assert.rejects(
        pipe.invert(picture(), asked),
        refused(
          /^the bundle's UNet takes image beside the latent, which an inversion does not make; give concatLatents$/,
        ),
      );
      assert.equal((await pipe.invert(picture(), { ...asked, concatLatents: rows(1, 4, 4, 4) })).mask.length, 2);
    },
    { concat: ["image"], inChannels: 8 },
  );
});

test("a picture that nothing encodes is refused", async () => {
  const without = (document) => delete document.targets[0].components.vae_encoder;
  await fake(
    async (pipe) => {
      assert.equal(pipe.canEdit, false);
      await assert.rejects(
        pipe.generate({ ...told, image: picture() }),
        refused(/^image was given, but the bundle has no vae_encoder for this backend; export it with that component$/),
      );
    },
    { change: without },
  );
  await fake(
    async (pipe) => {
      assert.equal(pipe.canEdit, false);
      await assert.rejects(
        pipe.generate({ image: { data: new Uint8Array(192), dims: [8, 8, 3] } }),
        refused(/^image was given, but the model's pictures have 1 channels; supported: 3$/),
      );
    },
    { of: "class", change: grey },
  );
  await fake(async (pipe) => assert.equal(pipe.canEdit, true));
  assert.equal(pipe.canEdit, true);
});

// --- Refusals

for (const [bad, why] of [
  [{ strength: 0.5 }, /^strength was given without an image; give image too$/],
  [{ maskImage: mask() }, /^maskImage was given without an image; give image too$/],
  [{ paste: true }, /^paste was given without a mask; give maskImage too$/],
  [{ feather: 2 }, /^feather was given without a mask; give maskImage too$/],
  [
    { image: picture(), maskImage: mask(), feather: 2 },
    /^feather was given, but nothing is pasted; give paste: true too$/,
  ],
  [
    { image: picture(), maskImage: mask(), paste: true, feather: 257 },
    /^feather is 257; expected a whole number from 0 to 256, in pixels$/,
  ],
  [{ image: picture(), maskImage: mask(), paste: true, feather: 1.5 }, /^feather is 1.5/],
  [{ image: picture(), maskImage: mask(), paste: true, feather: "2" }, /^feather is "2"/],
  [{ image: picture(), maskImage: mask(), paste: "yes" }, /^paste is "yes"; expected true or false$/],
  [{ paste: "yes" }, /^paste is "yes"; expected true or false$/], // what it is comes before what it needs
  [
    { image: picture(), maskImage: mask(), paste: true, outputType: "latent" },
    /^paste was given, but there will be latents and no picture; leave it out$/,
  ],
  [
    { image: picture(), strength: 0.5, numInferenceSteps: 1 },
    /^strength is 0.5: of 1 step it leaves none; expected 1 or more, or more steps$/,
  ],
  [{ image: picture(), strength: 1.1 }, /^strength is 1.1; expected 0 \(nothing changes\) to 1$/],
  [{ image: picture(), strength: NaN }, /^strength is/],
  [{ image: picture(), strength: "0.5" }, /^strength is "0.5"/],
  [
    { image: picture(), strength: 0.2 },
    /^strength is 0.2: of 4 steps it leaves none; expected 0.25 or more, or more steps$/,
  ],
  [
    { image: picture(), strength: 0.5, clock: "1,0,1,0" },
    /^clock mask "1,0,1,0" has 4 entries for the last 2 of 4 steps, which the strength leaves; expected one each$/,
  ],
  [
    { image: picture(), strength: 0.5, guidanceScale: [2, 2, 2] },
    /^guidanceScale has 3 entries for the last 2 of 4 steps, which the strength leaves; expected one each$/,
  ],
  [
    { image: { data: new Uint8Array(48), dims: [4, 4, 3] } },
    /^image has 4 x 4 pixels \(width x height\); expected ImageData of 8 x 8, or \{data, dims\} of uint8 \[N, 8, 8, 3\]$/,
  ],
  [{ image: { data: new Uint8ClampedArray(64), width: 4, height: 4 } }, /^image has 4 x 4 pixels/],
  [{ image: { data: new Uint8Array(256), dims: [1, 8, 8, 4] } }, /^image is Uint8Array \[1,8,8,4\]; expected/],
  [{ image: { data: new Float32Array(192), dims: [8, 8, 3] } }, /^image is Float32Array \[8,8,3\]; expected/],
  [{ image: { data: new Uint8Array(5), dims: [8, 8, 3] } }, /^image is Uint8Array \[8,8,3\]/],
  [{ image: [] }, /^image is Array; expected/],
  [{ image: "apple.png" }, /^image is "apple.png"; expected/],
  [
    { image: picture(), maskImage: { data: new Uint8Array(16), dims: [4, 4] } },
    /^maskImage has 4 x 4 pixels \(width x height\); expected ImageData of 8 x 8, or \{data, dims\} of uint8 \[N, 8, 8\]$/,
  ],
  [{ image: picture(), maskImage: { data: new Uint8Array(192), dims: [8, 8, 3] } }, /^maskImage has 3 x 8 pixels/],
  [{ image: picture(), maskImage: { data: new Float32Array(64), dims: [8, 8] } }, /^maskImage is Float32Array \[8,8\]/],
  [
    { image: picture(), maskImage: black() },
    /^maskImage covers nothing; expected white where the picture is to be drawn anew$/,
  ],
  [{ image: picture(2), numImages: 3 }, /^image has 2 pictures for 3 images; expected 1 or 3$/],
  [
    { image: picture(), numImages: 3, maskImage: { data: new Uint8Array(128).fill(255), dims: [2, 8, 8] } },
    /^maskImage has 2 pictures for 3 images; expected 1 or 3$/,
  ],
  [
    { depthMap: { data: new Float32Array(4), dims: [2, 2] } },
    /^depthMap was given, but the bundle's UNet takes no depth; leave it out$/,
  ],
  [
    { image: picture(), imageGuidanceScale: 1.5 },
    /^imageGuidanceScale was given, but the bundle's UNet is not guided by an image; leave it out$/,
  ],
  [
    { image: picture(), latents: rows(1, 3, 8, 8) },
    /^latents and an image were given, and a generation begins with one of them; give one$/,
  ],
  [
    { image: picture(), maskImage: mask(), strength: 0.9, latents: rows(1, 3, 8, 8) },
    /^latents and an image were given, and a generation begins with one of them; give one$/,
  ],
  [
    { image: picture(2), label: ["square", "round", "square"] },
    /^label has 3 entries for 2 images; expected one each$/,
  ],
  [
    { latents: rows(3, 3, 8, 8), image: picture(2), maskImage: mask() },
    /^image has 2 pictures for 3 images; expected 1 or 3$/,
  ],
]) {
  const told = Object.entries(bad).map(([name, value]) => `${name} ${String(value?.dims ?? value).slice(0, 20)}`);
  test(`refused: ${told.join(", ")}`, async () => {
    await assert.rejects(pipe.generate({ numInferenceSteps: 4, ...bad }), refused(why));
  });
}

for (const [concat, request, why] of [
  [["image"], {}, /^the bundle's UNet takes image beside the latent; give image$/],
  [["mask", "masked_image"], {}, /^the bundle's UNet takes mask and masked image beside the latent; give image$/],
  [
    ["mask", "masked_image"],
    { image: small },
    /^the bundle's UNet takes mask and masked image beside the latent; give maskImage$/,
  ],
  [["depth"], { image: small }, /^the bundle's UNet takes depth beside the latent; give depthMap$/],
  [
    ["image"],
    { image: small, maskImage: corner },
    /^maskImage was given, but the bundle's UNet follows instructions for the whole picture;/,
  ],
  [
    ["image"],
    { image: small, strength: 0.5 },
    /^strength was given, but the bundle's UNet sees the image in every step and begins from noise; give imageGuidanceScale$/,
  ],
  [["image"], { image: small, imageGuidanceScale: -1 }, /^imageGuidanceScale is -1; expected a finite number from 0$/],
  [["image"], { image: small, imageGuidanceScale: Infinity }, /^imageGuidanceScale is/],
  [["image"], { image: small, imageGuidanceScale: 1e300 }, /^imageGuidanceScale is 1e\+300; expected a finite/],
  [["image"], { image: small, imageGuidanceScale: "2" }, /^imageGuidanceScale is "2"/],
  [
    ["depth"],
    { depthMap: { data: Float32Array.of(1, NaN), dims: [1, 2] } },
    /^depthMap holds NaN or infinity; expected finite numbers$/,
  ],
  [
    ["depth"],
    { depthMap: { data: new Float32Array(4).fill(3), dims: [2, 2] } },
    /^depthMap is the same everywhere; expected larger numbers where something is nearer$/,
  ],
  [
    ["depth"],
    { depthMap: { data: Float32Array.of(0, 1, 2, 5, 5, 5), dims: [2, 1, 3] } },
    /^depthMap is the same everywhere; expected larger numbers where something is nearer$/,
  ],
  [
    ["depth"],
    { depthMap: { data: Float32Array.from({ length: 64 }, (_, k) => k % 4), dims: [8, 8] } },
    /^depthMap is the same everywhere at the latent's size; expected a coarser one$/,
  ],
  [["depth"], { depthMap: { data: new Float32Array(4), dims: [4] } }, /^depthMap is Float32Array \[4\]; expected/],
  [["depth"], { depthMap: 5 }, /^depthMap is 5; expected/],
  [
    [],
    { image: small, maskImage: { data: Uint8Array.from({ length: 16 }, (_, k) => (k === 5 ? 255 : 0)), dims: [4, 4] } },
    /^maskImage is too thin: no pixel of it is left at the latent's size; expected 2 pixels or more$/,
  ],
]) {
  test(`refused by a UNet of [${concat}]: ${String(why).slice(2, 70)}`, () => {
    assert.throws(() => readEdit({ channels: 1, in_channels: 9, concat }, [2, 2], 2, request), refused(why));
  });
}
