import assert from "node:assert/strict";
import { test } from "node:test";
import { RequestError } from "../src/errors.js";
import { noise } from "../src/noise.js";
import { betaQuantile } from "../src/schedule_tables.js";
import { callOf, makeScheduler, nameOf, readScheduler, SCHEDULER_NAMES, withSampler } from "../src/schedulers.js";
import { closeTo, goldenFiles, largest, readGolden } from "./golden.js";

for (const name of goldenFiles("schedulers")) {
  test(`steps as diffusers does: ${name}`, () => {
    const trace = readGolden(`schedulers/${name}`);
    const scheduler = makeScheduler(readScheduler(trace.config), trace.num_inference_steps);
    closeTo(scheduler.timesteps, trace.timesteps, 1e-3);
    closeTo([scheduler.initNoiseSigma / trace.init_noise_sigma], [1], 1e-5);
    const floats = (values) => (values === null ? null : Float32Array.from(values));
    let state = null;
    trace.steps.forEach((step, i) => {
      const x = floats(step.x_t),
        tolerance = 1e-5 * largest(step.x_t);
      closeTo(scheduler.scaleModelInput(i, x), step.scaled_input, tolerance);
      assert.equal(scheduler.needsNoise, step.noise !== null);
      const [next, kept] = scheduler.step(i, x, floats(step.model_output), state, floats(step.noise));
      state = kept;
      closeTo(next, step.x_prev, tolerance);
      assert.deepEqual(Array.from(x), Array.from(floats(step.x_t)), "x_t was changed");
    });
    const x0 = noise(11n, new Float32Array(trace.steps[0].x_t.length), 0, 0),
      under = noise(12n, x0.slice(), 0, 0),
      count = trace.steps.length;
    assert.equal(trace.levels.length, 2 * count);
    for (let i = 0; i < count; i++) {
      const [signal, level] = trace.levels.slice(2 * i, 2 * i + 2),
        want = Array.from(x0, (value, k) => signal * value + level * under[k]);
      closeTo(scheduler.addNoise(i, x0, under), want, 1e-5 * Math.max(1, level) * largest(under));
    }
    assert.deepEqual(scheduler.addNoise(count, x0, under), x0);
    assert.notEqual(scheduler.addNoise(count, x0, under), x0);
    assert.throws(() => scheduler.addNoise(count + 1, x0, under), /^RequestError: step \d+: expected 0 to/);
    if (trace.hold_trajectory) {
      let x = floats(trace.steps[0].x_t);
      state = null;
      trace.steps.forEach(
        (step, i) => ([x, state] = scheduler.step(i, x, floats(step.model_output), state, floats(step.noise))),
      );
      closeTo(x, trace.steps.at(-1).x_prev, 1e-5 * Math.max(...trace.steps.map((step) => largest(step.x_t))));
    }
  });
}

test("editing begins at the call that follows the steps left out", () => {
  for (const [name, steps, call] of [
    ["ddim", 0, 0],
    ["ddim", 3, 3],
    ["heun", 0, 0],
    ["heun", 3, 6],
    ["heun_karras", 1, 2],
    ["pndm", 0, 0],
    ["pndm", 3, 4],
    ["lcm", 2, 2],
  ])
    assert.equal(callOf(name, steps), call, name);
});

test("quantiles of Beta(0.6, 0.6)", () => {
  closeTo(
    [0.1, 0.25, 0.5, 0.75].map(betaQuantile),
    [0.03958440558878085, 0.17568037865269498, 0.5, 1 - 0.17568037865269498],
    1e-12,
  );
});

test("settings that do not fit are refused", () => {
  for (const [bad, why] of [
    [{ name: "ddpm" }, /one of ddim/],
    [{ name: "toString" }, /one of ddim/],
    [{ name: "ddim", colour: 1 }, /no such setting/],
    [{ name: "ddim", use_karras_sigmas: true }, /does not read/],
    [{ name: "euler", use_karras_sigmas: true, use_beta_sigmas: true }, /one of them/],
    [
      { name: "pndm", prediction_type: "sample" },
      /^scheduler prediction_type "sample": expected one of epsilon, v_prediction for pndm$/,
    ],
    [{ name: "ddim", eta: 2 }, /0 to 1/],
    [{ name: "ddim", num_train_timesteps: true }, /integer/],
    [{ name: "ddim", trained_betas: [0.1] }, /each training timestep/],
    [{ name: "lcm", original_inference_steps: 0 }, /integer/],
  ]) {
    assert.throws(
      () => readScheduler(bad),
      (e) => e instanceof RequestError && why.test(e.message),
      JSON.stringify(bad),
    );
  }
});

test("another sampler has the same noise process, and of the rest what both read", () => {
  const own = readScheduler({
    name: "dpmpp_2m",
    beta_schedule: "scaled_linear",
    prediction_type: "v_prediction",
    rescale_betas_zero_snr: true,
    timestep_spacing: "trailing",
    use_karras_sigmas: true,
    final_sigmas_type: "sigma_min",
  });
  assert.equal(nameOf(own), "dpmpp_2m_karras");
  assert.equal(withSampler(own, "dpmpp_2m_karras"), own);
  assert.equal(withSampler(own, "dpmpp_2m").use_karras_sigmas, false);
  const ddim = withSampler(own, "ddim");
  assert.deepEqual(
    ddim,
    readScheduler({
      name: "ddim",
      beta_schedule: "scaled_linear",
      prediction_type: "v_prediction",
      rescale_betas_zero_snr: true,
      timestep_spacing: "trailing",
      clip_sample: false,
      set_alpha_to_one: false,
    }),
  );
  const clipping = readScheduler({ name: "ddim", eta: 0.5 });
  assert.deepEqual(
    [withSampler(clipping, "lcm").clip_sample, withSampler(clipping, "pndm").set_alpha_to_one],
    [true, true],
  );
  assert.equal(withSampler(clipping, "tcd").eta, 0.3); // another thing by the same name
  for (const name of SCHEDULER_NAMES) assert.equal(nameOf(withSampler(clipping, name)), name);
});

test("another sampler has the bundle's zero terminal SNR or is refused", () => {
  const own = readScheduler({ name: "ddim", prediction_type: "v_prediction", rescale_betas_zero_snr: true });
  for (const name of SCHEDULER_NAMES) {
    if (name === "pndm" || name.startsWith("heun"))
      assert.throws(
        () => withSampler(own, name),
        /^RequestError: scheduler rescale_betas_zero_snr true: (pndm|heun) does not read it; expected false; it is a setting of ddim, .*, tcd$/,
      );
    else assert.equal(withSampler(own, name).rescale_betas_zero_snr, true);
  }
});

test("a sampler that there is not, and one that does not take the model's prediction, are refused", () => {
  const own = readScheduler({ name: "ddim", prediction_type: "sample" });
  for (const name of ["dpm", "ddim_karras", "toString", "", 5, ["ddim"]])
    assert.throws(
      () => withSampler(own, name),
      /^RequestError: scheduler .*: expected one of ddim, pndm, dpmpp_2m, .*, lcm, tcd$/,
    );
  assert.throws(
    () => withSampler(own, "pndm"),
    /^RequestError: scheduler prediction_type "sample": expected one of epsilon, v_prediction for pndm$/,
  );
});

test("numbers of steps that do not fit are refused", () => {
  const ddim = readScheduler({ name: "ddim" });
  for (const steps of [0, -1, 1.5, 1001, "8", NaN, null])
    assert.throws(() => makeScheduler(ddim, steps), /numInferenceSteps/);
  assert.throws(() => makeScheduler(readScheduler({ name: "lcm" }), 51), /take fewer steps/);
  assert.throws(() => makeScheduler(readScheduler({ name: "ddim", steps_offset: 999 }), 4), /take fewer steps/);
  const zero = readScheduler({ name: "ddim", rescale_betas_zero_snr: true, timestep_spacing: "trailing" });
  assert.throws(() => makeScheduler(zero, 4), /divide by zero/);
});
