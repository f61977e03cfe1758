"""optimum-onnx beside edgediff: the parent's side of `optimum_worker.py`, a contender of `against.py`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DPMSolverMultistepScheduler

from edgediff.models.load import Model
from edgediff_runtime.loop import initial_latents


class OptimumOnnx:
    """optimum-onnx's pipeline in a process of its own, asked for one generation at a time."""

    def __init__(self, python: Path, model: Model, request: dict[str, Any], folder: Path) -> None:
        """Hands the model over and waits until it is exported and loaded.

        Args:
            python: The interpreter of an environment with optimum-requirements.txt.
            model: A text-conditioned model.
            request: Of one image: embeddings, steps, guidance and seed.
            folder: Where the model goes.
        """
        assert model.scheduler is not None
        folder.mkdir()
        model.unet.save_pretrained(folder / "unet")
        DPMSolverMultistepScheduler.from_config(model.scheduler.config).save_pretrained(folder / "scheduler")
        np.savez(
            folder / "given.npz",
            prompt_embeds=request["prompt_embeds"],
            negative_prompt_embeds=request["negative_prompt_embeds"],
            latents=initial_latents(request["seed"], 1, model.sample_shape, 1.0),
            steps=request["num_inference_steps"],
            guidance=request["guidance_scale"],
        )
        worker = Path(__file__).with_name("optimum_worker.py")
        self._process = subprocess.Popen(
            [python, worker, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
        )
        assert self._hear() == {"ready": True}

    def __call__(self) -> tuple[float, np.ndarray]:
        """One generation: milliseconds, and its latents."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        said = self._hear()
        return said["ms"], np.load(said["latents"])

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"optimum_worker.py ended with exit code {self._process.wait()}")
        said: dict[str, Any] = json.loads(line)
        return said
