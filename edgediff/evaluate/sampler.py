"""What makes images: a bundle in a backend, or a model in torch; they differ in the session behind the one loop."""

import math
from pathlib import Path

import torch

from edgediff.errors import ConfigError, ModelError
from edgediff.evaluate.comparable import check_manifest, check_model
from edgediff.models.conditioning import usual_guidance
from edgediff.models.load import Model, load_model
from edgediff.models.sampling import scheduler_config
from edgediff.models.undivided import undivided_session
from edgediff.targets.backends import BACKENDS, open_session, usual_backend
from edgediff_runtime import EdgePipeline, clock_mask, make_scheduler, noise, open_bundle
from edgediff_runtime.bundle import MANIFEST
from edgediff_runtime.manifest import Manifest
from edgediff_runtime.manifest_json import MAX_GUIDANCE
from edgediff_runtime.schedulers import SchedulerConfig
from edgediff_runtime.sessions import Session

SCHEDULER = "dpmpp_2m"
STEPS = 8
TORCH = "torch"


class Sampler:
    """Makes images, and says what it is and how it is sampled where nothing else is asked for.

    Attributes:
        name: Built-in name, or the directory's name.
        built_in: Whether it is, or was made of, a built-in model.
        kind: ``bundle`` or ``model``, for messages.
        backend: What runs the graphs.
        session: The same, opened.
        scheduler: How it is sampled.
        size: Height and width of the images, in pixels.
        labels: Names of the classes; None where there is no condition.
        null_label: Index of the class that stands for none, where there is one.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is off.
        clocks: Periods or masks.
    """

    name: str
    built_in: bool
    kind = "model"
    backend: str
    session: Session
    scheduler: SchedulerConfig
    size: int
    labels: tuple[str, ...] | None
    null_label: int | None
    steps = STEPS
    guidance_scale: float
    clocks: tuple[str, ...] = ("1",)

    def __init__(self, model: Model, scheduler: str | None = None, device: torch.device | None = None) -> None:
        """Takes a model, whose every step is full.

        Args:
            model: The model; its UNet is moved to the device.
            scheduler: One of `edgediff.models.sampling.SCHEDULERS`; dpmpp_2m where None.
            device: Where it runs; the CPU where None.

        Raises:
            ConfigError: It is a geometry without weights.
            ModelError: It has no scheduler.
            UnsupportedError: It makes no photographs, or the scheduler is unknown or cannot be carried over.
        """
        self.size = check_model(model)
        known = model.conditioning
        self.name = model.name
        self.backend = TORCH
        self.scheduler = scheduler_config(model.scheduler, SCHEDULER if scheduler is None else scheduler)
        model.unet.to(torch.device("cpu") if device is None else device)
        self.session = undivided_session(model)
        self.labels = known.labels if known.kind == "class" else None
        self.null_label = known.null_label
        self.guidance_scale = usual_guidance(known)

    def check(self, clock: str, steps: int, guidance_scale: float, seed: int) -> tuple[bool, ...]:
        """Refuses what does not fit, before anything runs.

        Args:
            clock: Period or mask of the full steps.
            steps: Denoising steps.
            guidance_scale: Classifier-free guidance; 1 is off.
            seed: 0 to 2^64 - 1.

        Returns:
            The clock spelt out, True = full.

        Raises:
            ConfigError: The guidance is no number above 0 or lacks a null class, or the clock leaves steps out.
            RequestError: The clock, the number of steps or the seed is none.
        """
        mask = clock_mask(clock, steps)
        if not all(mask):
            raise ConfigError(
                f"clock {clock}: a model is sampled with every step full; export a bundle to compare clocks"
            )
        make_scheduler(self.scheduler, steps)
        noise(seed, (1,))
        if not math.isfinite(guidance_scale) or not 0 < guidance_scale <= MAX_GUIDANCE:
            raise ConfigError(f"guidance_scale is {guidance_scale!r}; expected a finite number above 0")
        if guidance_scale > 1 and self.null_label is None:
            raise ConfigError("guidance_scale above 1 needs a null class, which this model does not have; give 1")
        return mask

    @property
    def scheduler_name(self) -> str:
        """The scheduler by the name that options have for it."""
        return self.scheduler.name + ("_karras" if self.scheduler.use_karras_sigmas else "")


class BundleSampler(Sampler):
    """A bundle, through one of its backends."""

    kind = "bundle"

    def __init__(self, path: str | Path, backend: str | None = None, *, warn: bool = True) -> None:
        """Opens a bundle.

        Args:
            path: The bundle.
            backend: What runs the graphs; the usual one where None.
            warn: Give a warning where a generation is not what the bundle's adaptor was trained for.

        Raises:
            BundleError: It is damaged.
            RequestError: The backend is unknown, or not to be had on this machine.
            UnsupportedError: It makes no photographs.
        """
        opened = open_bundle(path)
        self._manifest: Manifest = opened.manifest
        self.size = check_manifest(self._manifest)
        self.backend = usual_backend(opened) if backend is None else backend
        self.session = open_session(opened, self.backend)
        self._pipe = EdgePipeline(self._manifest, self.session, warn=warn)
        source, known, point = self._manifest.source, self._manifest.conditioning, self._manifest.operating_point
        self.name = source.name
        self.scheduler = self._manifest.scheduler
        self.labels = known.labels if known.kind == "class" else None
        self.null_label = known.null_label
        self.steps, self.guidance_scale = point.num_inference_steps, point.guidance_scale
        self.clocks = ("1", str(point.clock))

    def check(self, clock: str, steps: int, guidance_scale: float, seed: int) -> tuple[bool, ...]:
        """Refuses what does not fit, in the pipeline's words.

        Raises:
            RequestError: What was asked does not fit the bundle.
        """
        mask = clock_mask(clock, steps)
        label = None if self.labels is None else 0
        self._pipe.stream(label=label, num_inference_steps=steps, clock=clock, guidance_scale=guidance_scale, seed=seed)
        return mask


def open_sampler(
    source: str | Path,
    *,
    backend: str | None = None,
    scheduler: str | None = None,
    device: torch.device | None = None,
    warn: bool = True,
) -> Sampler:
    """Opens what makes the images.

    Args:
        source: A bundle, a diffusers directory, or a built-in name.
        backend: Of a bundle; a model's is torch.
        scheduler: Of a model; a bundle brings its own.
        device: Where a model runs; the CPU where None.
        warn: Give a warning where a generation is not what a bundle's adaptor was trained for.

    Returns:
        The sampler.

    Raises:
        BundleError: The bundle is damaged.
        ConfigError: An option is for the other of the two, or the model has no weights.
        ModelError: There is no such model, it cannot be read, or has no scheduler.
        RequestError: The backend is unknown, or not to be had on this machine.
        UnsupportedError: It makes no photographs, or its scheduler is not handled.
    """
    folder = Path(source)
    if (folder / MANIFEST).is_file():
        if scheduler is not None:
            raise ConfigError(f"scheduler {scheduler} was given, but a bundle brings its own; leave it out")
        return BundleSampler(folder, backend, warn=warn)
    if folder.is_dir() and not any((folder / name).exists() for name in ("unet", "config.json")):
        raise ModelError(
            f"{source} is neither a bundle, which has a {MANIFEST}, nor a model, which has unet/config.json"
        )
    if backend not in (None, TORCH):
        known = f"{backend!r} is for bundles" if backend in BACKENDS else f"no backend {backend!r}"
        raise ConfigError(f"{known}; a model is sampled in torch")
    return Sampler(load_model(source), scheduler, device)
