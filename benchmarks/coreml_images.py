"""Do Core ML packages make the images that ONNX Runtime makes? grocery-32, 8 steps, clock 2, 4 images, evaluated here.

The bars: 60 dB in fp32, 30 dB in fp16, over uint8 images; and evaluating a full step takes at most 20 times as long as
torch eager. The evaluator is a model of the device: a phone's own figures come from a phone.
"""

import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from measure import machine, spread

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.targets.backends import open_session
from edgediff.targets.coreml import CoreMLConfig
from edgediff_runtime import EdgePipeline, open_bundle

IMAGES = 4
ROUNDS = 15
DB = {"fp32": 60.0, "fp16": 30.0}
TIMES = 20.0


def main() -> None:
    """Exports both targets, compares their images, then times the evaluator and torch in turn."""
    print(machine())
    model = edgediff.load_model("grocery-32")
    for dtype, bar in DB.items():
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            config = edgediff.ExportConfig(targets=("onnx", "coreml"), coreml=CoreMLConfig(dtype=dtype, layout="pair"))
            edgediff.export_bundle(model, bundle, config)
            opened = open_bundle(bundle)
            session = open_session(opened, "mil-reference")
            asked = {"num_images": IMAGES, "num_inference_steps": 8, "clock": 2, "seed": 0}
            want = EdgePipeline.from_pretrained(bundle)(**asked)
            got = EdgePipeline(opened.manifest, session)(**asked)
            number = psnr_db(want.images.astype(np.float32), got.images.astype(np.float32))
            off = np.abs(want.images.astype(int) - got.images.astype(int))
            print(f"{dtype}: images {number:.1f} dB (bar: {bar:.0f}) {'ok' if number >= bar else 'MISSED'}, "
                  f"{np.mean(off > 0):.2%} of the bytes differ, by {off.max()} at most; "
                  f"latents {psnr_db(want.latents, got.latents):.1f} dB")  # fmt: skip
            measure(model, session, dtype)


def measure(model: edgediff.Model, session: object, dtype: str) -> None:
    """Times a full step of two rows, evaluated and in torch eager, interleaved."""
    function = session.functions["full"]  # type: ignore[attr-defined]
    sample, labels = torch.randn(2, *model.sample_shape), torch.tensor([1, 2])
    given = {"sample": sample, "timestep": torch.tensor([500.0]), "class_labels": labels.to(torch.int32)}
    evaluated, eager = [], []
    with torch.no_grad():
        for _ in range(ROUNDS):
            start = perf_counter()
            function.run(given)
            evaluated.append(1e3 * (perf_counter() - start))
            start = perf_counter()
            model.unet(sample, 500.0, class_labels=labels)
            eager.append(1e3 * (perf_counter() - start))
    times = float(np.median([a / b for a, b in zip(evaluated, eager, strict=True)]))
    print(f"{dtype}: a full step of 2 rows, ms: {spread(evaluated)} evaluated, {spread(eager)} in torch eager, "
          f"{times:.1f} times (bar: {TIMES:.0f}) {'ok' if times <= TIMES else 'MISSED'}")  # fmt: skip


if __name__ == "__main__":
    main()
