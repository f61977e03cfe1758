import assert from "node:assert/strict";
import { test } from "node:test";
import { denoise } from "../src/loop.js";
import { makeScheduler, readScheduler } from "../src/schedulers.js";
import { readSeed } from "../src/noise.js";
import { closeTo, goldenFiles, largest, readGolden } from "./golden.js";

/** Fake graphs of matrices, one row at a time. */
class FakeSession {
  live = new Set();
  ran = [];

  constructor(golden) {
    this.golden = golden;
    this.batch = golden.batch;
  }

  put(rows) {
    if (this.batch && rows.dims.length > 1) assert.equal(rows.dims[0], this.batch);
    assert.equal(
      rows.data.length,
      rows.dims.reduce((a, b) => a * b),
    );
    const value = { ...rows };
    this.live.add(value);
    return value;
  }

  async get(value) {
    assert.ok(this.live.has(value), "read after it was dropped");
    return value;
  }

  drop(value) {
    assert.ok(this.live.delete(value), "dropped twice");
  }

  async run({ name }, table) {
    this.ran.push(name);
    const graph = this.golden.graphs.find((each) => each.name === name);
    const others = graph.inputs.filter((each) => each !== "timestep").map((each) => table.get(each)),
      count = Math.max(...others.map(({ dims }) => dims[0]));
    const rows = Array.from({ length: count }, (_, i) => {
      const row = {};
      for (const each of graph.inputs) {
        const value = table.get(each);
        assert.ok(this.live.has(value), `${each} was used after it was dropped`);
        const size = value.data.length / value.dims[0];
        row[each] =
          each === "timestep"
            ? [...value.data]
            : Array.from(value.data.subarray((i % value.dims[0]) * size).subarray(0, size));
      }
      return row;
    });
    for (const { tensor, terms } of graph.compute) {
      for (const row of rows) {
        row[tensor] = terms[0].matrix.map((_, k) =>
          terms.reduce((sum, { of, matrix, rows: taken }) => {
            const from = taken ? rows[Number(row[taken][0])] : row;
            return sum + matrix[k].reduce((total, weight, j) => total + weight * from[of][j], 0);
          }, 0),
        );
      }
    }
    const made = {};
    for (const each of graph.outputs) {
      const { shape } = graph.compute.find(({ tensor }) => tensor === each);
      made[each] = this.put({ data: Float32Array.from(rows.flatMap((row) => row[each])), dims: [count, ...shape] });
    }
    return made;
  }
}

function requestOf(golden) {
  const rows = (values, dims) =>
    values?.length ? { data: Float32Array.from(values), dims: [golden.num_images, ...dims] } : null;
  const tensors = (names) =>
    names.map((name) => ({ name, dtype: name.endsWith("_rows") ? "int64" : "float32", shape: ["batch"] }));
  const graphs = golden.graphs.map((each) => ({
    ...each,
    file: "x",
    inputs: tensors(each.inputs),
    outputs: tensors(each.outputs),
  }));
  const { source } = golden,
    uncond = rows(golden.uncond, [1, 2]),
    [, height, width] = golden.shape;
  const concat = golden.concat?.length
    ? rows(golden.concat, [golden.concat.length / golden.num_images / height / width, height, width])
    : null;
  const steering = golden.control_image ? { control_image: rows(golden.control_image, golden.shape) } : {};
  return {
    graphs,
    concat,
    scheduler: makeScheduler(readScheduler(golden.scheduler), golden.num_inference_steps),
    clock: golden.clock.map(Boolean),
    guidance: golden.guidance,
    latents: rows(golden.latents, golden.shape),
    cond: { encoder_hidden_states: rows(golden.cond, [1, 2]), ...steering },
    uncond: uncond ? { encoder_hidden_states: uncond, ...steering } : {},
    seed: readSeed(golden.seed),
    start: golden.start,
    imageGuidance: golden.image_guidance ?? null,
    kept: golden.kept
      ? Object.fromEntries(Object.entries(golden.kept).map(([key, values]) => [key, Float32Array.from(values)]))
      : null,
    source: source
      ? {
          latents: golden.clock.map((_, i) => {
            const size = source.latents.length / golden.clock.length;
            return rows(source.latents.slice(i * size, (i + 1) * size), golden.shape);
          }),
          cond: { encoder_hidden_states: rows(source.cond, [1, 2]) },
          calls: source.calls,
        }
      : null,
  };
}

for (const name of goldenFiles("loop")) {
  test(`the loop: ${name}`, async () => {
    const golden = readGolden(`loop/${name}`),
      session = new FakeSession(golden),
      steps = [];
    for await (const step of denoise(requestOf(golden), session)) steps.push(step);
    assert.deepEqual(
      steps.map((step) => Number(step.full)),
      golden.mask,
    );
    steps.forEach((step, k) => {
      closeTo(step.latents, golden.steps[k].latents, 1e-5 * largest(golden.steps[k].latents));
      assert.equal(step.index, golden.start + k);
      assert.ok(Object.values(step.ms).every(Number.isFinite) && "scheduler" in step.ms && "other" in step.ms);
      assert.equal("guidance" in step.ms, golden.guidance[step.index] > 1);
      const drawn = Object.values(golden.source?.calls ?? {}).some((calls) => step.index < calls);
      assert.equal(step.rows, Number(drawn) + (step.guided ? ("image_guidance" in golden ? 3 : 2) : 1));
    });
    assert.equal(steps.length, golden.steps.length);
    assert.equal(session.live.size, 0, "tensors outlived the generation");
  });
}

test("what is the same for all rows and steps is there in each, also where guidance ends", async () => {
  for (const name of ["guided_pair.json", "guidance_ends_on_a_cached_step.json"]) {
    const fixed = { lora_up_full: { data: Float32Array.of(3), dims: [1, 1] } },
      request = { ...requestOf(readGolden(`loop/${name}`)), fixed },
      session = new FakeSession(readGolden(`loop/${name}`)),
      run = session.run.bind(session);
    session.run = (graph, table) => {
      assert.equal(table.get("lora_up_full").data[0], 3);
      assert.ok(session.live.has(table.get("lora_up_full")), "used after it was dropped");
      return run(graph, table);
    };
    for await (const _ of denoise(request, session));
    assert.equal(session.live.size, 0, "tensors outlived the generation");
  }
});

test("graphs that can repeat a sample take it once for each image, unless another graph cannot", async () => {
  for (const shared of [2, 1]) {
    const golden = readGolden("loop/guided_pair.json"),
      request = requestOf(golden),
      session = new FakeSession(golden),
      rows = [];
    request.graphs
      .slice(0, shared)
      .forEach((graph) => (graph.inputs.find(({ name }) => name === "sample").shape = ["images"]));
    const put = session.put.bind(session);
    session.put = (value) => (rows.push(value.dims), put(value));
    for await (const step of denoise(request, session))
      closeTo(step.latents, golden.steps[step.index].latents, 1e-5 * largest(golden.steps[step.index].latents));
    const samples = rows.filter((dims) => dims.length === 4 && dims[2] === 2 && dims[1] === 2);
    assert.ok(samples.some(([n]) => n === (shared === 2 ? 2 : 4)));
  }
});

test("rows that an image guides do not share a sample", async () => {
  const golden = readGolden("loop/guided_by_an_image_pair.json"),
    request = requestOf(golden);
  for (const graph of request.graphs) {
    const taken = graph.inputs.find(({ name }) => name === "sample");
    if (taken) taken.shape = ["images"];
  }
  for await (const step of denoise(request, new FakeSession(golden)))
    closeTo(step.latents, golden.steps[step.index].latents, 1e-5 * largest(golden.steps[step.index].latents));
});

test("a sample is shared again where an inverted picture is no longer drawn along", async () => {
  const golden = readGolden("loop/injected.json"),
    request = requestOf(golden),
    session = new FakeSession(golden),
    { run } = session,
    seen = [];
  request.graphs[0].inputs.find(({ name }) => name === "sample").shape = ["images"];
  session.run = (graph, table) => {
    const [attention, features] = ["attention_rows", "feature_rows"].map((name) => table.get(name).data);
    assert.ok(attention instanceof BigInt64Array);
    if (graph.name === "highres_in") seen.push([table.get("sample").dims[0], attention.join(""), features.join("")]);
    return run.call(session, graph, table);
  };
  for await (const step of denoise(request, session))
    closeTo(step.latents, golden.steps[step.index].latents, 1e-5 * largest(golden.steps[step.index].latents));
  const [other, own, less] = ["010101", "012345", "0123"];
  assert.deepEqual(seen, [
    [6, other, other],
    [6, other, other],
    [6, own, other],
    [2, less, less],
    [2, less, less],
  ]);
});

test("what stays under a mask is what was given, to the bit, and so is its preview", async () => {
  const golden = readGolden("loop/keeps_what_the_mask_leaves.json"),
    request = requestOf(golden),
    { mask, latents, noise } = request.kept,
    area = golden.shape[1] * golden.shape[2],
    size = area * golden.shape[0];
  let seen = 0;
  for await (const step of denoise(request, new FakeSession(golden))) {
    const now = request.scheduler.addNoise(step.index + 1, latents, noise);
    for (let k = 0; k < now.length; k++) {
      if (mask[Math.floor(k / size) * area + (k % area)]) continue;
      seen++;
      assert.equal(step.latents[k], now[k]);
      assert.equal(step.predicted[k], latents[k]);
    }
  }
  assert.ok(seen > 0);
});

test("of a ControlNet's residuals the conditional rows are kept where guidance ends on a cached step", async () => {
  const golden = readGolden("loop/steered.json"),
    session = new FakeSession(golden),
    request = { ...requestOf(golden), guidance: [2, 1, 1, 1, 1] },
    { run } = session;
  const made = [],
    taken = [];
  session.run = async (graph, table) => {
    if (table.has("control_0") && graph.inputs.some(({ name }) => name === "control_0"))
      taken.push([...table.get("control_0").data]);
    const outputs = await run.call(session, graph, table);
    if (outputs.control_0) made.push([...outputs.control_0.data]);
    return outputs;
  };
  const mask = [];
  for await (const { full } of denoise(request, session)) mask.push(Number(full));
  assert.deepEqual(mask, golden.mask);
  assert.equal(made.length, 2);
  assert.equal(made[0].length, 2 * made[1].length);
  const conditional = made[0].slice(made[1].length);
  assert.notDeepEqual(conditional, made[1]);
  for (const rows of taken) {
    const known = [made[0], conditional, made[1]].map(String);
    assert.ok(known.includes(String(rows)));
  }
  assert.ok(taken.some((rows) => String(rows) === String(conditional)));
  assert.equal(session.live.size, 0);
});

test("a caller may change and transfer what a step gives", async () => {
  const golden = readGolden("loop/second_order.json");
  for await (const step of denoise(requestOf(golden), new FakeSession(golden))) {
    if (step.index === golden.steps.length - 1)
      closeTo(step.latents, golden.steps.at(-1).latents, 1e-5 * largest(golden.steps.at(-1).latents));
    structuredClone(step, { transfer: [step.latents.buffer, step.predicted.buffer] });
  }
});

test("generations side by side do not meet", async () => {
  const [a, b] = ["guided", "mask"].map((name) => readGolden(`loop/${name}.json`));
  const run = async (golden) => {
    let last;
    for await (const step of denoise(requestOf(golden), new FakeSession(golden))) last = step;
    closeTo(last.latents, golden.steps.at(-1).latents, 1e-5 * largest(golden.steps.at(-1).latents));
  };
  await Promise.all([run(a), run(b), run(a)]);
});

test("leaving and aborting end the generation and give its tensors back", async () => {
  const golden = readGolden("loop/guided.json"),
    session = new FakeSession(golden),
    controller = new AbortController();
  let count = 0;
  for await (const step of denoise(requestOf(golden), session)) if (++count && step.index === 1) break;
  assert.equal(count, 2);
  const ran = session.ran.length;
  await assert.rejects(async () => {
    for await (const step of denoise(requestOf(golden), session, controller.signal))
      if (step.index === 2) controller.abort();
  }, /AbortError/);
  assert.ok(session.ran.length > ran && session.ran.length < ran + 2 * 5 * 3);
  assert.equal(session.live.size, 0);
});

test("a message that aborts arrives between steps", async () => {
  const golden = readGolden("loop/guided.json"),
    controller = new AbortController(),
    { port1, port2 } = new MessageChannel();
  port1.onmessage = () => controller.abort();
  let count = 0;
  await assert.rejects(async () => {
    for await (const _ of denoise(requestOf(golden), new FakeSession(golden), controller.signal))
      if (++count === 1) port2.postMessage(0);
  }, /AbortError/);
  port1.close();
  assert.ok(count < 4, `${count} steps ran`);
});

test("an output that is not finite is the bundle's fault", async () => {
  for (const bad of [NaN, Infinity, 1e30]) {
    const golden = readGolden("loop/one_image.json"),
      request = requestOf(golden);
    request.latents.data[3] = bad;
    await assert.rejects(
      denoise(request, new FakeSession(golden)).next(),
      /^BundleError: the model's output is not finite at step 0/,
    );
  }
});
