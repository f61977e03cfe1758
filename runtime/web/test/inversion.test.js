import assert from "node:assert/strict";
import { test } from "node:test";
import { inverseScheduler } from "../src/inversion.js";
import { makeScheduler, readScheduler } from "../src/schedulers.js";
import { closeTo, largest, readGolden } from "./golden.js";

for (const { name, config, num_inference_steps: steps, refinements, calls } of readGolden("inversion.json").cases) {
  test(`DDIM backwards: ${name}`, () => {
    const inverse = inverseScheduler(readScheduler(config), steps, refinements);
    closeTo(
      inverse.timesteps,
      calls.map(({ timestep }) => timestep),
      1e-3,
    );
    assert.deepEqual([inverse.needsNoise, inverse.initNoiseSigma, inverse.clip], [false, 1, 0]);
    let state = null;
    calls.forEach(({ x, model_output: out, next }, i) => {
      const given = Float32Array.from(x),
        [made, kept] = inverse.step(i, given, Float32Array.from(out), state, null);
      state = kept;
      closeTo(made, next, 1e-5 * largest(x));
      assert.deepEqual(given, Float32Array.from(x), "x was changed");
    });
  });
}

test("a step and its inverse with the same output cancel, refined or not", () => {
  for (const prediction_type of ["epsilon", "v_prediction", "sample"]) {
    const config = readScheduler({ name: "ddim", prediction_type, clip_sample: false, set_alpha_to_one: false }),
      forwards = makeScheduler(config, 8),
      backwards = inverseScheduler(config, 8, 2);
    const x = Float32Array.from({ length: 16 }, (_, k) => Math.sin(k)),
      out = x.map((_, k) => Math.cos(3 * k));
    for (let i = 0; i < 8; i++) {
      let [back] = forwards.step(i, x, out, [], null),
        state = null;
      const first = 3 * (7 - i);
      for (let call = first; call < first + 3; call++)
        [back, state] = backwards.step(call, back, out, state, null, call === first);
      closeTo(back, x, 1e-4);
    }
  }
});
