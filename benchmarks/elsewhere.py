"""Do the trees of a bundle open elsewhere, unconverted, and draw the same picture? optimum-onnx and OpenVINO GenAI.

Small Stable Diffusion pipelines of random weights, 1.x and XL, or those that are named. Both draw from the latents that
the runtime begins with, every step full. The bars: 60 dB of the runtime's picture for optimum-onnx, and 40 dB for
GenAI, which gives bytes. Each runs in an environment of its own: optimum-requirements.txt, genai-requirements.txt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

DB = {"optimum": 60.0, "genai": 40.0}
TARGET = {"optimum": "onnx", "genai": "openvino"}
# GenAI does not know DPM-Solver++, nor DDIM that clips.
REQUEST = {"prompt": "a red apple", "negative_prompt": "", "num_inference_steps": 4, "guidance_scale": 5.0}
SEED = 0


def main() -> None:
    """Exports each pipeline, and hands its trees to the readers whose Python is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="pipelines; left out, small ones are made")
    for name in DB:
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"the Python of {name}'s environment")
    parser.add_argument("--read", choices=DB, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read is not None:
        read(asked.read, asked.models[0])
        return
    pythons = {name: getattr(asked, name) for name in DB if getattr(asked, name) is not None}
    from measure import machine

    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        for model in asked.models or small_pipelines(Path(folder)):
            bundle = Path(folder) / f"{model.name}-bundle"
            shown(model, bundle, pythons)


def small_pipelines(folder: Path) -> list[Path]:
    """Two pipelines of random weights, as the tests make them."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from tiny_pipelines import SAVE

    SAVE["sd1-up"](folder / "sd1")
    SAVE["xl"](folder / "xl")
    return [folder / name for name in ("sd1", "xl")]


def shown(model: Path, bundle: Path, pythons: dict[str, str]) -> None:
    """Exports a pipeline and prints a row for each reader."""
    import edgediff
    from edgediff.bundle.psnr import psnr_db
    from edgediff.config.floors import VerifyConfig
    from edgediff_runtime import EdgePipeline, noise

    config = edgediff.ExportConfig(
        targets=tuple(TARGET[name] for name in pythons), scheduler="euler", clock=1, adaptor="identity", layout="split",
        steps=REQUEST["num_inference_steps"], guidance_scale=REQUEST["guidance_scale"],
        verify=VerifyConfig(mode="graphs"),
    )  # fmt: skip
    edgediff.export_bundle(edgediff.load_model(str(model)), bundle, config)
    for name, python in pythons.items():
        backend = {"onnx": "onnxruntime"}.get(TARGET[name], TARGET[name])
        pipe = EdgePipeline.from_pretrained(bundle, backend=backend)
        sample = pipe.manifest.sample
        pixels = pipe(**REQUEST, seed=SEED, clock=1, num_images=1).pixels
        assert pixels is not None
        want = np.clip(pixels / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
        latents = noise(SEED, (sample.channels, sample.height, sample.width), image=0)[None]
        np.savez(bundle / "given.npz", latents=latents, size=np.array(want.shape[1:3]))
        command = [python, "-I", __file__, str(bundle), "--read", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {model.name} | {name} | does not open: {done.stderr.strip().splitlines()[-1]} | MISSED |")
            continue
        made = np.load(bundle / "made.npy")
        number = psnr_db(want, made)
        print(f"| {model.name} | {name} | {number:.1f} dB | {'ok' if number >= DB[name] else 'MISSED'} |", flush=True)


def read(name: str, bundle: Path) -> None:
    """Draws with another tool's pipeline, in its own environment: float32 [1, H, W, 3], 0 to 1, to made.npy."""
    given = np.load(bundle / "given.npz")
    height, width = map(int, given["size"])
    tree, size = bundle / TARGET[name], {"height": height, "width": width}
    kind = json.loads((tree / "model_index.json").read_text())["_class_name"]
    draw = draw_in_optimum if name == "optimum" else draw_in_genai
    np.save(bundle / "made.npy", draw(tree, kind, given["latents"], REQUEST | size).astype(np.float32))


def draw_in_optimum(tree: Path, kind: str, latents: np.ndarray, request: dict[str, Any]) -> np.ndarray:
    """The picture of optimum-onnx."""
    import optimum.onnxruntime
    import torch

    pipe = getattr(optimum.onnxruntime, f"ORT{kind}").from_pretrained(tree, provider="CPUExecutionProvider")
    images: np.ndarray = pipe(**request, latents=torch.from_numpy(latents), output_type="np").images
    return images


def draw_in_genai(tree: Path, kind: str, latents: np.ndarray, request: dict[str, Any]) -> np.ndarray:
    """The picture of OpenVINO GenAI."""
    import openvino
    import openvino_genai

    class Given(openvino_genai.Generator):  # type: ignore[misc,unused-ignore]
        """Gives the latents as if it had drawn them."""

        def __init__(self) -> None:
            openvino_genai.Generator.__init__(self)

        def next(self) -> float:
            """Nothing else is drawn."""
            raise AssertionError("GenAI draws one number where a whole tensor was expected")

        def randn_tensor(self, shape: Any) -> Any:
            """The latents."""
            assert list(shape) == list(latents.shape)
            return openvino.Tensor(latents)

    pipe = openvino_genai.Text2ImagePipeline(tree, "CPU")
    return np.array(pipe.generate(**request, generator=Given()).data) / 255


if __name__ == "__main__":
    main()
