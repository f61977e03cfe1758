"""Do Core ML packages make ONNX Runtime's images, what does evaluating them cost, and how large are they? grocery-32.

The bars: 60 dB in fp32 and 30 dB in fp16 over uint8 images; evaluating takes at most 20 times as long as torch eager;
a package of two functions is at most 1.10 times the parts' packages. The evaluator is a model of the device: a phone's
own times come from a phone.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from measure import exported, machine, ratios, spread, verdict

from edgediff.bench.run_bench import run_bench
from edgediff.bundle.psnr import psnr_db
from edgediff.targets.backends import open_session
from edgediff.targets.coreml import CoreMLConfig
from edgediff_runtime import EdgePipeline, open_bundle

MODEL = "grocery-32"
ASKED = {"num_images": 4, "num_inference_steps": 8, "clock": 2, "seed": 0}
DB = {"fp32": 60.0, "fp16": 30.0}
TIMES = 20.0
SIZE = 1.10


def main() -> None:
    """Exports, compares images, times, and adds up files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DB:
            config = CoreMLConfig(dtype=dtype, layout="pair")
            pair = Path(exported(MODEL, Path(folder) / dtype, targets=("onnx", "coreml"), coreml=config))
            images(pair, dtype)
            times(pair, dtype, rounds)
        split = Path(exported(MODEL, Path(folder) / "split", targets=("coreml",), coreml=CoreMLConfig(layout="split")))
        ratio = size(pair) / size(split)
        print(f"one package of two functions: {size(pair):,} bytes, {ratio:.3f} of the parts' (bar: {SIZE:.2f}) "
              f"{verdict(ratio <= SIZE)}")  # fmt: skip


def images(bundle: Path, dtype: str) -> None:
    """Compares the evaluator's images with ONNX Runtime's."""
    opened = open_bundle(bundle)
    want = EdgePipeline.from_pretrained(bundle)(**ASKED)
    got = EdgePipeline(opened.manifest, open_session(opened, "mil-reference"))(**ASKED)
    near = psnr_db(want.images.astype(np.float32), got.images.astype(np.float32))
    off = np.abs(want.images.astype(int) - got.images.astype(int))
    print(f"{dtype}: images {near:.1f} dB (bar: {DB[dtype]:.0f}) {verdict(near >= DB[dtype])}, {np.mean(off > 0):.2%} "
          f"of the bytes differ, by {off.max()} at most; latents "
          f"{psnr_db(want.latents, got.latents):.1f} dB")  # fmt: skip


def times(bundle: Path, dtype: str, rounds: int) -> None:
    """Times full steps of two rows, evaluated and in torch eager."""
    found = run_bench([bundle], ["mil-reference", "torch"], rounds=rounds)
    rows = {(row.backend, row.part): list(row.samples_ms) for row in found.rows}
    evaluated, eager = rows["mil-reference", "loop_clock1"], rows["torch", "undivided_loop"]
    share = ratios(evaluated, eager)
    print(f"{dtype}: all steps full, ms: {spread(evaluated)} evaluated, {spread(eager)} in torch eager, "
          f"{spread(share)} times (bar: {TIMES:.0f}) {verdict(median(share) <= TIMES)}")  # fmt: skip


def size(bundle: Path) -> int:
    """Bytes of a bundle's Core ML packages."""
    return sum(file.stat().st_size for file in (bundle / "coreml").rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
