"""What the Python runtime makes of small edits, for the browser's library: runtime/web/test/edits.json.

`python tests/test_web_edits.py` writes the file again.
"""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from web_pages import GOLDEN

from edgediff_runtime import EdgePipeline
from edgediff_runtime.editing import feathered, from_vae, read_edit
from edgediff_runtime.manifest import Sample, Vae
from edgediff_runtime.pictures import images_of, masks_of

ANSWERS = Path(__file__).parents[1] / "runtime/web/test/edits.json"
SIDE = 8  # of the golden bundle's pictures, which are latents too


def answers() -> dict[str, Any]:
    """Inputs and what the Python runtime makes of them, as JSON has them."""
    rng = np.random.default_rng(5)
    masks = rng.random((2, 6, 8)) < 0.9
    depth = (10 * rng.random((5, 7))).round(2).astype(np.float32)
    sample = Sample(channels=4, in_channels=5, height=4, width=6, space="latent", concat=("depth",))
    rgba = rng.integers(0, 256, (4, 5, 4), dtype=np.uint8)
    rgba[:2, :, 3] = 255
    pillow = Image.fromarray(rgba, "RGBA")
    given = rng.normal(size=(2, 2, 2, 1)).astype(np.float32)
    plain = Vae(scaling_factor=0.18215, downscale=8)
    moved = Vae(scaling_factor=0.5, downscale=8, mean=(0.25, -1.0), std=(1.5, 0.75))
    return {
        "feather": {
            "shape": list(masks.shape),
            "masks": _bytes(masks),
            "alpha": {str(n): _numbers(feathered(masks, n)) for n in (0, 1, 2)},
        },
        "depth": {
            "map": depth.tolist(),
            "size": [4, 6],
            "scaled": _numbers(read_edit(sample, (4, 6), 8, depth_map=depth).depth),
        },
        "rgba": {
            "width": 5,
            "height": 4,
            "data": _bytes(rgba),
            "image": _bytes(images_of(pillow, 4, 5)),
            "mask": _bytes(masks_of(pillow, 4, 5, pillow)),
        },
        "latents": {
            "given": _numbers(given),
            "shape": list(given.shape),
            "cases": [
                {
                    "vae": {"scaling_factor": vae.scaling_factor, "downscale": 8, "mean": vae.mean, "std": vae.std},
                    "scaled": _numbers(from_vae(vae, given)),
                }
                for vae in (plain, moved)
            ],
        },
        "bundle": _edits(rng),
    }


def _edits(rng: np.random.Generator) -> dict[str, Any]:
    """Edits with the golden bundle: requests in JavaScript's words, and pictures."""
    pipe = EdgePipeline.from_pretrained(GOLDEN)
    images = rng.integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[2:7, 1:6] = 255
    cases = [
        ({"strength": 0.75, "clock": 2}, ["image"]),
        ({"clock": "1,0,1,0,1,0", "steps": 8, "label": "round"}, ["image"]),
        ({"strength": 0.75, "clock": 2}, ["image", "mask"]),
        ({"clock": 2, "paste": True, "feather": 1}, ["image", "mask"]),
        ({"strength": 0.5, "clock": 1, "guidance": [3.0, 1.0], "paste": True}, ["images", "mask"]),
    ]
    made = []
    for asked, pictures in cases:
        steps = asked.get("steps", 4)
        result = pipe(
            label=asked.get("label", "square"),
            seed=7,
            num_inference_steps=steps,
            clock=asked["clock"],
            guidance_scale=asked.get("guidance", 2.0),
            image=images if "images" in pictures else images[0],
            mask_image=mask if "mask" in pictures else None,
            strength=asked.get("strength"),
            paste=asked.get("paste", False),
            feather=asked.get("feather", 0),
        )
        made.append(
            {
                "asked": asked,
                "pictures": pictures,
                "index": result.ledger[0].index,
                "mask": result.mask,
                "images": _bytes(result.images),
            }
        )
    return {"images": _bytes(images), "mask": _bytes(mask), "cases": made}


def _numbers(values: Any) -> list[float]:
    return [float(f"{value:.8g}") for value in np.asarray(values).reshape(-1).tolist()]


def _bytes(values: Any) -> dict[str, str]:
    return {"base64": base64.b64encode(np.asarray(values).astype(np.uint8).tobytes()).decode()}


def _close(found: Any, written: Any) -> bool:
    """Whether nested values are equal, numbers within 1e-5, and bytes within 1: each machine adds in its own order."""
    if isinstance(written, dict) and "base64" in written:
        return _close(*(list(base64.b64decode(each["base64"])) for each in (found, written)))
    if isinstance(written, dict):
        return found.keys() == written.keys() and all(_close(found[key], written[key]) for key in written)
    if isinstance(written, list | tuple):
        return len(found) == len(written) and all(map(_close, found, written))
    if isinstance(written, float):
        return bool(np.isclose(found, written, rtol=1e-5, atol=1e-5))
    if isinstance(written, int) and not isinstance(written, bool):
        return abs(found - written) <= 1
    return bool(found == written)


def test_the_browsers_answers_are_the_python_runtimes() -> None:
    assert _close(json.loads(json.dumps(answers())), json.loads(ANSWERS.read_text()))


if __name__ == "__main__":
    sections = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in answers().items())
    ANSWERS.write_text(f"{{\n{sections}\n}}\n")
