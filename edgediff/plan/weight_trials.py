"""What storing weights in fewer bits does to the pictures: a whole pipeline in torch, with some weights rounded."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgediff.bundle.reference import Reference
from edgediff.errors import ConfigError, UnsupportedError
from edgediff.export.component_reference import component_inputs
from edgediff.export.prepare import Prepared
from edgediff.models.graphs import graph_list
from edgediff.models.stored_weights import TakenWeights, taken_weights, weights_of
from edgediff.models.torch_pipeline import source_tokenizers
from edgediff.models.torch_session import TorchSession
from edgediff.models.weight_formats import Scales, Stored, store
from edgediff.plan import trajectory
from edgediff_runtime import EdgePipeline
from edgediff_runtime.components import UNET, Components
from edgediff_runtime.manifest import WeightFormat
from edgediff_runtime.pipeline import DECODER
from edgediff_runtime.sessions import Session

# Of final latents and, where a decoder makes them, of pictures.
Errors = NDArray[np.float64]
NUM_IMAGES = 4


@dataclass(frozen=True)
class Place:
    """Where a weight is: the component, and its name there."""

    component: str
    name: str

    def __str__(self) -> str:
        return f"{self.component}/{self.name}"


def psnr_db(errors: Errors | float) -> float:
    """The lower PSNR of latents and pictures, in dB; infinite where nothing differs.

    >>> psnr_db(np.array([1e-5, 1e-4]))
    40.0
    """
    return trajectory.psnr_db(float(np.max(errors)))


class Trials:
    """Draws the same pictures with weights as they are and as they would be stored.

    Attributes:
        weights: The weights that are computed with on the way from a prompt or a class to the pictures.
        others: Those of components that no generation passes through, such as the VAE's encoder.
        fixed_elements: How many elements no format is for: biases, norms.
    """

    def __init__(
        self,
        prepared: Prepared,
        prompts: Sequence[str] | None,
        num_images: int | None = None,
        seed: int = 0,
        scales: Scales = "blocks",
    ) -> None:
        """Takes a model as an export prepared it, and draws the pictures that others are compared with.

        Args:
            prompts: One for each picture; None for a model without text.
            num_images: Pictures of a model without text.
            scales: Where int4 has them in the target.

        Raises:
            ConfigError: The model takes text and has none to measure with, or the other way round.
            UnsupportedError: The pipeline has no text encoder, or the UNet takes an image beside the latent.
        """
        self._prepared, self._scales = prepared, scales
        self._last: dict[Place, tuple[WeightFormat, Stored]] = {}
        model, draft = prepared.model, prepared.draft
        self.takes_text = model.conditioning.kind == "text"
        if self.takes_text and not prompts:
            raise ConfigError(
                f"{model.name} takes text, and weights are measured along its pictures; give prompts, one a line: "
                "--conditioning prompts.txt"
            )
        if self.takes_text and draft.prompt is None:
            raise UnsupportedError(f"{model.name}: it has no text encoder; give the directory of a whole pipeline")
        if prompts and not self.takes_text:
            raise ConfigError(f"{model.name} takes no text; leave the prompts out")
        if draft.sample.in_channels != draft.sample.channels:
            raise UnsupportedError(f"{model.name}: its UNet takes an image beside the latent; supported: text alone")
        self._parts = {name: component.load() for name, component in prepared.components.items()}
        components = prepared.components
        sessions: dict[str, Session] = {
            name: TorchSession({name: part}, (components[name].graph,)) for name, part in self._parts.items()
        }
        sessions[UNET] = TorchSession(prepared.divided.parts, graph_list(prepared.divided, model))
        tokenizers = [] if draft.prompt is None else source_tokenizers(components, draft.prompt)
        self._pipe = EdgePipeline(draft, Components.of(sessions), lambda: tokenizers, warn=False)
        self._request: dict[str, Any] = {"seed": seed}
        self._texts: dict[str, Any] = {"prompt": list(prompts)} if prompts else {}
        if not prompts:
            self._request["num_images"] = NUM_IMAGES if num_images is None else num_images
        # What a generation takes, of all that the components' modules hold.
        adaptor = prepared.adaptor.part
        named = {UNET: weights_of(model.unet, adaptor)} | {n: weights_of(part) for n, part in self._parts.items()}
        with TakenWeights() as taking:
            self._latents, self._pictures = self._draw()
        self.weights = {
            Place(component, name): weight
            for component, held in named.items()
            for name, weight in held.items()
            if id(weight) in taking.taken
        }
        self._embeddings = self._encode()
        self.others = self._not_passed(taking.taken)
        known = {id(weight) for weight in (*self.weights.values(), *self.others.values())}
        modules: list[nn.Module] = [model.unet, adaptor, *self._parts.values()]
        every = {id(p): p.numel() for module in modules for p in module.parameters()}
        passed = {key: count for key, count in every.items() if key not in known and key in taking.taken}
        self.fixed_elements = sum(passed.values())

    def errors(self, changed: Mapping[Place, WeightFormat]) -> Errors:
        """How far latents and pictures are from the unchanged ones with these weights stored so.

        Returns:
            Mean squared difference over the square of the largest value, float64 [1 or 2].
        """
        with self._rounded(changed):
            touched = {place.component for place in changed}
            if touched <= {DECODER}:
                latents, pictures = self._latents, self._pipe.decode(self._latents) if touched else self._pictures
            else:
                latents, pictures = self._draw(texts=not touched <= {UNET, DECODER})
        found = [_error(self._latents, latents)]
        if self._pictures is not None and pictures is not None:
            found.append(_error(self._pictures, pictures))
        return np.array(found)

    @property
    def runs(self) -> str:
        """What is drawn, in words."""
        point, count = self._prepared.draft.operating_point, len(self._latents)
        return f"{count} picture{'s' * (count > 1)} in {point.num_inference_steps} steps, clock {point.clock}"

    @contextmanager
    @torch.no_grad()
    def _rounded(self, changed: Mapping[Place, WeightFormat]) -> Iterator[None]:
        kept = {place: self.weights[place].detach().clone() for place in changed}
        try:
            for place, form in changed.items():
                self.weights[place].copy_(torch.from_numpy(self._stored(place, form, kept[place]).values()))
            yield
        finally:
            for place, weight in kept.items():
                self.weights[place].copy_(weight)

    def _stored(self, place: Place, form: WeightFormat, weight: torch.Tensor) -> Stored:
        """A weight in a format; the last one of each is kept, since plans that are measured in turn share most."""
        known = self._last.get(place)
        if known is None or known[0] != form:
            known = self._last[place] = form, store(weight.float().numpy(), form, str(place), self._scales)
        return known[1]

    def _draw(self, texts: bool = True) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        result = self._pipe(**self._request, **(self._texts if texts else self._embeddings))
        return np.array(result.latents), result.pixels

    def _encode(self) -> dict[str, Any]:
        if not self._texts:
            return {}
        return self._pipe.encode_prompt(**self._texts)

    def _not_passed(self, taken: set[int]) -> dict[Place, nn.Parameter]:
        """The weights of components that have a part of their own in a bundle, and none in a generation."""
        found: dict[Place, nn.Parameter] = {}
        pictures = {} if self._pictures is None else {DECODER: {"sample": self._pictures[:1]}}
        reference = Reference((), self._latents, self._prepared.conditioning, components=pictures)
        for name, component in self._prepared.components.items():
            if component.stage in ("image", "preview"):
                inputs = component_inputs(component, self._prepared.draft, {}, reference)
                own = taken_weights(self._parts[name], inputs)
                found |= {Place(name, key): weight for key, weight in own.items() if id(weight) not in taken}
        return found


def _error(reference: NDArray[np.float32], value: NDArray[np.float32]) -> float:
    if not np.isfinite(value).all():
        return math.inf
    difference = value.astype(np.float64) - reference
    return float(np.mean(difference**2)) / max(float(np.abs(reference).max()) ** 2, 1e-30)
