"""What makes images: a bundle in a backend, or a model in torch; they differ in the session behind the one loop.

Noise is drawn by the image's number among all images: image i is the same for any batch and any number of processes
(but for rounding, where a backend adds up in another order), and is image i of `edgediff run` with the same seed and
class.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from edgediff.errors import ConfigError, ModelError, UnsupportedError
from edgediff.evaluate.metrics import MIN_IMAGES
from edgediff.models.classifier import Classifier
from edgediff.models.load import Model, load_model
from edgediff.models.sampling import scheduler_config
from edgediff.models.undivided import undivided_session
from edgediff.targets.backends import BACKENDS, open_session, usual_backend
from edgediff_runtime import EdgePipeline, clock_mask, denoise, make_scheduler, noise, open_bundle
from edgediff_runtime.bundle import MANIFEST
from edgediff_runtime.image import to_uint8
from edgediff_runtime.loop import Request
from edgediff_runtime.manifest import Manifest
from edgediff_runtime.manifest_json import MAX_GUIDANCE
from edgediff_runtime.schedulers import SchedulerConfig, steps_of
from edgediff_runtime.sessions import Session

SCHEDULER = "dpmpp_2m"
STEPS = 8
BATCH = 50
MAX_IMAGES = 1_000_000
TORCH = "torch"

Mask = tuple[bool, ...]
Say = Callable[[str], None]


def check_counts(num_images: int, batch: int) -> None:
    """Raises ConfigError for numbers of images out of range."""
    if not MIN_IMAGES <= num_images <= MAX_IMAGES:
        raise ConfigError(f"num_images is {num_images}; expected {MIN_IMAGES} or more, up to {MAX_IMAGES}")
    check_batch(batch)


def check_batch(batch: int) -> None:
    """Raises ConfigError for a number of images in one generation that is out of range."""
    if batch < 1:
        raise ConfigError(f"batch is {batch}; expected a whole number above 0")


def check_size(classifier: Classifier, home: str | Path, size: int, kind: str) -> None:
    """Refuses, with an UnsupportedError, a classifier of another size than the images of a bundle or model."""
    if classifier.shape.size != size:
        takes, makes = (f"{each}x{each}" for each in (classifier.shape.size, size))
        raise UnsupportedError(f"the classifier in {home} takes {takes} pixels, the {kind} makes {makes}")


def chunks(count: int, batch: int) -> list[range]:
    """Divides 0 to count - 1 into ranges of `batch` numbers, the last of which may be shorter."""
    return [range(i, min(i + batch, count)) for i in range(0, count, batch)]


def check_model(model: Model) -> None:
    """Refuses a model whose images cannot be compared with photographs.

    Raises:
        ConfigError, ModelError: It has no weights, or no scheduler.
        UnsupportedError: It makes latents, or images that are not square or not RGB, is conditioned on text, or
            predicts something besides the image.
    """
    _check_images(model.name, model.conditioning.kind, model.space, model.sample_shape)
    if model.unet.config.out_channels != 3:
        raise UnsupportedError(f"{model.name} gives {model.unet.config.out_channels} channels; expected the 3 it takes")
    if not model.has_weights:
        raise ConfigError(f"{model.name} is a geometry without weights, which makes no images; give a trained model")
    model.check_schedule()


def check_manifest(manifest: Manifest) -> None:
    """Refuses a bundle whose images cannot be compared with photographs with an UnsupportedError.

    That is as for `check_model`, or it draws fresh noise in each step.
    """
    sample = manifest.sample
    shape = (sample.channels, sample.height, sample.width)
    _check_images("the bundle's model", manifest.conditioning.kind, sample.space, shape)
    _check_noise("the bundle's sampler", manifest.scheduler)


def _check_noise(subject: str, scheduler: SchedulerConfig) -> None:
    """Refuses samplers whose images would depend on which are drawn together."""
    if scheduler.draws_noise:
        raise UnsupportedError(
            f"{subject} is {scheduler.name}, which draws fresh noise in every step; expected one that does not, "
            "such as dpmpp_2m"
        )


def _check_images(subject: str, conditioning: str, space: str, shape: tuple[int, ...]) -> None:
    if conditioning == "text":
        raise UnsupportedError(f"{subject} is conditioned on text; expected classes, or no condition")
    if space != "pixel":
        raise UnsupportedError(f"{subject} works on latents and has no decoder; expected a model that makes images")
    channels, height, width = shape
    if channels != 3 or height != width:
        raise UnsupportedError(f"{subject} makes {channels}x{height}x{width}; expected square images of 3 channels")


@dataclass(frozen=True, eq=False)
class Sampler:
    """Makes images; `steps`, `guidance_scale` and `clocks` are what it uses where nothing else is asked for.

    Attributes:
        size: Height and width of the images, in pixels.
        labels: Names of the classes; None where there is no condition.
        null_label: Index of the class that stands for none, where there is one.
        pipe: Of a bundle: it checks requests.
    """

    name: str
    backend: str
    session: Session
    scheduler: SchedulerConfig
    size: int
    labels: tuple[str, ...] | None
    null_label: int | None
    steps: int
    guidance_scale: float
    clocks: tuple[str, ...]
    pipe: EdgePipeline | None = None

    @property
    def kind(self) -> str:
        """``bundle`` or ``model``, for messages."""
        return "model" if self.pipe is None else "bundle"

    @property
    def scheduler_name(self) -> str:
        """The scheduler's name in options."""
        return self.scheduler.recipe_name

    def check(self, clock: str, steps: int, guidance_scale: float, seed: int) -> Mask:
        """Refuses what does not fit, before anything runs; returns the clock's mask, True = full.

        Raises:
            ConfigError: Of a model: the guidance is out of range or needs a null class, or the clock skips steps.
            RequestError: The clock, the number of steps or the seed is out of range, or does not fit the bundle.
        """
        mask = clock_mask(clock, steps, self.scheduler.name)
        if self.pipe is not None:
            label = None if self.labels is None else 0
            self.pipe.stream(
                label=label, num_inference_steps=steps, clock=clock, guidance_scale=guidance_scale, seed=seed
            )
            return mask
        if not all(mask):
            raise ConfigError(f"clock {clock}: a model is sampled with every step full; export it to compare clocks")
        make_scheduler(self.scheduler, steps)
        noise(seed, (1,))
        if not math.isfinite(guidance_scale) or not 0 < guidance_scale <= MAX_GUIDANCE:
            raise ConfigError(f"guidance_scale is {guidance_scale!r}; expected a finite number above 0")
        if guidance_scale > 1 and self.null_label is None:
            raise ConfigError("guidance_scale above 1 needs a null class, which this model does not have; give 1")
        return mask

    def draw(
        self, numbers: Sequence[int], mask: Mask, *, classes: NDArray[np.int64] | None, guidance_scale: float, seed: int
    ) -> NDArray[np.uint8]:
        """Makes the images of these numbers, uint8 [len(numbers), H, W, 3], with what `check` has seen.

        `classes`, int64, are those of all images, not just these; None where there is no condition.

        Raises:
            ConfigError: They need more memory than there is.
            NotFiniteError: The model's output is not finite.
        """
        try:
            graphs = self.session.graphs
            scheduler = make_scheduler(self.scheduler, steps_of(self.scheduler.name, len(mask)))
            latents = np.stack([noise(seed, (3, self.size, self.size), image=int(i)) for i in numbers])
            cond, uncond = {}, {}
            if classes is not None:
                dtype = next(
                    tensor.dtype for graph in graphs for tensor in graph.inputs if tensor.name == "class_labels"
                )
                cond["class_labels"] = classes[np.asarray(numbers)].astype(dtype)
                if guidance_scale > 1:
                    uncond["class_labels"] = np.full(len(numbers), self.null_label, dtype=dtype)
            request = Request(
                graphs=graphs,
                scheduler=scheduler,
                clock=mask,
                guidance=(guidance_scale,) * len(mask),
                latents=latents * np.float32(scheduler.init_noise_sigma),
                cond=cond,
                uncond=uncond,
                seed=seed,
            )
            *_, last = denoise(request, self.session)
            return to_uint8(last.latents)
        except (MemoryError, torch.OutOfMemoryError) as e:
            raise ConfigError(
                f"batch of {len(numbers)} images: too many for the memory of {self.backend}; give a smaller --batch"
            ) from e


def sample_model(model: Model, scheduler: str | None = None, device: torch.device | None = None) -> Sampler:
    """A sampler of a model in torch, every step full; its UNet is moved to the device, the CPU where None.

    Raises as `check_model`; an UnsupportedError also where the scheduler is unknown or cannot be carried over.
    """
    check_model(model)
    config = scheduler_config(model.scheduler, SCHEDULER if scheduler is None else scheduler)
    _check_noise("the scheduler", config)
    known = model.conditioning
    model.unet.to(torch.device("cpu") if device is None else device)
    return Sampler(
        name=model.name,
        backend=TORCH,
        session=undivided_session(model),
        scheduler=config,
        size=model.sample_shape[1],
        labels=known.labels if known.kind == "class" else None,
        null_label=known.null_label,
        steps=STEPS,
        guidance_scale=model.usual_guidance,
        clocks=("1",),
    )


def sample_bundle(path: str | Path, backend: str | None = None, *, warn: bool = True) -> Sampler:
    """A sampler of a bundle in a backend, the usual one where None.

    `warn`: of a generation that is not what the bundle's adaptor was trained for. Errors: as for `open_bundle`,
    `open_session` and `check_manifest`.
    """
    opened = open_bundle(path)
    manifest = opened.manifest
    check_manifest(manifest)
    backend = usual_backend(opened) if backend is None else backend
    session = open_session(opened, backend)
    known, point = manifest.conditioning, manifest.operating_point
    return Sampler(
        name=manifest.source.name,
        backend=backend,
        session=session,
        scheduler=manifest.scheduler,
        size=manifest.sample.height,
        labels=known.labels if known.kind == "class" else None,
        null_label=known.null_label,
        steps=point.num_inference_steps,
        guidance_scale=point.guidance_scale,
        clocks=("1", str(point.clock)),
        pipe=EdgePipeline(manifest, session, warn=warn),
    )


def open_sampler(
    source: str | Path, *, backend: str | None, scheduler: str | None, device: torch.device, warn: bool
) -> Sampler:
    """A sampler of a bundle, a diffusers directory or a built-in model; `backend` is for the first, `scheduler` not.

    Errors: as for `sample_bundle`, `sample_model` and `load_model`; a ConfigError for an option of the other kind.
    """
    if check_source_kind(source, backend, scheduler) == "bundle":
        return sample_bundle(source, backend, warn=warn)
    return sample_model(load_model(source), scheduler, device)


def check_source_kind(source: str | Path, backend: str | None, scheduler: str | None) -> Literal["bundle", "model"]:
    """Whether a source is a bundle or, as far as its files tell, a model.

    Raises:
        ConfigError: An option is for a source of the other kind.
        ModelError: It is a folder of neither kind.
    """
    folder = Path(source)
    if (folder / MANIFEST).is_file():
        if scheduler is not None:
            raise ConfigError(f"scheduler {scheduler} was given, but a bundle has its own; leave it out")
        return "bundle"
    if folder.is_dir() and not any((folder / name).exists() for name in ("unet", "config.json")):
        raise ModelError(f"{source} is neither a bundle, with a {MANIFEST}, nor a model, with unet/config.json")
    if backend not in (None, TORCH):
        known = f"{backend!r} is for bundles" if backend in BACKENDS else f"no backend {backend!r}"
        raise ConfigError(f"{known}; a model is sampled in torch")
    return "model"
