"""One run of `edgediff bench`: bundles in backends, beside each the undivided UNet, in turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from edgediff.bench.contenders import BACKENDS, named, time_bundle, time_peak
from edgediff.bench.in_browser import time_in_browser
from edgediff.bench.ledger import Contender, Ledger, Row, Settings, rows_of, spread
from edgediff.bench.machine import describe_machine
from edgediff.bench.turns import Call, Runner, Say, take_turns
from edgediff.errors import ConfigError
from edgediff.targets.base import Backend
from edgediff_runtime import Bundle, Manifest, clock_mask, make_scheduler, open_bundle

# Runtimes keep weights a second time, laid out for their kernels.
WEIGHTS_TIMES = 2.2
# Tracing a model takes it twice.
BASE_BYTES = 300 * 2**20


@dataclass
class _Entry:
    """A bundle in a backend, and beside it the undivided UNet where that can be run."""

    bundle: str
    manifest: Manifest
    backend: Backend
    runner: Runner
    undivided: Runner | None = None


def run_bench(
    bundles: Sequence[Path],
    backends: Sequence[str] | None = None,
    *,
    steps: int | None = None,
    clock: str | None = None,
    num_images: int = 1,
    guidance_scale: float | None = None,
    rounds: int = 10,
    threads: int | None = None,
    undivided: bool = True,
    progress: Say = lambda what: None,
) -> Ledger:
    """Times bundles in backends.

    Args:
        backends: Names; if None, all that are timed by default.
        steps, clock, guidance_scale: Each bundle's own if None; a guidance scale of 1 halves the rows.
        rounds: How often each contender is asked; a round is a generation at the clock and one at clock 1.
        threads: How many a backend may use; its own choice if None.
        undivided: Whether to run the undivided UNet too where a bundle has it; else time is saved against the bundles'
            own graphs at clock 1.

    Returns:
        The ledger. What could not be measured is in it with the reason.

    Raises:
        BundleError: A bundle is damaged.
        ConfigError: There is no bundle, or a number is out of range.
        RequestError: The clock or the number of steps is not valid.
        UnsupportedError: A backend is unknown.
    """
    for name, number in (("num_images", num_images), ("rounds", rounds), ("threads", threads)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} is {number}; expected a whole number above 0")
    if not bundles:
        raise ConfigError("no bundle was given")
    chosen = [named(name) for name in dict.fromkeys(backends)] if backends else [
        backend for backend in BACKENDS if backend.by_default
    ]  # fmt: skip
    opened = [(str(path), open_bundle(path)) for path in dict.fromkeys(bundles)]
    for _, bundle in opened:
        point = bundle.manifest.operating_point
        count = point.num_inference_steps if steps is None else steps
        make_scheduler(bundle.manifest.scheduler, count)
        clock_mask(point.clock if clock is None else clock, count, bundle.manifest.scheduler.name)
    asked = {"num_inference_steps": steps, "clock": clock, "num_images": num_images, "guidance_scale": guidance_scale}
    asked["threads"] = threads
    entries = [entry for name, bundle in opened for entry in _entries(name, bundle, chosen, asked, undivided)]
    runners = [runner for entry in entries for runner in (entry.runner, entry.undivided) if runner is not None]
    peak = Runner("the machine's peak", Call.of(time_peak), threads=threads)
    if any(runner.status == "measured" for runner in runners):  # else there is nothing to compare with the peak
        take_turns([peak, *runners], rounds, progress)
    gflops = peak.parts.get("gflops")
    settings = Settings(steps, clock, num_images, guidance_scale, rounds, threads)
    return _ledger(entries, median(gflops) if gflops else None, settings)


def _entries(
    name: str, bundle: Bundle, chosen: Sequence[Backend], asked: dict[str, Any], undivided: bool
) -> list[_Entry]:
    """A bundle in each backend, and the undivided UNet beside it where that is wanted and there is one."""
    manifest = bundle.manifest
    needs = BASE_BYTES + int(
        4 * WEIGHTS_TIMES * (manifest.cost["full"].parameters + manifest.cost["adaptor"].parameters)
    )
    entries = []
    for backend in chosen:
        target = backend.target(manifest)
        given = {"bundle": name, "backend": backend.name, **asked}
        function = time_in_browser if backend.in_browser else time_bundle
        has_undivided = target is None or manifest.target(target).unet.model is not None
        runner = Runner(f"{name} in {backend.name}", Call.of(function, **given), needs, asked["threads"])
        entry = _Entry(name, manifest, backend, runner)
        entries.append(entry)
        if not backend.is_installed:
            runner.status, runner.says = "absent", f"not installed: {backend.install}"
        elif backend.targets and target is None:
            there = ", ".join(target.target for target in manifest.targets)
            runner.status, runner.says = "absent", f"runs {' or '.join(backend.targets)} graphs, the bundle has {there}"
        elif undivided and has_undivided and not backend.in_browser:
            call = Call.of(time_bundle, **given, undivided=True)
            entry.undivided = Runner(f"{runner.name}, undivided", call, needs, asked["threads"])
    return entries


def _ledger(entries: Sequence[_Entry], peak: float | None, settings: Settings) -> Ledger:
    contenders: list[Contender] = []
    rows: list[Row] = []
    saved: dict[str, float] = {}
    for entry in entries:
        known = _contender(entry, peak)
        contenders.append(known)
        rows += rows_of(known.bundle, known.backend, entry.runner.parts, known.peak_mib)
        beside = entry.undivided
        # Without its contender the undivided UNet has nothing to be compared with.
        if beside is not None and beside.heard and known.mask:
            parts = {name: samples for name, samples in beside.parts.items() if name.startswith("undivided")}
            rows += rows_of(known.bundle, known.backend, parts, beside.heard[-1].peak_mib)
        if known.ratio is not None:
            alone = len({each.bundle for each in entries}) == 1
            saved[known.backend if alone else f"{known.backend} ({known.bundle})"] = round(known.ratio, 4)
    return Ledger(
        machine=describe_machine(),
        settings=settings,
        peak_gflops=None if peak is None else round(peak, 1),
        contenders=tuple(contenders),
        rows=tuple(rows),
        time_saved_over_flops_saved=saved,
    )


def _contender(entry: _Entry, peak: float | None) -> Contender:
    """What the clock saved, and how near the machine's peak the steps came."""
    runner, beside = entry.runner, entry.undivided
    known = Contender(
        entry.bundle,
        entry.backend.name,
        entry.manifest.source.sha256,
        runner.status,
        runner.says,
        runner.psnr_db,
    )
    without = "" if beside is None else beside.says
    if known.status == "measured" and without:
        known = msgspec.structs.replace(known, says=f"the undivided UNet: {without}")
    parts = runner.parts
    if not parts.get("loop"):
        return known
    last = runner.heard[-1]
    macs = {name: cost.macs + cost.macs_attention for name, cost in entry.manifest.cost.items()}
    flops_saved = 1 - sum(macs["full" if full else "cached"] for full in last.mask) / (len(last.mask) * macs["full"])
    whole = [] if beside is None else beside.parts.get("undivided_loop", [])
    # Each round against itself: what a machine does in the course of a run would not be the clock's doing. A process
    # that died has fewer rounds.
    pairs = zip(parts["loop"], whole or parts["loop_clock1"], strict=False)
    saved = tuple(round(1 - loop / always, 4) for loop, always in pairs)
    return msgspec.structs.replace(
        known,
        mask=last.mask,
        rows=last.rows,
        peak_mib=None if entry.backend.in_browser else last.peak_mib,
        undivided="undivided" if whole else "own",
        flops_saved=round(flops_saved, 4),
        time_saved=round(median(saved), 4),
        time_saved_spread=spread(saved) if len(saved) > 1 else None,
        share_of_peak={
            name: round(2e-9 * last.rows * macs[name] / (1e-3 * median(parts[name])) / peak, 4)
            for name in ("full", "cached")
            if peak is not None and parts.get(name) and entry.backend.on_cpu
        },
    )
