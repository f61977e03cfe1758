"""From a bundle to images: a request is checked, the prompt is encoded, the loop runs, the decoder makes pictures.

The arguments are diffusers' where diffusers has them. Numbers may be numpy's or torch's, and so may arrays. A pipeline
holds nothing of any generation, so that one object may serve several threads.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from edgediff_runtime.bundle import Bundle, open_bundle
from edgediff_runtime.clock import ClockSpec, calls_in_words, clock_mask, remaining_clock
from edgediff_runtime.components import UNET, Components
from edgediff_runtime.conditioning import (
    Label,
    Text,
    Texts,
    arrays,
    as_array,
    check_count,
    class_rows,
    guidance_embedding,
    plain,
    repeated,
    rows_of,
    spell_shape,
    time_ids,
)
from edgediff_runtime.decoding import OVERLAP, decode
from edgediff_runtime.editing import Edit, as_pixels, begin, encode, from_vae, in_words, read_edit, steps_left_out
from edgediff_runtime.errors import BundleError, OperatingPointWarning, RequestError
from edgediff_runtime.image import NO_PREVIEW, to_uint8
from edgediff_runtime.injection import check_injection, source_of
from edgediff_runtime.inversion import DDIM, Inverted, inverse_scheduler
from edgediff_runtime.loop import Request, Step, denoise, initial_latents
from edgediff_runtime.low_rank import Lora, spread_over_inputs
from edgediff_runtime.manifest import (
    CONTROL_IMAGE,
    CONTROLNET,
    GUIDANCE,
    T2I_ADAPTER,
    TEXT,
    TOKENS,
    Conditioning,
    Graph,
    Manifest,
    Tensor,
    has_rows,
    operations_saved,
)
from edgediff_runtime.manifest_json import MAX_GUIDANCE
from edgediff_runtime.memory import Usage, available_bytes
from edgediff_runtime.operating_point import departure
from edgediff_runtime.pictures import images_of
from edgediff_runtime.schedulers import make_scheduler, sampler_of, with_sampler
from edgediff_runtime.sessions import TARGETS_OF, Array, Session, check_backend, check_cache, open_session
from edgediff_runtime.steering import steer
from edgediff_runtime.text_encoding import TextStage, Tokenizer, run_one

NO_LATENTS = np.empty((0,), dtype=np.float32)
TEXT_INPUTS = (TEXT, "text_embeds", "time_ids")
DECODER = "vae_decoder"
ENCODER = "vae_encoder"
PREVIEW = "preview_decoder"
RGB = 3


class Condition(TypedDict, total=False):
    """What of `Arguments` says what a picture shows, and its size."""

    label: Label
    prompt: Text
    negative_prompt: Text
    prompt_2: Text
    negative_prompt_2: Text
    clip_skip: int
    emphasis: bool
    prompt_embeds: Array | None
    negative_prompt_embeds: Array | None
    added_cond: Mapping[str, Array] | None
    negative_added_cond: Mapping[str, Array] | None
    concat_latents: Array | None
    lora: Lora | Sequence[Lora] | None
    lora_scale: float | Sequence[float] | None
    height: int | None
    width: int | None


class Arguments(Condition, total=False):
    """What a generation is asked for; what is left out comes from the bundle's operating point.

    Attributes:
        label: Class of all images, or of each, by name or index; left out, image i gets class i mod their number.
        prompt: A text for all images, or a list with one for each.
        negative_prompt: What guidance leads away from, the same way.
        prompt_2: What the second text encoder is told instead; also ``negative_prompt_2``.
        clip_skip: How many layers are left out at the end of the text encoder, from 0.
        emphasis: False takes brackets in prompts as characters; else ``(word:1.2)`` and ``[word]`` are weights.
        prompt_embeds: [1, S, D] for all images or [N, S, D], instead of a prompt.
        negative_prompt_embeds: The same for guidance.
        added_cond: ``text_embeds`` [1 or N, P] and ``time_ids`` [1 or N, K] of SDXL.
        negative_added_cond: The same for guidance; ``time_ids`` left out are those of `added_cond`.
        concat_latents: [1 or N, C', H, W], what an inpainting or editing UNet takes after the latent.
        lora: A file that ``edgediff lora`` wrote, or a mapping of what is in one, for a bundle whose graphs take
            low-rank factors; or a list, of which the ranks add up.
        lora_scale: What a LoRA is multiplied by, 1 if left out; or a number for each.
        latents: [1 or N, C, H, W], what a generation begins with in place of noise of its own; standard normal, as of
            `invert`. Not with an image, unless the loop begins with noise alone.
        num_images: N; if left out, the number of labels, prompts, embeddings, pictures or latents given, or 1.
        num_inference_steps: Denoising steps. A clock left out is then the bundle's period; a bundle whose clock
            is a mask asks for one.
        scheduler: Another sampler than the bundle's, one of `edgediff_runtime.schedulers.SCHEDULER_NAMES`.
        clock: Period or mask of the full steps; a mask has an entry for each call of the UNet that is run.
        guidance_scale: One number from 0, or one for each call of the UNet that is run; 1 or less is without guidance.
        seed: 0 to 2^64 - 1.
        image: What editing begins with: pictures of Pillow's, scaled and cut to the size that is drawn, or uint8
            [h, w, 3] or [N, h, w, 3] of that size.
        mask_image: Where it is drawn anew: of the same sizes, half white and more; uint8 or bool [h, w] or [N, h, w].
        strength: Share of the steps that run, 0 to 1; left out, 0.8, or 1 with a mask.
        image_guidance_scale: How far a UNet that follows instructions keeps to the image; 1.5 if left out.
        depth_map: Numbers [h, w] or [N, h, w], or pictures of Pillow's, the nearer the larger, for a UNet of depth.
        control_image: What a bundle's ControlNet or T2I-Adapter draws by: as `image`; left out, it does not run. Of a
            bundle with several ControlNets a list with one for each, where None leaves one out.
        controlnet_conditioning_scale: How strongly, a number from 0, or one for each ControlNet; 1 if left out. For a
            T2I-Adapter too, where diffusers has adapter_conditioning_scale.
        control_features: What the T2I-Adapter made of a control image before, by the names of its outputs, each
            [1 or N, C, H, W], instead of the image.
        paste: Whether the finished pictures have the image's own pixels outside of the mask.
        feather: Pixels inside of the mask's edge over which a pasted picture fades in.
        inverted: A picture that `invert` found, which the images are drawn beside, with DDIM from its latents: they
            take its layout (plug-and-play, Tumanyan et al. 2022), from bundles exported with ``injection``.
        inject_attention: Share of the steps, 0 to 1, in which they take its self-attention; 0.5 if left out.
        inject_features: The same of its features; 0.8 if left out.
        first_image: Number of the first image, 0 if left out. Image i of a seed is the same in any generation, so many
            images can be drawn in parts.
        height: Of the picture in pixels (of the latent, where the bundle has no decoder), as is `width`; left out, the
            usual size. What a bundle takes was chosen at its export.
    """

    latents: Array | None
    image: Any
    mask_image: Any
    strength: float | None
    image_guidance_scale: float | None
    depth_map: Any
    control_image: Any
    controlnet_conditioning_scale: float | Sequence[float] | None
    control_features: Mapping[str, Array] | None
    inverted: Inverted | None
    inject_attention: float | None
    inject_features: float | None
    paste: bool
    feather: int
    num_images: int | None
    num_inference_steps: int | None
    scheduler: str | None
    clock: ClockSpec | None
    guidance_scale: float | Sequence[float] | None
    seed: int
    first_image: int


@dataclass(frozen=True)
class Result:
    """What a generation gave.

    Attributes:
        latents: float32 [N, C, H, W].
        ledger: Each step without its tensors and latents, which would stay in memory.
        stages: Milliseconds of each component outside of the loop, by its name.
        pixels: float32 [N, C, H, W], about -1 to 1; None where latents were asked for, or nothing decodes them.
        flops_saved: Share of the UNet's operations that cached steps saved, attention matmuls included; 0 at clock 1.
        peak_bytes: With `low_memory`, peak resident memory of the process while each component ran, by its name; None
            otherwise, and where the system does not tell it.
    """

    latents: Array
    ledger: tuple[Step, ...]
    stages: dict[str, float] = field(default_factory=dict)
    pixels: Array | None = None
    peak_bytes: dict[str, int] | None = None
    flops_saved: float = 0.0

    @property
    def images(self) -> Array:
        """The images, uint8 [N, H, W, C].

        Raises:
            RequestError: Latents were asked for, or the bundle has no decoder for them.
        """
        if self.pixels is None:
            raise RequestError(
                "there are latents and no images: they were asked for, or the bundle's model works on latents and the "
                "bundle has no decoder; take result.latents instead"
            )
        return to_uint8(self.pixels)

    @property
    def mask(self) -> tuple[int, ...]:
        """The steps as they were run, 1 = full."""
        return tuple(int(step.full) for step in self.ledger)

    @property
    def ms(self) -> float:
        """Milliseconds of all steps and stages together."""
        return sum(sum(step.ms.values()) for step in self.ledger) + sum(self.stages.values())


class EdgePipeline:
    """Makes images from a bundle."""

    def __init__(
        self,
        manifest: Manifest,
        components: Session | Components,
        tokenizers: Callable[[], Sequence[Tokenizer]] | None = None,
        *,
        warn: bool = True,
    ) -> None:
        """Makes a pipeline of an opened bundle.

        It gives an `OperatingPointWarning`, once, where a generation is not what the adaptor was trained for; not so
        without `warn`.

        Args:
            components: What runs the bundle's components; or a session of the UNet alone.
            tokenizers: Reads the tokenizer of each text encoder, when a prompt first comes; None where there is none.
        """
        self.manifest = manifest
        self.components = components if isinstance(components, Components) else Components.of({UNET: components})
        self._tokenizers = tokenizers
        self._read_tokenizers: list[Tokenizer] | None = None
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
        low_memory: bool = False,
        cache: str | Path | None = None,
    ) -> "EdgePipeline":
        """Opens a bundle.

        Args:
            backend: What runs the graphs, one of `edgediff_runtime.sessions.BACKENDS`.
            compute_units: What Core ML may use: ``all``, ``cpu_only``, ``cpu_and_gpu`` or ``cpu_and_ne``.
            threads: CPU threads of the backend; None takes its own choice. Set it in a container that has fewer cores
                than its host. Core ML has no such choice.
            low_memory: Open each component when its stage comes, and drop it after. Weights of fewer bits stay so in
                memory.
            cache: A folder in which the backend keeps graphs as it optimized them for this machine, to
                open them faster the next time. It is as large as the bundle, or larger.

        Raises:
            BundleError: The bundle is damaged, unsafe or of a newer version.
            RequestError: The backend is unknown or not available on this machine, or `threads` is not above 0.
        """
        bundle = open_bundle(path)
        check_backend(backend)
        kept = None if cache is None else Path(cache)
        check_cache(kept)
        return cls.of_bundle(
            bundle,
            TARGETS_OF[backend],
            lambda name: open_session(bundle, backend, compute_units, threads, name, kept, low_memory),
            low_memory,
        )

    @classmethod
    def of_bundle(
        cls,
        bundle: Bundle,
        targets: Sequence[str],
        open_component: Callable[[str], Session],
        low_memory: bool = False,
        *,
        warn: bool = True,
    ) -> "EdgePipeline":
        """Makes a pipeline of a bundle's components in the first of some targets that it has; opens the UNet.

        Args:
            open_component: Opens a component by its name.
            low_memory: Open each component, the UNet too, when its stage comes, and drop it after.
        """
        entry = bundle.manifest.target(*targets)
        graphs = {name: component.graphs for name, component in entry.components.items()}
        further = {name: component.further for name, component in entry.components.items()}
        components = Components(graphs, open_component, keep=not low_memory, further=further)
        if not low_memory:
            components.session(UNET)

        def tokenizers() -> list[Tokenizer]:
            encoders = () if bundle.manifest.prompt is None else bundle.manifest.prompt.encoders
            found = []
            for encoder in encoders:
                file = entry.component(encoder.component).tokenizer
                if file is None:
                    raise BundleError(f"{encoder.component}: the {entry.target} target has no tokenizer; export again")
                found.append(Tokenizer.from_file(bundle.file(file)))
            return found

        return cls(bundle.manifest, components, tokenizers, warn=warn)

    @property
    def session(self) -> Session:
        """What runs the UNet's graphs, opened at its first use."""
        return self.components.session(UNET)

    def __call__(
        self,
        *,
        output_type: Literal["image", "latent"] = "image",
        callback: Callable[[Step], None] | None = None,
        tile: int | None = None,
        **request: Unpack[Arguments],
    ) -> Result:
        """Generates images.

        Args:
            output_type: ``latent`` leaves the decoder out.
            callback: Called after each step; what it raises cancels the generation.
            tile: Side in pixels of the overlapping tiles that a larger picture is decoded in, to save memory, as
                diffusers' ``enable_vae_tiling`` does; None decodes it as a whole.
            request: As `Arguments` says; errors are those of `stream`.
        """
        if output_type not in ("image", "latent"):
            raise RequestError(f"output_type is {output_type!r}; expected image or latent")
        latent_tile = self._latent_tile(tile)
        if plain(request.get("paste")) is True and (output_type == "latent" or not self.can_decode):
            raise RequestError("paste was given, but there will be latents and no picture; leave it out")
        prepared, edit, usage = self._prepare(tile=latent_tile, **request)
        latents, ledger = self._denoise(prepared, usage, callback)
        pixels = None
        if output_type == "image" and self.manifest.sample.space == "pixel":
            pixels = latents
        elif output_type == "image" and self.can_decode:
            pixels = self._decode(latents, usage, latent_tile)
        pixels = None if pixels is None else edit.pasted(pixels)
        stages = {name: ms for name, ms in usage.ms.items() if name != UNET}
        return Result(latents, ledger, stages, pixels, usage.peak_bytes or None, self._saved(ledger))

    def _saved(self, ledger: Sequence[Step]) -> float:
        steered = any(CONTROLNET in step.ms for step in ledger)
        return operations_saved(self.manifest.cost, [(step.full, step.rows) for step in ledger], steered)

    def _denoise(
        self, prepared: Request, usage: Usage, callback: Callable[[Step], None] | None
    ) -> tuple[Array, tuple[Step, ...]]:
        """Finished latents and the ledger; the tensors of the last step do not outlive it."""
        ledger = []
        latents = prepared.latents
        with self._denoising(prepared, usage) as steps:
            for step in steps:
                latents = step.latents
                ledger.append(replace(step, tensors=(), latents=NO_LATENTS, predicted=NO_LATENTS))
                if callback is not None:
                    callback(step)
        return latents, tuple(ledger)

    @property
    def can_decode(self) -> bool:
        """Whether latents can be made into images."""
        return self.manifest.sample.space == "pixel" or (self.manifest.vae is not None and DECODER in self.components)

    @property
    def can_preview(self) -> bool:
        """Whether `preview` has something to make pictures with."""
        has_decoder = self.manifest.preview is not None and PREVIEW in self.components
        return self.manifest.sample.space == "pixel" or has_decoder

    @property
    def can_encode(self) -> bool:
        """Whether prompts can be made into embeddings: the bundle says how, and each text encoder is there."""
        spec = self.manifest.prompt
        there = spec is not None and all(encoder.component in self.components for encoder in spec.encoders)
        return there and self._tokenizers is not None

    def encode_prompt(
        self,
        prompt: Text,
        negative_prompt: Text = None,
        *,
        prompt_2: Text = None,
        negative_prompt_2: Text = None,
        clip_skip: int = 0,
        emphasis: bool = True,
    ) -> dict[str, Any]:
        """Encodes prompts that many requests use; returns the arguments to pass instead of them.

        Returns:
            ``prompt_embeds`` and ``negative_prompt_embeds``, and ``added_cond`` and ``negative_added_cond``, each with
            a row for each prompt. SDXL's sizes are not among them: they follow from the request.

        Raises:
            RequestError: The bundle has no text encoder, or a text cannot be encoded.
        """
        self._check_text(prompt, None, None)
        texts = Texts(prompt, prompt_2, negative_prompt, negative_prompt_2, plain(clip_skip), emphasis)
        size = self._latent_size(None, None)
        needed = {t.name: t for graph in self._graphs(UNET, *size) for t in graph.inputs if t.name in TEXT_INPUTS}
        both = self._embeds(texts, texts.count(), True, needed, self._usage())
        found: dict[str, Any] = {}
        for prefix, made in zip(("", "negative_"), both, strict=True):
            found[f"{prefix}prompt_embeds"] = made.pop(TEXT, None)
            found[f"{prefix}added_cond"] = made
        return found

    def _embeds(
        self, texts: Texts, count: int, guided: bool, needed: Mapping[str, Tensor], usage: Usage
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The UNet's inputs of every image's texts and, where guidance needs them, of what it leads away from."""
        any_length = TEXT not in needed or TOKENS in needed[TEXT].shape
        made = texts.encode(self._text_stage(usage), count, guided, any_length)
        given, negative = ({name: value for name, value in each.items() if name in needed} for each in made)
        return given, negative

    def decode(self, latents: Array, tile: int | None = None) -> Array:
        """Decodes finished latents, float32 [N, C, H, W]: pixels, float32 [N, 3, h, w], about -1 to 1.

        Args:
            tile: As for a generation.

        Raises:
            RequestError: The bundle has no decoder for this backend, or the latents or the tile do not fit it.
        """
        return self._decode(self._latents(latents), self._usage(), self._latent_tile(tile))

    def preview(self, latents: Array) -> Array:
        """Makes quick pictures of latents, float32 [N, C, H, W], at any step: uint8 [N, h, w, 3].

        Of ``step.predicted`` they are what the picture is going to be; of ``step.latents``, which diffusers' callbacks
        are given, the same under noise. The small decoder that the bundle was exported with (``--preview``) is opened
        at its first use and stays open, with `low_memory` too: TAESD's takes 5 MB beside the UNet. No generation is
        changed by it. A model of pixels needs none.

        Raises:
            RequestError: The bundle has no preview decoder for this backend, or the latents do not fit it.
        """
        given = self._latents(latents)
        if self.manifest.sample.space == "pixel":
            return to_uint8(given)
        if self.manifest.preview is None:
            raise RequestError(NO_PREVIEW)
        size = given.shape[2:]
        (graph,) = self._graphs(PREVIEW, *size)
        return to_uint8(decode(self.components.session(PREVIEW), lambda *_: graph, self.manifest.preview, given))

    def _latents(self, latents: Array) -> Array:
        """Latents of the model's channels, as float32."""
        sample, given = self.manifest.sample, as_array(latents, "latents")
        if given.dtype.kind != "f" or given.ndim != 4 or given.shape[1] != sample.channels or not given.size:
            shape = ("N", sample.channels, sample.height, sample.width)
            raise RequestError(
                f"latents are {given.dtype.name} {list(given.shape)}; expected float32 {spell_shape(shape)}"
            )
        with np.errstate(over="ignore"):
            found: Array = given.astype(np.float32)
        if not np.isfinite(found).all():
            raise RequestError("latents hold NaN or infinity; expected finite numbers")
        return found

    def _decode(self, latents: Array, usage: Usage, tile: int | None) -> Array:
        if self.manifest.vae is None:
            raise RequestError("the bundle has no decoder; export it with its autoencoder")
        height, width = latents.shape[2:]
        self._check_decoder(height, width, tile)

        def graph_at(height: int, width: int) -> Graph | None:
            found = self.components.graphs_at(DECODER, self.manifest.sample, height, width)
            return None if found is None else found[0]

        with self.components.measured(usage).use(DECODER) as session:
            return decode(session, graph_at, self.manifest.vae, latents, tile)

    def _latent_tile(self, tile: object) -> int | None:
        """Side of a tile in the latent, from that in pixels."""
        if tile is None:
            return None
        if self.manifest.vae is None or DECODER not in self.components:
            raise RequestError(f"tile is {tile!r}, but the bundle has no decoder for this backend; leave it out")
        side, each = plain(tile), OVERLAP * self.manifest.vae.downscale
        if isinstance(side, bool) or not isinstance(side, int) or side < 1 or side % each:
            raise RequestError(
                f"tile is {tile!r}; expected a multiple of {each} pixels, of which a quarter overlaps the next tile"
            )
        return side // self.manifest.vae.downscale

    def _check_decoder(self, height: int, width: int, tile: int | None) -> None:
        """Refuses a latent that the decoder does not take, as a whole or in tiles."""
        if tile is None or max(height, width) <= tile:
            self._graphs(DECODER, height, width)
            return
        rows, columns = min(height, tile), min(width, tile)
        if self.components.graphs_at(DECODER, self.manifest.sample, rows, columns) is None:
            each = self.manifest.pixels_of_latent
            raise RequestError(
                f"tile is {each * tile}: {DECODER} has no graph for {each * columns} x {each * rows} (width x height); "
                f"it takes {self._sizes(DECODER)}; ask for a tile of one of these"
            )

    def _graphs(self, name: str, height: int, width: int) -> tuple[Graph, ...]:
        """A component's graphs for a latent of this size; a RequestError where it has none."""
        found = self.components.graphs_at(name, self.manifest.sample, height, width)
        if found is None:
            each = self.manifest.pixels_of_latent
            raise RequestError(
                f"{name}: it has no graphs for {each * width} x {each * height} (width x height); it takes "
                f"{self._sizes(name)}; ask for one of these, or export with --size {each * width}x{each * height}"
            )
        return found

    def _sizes(self, name: str) -> str:
        """The pictures that a component has graphs for, in words."""
        sample, each = self.manifest.sample, self.manifest.pixels_of_latent
        if any(graph.takes_any_size for graph in self.components.graphs[name]):
            return f"multiples of {each * sample.multiple}"
        further = [(sized.height, sized.width) for sized in self.components.further.get(name, ())]
        sizes = [(sample.height, sample.width), *further]
        return ", ".join(f"{each * width} x {each * height}" for height, width in sizes)

    def _latent_size(self, height: object, width: object) -> tuple[int, int]:
        """Height and width of the latent for a picture of these, the usual ones where they are None."""
        sample, each = self.manifest.sample, self.manifest.pixels_of_latent
        found = []
        for name, given, usual in (("height", height, sample.height), ("width", width, sample.width)):
            if given is None:
                found.append(usual)
            elif isinstance(given, bool) or not isinstance(given, int) or given < 1 or given % each:
                raise RequestError(f"{name} is {given!r}; expected a multiple of {each * sample.multiple}")
            else:
                found.append(given // each)
        return found[0], found[1]

    def _usage(self) -> Usage:
        return Usage(measures_memory=not self.components.keeps)

    def stream(self, **request: Unpack[Arguments]) -> Iterator[Step]:
        """Generates latents step by step; closing the iterator cancels.

        Everything is checked, and the prompt encoded, before the first step.

        Args:
            request: As `Arguments` says.

        Raises:
            RequestError: The request does not fit the bundle.

        Warns:
            OperatingPointWarning: It is not what the bundle's adaptor was trained for; once for each pipeline.
        """
        if plain(request.get("paste")) is True:
            raise RequestError("paste was given, but steps have latents and no picture; leave it out")
        prepared, _, usage = self._prepare(**request)

        def steps() -> Iterator[Step]:
            with self._denoising(prepared, usage) as running:
                yield from running

        return steps()

    @contextmanager
    def _denoising(self, prepared: Request, usage: Usage) -> Iterator[Iterator[Step]]:
        """The loop, with the UNet open while the block lasts."""
        with self.components.measured(usage).use(UNET) as session:
            yield denoise(prepared, session)

    def _prepare(
        self,
        *,
        tile: int | None = None,
        label: Label = None,
        prompt: Text = None,
        negative_prompt: Text = None,
        prompt_2: Text = None,
        negative_prompt_2: Text = None,
        clip_skip: int = 0,
        emphasis: bool = True,
        prompt_embeds: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        added_cond: Mapping[str, Array] | None = None,
        negative_added_cond: Mapping[str, Array] | None = None,
        concat_latents: Array | None = None,
        lora: Lora | Sequence[Lora] | None = None,
        lora_scale: float | Sequence[float] | None = None,
        latents: Array | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        image_guidance_scale: float | None = None,
        depth_map: Any = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | Sequence[float] | None = None,
        control_features: Mapping[str, Array] | None = None,
        inverted: Inverted | None = None,
        inject_attention: float | None = None,
        inject_features: float | None = None,
        paste: bool = False,
        feather: int = 0,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        scheduler: str | None = None,
        clock: ClockSpec | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        seed: int = 0,
        first_image: int = 0,
        height: int | None = None,
        width: int | None = None,
    ) -> tuple[Request, Edit, Usage]:
        """A checked request, what it says in pictures, and what its text and pictures took."""
        point = self.manifest.operating_point
        label, num_images, seed, first_image = plain(label), plain(num_images), plain(seed), plain(first_image)
        guidance_scale, clip_skip = plain(guidance_scale), plain(clip_skip)
        if isinstance(first_image, bool) or not isinstance(first_image, int) or first_image < 0:
            raise RequestError(f"first_image is {first_image!r}; expected a whole number from 0")
        unet = self.components.graphs[UNET]
        check_injection(inverted, unet, inject_attention, inject_features, latents, image)
        if inverted is not None:
            latents = inverted.latents
            num_inference_steps = len(inverted.timesteps) if num_inference_steps is None else num_inference_steps
            scheduler = DDIM if scheduler is None else scheduler
        steps = point.num_inference_steps if num_inference_steps is None else plain(num_inference_steps)
        config = self.manifest.scheduler if scheduler is None else with_sampler(self.manifest.scheduler, scheduler)
        sampling = make_scheduler(config, steps)
        size = self._latent_size(plain(height), plain(width))
        edit = read_edit(
            self.manifest.sample, size, self.manifest.pixels_of_latent, image=image, mask_image=mask_image,
            depth_map=depth_map, strength=strength, image_guidance_scale=image_guidance_scale, paste=paste,
            feather=feather, concatenated=concat_latents is not None,
        )  # fmt: skip
        if edit.image is not None:
            self._check_encoder(size)
        sampler = config.name
        start = sampler_of(sampler).call_of(steps_left_out(edit.strength, steps))
        clock = remaining_clock(point.clock, start) if clock is None else plain(clock)
        mask = clock_mask(clock, steps, sampler, start)
        scale = point.guidance_scale if guidance_scale is None else guidance_scale
        guidance = _guidance(scale, len(mask), calls_in_words(steps, sampler, start))
        differs = departure(self.manifest, mask, guidance, clock, start, scheduler)
        begins_with = None if latents is None else self._latents(latents)
        if begins_with is not None and not edit.begins_with_noise:
            raise RequestError("latents and an image were given, and a generation begins with one of them; give one")
        texts = None
        if any(text is not None for text in (prompt, negative_prompt, prompt_2, negative_prompt_2)):
            self._check_text(prompt, prompt_embeds, negative_prompt_embeds)
            texts = Texts(prompt, prompt_2, negative_prompt, negative_prompt_2, clip_skip, emphasis)
        steering = steer(
            self._graphs(UNET, *size), control_image, controlnet_conditioning_scale, control_features,
            (lambda: self._graphs(T2I_ADAPTER, *size)[0]) if T2I_ADAPTER in self.components else None,
        )  # fmt: skip
        graphs = steering.graphs
        several = max(edit.count, steering.count, 1 if begins_with is None else len(begins_with))
        if num_images is None and several > 1:
            num_images = several
        if self.manifest.vae is not None and DECODER in self.components:
            self._check_decoder(*size, tile)
        tensors = {t.name: t for graph in graphs for t in graph.inputs}
        fixed = spread_over_inputs(self.manifest.lora, lora, lora_scale, tensors)
        told = None
        if GUIDANCE in tensors:
            if len(set(guidance)) > 1:
                raise RequestError("guidance_scale differs between steps, but the model is told one; give one number")
            told, guidance = guidance[0], (1.0,) * len(mask)
        usage = self._usage()
        cond, uncond, count = self._conditioning(
            label, texts, prompt_embeds, negative_prompt_embeds, added_cond, negative_added_cond, num_images, tensors,
            rows=1 if max(guidance) <= 1 else 2 if edit.image_guidance is None else 3, usage=usage, size=size,
            beside=0 if inverted is None else 1,
        )  # fmt: skip
        edit.check_count(count)
        beside = steering.tensors(count, lambda pictures: self._adapt(pictures, size, usage))
        cond, uncond = cond | beside, uncond and uncond | beside
        if told is not None:
            cond[GUIDANCE] = guidance_embedding(told, int(tensors[GUIDANCE].shape[1]), count)
        shape = (self.manifest.sample.channels, *size)
        noise = self._noise(begins_with, seed, count, shape, first_image)
        source = None
        if inverted is not None:
            source = source_of(inverted, graphs, sampling, cond, max(guidance) > 1, inject_attention, inject_features)
        begun = begin(
            edit, self.manifest.vae, sampling, start, noise, lambda batches: self._encode(batches, usage)
        )  # fmt: skip
        request = Request(
            graphs=graphs,
            scheduler=sampling,
            clock=(True,) * start + mask,
            guidance=guidance[:1] * start + guidance,
            latents=begun.latents,
            cond=cond,
            uncond=uncond,
            seed=seed,
            concat=self._concat(concat_latents, count, size) if begun.concat is None else begun.concat,
            start=start,
            first_image=first_image,
            image_guidance=edit.image_guidance,
            kept=begun.kept,
            source=source,
            fixed=fixed,
        )
        if differs is not None and self._warning.acquire(blocking=False):
            warnings.warn(differs, OperatingPointWarning, stacklevel=3)
        return request, edit, usage

    @staticmethod
    def _noise(given: Array | None, seed: int, count: int, shape: tuple[int, ...], first: int) -> Array:
        """What images begin with, float32 [N, C, H, W]: drawn by the seed, or as it was given."""
        if given is None:
            return initial_latents(seed, count, shape, 1.0, first)
        if given.shape[1:] != shape or len(given) not in (1, count):
            raise RequestError(
                f"latents are {list(given.shape)}; expected {spell_shape(('N', *shape))} with 1 or {count} rows"
            )
        return repeated(given, count)

    def invert(
        self,
        image: Any,
        *,
        num_inference_steps: int | None = None,
        refinements: int = 0,
        clock: ClockSpec = 1,
        guidance_scale: float | Sequence[float] = 1.0,
        callback: Callable[[Step], None] | None = None,
        **request: Unpack[Condition],
    ) -> Inverted:
        """Finds the latents that DDIM draws pictures from (Song et al. 2020, section 4.3).

        ``pipe(latents=inverted.latents, scheduler="ddim", ...)`` with the same prompt and steps, and the guidance that
        was inverted, draws them again; with another prompt it edits them.

        Args:
            image: As in `Arguments`.
            refinements: How often each step is taken again, with the UNet's output for what it led to: closer to
                the picture for as many more calls of the UNet.
            clock: Period or mask of the full calls; a mask has (refinements + 1) * num_inference_steps entries.
            guidance_scale: One number, or one for each call; 1, as here, inverts without guidance, which is more exact.
            callback: Called after each call of the UNet.
            request: The prompt or the label, and the size, as `Arguments` says.

        Raises:
            RequestError: The request does not fit the bundle, or its DDIM cannot be taken backwards.
        """
        height, width = self._latent_size(plain(request.get("height")), plain(request.get("width")))
        each = self.manifest.pixels_of_latent
        images = images_of(image, each * height, each * width)
        self._check_encoder((height, width))
        steps = self.manifest.operating_point.num_inference_steps
        steps = steps if num_inference_steps is None else plain(num_inference_steps)
        inverse = inverse_scheduler(self.manifest.scheduler, steps, plain(refinements))
        calls = len(inverse.timesteps)
        mask = clock_mask(plain(clock), calls)
        guidance = _guidance(plain(guidance_scale), calls, f"{calls} calls")
        if self.manifest.sample.concat and request.get("concat_latents") is None:
            beside = in_words(self.manifest.sample.concat)
            raise RequestError(
                f"the bundle's UNet takes {beside} beside the latent, which an inversion does not make; "
                "give concat_latents="
            )
        prepared, _, usage = self._prepare(
            num_images=len(images),
            num_inference_steps=steps,
            scheduler=DDIM,
            clock=1,
            guidance_scale=max(guidance),
            **request,
        )
        if GUIDANCE in prepared.cond:  # the model is told, and there are no unconditional rows
            guidance = (1.0,) * calls
        (encoded,) = self._encode([as_pixels(images)], usage)
        vae = self.manifest.vae
        backwards = replace(
            prepared, scheduler=inverse, clock=mask, guidance=guidance,
            latents=encoded if vae is None else from_vae(vae, encoded),
        )  # fmt: skip
        calls_of_step = calls // steps
        found: list[Array] = []

        def keep(step: Step) -> None:
            if (step.index + 1) % calls_of_step == 0:
                found.append(step.latents)
            if callback is not None:
                callback(step)

        latents, ledger = self._denoise(backwards, usage, keep)
        stages = {name: ms for name, ms in usage.ms.items() if name != UNET}
        timesteps = inverse.timesteps[::-calls_of_step].copy()
        cond = dict(prepared.cond)
        return Inverted(latents, ledger, stages, np.stack(found[::-1]), timesteps, cond, self._saved(ledger))

    @property
    def can_edit(self) -> bool:
        """Whether a generation can begin with a picture: latents are RGB, or there is an encoder for pictures."""
        sample = self.manifest.sample
        if sample.space == "pixel":
            return sample.channels == RGB
        return self.manifest.vae is not None and ENCODER in self.components

    def _check_encoder(self, size: tuple[int, int]) -> None:
        """Refuses a picture that nothing encodes."""
        if self.manifest.sample.space == "pixel" and not self.can_edit:
            raise RequestError(
                f"image was given, but the model's pictures have {self.manifest.sample.channels} channels; supported: 3"
            )
        if not self.can_edit:
            raise RequestError(
                "image was given, but the bundle has no vae_encoder for this backend; export it with that component"
            )
        if self.manifest.vae is not None:
            self._graphs(ENCODER, *size)

    def _encode(self, batches: list[Array], usage: Usage) -> list[Array]:
        """What the encoder gives for pictures, float32 [N, 3, h, w] each batch; pictures themselves without one."""
        vae = self.manifest.vae
        if vae is None or not batches:
            return batches
        height, width = (side // vae.downscale for side in batches[0].shape[2:])
        (graph,) = self._graphs(ENCODER, height, width)
        with self.components.measured(usage).use(ENCODER) as session:
            return [encode(session, graph, batch) for batch in batches]

    def _adapt(self, pictures: Array, size: tuple[int, int], usage: Usage) -> dict[str, Array]:
        """What the T2I-Adapter makes of control pictures, float32 [N, C, h, w]: features [N, C, H, W] by name."""
        (graph,) = self._graphs(T2I_ADAPTER, *size)
        with self.components.measured(usage).use(T2I_ADAPTER) as session:
            made = [run_one(session, graph, {CONTROL_IMAGE: picture[None]}) for picture in pictures]
        return {name: np.concatenate([each[name] for each in made]) for name in made[0]}

    def _check_text(self, prompt: Text, prompt_embeds: object, negative_prompt_embeds: object) -> None:
        """Refuses texts that nothing can encode."""
        known = self.manifest.conditioning
        if known.kind != "text":
            raise RequestError(f"a prompt was given, but the model is conditioned on {_what(known)}; leave it out")
        if not self.can_encode:
            raise RequestError(
                "the bundle has no text encoder; give embeddings (prompt_embeds=, or --conditioning FILE), not a prompt"
            )
        if prompt_embeds is not None or negative_prompt_embeds is not None:
            raise RequestError("a prompt and its embeddings were given; give one of them")
        if prompt is None:
            raise RequestError("a negative prompt or a second one was given without a prompt; give one")

    def _text_stage(self, usage: Usage) -> TextStage:
        assert self.manifest.prompt is not None
        if self._read_tokenizers is None:
            assert self._tokenizers is not None
            self._read_tokenizers = list(self._tokenizers())
        return TextStage(self.manifest.prompt, self._read_tokenizers, self.components.measured(usage))

    def _check_memory(self, count: int, rows: int, size: tuple[int, int]) -> None:
        """Refuses images that cannot be in memory together: their latents, what crosses between graphs, their pixels.

        This is the least that they take, each image having so many rows; what a backend needs inside of a graph is not
        known.
        """
        rows *= count
        tensors = {t.name: t for graph in self._graphs(UNET, *size) for t in (*graph.inputs, *graph.outputs)}
        needed = sum(_row_bytes(tensor) * (rows if has_rows(name) else 1) for name, tensor in tensors.items())
        if self.manifest.vae is not None and DECODER in self.components:
            needed += count * 3 * np.dtype(np.float32).itemsize * self.manifest.vae.downscale**2 * math.prod(size)
        available = available_bytes()
        if available is not None and needed > available:
            raise RequestError(
                f"num_images is {count}: they take {needed / 1e9:.1f} GB of memory at least, {available / 1e9:.1f} GB "
                "are available; ask for fewer at a time"
            )

    def _concat(self, given: Array | None, count: int, size: tuple[int, int]) -> Array | None:
        """Rows of the channels that are concatenated to the latents; None where the UNet takes none."""
        sample = self.manifest.sample
        channels = sample.in_channels - sample.channels
        if not channels:
            if given is not None:
                raise RequestError("concat_latents were given, but the UNet takes the latent alone; leave them out")
            return None
        name = "concat_latents"
        tensor = Tensor(name, "float32", ("batch", channels, *size))
        return rows_of({name: tensor}, {} if given is None else arrays(None, {name: given}, ""), count, "")[name]

    def _conditioning(
        self,
        label: Label,
        texts: Texts | None,
        prompt_embeds: Array | None,
        negative_prompt_embeds: Array | None,
        added_cond: Mapping[str, Array] | None,
        negative_added_cond: Mapping[str, Array] | None,
        num_images: int | None,
        tensors: Mapping[str, Tensor],
        rows: int,
        usage: Usage,
        size: tuple[int, int],
        beside: int,
    ) -> tuple[dict[str, Array], dict[str, Array], int]:
        """Rows of every conditioning tensor: conditional, unconditional, and the number of images.

        Args:
            rows: Of an image in a step; more than one are guided.
            beside: Rows more, of what is drawn along.
        """
        known, guided = self.manifest.conditioning, rows > 1
        if num_images is not None:
            check_count(num_images)
        if known.kind != "class" and label is not None:
            raise RequestError(
                f"label {label!r} was given, but the model is conditioned on {_what(known)}; leave it out"
            )
        told = (prompt_embeds, negative_prompt_embeds, added_cond, negative_added_cond)
        if known.kind != "text" and any(each is not None for each in told):
            raise RequestError(f"a prompt was given, but the model is conditioned on {_what(known)}; leave it out")
        if known.kind == "none":
            if guided:
                raise RequestError("guidance_scale is above 1, but the model has no condition; give 1")
            count = 1 if num_images is None else num_images
            self._check_memory(count, rows + beside, size)
            return {}, {}, count
        if known.kind == "class":
            found = class_rows(known, label, num_images, guided, tensors["class_labels"].dtype)
            self._check_memory(found[-1], rows + beside, size)
            return found
        needed = {name: tensors[name] for name in (*TEXT_INPUTS, "class_labels") if name in tensors}
        given = arrays(prompt_embeds, added_cond, "")
        negative = arrays(negative_prompt_embeds, negative_added_cond, "negative ")
        for same in ("time_ids", "class_labels"):
            if same in given and same not in negative:
                negative[same] = given[same]
        if num_images is None:
            embeds = given.get("encoder_hidden_states")
            num_images = (1 if embeds is None else (*embeds.shape, 1)[0]) if texts is None else texts.count()
            check_count(num_images)
        self._check_memory(num_images, rows + beside, size)
        if texts is not None:
            made, made_negative = self._embeds(texts, num_images, guided, needed, usage)
            given, negative = made | given, made_negative | negative
        if "time_ids" in needed and self.manifest.vae is not None:
            height, width = (self.manifest.vae.downscale * side for side in size)
            for values, is_negative in ((given, False), (negative, True)):
                if "time_ids" not in values:
                    values["time_ids"] = time_ids(int(needed["time_ids"].shape[1]), height, width, is_negative)
        cond = rows_of(needed, given, num_images, "")
        if not guided:
            return cond, {}, num_images
        uncond = rows_of(needed, negative, num_images, "negative ")
        for name in cond:
            if cond[name].shape != uncond[name].shape:
                raise RequestError(
                    f"{name} has shape {list(cond[name].shape)} and negative {name} {list(uncond[name].shape)}; "
                    "expected the same"
                )
        return cond, uncond, num_images


def _guidance(scale: float | Sequence[float], calls: int, in_words: str) -> tuple[float, ...]:
    scales: list[Any] = list(scale) if isinstance(scale, list | tuple) else [scale] * calls
    if len(scales) != calls:
        raise RequestError(f"guidance_scale has {len(scales)} entries for {in_words}; expected one each")
    for value in scales:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_GUIDANCE:
            raise RequestError(f"guidance_scale is {value!r}; expected a finite number from 0; 1 or less is off")
    return tuple(float(value) for value in scales)


def _row_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's row; sizes that only a request tells count as 1."""
    sizes = [size for size in tensor.shape[1:] if isinstance(size, int)]
    return np.dtype(tensor.dtype).itemsize * math.prod(sizes)


def _what(known: Conditioning) -> str:
    return {"none": "nothing", "class": "classes (label=)", "text": "text (prompt=, or prompt_embeds=)"}[known.kind]
