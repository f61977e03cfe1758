import assert from "node:assert/strict";
import { test } from "node:test";
import { BundleError } from "../src/errors.js";
import { graphsAt, parseManifest } from "../src/manifest.js";
import { readGolden } from "./golden.js";

const encode = (document) => new TextEncoder().encode(JSON.stringify(document));
const good = (name) => readGolden(`manifests/${name}.json`);

test("good manifests are read, and targets of unknown formats left out", () => {
  for (const [name, targets] of Object.entries({ class: ["onnx"], text: ["coreml"], pipeline: ["onnx"] })) {
    assert.deepEqual(
      parseManifest(encode(good(name))).targets.map((each) => each.target),
      targets,
    );
  }
});

for (const { manifest, at, value, why } of readGolden("manifests/bad.json").bad) {
  test(`refused: ${why} (${at.join(".")})`, () => {
    const document = good(manifest);
    const place = at.slice(0, -1).reduce((each, key) => each[key], document);
    if (value === "remove") delete place[at.at(-1)];
    else place[at.at(-1)] = value;
    assert.throws(
      () => parseManifest(encode(document)),
      (e) => e instanceof BundleError && !e.message.includes("\n"),
    );
  });
}

test("every field that has no default is needed, at every depth", () => {
  const document = good("pipeline");
  const refused = (path) => {
    const changed = structuredClone(document);
    const place = path.slice(0, -1).reduce((each, key) => each[key], changed);
    delete place[path.at(-1)];
    assert.throws(() => parseManifest(encode(changed)), BundleError, path.join("."));
  };
  for (const key of [
    "generator",
    "license",
    "source",
    "cut",
    "adaptor",
    "sample",
    "conditioning",
    "scheduler",
    "operating_point",
    "evidence",
    "cost",
    "cache_bytes",
    "targets",
    "config",
    "versions",
    "files",
  ])
    refused([key]);
  refused(["sample", "space"]);
  refused(["targets", 0, "components", "unet", "graphs", 0, "name"]);
  refused(["targets", 0, "components", "unet", "graphs", 0, "inputs", 0, "dtype"]);
});

test("what is concatenated to the latent has its channels, each part once, a mask with a masked image", () => {
  const text = good("text");
  assert.deepEqual(parseManifest(encode(text)).sample.concat, ["mask", "masked_image"]);
  for (const [concat, channels, why] of [
    [["mask"], 9, /in_channels is 9; expected 5, with mask/],
    [["mask"], 5, /sample.concat is \["mask"\]; expected a mask with a masked image/],
    [["masked_image"], 8, /a mask with a masked image/],
    [["mask", "masked_image"], 8, /in_channels is 8; expected 9, with mask, masked_image/],
    [["image"], 9, /in_channels is 9; expected 8, with image/],
    [["depth", "depth"], 6, /sample.concat is .*; expected each once/],
    [["mask", "masked_image", "depth"], 9, /expected 10/],
    [["light"], 8, /sample.concat\[0\] is "light"; expected mask, masked_image, image, depth/],
    ["mask", 9, /expected a list/],
  ]) {
    const changed = good("text");
    changed.sample = { ...changed.sample, concat, in_channels: channels };
    assert.throws(
      () => parseManifest(encode(changed)),
      (e) => e instanceof BundleError && why.test(e.message),
      JSON.stringify([concat, channels]),
    );
  }
  delete text.sample.concat; // only the caller knows what comes beside
  assert.deepEqual(parseManifest(encode(text)).sample.concat, []);
});

test("a cached graph takes the residuals of a full step's ControlNet, and of no other graph", () => {
  for (const [name, why] of [
    ["controlnet", null],
    ["light", /inputs of cached is "control_0"; expected tensors that a step has by then/],
  ]) {
    const changed = good("class"),
      { graphs } = changed.targets[0].components.unet,
      residual = { name: "control_0", dtype: "float32", shape: ["batch", 3, 8, 8] };
    graphs.forEach(({ inputs }) => inputs.push(residual));
    const [{ inputs }] = graphs;
    graphs.unshift({ ...graphs[0], name, inputs: inputs.filter((t) => t !== residual), outputs: [residual] });
    changed.cost[name] = changed.cost.full;
    changed.source.control = "folder";
    if (why)
      assert.throws(
        () => parseManifest(encode(changed)),
        (e) => e instanceof BundleError && why.test(e.message),
      );
    else assert.equal(parseManifest(encode(changed)).targets[0].components.unet.graphs.length, 3);
  }
});

test("what is no manifest is refused in one sentence", () => {
  for (const bytes of ["", "<!doctype html>", "[]", "null", "{}", '{"format_version": "2"}', "\ufeff{}"].map((text) =>
    new TextEncoder().encode(text),
  )) {
    assert.throws(
      () => parseManifest(bytes),
      (e) => e instanceof BundleError && /expected a bundle that export wrote$/.test(e.message),
    );
  }
  assert.throws(() => parseManifest(new Uint8Array([0xff, 0xfe])), /not JSON/);
});

test("the version is refused before anything else is read", () => {
  assert.throws(() => parseManifest(encode({ format_version: 3, new: 1 })), /version 3.*update/);
  assert.throws(() => parseManifest(encode({ format_version: 1 })), /version 1.*export the model again/);
});

test("what may be left out takes its default", () => {
  const document = good("pipeline"),
    { components } = document.targets[0],
    graph = components.unet.graphs[0];
  for (const place of [graph, components.vae_decoder.model ?? {}]) delete place.external_data;
  delete graph.function;
  delete document.prompt.encoders[0].pooled;
  delete components.unet.further;
  delete document.sample.multiple;
  document.sample.width = document.sample.height;
  const { targets, prompt, sample } = parseManifest(encode(document)),
    { unet } = targets[0].components;
  assert.deepEqual([unet.graphs[0].external_data, unet.graphs[0].function, unet.further], [[], null, []]);
  assert.deepEqual([prompt.encoders[0].pooled, sample.multiple], [null, 1]);
});

test("whatever stands in a place, a manifest is read or refused as a bundle's fault", () => {
  const places = (value, path = []) =>
    value && typeof value === "object"
      ? [path, ...Object.keys(value).flatMap((key) => places(value[key], [...path, key]))]
      : [path];
  let refused = 0;
  for (const name of ["class", "pipeline"]) {
    const document = good(name);
    for (const path of places(document).slice(1)) {
      const place = path.slice(0, -1).reduce((each, key) => each[key], document),
        last = path.at(-1),
        before = place[last];
      for (const value of [null, -1, 1.5, "x", [], [[]], {}, true]) {
        place[last] = value;
        try {
          parseManifest(encode(document));
        } catch (e) {
          assert.ok(e instanceof BundleError, `${path.join(".")}: ${e.stack}`);
          refused++;
        }
      }
      place[last] = before;
    }
  }
  assert.ok(refused > 5000, `${refused} refused`);
});

test("keys of prototypes are only keys", () => {
  for (const key of ["__proto__", "constructor", "toString"]) {
    const document = JSON.stringify(good("class")).replace(
      '"files":{',
      `"files":{"${key}":{"size":1,"sha256":"${"0".repeat(64)}"},`,
    );
    const { files } = parseManifest(new TextEncoder().encode(document));
    assert.equal(files[key].size, 1);
    const target = good("class");
    target.targets[0].target = key;
    assert.throws(() => parseManifest(encode(target)), BundleError);
  }
});

test("graphs of any size take multiples, others the sizes that they list", () => {
  const { targets, sample } = parseManifest(encode(good("pipeline"))),
    { unet, text_encoder } = targets[0].components;
  const shapes = graphsAt(unet, sample, 32, 48)[0].inputs[0].shape;
  assert.deepEqual(shapes.slice(2), [32, 48]);
  assert.equal(graphsAt(unet, sample, 33, 48), null);
  assert.deepEqual(graphsAt(text_encoder, sample, 33, 48), text_encoder.graphs);
  const text = parseManifest(encode(good("text")));
  assert.equal(graphsAt(text.targets[0].components.unet, text.sample, 16, 8)[0].function, "full_8x16");
  assert.equal(graphsAt(text.targets[0].components.unet, text.sample, 8, 16), null);
});
