import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { RequestError } from "../src/errors.js";
import { steer } from "../src/steering.js";
import { changed } from "./changed_bundle.js";
import { closeTo } from "./golden.js";

// What the Python runtime makes of the same: tests/test_web_edits.py writes it.
const answers = JSON.parse(readFileSync(new URL("edits.json", import.meta.url), "utf8"), (_, value) =>
    typeof value?.base64 === "string" ? Uint8Array.from(Buffer.from(value.base64, "base64")) : value,
  ),
  python = answers.steered;
const picture = (data, count = 1) => ({ data: data.slice(0, 192 * count), dims: [count, 8, 8, 3] });
const PICTURES = {
  image: picture(python.image),
  control_image: picture(python.controls),
  control_images: picture(python.controls, 2),
};
const asked = { label: "square", numInferenceSteps: 4, guidanceScale: 2, clock: 2, seed: 7 };
/** Arguments in this runtime's words. */
const camel = (words) =>
  Object.fromEntries(
    Object.entries(words).map(([name, value]) => [name.replace(/_(.)/g, (_, letter) => letter.toUpperCase()), value]),
  );

let pipe;
before(async () => {
  pipe = await changed((manifest) => {
    manifest.targets[0].components.unet.graphs = python.graphs;
    manifest.cost.controlnet = python.cost;
    manifest.conditioning.tensors.push(...python.graphs[0].inputs.slice(1));
  }, python.files);
});
after(() => pipe.close());

const refused = (pattern) => (e) => {
  assert.ok(e instanceof RequestError, e.stack);
  assert.match(e.message, pattern);
  assert.ok(!e.message.includes("\n"), e.message);
  return true;
};

for (const { asked: more, pictures, mask, images } of python.cases) {
  test(`a picture as Python draws it: ${JSON.stringify(more)}, [${pictures}]`, async () => {
    const beside = Object.fromEntries(pictures.map((name) => [name.replace(/s$/, ""), PICTURES[name]])),
      request = { ...asked, ...camel(more), ...camel(beside) };
    const result = await pipe.generate(request);
    closeTo(result.images.data, images, 1);
    assert.deepEqual(result.mask, mask);
    const steers = pictures.some((name) => name.startsWith("control"));
    for (const { full, ms } of result.ledger) assert.equal("controlnet" in ms, steers && full);
    // Where it does not run, it saves nothing either.
    const { full, controlnet } = pipe.manifest.cost,
      rows = result.ledger.reduce((sum, step) => sum + (request.numImages ?? 1) * step.rows, 0),
      each = full.macs + full.macs_attention - (steers ? 0 : controlnet.macs);
    assert.equal(result.macs.uncached, rows * each);
  });
}

test("a ControlNet's picture and its scale matter, and a scale of 0 leaves it out", async () => {
  const { controlImage } = camel({ control_image: PICTURES.control_image });
  const { latents } = await pipe.generate({ ...asked, controlImage });
  for (const other of [
    { controlImage: picture(python.controls.slice(192)) },
    { controlImage, controlnetConditioningScale: 0.5 },
  ])
    assert.notDeepEqual((await pipe.generate({ ...asked, ...other })).latents, latents);
  const none = await pipe.generate({ ...asked, controlImage, controlnetConditioningScale: 0 });
  closeTo(none.latents.data, (await pipe.generate(asked)).latents.data, 1e-5);
});

test("as many images as control images are given", async () => {
  const { label, ...each } = asked;
  for (const more of [{ label }, {}]) {
    const several = await pipe.generate({ ...each, ...more, controlImage: PICTURES.control_images });
    assert.equal(several.latents.dims[0], 2);
  }
  await assert.rejects(
    pipe.generate({ ...asked, label: ["square", "round", "square"], controlImage: PICTURES.control_images }),
    refused(/^label has 3 entries for 2 images; expected one each$/),
  );
});

test("guidance may end on a cached step", async () => {
  const controlImage = PICTURES.control_image;
  const { mask, ledger } = await pipe.generate({ ...asked, controlImage, guidanceScale: [2, 1, 1, 1] });
  assert.deepEqual(mask, [1, 0, 1, 0]);
  assert.deepEqual(
    ledger.map(({ rows }) => rows),
    [2, 1, 1, 1],
  );
});

test("residuals of a graph in fp16 are zeros of that dtype", () => {
  const tensor = (name, dtype, ...shape) => ({ name, dtype, shape: ["batch", ...shape], stored_as: null });
  const net = { name: "controlnet", inputs: [], outputs: [tensor("control_0", "float16", 4, 2, 2)] },
    full = { name: "full", inputs: [], outputs: [] };
  const { graphs, count, tensors } = steer([net, full], undefined, undefined);
  assert.deepEqual([graphs, count], [[full], 1]);
  assert.deepEqual(tensors(3), { control_0: { data: new Uint16Array(48), dims: [3, 4, 2, 2] } });
});

for (const [bad, why] of [
  [{ controlnetConditioningScale: 0.5 }, /^controlnetConditioningScale was given without a controlImage; give one$/],
  ...[-1, NaN, Infinity, 1e300, "1"].map((scale) => [
    { controlImage: PICTURES.control_image, controlnetConditioningScale: scale },
    /^controlnetConditioningScale is (-1|null|1e\+300|"1"); expected a finite number from 0$/,
  ]),
  [
    { controlImage: { data: new Uint8Array(48), dims: [4, 4, 3] } },
    /^controlImage has 4 x 4 pixels \(width x height\); expected ImageData of 8 x 8/,
  ],
  [{ controlImage: "edges.png" }, /^controlImage is "edges.png"; expected ImageData of 8 x 8/],
  [
    { controlImage: PICTURES.control_images, numImages: 3 },
    /^controlImage has 2 pictures for 3 images; expected 1 or 3$/,
  ],
]) {
  test(`refused: ${Object.keys(bad)} ${String(why).slice(2, 60)}`, async () => {
    await assert.rejects(pipe.generate({ ...asked, ...bad }), refused(why));
  });
}

test("without a ControlNet its arguments are refused", async () => {
  const golden = await changed(() => {});
  assert.deepEqual([pipe.canControl, golden.canControl], [true, false]);
  await assert.rejects(
    golden.generate({ ...asked, controlImage: PICTURES.control_image }),
    refused(/^controlImage was given, but the bundle has neither a ControlNet nor a T2I-Adapter; leave it out, or export with/),
  );
  await assert.rejects(
    golden.generate({ ...asked, controlnetConditioningScale: 1 }),
    refused(/^controlnetConditioningScale was given, but there is no ControlNet and no T2I-Adapter; leave it out$/),
  );
  await golden.close();
});

// --- A T2I-Adapter, and two ControlNets

const OTHERS = {
  adapted: (manifest, { graphs, component }) => {
    manifest.targets[0].components.unet.graphs = graphs;
    manifest.targets[0].components.t2i_adapter = component;
    manifest.conditioning.tensors.push(...component.graphs[0].outputs);
  },
  paired: (manifest, { graphs, cost }) => {
    manifest.targets[0].components.unet.graphs = graphs;
    manifest.cost.controlnet = cost;
    manifest.conditioning.tensors.push(...graphs[0].inputs.slice(1));
  },
};
for (const [kind, change] of Object.entries(OTHERS)) {
  const said = answers[kind],
    each = (i) => picture(said.controls.slice(192 * i)),
    open = () => changed((manifest) => change(manifest, said), said.files);
  test(`${kind}: pictures as Python draws them`, async () => {
    const other = await open();
    assert.ok(other.canControl);
    for (const { asked: told, mask, images } of said.cases) {
      const { count, list, ...more } = told,
        { label, ...rest } = asked,
        request = { ...rest, ...(count === 2 ? {} : { label }), ...camel(more) };
      if (count) request.controlImage = picture(said.controls, count);
      if (list) request.controlImage = list.map((i) => (i === null ? null : each(i)));
      const result = await other.generate(request);
      closeTo(result.images.data, images, 1);
      assert.deepEqual(result.mask, mask);
      assert.equal("t2i_adapter" in result.stages, kind === "adapted" && Boolean(count));
    }
    await other.close();
  });
}

test("an adapter's picture is refused where it does not fit", async () => {
  const said = answers.adapted,
    other = await changed((manifest) => OTHERS.adapted(manifest, said), said.files);
  for (const [bad, why] of [
    [{ controlnetConditioningScale: 0.5 }, /^controlnetConditioningScale was given without a controlImage; give one$/],
    [{ controlImage: picture(said.controls, 2), numImages: 3 }, /^controlImage has 2 pictures for 3 images/],
    [{ controlImage: "edges.png" }, /^controlImage is "edges.png"; expected ImageData of 8 x 8/],
  ])
    await assert.rejects(other.generate({ ...asked, ...bad }), refused(why));
  await other.close();
});

test("two ControlNets are given a list of two", async () => {
  const said = answers.paired,
    one = picture(said.controls),
    other = await changed((manifest) => OTHERS.paired(manifest, said), said.files);
  for (const [bad, why] of [
    [{ controlImage: one }, /^controlImage is for one ControlNet, and the bundle has 2; expected a list of 2$/],
    [{ controlImage: [one] }, /^controlImage has 1 entries, and the bundle has 2; expected a list of 2$/],
    [
      { controlImage: [one, one], controlnetConditioningScale: [1] },
      /^controlnetConditioningScale has 1 entries, and the bundle has 2; expected a list of 2$/,
    ],
  ])
    await assert.rejects(other.generate({ ...asked, ...bad }), refused(why));
  const { ledger } = await other.generate({ ...asked, controlImage: [null, null] });
  assert.ok(ledger.every(({ ms }) => !("controlnet" in ms)));
  await other.close();
});

// --- Inversion

for (const { asked: more, mask, latents, again } of python.inversions) {
  test(`an inversion as Python's: ${JSON.stringify(more)}`, async () => {
    const told = { label: "square", numInferenceSteps: 4, ...camel(more) },
      steps = [];
    const found = await pipe.invert(PICTURES.image, { ...told, onStep: (step) => steps.push(step) });
    assert.deepEqual(found.latents.dims, [1, 3, 8, 8]);
    closeTo(found.latents.data, latents, 1e-4);
    assert.deepEqual(found.mask, mask);
    assert.deepEqual(
      steps.map(({ done, count }) => [done, count]),
      mask.map((_, k) => [k + 1, mask.length]),
    );
    const { guidanceScale = 1 } = told;
    const request = { ...asked, seed: null, guidanceScale, clock: 1, latents: found.latents, scheduler: "ddim" };
    closeTo((await pipe.generate(request)).images.data, again, 1);
  });
}

test("two pictures are inverted as each alone, and their steps may be a list's", async () => {
  const both = { data: Uint8Array.of(...python.image, ...python.controls.slice(0, 192)), dims: [2, 8, 8, 3] };
  const told = { label: "round", numInferenceSteps: 3, refinements: 1, guidanceScale: [2, 2, 2, 1, 1, 1] };
  const { latents, ledger } = await pipe.invert(both, told);
  assert.deepEqual(
    ledger.map(({ rows }) => rows),
    [2, 2, 2, 1, 1, 1],
  );
  const alone = await pipe.invert(PICTURES.control_image, told);
  closeTo(latents.data.slice(192), alone.latents.data, 1e-4);
});

test("an inversion ends where its signal is aborted, and nothing outlives it", async () => {
  const controller = new AbortController();
  let count = 0;
  const told = { label: "square", signal: controller.signal, onStep: () => ++count === 2 && controller.abort() };
  await assert.rejects(pipe.invert(PICTURES.image, told), { name: "AbortError" });
  assert.equal(count, 2);
  await assert.rejects(pipe.invert(PICTURES.image, { signal: AbortSignal.abort() }), { name: "AbortError" });
  assert.equal((await pipe.invert(PICTURES.image)).mask.length, 4);
});

for (const [bad, why] of [
  [{ refinements: -1 }, /^refinements is -1; expected 0 to 20$/],
  [{ refinements: 1.5 }, /^refinements is 1.5; expected 0 to 20$/],
  [{ refinements: 21 }, /^refinements is 21/],
  [{ refinements: "1" }, /^refinements is "1"/],
  [{ clock: "1,0" }, /^clock mask "1,0" has 2 entries for 8 steps; expected one each$/],
  [{ clock: "1,0,1,0,1,0,1,0", refinements: 1 }, /^clock mask .* has 8 entries for 16 steps; expected one each$/],
  [{ guidanceScale: [1, 1] }, /^guidanceScale has 2 entries for 8 calls; expected one each$/],
  [{ guidanceScale: -1 }, /^guidanceScale is -1; expected a finite number from 0; 1 or less is off$/],
  [{ numInferenceSteps: 0 }, /^numInferenceSteps is 0; expected a whole number from 1 to 1000$/],
  [{ label: "triangle" }, /^no label "triangle"; choices: round, square$/],
  [{ scheduler: "ddim" }, /^there is no argument "scheduler"; expected some of prompt, .*refinements/],
  [{ controlImage: PICTURES.control_image }, /^there is no argument "controlImage"/],
]) {
  test(`refused by an inversion: ${JSON.stringify(bad).slice(0, 40)}`, async () => {
    await assert.rejects(pipe.invert(PICTURES.image, { numInferenceSteps: 8, ...bad }), refused(why));
  });
}

test("an inversion of what is no picture of that size is refused", async () => {
  await assert.rejects(
    pipe.invert({ data: new Uint8Array(48), dims: [4, 4, 3] }),
    refused(/^image has 4 x 4 pixels \(width x height\)/),
  );
  await assert.rejects(pipe.invert(null), refused(/^image is null; expected ImageData of 8 x 8/));
});

test("steps that clip or draw noise cannot be taken backwards", async () => {
  for (const [settings, why] of [
    [
      { clip_sample: true, eta: 0 },
      /^the bundle's ddim has clip_sample true and eta 0: such steps cannot be taken backwards; expected false and 0$/,
    ],
    [{ clip_sample: false, eta: 0.5 }, /^the bundle's ddim has clip_sample false and eta 0.5: such steps/],
  ]) {
    const other = await changed(({ scheduler, operating_point: point }) => {
      Object.assign(scheduler, { name: "ddim", lower_order_final: true, set_alpha_to_one: false, ...settings });
      point.scheduler = "ddim";
    });
    await assert.rejects(other.invert(PICTURES.image), refused(why));
    await other.close();
  }
});
