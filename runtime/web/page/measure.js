// The section "Measure this device": rounds with the clock and without, a table, and a file for `edgediff bench --import`.
import { samplerOf } from "../src/schedulers.js";
import { benchLedger } from "./bench_ledger.js";
import { element, input, refusal, saveJson, say, sayProgress } from "./elements.js";
import { percent } from "./ledger_chart.js";

const MOST_ROUNDS = 50;

/**
 * @param {import("./engine.js").Engine} engine
 * @param {import("./form.js").Form} form
 * @param {AbortSignal} signal
 */
export async function measure(engine, form, signal) {
  const rounds = Math.min(Math.max(Math.round(Number(input("rounds").value)) || 8, 2), MOST_ROUNDS);
  input("rounds").value = String(rounds);
  element("status").scrollIntoView({ block: "center" });
  const asked = form.settings();
  if (asked.sampler !== null || asked.control)
    throw refusal(
      "what is measured is the bundle's own sampler, without a control picture; choose that, and take the picture away",
    );
  if (asked.mask.length !== samplerOf(engine.opened.sampler).calls(asked.steps))
    throw refusal("what is measured is a whole generation; take the picture away, or set its strength to 1");
  const clocked = form.request(asked),
    always = form.requestOfFull(asked);
  say("Warming up");
  await engine.draw(always, { signal });
  await engine.draw(clocked, { signal });
  const found = [];
  for (let k = 0; k < rounds; k++) {
    say(`Round ${k + 1} of ${rounds}`);
    sayProgress(k / rounds);
    found.push({ always: await engine.draw(always, { signal }), clocked: await engine.draw(clocked, { signal }) });
  }
  const { opened } = engine,
    settings = { steps: asked.steps, clock: asked.mask.join(","), guidance: asked.guidance },
    ledger = benchLedger({ rounds: found, opened, settings });
  element("measured").replaceChildren(table(ledger.rows));
  saveJson(`${opened.model}-${opened.backend}.json`, ledger);
  const [{ time_saved }] = ledger.contenders;
  say(`Measured: the steps take ${percent(time_saved)} less time than with every step full.`);
}

/** @param {ReturnType<typeof benchLedger>["rows"]} rows */
function table(rows) {
  const made = document.createElement("table");
  made.innerHTML = "<thead><tr><th>milliseconds</th><th>median</th><th>10 to 90 %</th></tr></thead>";
  for (const name of ["loop", "loop_clock1", "full", "cached", "picture"]) {
    const row = rows.find((each) => each.part === name);
    if (!row) continue;
    const line = made.insertRow(),
      spread = `${row.p10_ms.toFixed(1)} to ${row.p90_ms.toFixed(1)}`;
    for (const text of [name.replace("_", ", "), row.median_ms.toFixed(1), spread])
      line.insertCell().textContent = text;
  }
  return made;
}
