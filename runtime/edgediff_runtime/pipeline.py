"""From a bundle to images: a request is checked here, then the loop runs.

The arguments are diffusers' where diffusers has them. Numbers may be numpy's or torch's, and so may arrays. A pipeline
holds nothing of any generation, so that one object may serve several threads.
"""

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgediff_runtime.bundle import Bundle, open_bundle
from edgediff_runtime.clock import ClockSpec, clock_mask
from edgediff_runtime.errors import OperatingPointWarning, RequestError
from edgediff_runtime.image import to_uint8
from edgediff_runtime.loop import Request, Step, denoise, initial_latents
from edgediff_runtime.manifest import Conditioning, Manifest, Tensor
from edgediff_runtime.manifest_json import MAX_GUIDANCE
from edgediff_runtime.operating_point import departure
from edgediff_runtime.schedulers import make_scheduler
from edgediff_runtime.sessions import Array, Session, open_session

# All images of a generation are in memory at once.
MAX_IMAGES = 4096
NO_LATENTS = np.empty((0,), dtype=np.float32)
Label = str | int | Sequence[str | int] | None
TEXT_INPUTS = ("encoder_hidden_states", "text_embeds", "time_ids")


@dataclass(frozen=True)
class Result:
    """What a generation gave.

    Attributes:
        latents: float32 [N, C, H, W].
        ledger: Each step without its tensors and latents, which would stay in memory.
    """

    latents: Array
    ledger: tuple[Step, ...]
    space: str

    @classmethod
    def of(cls, steps: Iterable[Step], manifest: Manifest) -> "Result":
        """Runs what `EdgePipeline.stream` gave to its end; of the tensors only the last latents are kept."""
        ledger = []
        for step in steps:
            latents = step.latents
            ledger.append(replace(step, tensors=(), latents=NO_LATENTS))
        return cls(latents, tuple(ledger), manifest.sample.space)

    @property
    def images(self) -> Array:
        """The images, uint8 [N, H, W, C].

        Raises:
            RequestError: The bundle has no decoder for its latents.
        """
        if self.space != "pixel":
            raise RequestError("the bundle's model works on latents and has no decoder; take result.latents instead")
        return to_uint8(self.latents)

    @property
    def mask(self) -> tuple[int, ...]:
        """The steps as they were run, 1 = full."""
        return tuple(int(step.full) for step in self.ledger)

    @property
    def ms(self) -> float:
        """Milliseconds of all steps together."""
        return sum(sum(step.ms.values()) for step in self.ledger)


class EdgePipeline:
    """Makes images from a bundle."""

    def __init__(self, manifest: Manifest, session: Session, *, warn: bool = True) -> None:
        """Makes a pipeline of an opened bundle.

        It gives an `OperatingPointWarning`, once, where a generation is not what the adaptor was trained for; not so
        without `warn`.
        """
        self.manifest = manifest
        self.session = session
        # Taken by the first thread that warns and never released.
        self._warning = threading.Lock()
        if not warn:
            self._warning.acquire()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        backend: str = "onnxruntime",
        compute_units: str = "all",
        threads: int | None = None,
    ) -> "EdgePipeline":
        """Opens a bundle.

        Args:
            backend: What runs the graphs, one of `edgediff_runtime.sessions.BACKENDS`.
            compute_units: What Core ML may use: ``all``, ``cpu_only``, ``cpu_and_gpu`` or ``cpu_and_ne``.
            threads: CPU threads of the backend; None takes its own choice. Set it in a container that has fewer cores
                than its host. Core ML has no such choice.

        Raises:
            BundleError: The bundle is damaged, unsafe or of a newer version.
            RequestError: The backend is unknown or not available on this machine, or `threads` is not above 0.
        """
        bundle: Bundle = open_bundle(path)
        return cls(bundle.manifest, open_session(bundle, backend, compute_units, threads))

    def __call__(self, **request: Any) -> Result:
        """Generates images; arguments and errors as in `stream`."""
        return Result.of(self.stream(**request), self.manifest)

    def stream(
        self,
        *,
        label: Label = None,
        prompt: str | None = None,
        prompt_embeds: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        added_cond: Mapping[str, Array] | None = None,
        negative_added_cond: Mapping[str, Array] | None = None,
        concat_latents: Array | None = None,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        clock: ClockSpec | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        seed: int = 0,
    ) -> Iterator[Step]:
        """Generates images step by step; closing the iterator cancels.

        Everything is checked before the first step; what is left out comes from the bundle's operating point.

        Args:
            label: Class of all images, or of each, by name or index; left out, image i gets class i mod their number.
            prompt: Refused until bundles carry a text encoder.
            prompt_embeds: [1, S, D] for all images or [N, S, D].
            negative_prompt_embeds: The same for guidance.
            added_cond: ``text_embeds`` [1 or N, P] and ``time_ids`` [1 or N, K] of SDXL.
            negative_added_cond: The same for guidance; ``time_ids`` left out are those of `added_cond`.
            concat_latents: [1 or N, C', H, W], what an inpainting or editing UNet takes after the latent.
            num_images: N; 1 if left out, or the number of labels or prompt embeddings given.
            num_inference_steps: Denoising steps. A clock left out is then the bundle's period; a bundle whose clock
                is a mask asks for one.
            clock: Period or mask of the full steps.
            guidance_scale: One number from 0, or one for each step; 1 or less runs without guidance.
            seed: 0 to 2^64 - 1.

        Raises:
            RequestError: The request does not fit the bundle.

        Warns:
            OperatingPointWarning: It is not what the bundle's adaptor was trained for; once for each pipeline.
        """
        point = self.manifest.operating_point
        label, num_images, seed = _plain(label), _plain(num_images), _plain(seed)
        guidance_scale = _plain(guidance_scale)
        steps = point.num_inference_steps if num_inference_steps is None else _plain(num_inference_steps)
        scheduler = make_scheduler(self.manifest.scheduler, steps)
        clock = point.clock if clock is None else _plain(clock)
        mask = clock_mask(clock, steps)
        guidance = _guidance(point.guidance_scale if guidance_scale is None else guidance_scale, steps)
        cond, uncond, count = self._conditioning(
            label, prompt, prompt_embeds, negative_prompt_embeds, added_cond, negative_added_cond, num_images,
            guided=any(g > 1 for g in guidance),
        )  # fmt: skip
        sample = self.manifest.sample
        shape = (sample.channels, sample.height, sample.width)
        request = Request(
            graphs=self.session.graphs,
            scheduler=scheduler,
            clock=mask,
            guidance=guidance,
            latents=initial_latents(seed, count, shape, scheduler.init_noise_sigma),
            cond=cond,
            uncond=uncond,
            seed=seed,
            concat=self._concat(concat_latents, count),
        )
        differs = departure(self.manifest, mask, guidance, clock)
        if differs is not None and self._warning.acquire(blocking=False):
            warnings.warn(differs, OperatingPointWarning, stacklevel=2)
        return denoise(request, self.session)

    def _concat(self, given: Array | None, count: int) -> Array | None:
        """Rows of the channels that are concatenated to the latents; None where the UNet takes none."""
        sample = self.manifest.sample
        channels = sample.in_channels - sample.channels
        if not channels:
            if given is not None:
                raise RequestError("concat_latents were given, but the UNet takes the latent alone; leave them out")
            return None
        name = "concat_latents"
        tensor = Tensor(name, "float32", ("batch", channels, sample.height, sample.width))
        arrays = {} if given is None else _arrays(None, {name: given}, "")
        return _rows({name: tensor}, arrays, count, "")[name]

    def _conditioning(
        self,
        label: Label,
        prompt: str | None,
        prompt_embeds: Array | None,
        negative_prompt_embeds: Array | None,
        added_cond: Mapping[str, Array] | None,
        negative_added_cond: Mapping[str, Array] | None,
        num_images: int | None,
        guided: bool,
    ) -> tuple[dict[str, Array], dict[str, Array], int]:
        """Rows of every conditioning tensor: conditional, unconditional, and the number of images."""
        known = self.manifest.conditioning
        if num_images is not None:
            _check_count(num_images)
        if known.kind != "class" and label is not None:
            raise RequestError(
                f"label {label!r} was given, but the model is conditioned on {_what(known)}; leave it out"
            )
        texts = (prompt, prompt_embeds, negative_prompt_embeds, added_cond, negative_added_cond)
        if known.kind != "text" and any(text is not None for text in texts):
            raise RequestError(f"a prompt was given, but the model is conditioned on {_what(known)}; leave it out")
        if prompt is not None:
            raise RequestError(
                "the bundle has no text encoder; give embeddings (prompt_embeds=, or --conditioning FILE), not a prompt"
            )
        if known.kind == "none":
            if guided:
                raise RequestError("guidance_scale is above 1, but the model has no condition; give 1")
            return {}, {}, 1 if num_images is None else num_images
        tensors = {tensor.name: tensor for graph in self.session.graphs for tensor in graph.inputs}
        if known.kind == "class":
            return _classes(known, label, num_images, guided, tensors["class_labels"].dtype)
        needed = {name: tensors[name] for name in TEXT_INPUTS if name in tensors}
        if "class_labels" in tensors:
            needed["class_labels"] = tensors["class_labels"]
        given = _arrays(prompt_embeds, added_cond, "")
        negative = _arrays(negative_prompt_embeds, negative_added_cond, "negative ")
        for same in ("time_ids", "class_labels"):
            if same in given and same not in negative:
                negative[same] = given[same]
        if num_images is None:
            embeds = given.get("encoder_hidden_states")
            num_images = 1 if embeds is None else (*embeds.shape, 1)[0]
            _check_count(num_images)
        count = num_images
        cond = _rows(needed, given, count, "")
        return cond, _rows(needed, negative, count, "negative ") if guided else {}, count


def _classes(
    known: Conditioning, label: Label, num_images: int | None, guided: bool, dtype: str
) -> tuple[dict[str, Array], dict[str, Array], int]:
    labels = known.labels
    one = label is None or (isinstance(label, str | int) and not isinstance(label, bool))
    if not one and (not isinstance(label, Sequence) or isinstance(label, bytes)):
        raise RequestError(f"label is {label!r}; expected a name, an index, or a list with one for each image")
    given = [label] if one else [_plain(entry) for entry in label]  # type: ignore[union-attr]
    count = len(given) if num_images is None else num_images
    _check_count(count)
    given = given * count if one else given
    if len(given) != count:
        raise RequestError(f"label has {len(given)} entries for {count} images; expected one each")
    indices = [i % len(labels) for i in range(count)] if label is None else [_class_index(labels, x) for x in given]
    cond = {"class_labels": np.array(indices, dtype=dtype)}
    if not guided:
        return cond, {}, count
    if known.null_label is None:
        raise RequestError("guidance_scale is above 1, but the model has no null class; give 1")
    return cond, {"class_labels": np.full(count, known.null_label, dtype=dtype)}, count


def _class_index(labels: Sequence[str], label: object) -> int:
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return label
    if label not in labels:
        raise RequestError(f"no label {label!r}; choices: {', '.join(labels)}")
    return labels.index(str(label))


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy or torch as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _arrays(embeds: object, added: object, which: str) -> dict[str, Array]:
    """Conditioning tensors by name, as numpy arrays; torch's may have gradients or be bfloat16."""
    if not isinstance(added, Mapping | None):
        raise RequestError(f"{which}added_cond is a {type(added).__name__}; expected arrays by name")
    arrays: dict[str, Array] = {}
    for name, value in {"encoder_hidden_states": embeds, **(added or {})}.items():
        if value is None:
            continue
        tensor: Any = value
        if hasattr(tensor, "detach"):
            tensor = tensor.detach().cpu()
            tensor = tensor.float() if tensor.is_floating_point() else tensor
        try:
            arrays[name] = np.asarray(tensor)
        except (TypeError, ValueError) as e:  # rows of different lengths
            raise RequestError(f"{which}{name} is not an array ({e}); expected numbers in rows of one length") from e
    return arrays


def _rows(needed: Mapping[str, Tensor], given: Mapping[str, Array], count: int, which: str) -> dict[str, Array]:
    """Checks arrays against the graphs' inputs and repeats single rows for every image."""
    unknown = sorted(set(given) - set(needed))
    if unknown:
        raise RequestError(f"{which}{unknown[0]} is not an input of this model; it takes {', '.join(needed)}")
    rows: dict[str, Array] = {}
    for name, tensor in needed.items():
        array = given.get(name)
        if array is None:
            argument = {"encoder_hidden_states": "prompt_embeds"}.get(name, name)
            raise RequestError(f"the model needs {which}{argument} of shape {_spell(tensor.shape)}")
        if array.dtype.kind not in "biuf":
            raise RequestError(f"{which}{name} holds {array.dtype.name}; expected numbers")
        if array.shape[1:] != tensor.shape[1:] or array.ndim != len(tensor.shape) or len(array) not in (1, count):
            raise RequestError(
                f"{which}{name} has shape {list(array.shape)}; expected {_spell(tensor.shape)} with 1 or {count} rows"
            )
        if not np.isfinite(array).all():
            raise RequestError(f"{which}{name} holds NaN or infinity")
        array = _cast(array, tensor.dtype, f"{which}{name}")
        rows[name] = np.ascontiguousarray(np.broadcast_to(array, (count, *array.shape[1:])))
    return rows


def _cast(array: Array, dtype: str, name: str) -> Array:
    with np.errstate(over="ignore"):
        cast: Array = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise RequestError(f"{name} has numbers beyond the range of {dtype}")
    return cast


def _guidance(scale: float | Sequence[float], steps: int) -> tuple[float, ...]:
    scales: list[Any] = list(scale) if isinstance(scale, list | tuple) else [scale] * steps
    if len(scales) != steps:
        raise RequestError(f"guidance_scale has {len(scales)} entries for {steps} steps; expected one each")
    for value in scales:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_GUIDANCE:
            raise RequestError(f"guidance_scale is {value!r}; expected a finite number from 0; 1 or less is off")
    return tuple(float(value) for value in scales)


def _check_count(num_images: int) -> None:
    if isinstance(num_images, bool) or not isinstance(num_images, int) or not 1 <= num_images <= MAX_IMAGES:
        raise RequestError(f"num_images is {num_images!r}; expected a whole number above 0, {MAX_IMAGES} at most")


def _spell(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def _what(known: Conditioning) -> str:
    return {"none": "nothing", "class": "classes (label=)", "text": "text (prompt_embeds=)"}[known.kind]
