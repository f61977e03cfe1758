"""Exports that are killed at random moments: no half bundle, and the next export clears away what they left."""

import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import snapshot
from conftest import SMALL, save_model
from traces import remembering
from unets import unet2d

import edgediff
from edgediff.bundle.files import check_files
from edgediff.config.floors import VerifyConfig
from edgediff_runtime import open_bundle

KILLS = 20
# Both ways to write, in turn: ONNX through torch.onnx, Core ML through coremltools and its own temporary files.
TARGETS = (("onnx",), ("coreml",))


def _export(model: Path, out: Path, targets: tuple[str, ...], steps: int, temporary: Path, traces: Path) -> None:
    tempfile.tempdir = os.fspath(temporary)
    config = edgediff.ExportConfig(targets=targets, steps=steps, verify=VerifyConfig(mode="graphs"))
    # Tracing writes nothing: an export that does not trace again is mostly moments at which there is something to lose.
    with remembering(traces):
        edgediff.export_bundle(edgediff.load_model(model), out, config, force=True)


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., multiprocessing.process.BaseProcess]]:
    """Starts exports from a process that has imported everything and computed nothing: its forks are quick and safe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["edgediff.export.export_bundle", "coremltools", __name__])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"

    def begin(*args: object) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=_export, args=args)
        process.start()
        return process

    yield begin
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="module")
def smallest_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As few operations as a UNet has that can be cut."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    unet = unet2d(**SMALL | blocks)
    return save_model(unet, tmp_path_factory.mktemp("models") / "smallest")


def test_twenty_exports_killed_at_random_moments(
    start: Callable[..., multiprocessing.process.BaseProcess], smallest_model: Path, place: Path, traces: Path
) -> None:
    temporary = place / "tmp"
    temporary.mkdir()
    beside = (temporary, traces)
    outs = {targets: place / targets[0] for targets in TARGETS}
    # How long an export takes, by the quickest so far: it must not end before it is killed.
    whole = dict.fromkeys(outs, 60.0)
    moments = random.Random(7)
    killed = attempt = 0
    while killed < KILLS:
        steps = 2 + attempt
        if attempt % 2:  # where there is nothing, and over a bundle that is there
            for out in outs.values():
                shutil.rmtree(out, ignore_errors=True)
        before = {out: snapshot(out) if out.exists() else None for out in outs.values()}
        began = time.monotonic()
        running = {targets: start(smallest_model, out, targets, steps, *beside) for targets, out in outs.items()}
        # The first two end by themselves, and say how long that is.
        ends = {targets: moments.uniform(0, whole[targets]) if attempt else 120.0 for targets in running}
        for targets in sorted(running, key=lambda targets: ends[targets]):
            process = running[targets]
            process.join(max(0.0, began + ends[targets] - time.monotonic()))
            if process.exitcode == 0:
                whole[targets] = min(whole[targets], time.monotonic() - began)
            process.kill()
        for process in running.values():
            process.join()
            killed += process.exitcode != 0
        for out, old in before.items():
            if out.exists():
                bundle = open_bundle(out)
                check_files(bundle)
                assert bundle.manifest.operating_point.num_inference_steps == steps or snapshot(out) == old
            else:  # what was there is not lost: it lies aside until the next export puts it back
                assert old is None or list(place.glob(f".{out.name}.edgediff-*.old"))
        attempt += 1
        assert attempt < 3 * KILLS
    running = [start(smallest_model, out, targets, 2, *beside) for targets, out in outs.items()]
    for process in running:
        process.join()
        assert process.exitcode == 0
    for out in outs.values():
        assert edgediff.verify_bundle(out).ok
    assert sorted(path.name for path in place.iterdir()) == ["coreml", "mine.txt", "onnx", "tmp"]
    assert list(temporary.iterdir()) == []
