import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { RequestError } from "../src/errors.js";
import { changed } from "./changed_bundle.js";
import { closeTo } from "./golden.js";

// What the Python runtime makes of the same: tests/test_web_edits.py writes it.
const python = JSON.parse(readFileSync(new URL("edits.json", import.meta.url), "utf8"), (_, value) =>
  typeof value?.base64 === "string" ? Uint8Array.from(Buffer.from(value.base64, "base64")) : value,
).injected;
const pictures = (count) => ({ data: python.images.slice(0, 192 * count), dims: [count, 8, 8, 3] });
const told = { label: "round", numInferenceSteps: 4 },
  asked = { label: "square", guidanceScale: 2, clock: 2 };
/** Arguments in this runtime's words. */
const camel = (words) =>
  Object.fromEntries(
    Object.entries(words).map(([name, value]) => [name.replace(/_(.)/g, (_, letter) => letter.toUpperCase()), value]),
  );
/** The golden bundle with graphs that take other rows, and its manifest changed further. */
const injecting = (change = () => {}) =>
  changed((manifest) => {
    manifest.targets[0].components.unet.graphs = structuredClone(python.graphs);
    manifest.conditioning.tensors.push(...python.rows);
    change(manifest);
  }, python.files);

let pipe;
before(async () => {
  pipe = await injecting();
});
after(() => pipe.close());

const refused = (pattern) => (e) => {
  assert.ok(e instanceof RequestError, e.stack);
  assert.match(e.message, pattern);
  assert.ok(!e.message.includes("\n"), e.message);
  return true;
};

for (const { pictures: count, inversion, asked: more, rows, mask, saved, images, timesteps, means } of python.cases) {
  test(`beside ${count} pictures as Python draws it: ${JSON.stringify(more)}`, async () => {
    const found = count ? await pipe.invert(pictures(count), camel(inversion)) : null;
    if (found) {
      const { trajectory, latents } = found,
        [steps] = trajectory.dims;
      closeTo(found.timesteps.data, timesteps, 1e-4);
      assert.deepEqual(trajectory.dims, [found.timesteps.dims[0], count, 3, 8, 8]);
      assert.deepEqual(trajectory.data.slice(0, latents.data.length), latents.data);
      const mean = (k) => trajectory.data.subarray(192 * k, 192 * (k + 1)).reduce((a, b) => a + b) / 192;
      closeTo(
        Array.from({ length: steps * count }, (_, k) => mean(k)),
        means,
        1e-4,
      );
    }
    const result = await pipe.generate({ inverted: found, ...camel(more) });
    closeTo(result.images.data, images, 1);
    assert.deepEqual(result.mask, mask);
    assert.deepEqual(
      result.ledger.map((step) => step.rows),
      rows,
    );
    assert.ok(Math.abs(1 - result.macs.done / result.macs.uncached - saved) < 1e-9);
  });
}

test("an inverted picture survives a message, and a picture is what it is alone", async () => {
  const both = await pipe.invert(pictures(2), told),
    alone = structuredClone(await pipe.invert(pictures(1), told));
  const two = await pipe.generate({ ...asked, inverted: both }),
    one = await pipe.generate({ ...asked, inverted: alone });
  assert.deepEqual([two.images.dims[0], one.images.dims[0]], [2, 1]);
  closeTo(two.latents.data.slice(0, 192), one.latents.data, 1e-4);
});

test("an inversion counts its operations, and its latents alone are drawn without its rows", async () => {
  const found = await pipe.invert(pictures(1), { ...told, clock: 2 }),
    { full, cached } = pipe.manifest.cost,
    [whole, part] = [full, cached].map(({ macs, macs_attention }) => macs + macs_attention);
  assert.deepEqual(found.macs, { done: 2 * whole + 2 * part, uncached: 4 * whole });
  const plain = { ...asked, latents: found.latents, scheduler: "ddim", numInferenceSteps: 4, clock: 1 };
  const own = await pipe.generate(plain),
    none = await pipe.generate({ ...asked, clock: 1, inverted: found, injectAttention: 0, injectFeatures: 0 });
  assert.deepEqual(none.latents, own.latents);
  assert.deepEqual(
    none.ledger.map(({ rows }) => rows),
    [2, 2, 2, 2],
  );
});

test("whether a bundle injects, and nothing outlives a generation that is left", async () => {
  const plain = await changed(() => {}),
    found = await pipe.invert(pictures(1), told);
  assert.deepEqual([pipe.canInject, plain.canInject], [true, false]);
  await assert.rejects(
    plain.generate({ ...asked, inverted: found }),
    refused(/^an inverted picture was given, but the bundle's UNet takes nothing of other rows; export it with --inj/),
  );
  await plain.close();
  const controller = new AbortController();
  await assert.rejects(
    async () => {
      for await (const event of pipe.stream({ ...asked, inverted: found, signal: controller.signal }))
        if (event.type === "step") controller.abort();
    },
    { name: "AbortError" },
  );
});

for (const [bad, why] of [
  [
    { inverted: null, injectAttention: 0.5 },
    /^injectAttention was given without an inverted picture; give inverted too$/,
  ],
  [{ inverted: null, injectFeatures: 0 }, /^injectFeatures was given without an inverted picture/],
  [{ injectFeatures: 1.5 }, /^injectFeatures is 1.5; expected a share of the steps, 0 to 1$/],
  [{ injectAttention: true }, /^injectAttention is true; expected a share/],
  [{ injectAttention: NaN }, /^injectAttention is null; expected a share/],
  [{ latents: pictures(1) }, /^latents and an inverted picture were given, and a generation begins with one of them/],
  [{ image: pictures(1) }, /^image and an inverted picture were given, and a generation begins with one of them; give/],
  [{ inverted: pictures(1) }, /^inverted has not .*; expected what invert gives$/],
  [{ inverted: "found" }, /^inverted has not .*; expected what invert gives$/],
  [
    { numInferenceSteps: 5 },
    /^the picture was inverted in 4 steps of DDIM, whose timesteps ddim does not have in 5 calls; /,
  ],
  [
    { scheduler: "heun" },
    /^the picture was inverted in 4 steps of DDIM, whose timesteps heun does not have in 7 calls/,
  ],
  [{ numImages: 3, label: ["square"] }, /^label has 1 entries for 3 images; expected one each$/],
]) {
  test(`refused: ${JSON.stringify(bad).slice(0, 40)}`, async () => {
    const inverted = await pipe.invert(pictures(1), told);
    await assert.rejects(pipe.generate({ ...asked, inverted, ...bad }), refused(why));
  });
}

test("two inverted pictures are for one image each, and what was changed is no inverted picture", async () => {
  const inverted = await pipe.invert(pictures(2), told),
    { trajectory, timesteps, cond } = inverted;
  await assert.rejects(
    pipe.generate({ ...asked, inverted, numImages: 3 }),
    refused(/^latents are \[2, 3, 8, 8\]; expected \[N, 3, 8, 8\] with 1 or 3 rows$/),
  );
  for (const change of [
    { trajectory: { ...trajectory, dims: [2, 4, 3, 8, 8] } },
    { trajectory: { ...trajectory, data: trajectory.data.map(() => NaN) } },
    { timesteps: { ...timesteps, dims: [1, 4] } },
    { timesteps: [...timesteps.data] },
    { cond: null },
    { cond: { class_labels: { ...cond.class_labels, dims: [1] } } },
  ])
    await assert.rejects(
      pipe.generate({ ...asked, inverted: { ...inverted, ...change } }),
      refused(/^inverted has not .*; expected what invert gives$/),
    );
});

test("a fixed batch takes an image's rows together, or is refused", async () => {
  const other = await injecting(({ targets: [{ components }] }) => {
    components.unet.batch = 3;
    for (const { inputs, outputs } of components.unet.graphs)
      for (const tensor of [...inputs, ...outputs]) if (tensor.name !== "timestep") tensor.shape[0] = 3;
  });
  const found = await other.invert(pictures(2), told),
    again = await pipe.invert(pictures(2), told);
  closeTo(found.latents.data, again.latents.data, 1e-4);
  const request = { ...asked, clock: "1,0,1,0", guidanceScale: [2, 2, 2, 1] };
  const [fixed, free] = [
    await other.generate({ ...request, inverted: found }),
    await pipe.generate({ ...request, inverted: again }),
  ];
  closeTo(fixed.latents.data, free.latents.data, 1e-4);
  await assert.rejects(
    other.generate({ ...asked, guidanceScale: 1, inverted: found }),
    refused(
      /^the graphs take 3 rows at a time, and with an inverted picture an image has 2; expected a guidance that fits, /,
    ),
  );
  await other.close();
});
