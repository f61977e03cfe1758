"""The manifest: what is in a bundle, so that a runtime hard-codes nothing.

A runtime reads the list of graphs and follows it: in each step it runs, in order, the graphs whose frequency says so,
taking inputs from and putting outputs into a table of tensors by name. The JSON Schema beside this package is
generated from these structs.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from math import gcd
from typing import Annotated, Any, Literal, Self

import msgspec

from edgediff_runtime.errors import BundleError
from edgediff_runtime.schedulers import SchedulerConfig

# What weights are stored in: ``int8`` has a scale for each output channel, ``int4`` one for each block of 32 inputs,
# ``paletteN`` a table of 2^N numbers for each weight.
WeightFormat = Literal["fp16", "int8", "int4", "palette8", "palette6", "palette4", "palette3", "palette2"]
Stage = Literal["prompt", "image", "step", "decode", "preview"]
Concatenated = Literal["mask", "masked_image", "image", "depth"]
Frequency = Literal["step", "full_step", "cached_step"]
# A size that only a request tells: of rows, of the text, or of the picture: what ``5*height/4`` says, of the latent's.
SYMBOL = r"^(batch|images|tokens|([1-9][0-9]*\*)?(height|width)(/[1-9][0-9]*)?)$"
Symbol = Annotated[str, msgspec.Meta(pattern=SYMBOL)]
# Tensors that the loop itself reads: a step's output, and the next step's input.
LOWRES_FEATURE = "lowres_feature"
CACHE = "cache"
# Of Core ML's model format, by the oldest system that reads it.
SPECIFICATION_OF = {"iOS16": 7, "iOS17": 8, "iOS18": 9}
# Inputs of a step; and the name of the batch of a sample that is given once for each image.
SAMPLE = "sample"
TIMESTEP = "timestep"
IMAGES = "images"
# The length of the text, where a graph takes any; and what a latent consistency model is told of the guidance.
TOKENS = "tokens"
TEXT = "encoder_hidden_states"
GUIDANCE = "timestep_cond"
# What pools a text, of SDXL.
POOLED = "text_embeds"
# What a ControlNet is handed: a picture, and what its residuals are multiplied by; a second one ``control_image_2`` and
# so on. And the name of its graph.
CONTROL_IMAGE = "control_image"
CONTROL_SCALE = "control_scale"
CONTROLNET = "controlnet"
# The component that makes features of a picture, which steps are then handed as ``t2i_adapter_0`` and so on.
T2I_ADAPTER = "t2i_adapter"
# The row whose queries and keys, and whose features, each row of a step takes: plug-and-play injection.
ATTENTION_ROWS, FEATURE_ROWS = "attention_rows", "feature_rows"
# The low-rank factors that a part of the UNet takes, before the part's name.
LORA_DOWN, LORA_UP = "lora_down_", "lora_up_"


def has_rows(name: str) -> bool:
    """Whether a tensor has a row for each row of the sample; the timestep and low-rank factors are there once."""
    return name != TIMESTEP and not name.startswith((LORA_DOWN, LORA_UP))


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all parts of the manifest share: immutable and strict."""


class Tensor(Struct, frozen=True):
    """A tensor that goes into or comes out of a graph.

    Attributes:
        name: Name in the table of tensors, and in the file unless `stored_as` says another.
        dtype: numpy's name of the element type.
        shape: Sizes; ``"batch"`` stands for the number of rows, ``"images"``, of a sample alone, for the number of
            images or that of rows, whichever is given, ``"tokens"`` for the length of the text; ``"height"`` and
            ``"width"`` for the latent's, of which ``"height/2"`` is a half and ``"8*height"`` eight times as much.
        stored_as: Its name in the file, where that is another: Core ML has no dots in names, and Apple's pipeline has
            names of its own.
    """

    name: str
    dtype: Literal["float32", "float16", "int64", "int32"]
    shape: tuple[int | Symbol, ...]
    stored_as: str | None = None

    @property
    def stored_name(self) -> str:
        """Its name in the file."""
        return self.name if self.stored_as is None else self.stored_as

    @property
    def is_map(self) -> bool:
        """Whether it has a height and a width: [B, C, H, W]."""
        return len(self.shape) == 4 and self.name != TEXT

    @property
    def takes_any_size(self) -> bool:
        """Whether its height and width are those of whatever latent is given."""
        return self.is_map and not all(isinstance(size, int) for size in self.shape[2:])

    def at(self, height: int, width: int) -> Self:
        """The tensor for a latent of this size."""
        shape = tuple(_size_at(size, height, width) for size in self.shape)
        return msgspec.structs.replace(self, shape=shape)

    def of_any_size(self, height: int, width: int) -> Self:
        """The tensor for a latent of any size, from that for one of this size."""
        if not self.is_map or self.takes_any_size:
            return self
        _, _, rows, columns = self.shape
        spatial = (_as_symbol("height", rows, height), _as_symbol("width", columns, width))
        return msgspec.structs.replace(self, shape=(*self.shape[:2], *spatial))


def _size_at(size: int | str, height: int, width: int) -> int | str:
    """What a size of a shape is for a latent of this size; the other symbols stay."""
    found = re.fullmatch(r"(?:(\d+)\*)?(height|width)(?:/(\d+))?", str(size))
    if found is None:
        return size
    times, side, parts = found.groups()
    return int(times or 1) * (height if side == "height" else width) // int(parts or 1)


def _as_symbol(side: str, size: int | str, of: int) -> str:
    """A size as a multiple or a part of the latent's.

    >>> _as_symbol("height", 512, 64), _as_symbol("width", 32, 64), _as_symbol("width", 64, 64)
    ('8*height', 'width/2', 'width')
    """
    shared = gcd(int(size), of)
    times, parts = int(size) // shared, of // shared
    return f"{times}*{side}" * (times > 1) + side * (times == 1) + f"/{parts}" * (parts > 1)


class Graph(Struct, frozen=True):
    """One graph and when it runs.

    Attributes:
        name: ``highres_in``, ``lowres``, ``adaptor``, ``highres_out``; ``full`` and ``cached`` in the ``pair`` layout.
        file: Path in the bundle, an ``.mlpackage`` being a directory; None where there is nothing to run (the identity
            adaptor).
        frequency: In the ``step`` stage: ``step``, ``full_step`` or ``cached_step``; None in the others, whose graphs
            run whenever the stage does.
        inputs: In the graph's order.
        outputs: In the graph's order.
        external_data: Paths in the bundle of the weights that lie outside of `file`.
        function: Which function of the file, where it holds several; None where it holds one.
        simplified: Whether onnxsim's result was taken, or why it was left out.
        kept_fp32: The operations of an fp16 graph that compute in fp32, since fp16 does not hold their numbers; for
            information.
    """

    name: str
    file: str | None
    frequency: Frequency | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    external_data: tuple[str, ...] = ()
    function: str | None = None
    simplified: str = ""
    kept_fp32: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Paths in the bundle of all that the graph lies in, a package's directory being one."""
        return () if self.file is None else (self.file, *self.external_data)

    def runs(self, full: bool) -> bool:
        """Whether the graph belongs to a full or a cached step; graphs of other stages belong to neither."""
        return self.frequency in ("step", "full_step" if full else "cached_step")

    @property
    def key(self) -> str:
        """What tells it from the other graphs of its component, those for further sizes included."""
        return self.name if self.function is None else self.function

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """What goes in or comes out that has a height and a width."""
        return tuple(tensor for tensor in (*self.inputs, *self.outputs) if tensor.is_map)

    @property
    def takes_any_size(self) -> bool:
        """Whether it takes a latent, or gives a picture, of any size."""
        return any(tensor.takes_any_size for tensor in self.maps)

    def at(self, height: int, width: int) -> "Graph":
        """The entry of the same graph as a latent of this size runs through it."""
        return self._with_tensors(lambda tensor: tensor.at(height, width))

    def of_any_size(self, height: int, width: int) -> "Graph":
        """The entry of the same graph where it takes any size, from that for a latent of this size."""
        return self._with_tensors(lambda tensor: tensor.of_any_size(height, width))

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Graph":
        inputs, outputs = (tuple(map(change, side)) for side in (self.inputs, self.outputs))
        return msgspec.structs.replace(self, inputs=inputs, outputs=outputs)

    @property
    def takes_sample(self) -> bool:
        """Whether it is handed the sample."""
        return any(tensor.name == SAMPLE for tensor in self.inputs)

    @property
    def can_count_rows(self) -> bool:
        """Whether it is handed something that has all rows, whatever its sample has."""
        return any(tensor.name != SAMPLE and has_rows(tensor.name) for tensor in self.inputs)

    @property
    def shares_rows(self) -> bool:
        """Whether it takes a sample once for each image, and repeats what it makes of it for all rows."""
        return any(tensor.name == SAMPLE and tensor.shape[:1] == (IMAGES,) for tensor in self.inputs)

    def with_any_text(self) -> "Graph":
        """The entry of the same graph where it takes a text of any length."""
        inputs = tuple(
            msgspec.structs.replace(tensor, shape=(tensor.shape[0], TOKENS, *tensor.shape[2:]))
            if tensor.name == TEXT
            else tensor
            for tensor in self.inputs
        )
        return msgspec.structs.replace(self, inputs=inputs)

    def with_shared_rows(self) -> "Graph":
        """The entry of the same graph where it takes a sample once for each image."""
        inputs = tuple(
            msgspec.structs.replace(tensor, shape=(IMAGES, *tensor.shape[1:])) if tensor.name == SAMPLE else tensor
            for tensor in self.inputs
        )
        return msgspec.structs.replace(self, inputs=inputs)


class Floors(Struct, frozen=True):
    """PSNR in dB that verification asks for; None is not judged.

    Attributes:
        graph: Of each graph against the same module in torch.
        composed: Of a composed step against torch.
        trajectory: Of the final latents against torch with the same clock.
        caching: Of clock N against clock 1 in the same backend.
        program: Of a graph in fp32 arithmetic against torch with weights of the graph's precision; None where the
            graph computes in fp32 anyway.
    """

    graph: float
    composed: float
    trajectory: float
    caching: float | None
    program: float | None = None


class Sized(Struct, frozen=True):
    """A component's graphs for a further size, of the same names and in the same order as those of the usual one.

    Attributes:
        height: Of the latent.
        width: Of the latent.
    """

    height: int
    width: int
    graphs: tuple[Graph, ...]


class Component(Struct, frozen=True):
    """A component of a pipeline, as diffusers has them, in one target.

    Attributes:
        stage: When it runs: ``prompt`` (once for each distinct prompt), ``image`` (once for an input image), ``step``
            (the loop), ``decode`` (once for each finished latent) or ``preview`` (whenever the caller asks).
        dtype: Precision of weights and features. In ``int8`` it is that of weights and matmuls: what goes into a graph
            and what crosses between graphs is float32.
        weights: How many elements of the weights are stored in each format of fewer bits, from which the engine makes
            numbers of `dtype`; the others are stored in `dtype`.
        batch: Rows that each graph takes, or None where the batch is symbolic.
        graphs: In the order in which the stage runs them.
        layout: How the graphs of the ``step`` stage are packed: ``split``, the four parts; or ``pair``, a whole full
            and a whole cached step. None in other stages.
        model: The component as the target's own ecosystem opens it, of the UNet the undivided step; None where there
            is none. edgediff's runtimes leave it alone.
        files: Paths in the bundle of everything that the component consists of.
        tokenizer: Of a text encoder, path in the bundle of the ``tokenizer.json`` that its ids come from.
        peak_bytes: What it took in memory at its peak, weights and activations, when the export's machine ran it alone;
            None where that was not measured.
        further: The graphs for further sizes, where a graph takes one size; files and weights are shared.
    """

    stage: Stage
    dtype: Literal["fp32", "fp16", "int8"]
    batch: int | None
    floors: Floors
    graphs: tuple[Graph, ...]
    layout: Literal["split", "pair"] | None = None
    model: Graph | None = None
    files: tuple[str, ...] = ()
    tokenizer: str | None = None
    peak_bytes: int | None = None
    further: tuple[Sized, ...] = ()
    weights: dict[WeightFormat, int] = {}

    @property
    def has_size(self) -> bool:
        """Whether it depends on the picture's size, as all components but text encoders do."""
        return any(graph.maps for graph in self.graphs)

    @property
    def every_graph(self) -> tuple[Graph, ...]:
        """The graphs of every size."""
        return (*self.graphs, *(graph for sized in self.further for graph in sized.graphs))


class Target(Struct, frozen=True, tag_field="target"):
    """The components in one file format. A subclass for each format has what only that format says.

    Attributes:
        components: By their names; ``unet`` is always there.
    """

    components: dict[str, Component]

    @property
    def target(self) -> str:
        """The file format's name, which is the tag in JSON."""
        return str(self.__struct_config__.tag)

    @property
    def unet(self) -> Component:
        """The component that the loop runs."""
        return self.components["unet"]

    def component(self, name: str) -> Component:
        """A component by its name; a BundleError where the target has none of this name."""
        if name not in self.components:
            raise BundleError(f"the {self.target} target has no {name}; it has: {', '.join(self.components)}")
        return self.components[name]

    def with_unet(self, **changes: Any) -> Self:
        """The entry with some fields of its UNet changed."""
        return self.with_component("unet", msgspec.structs.replace(self.unet, **changes))

    def with_component(self, name: str, component: Component) -> Self:
        """The entry with a component in the place of that of the same name."""
        return msgspec.structs.replace(self, components={**self.components, name: component})

    def faults(self) -> Iterator[tuple[bool, str, object, str]]:
        """What types cannot say of this format: whether it is so, the field, its value, what is expected."""
        yield from ()


# The file formats that this runtime knows, by their tags. A runtime leaves out targets that it does not know.
TARGETS: dict[str, type[Target]] = {}


def register(kind: type[Target]) -> type[Target]:
    """Makes a file format known to the reader of manifests."""
    TARGETS[str(kind.__struct_config__.tag)] = kind
    return kind


@register
class OnnxTarget(Target, frozen=True, tag="onnx"):
    """ONNX graphs.

    Attributes:
        ir_version: ONNX file version.
    """

    opset: int
    ir_version: int


@register
class CoreMLTarget(Target, frozen=True, tag="coreml"):
    """ML Programs.

    Attributes:
        deployment_target: Oldest system that runs them, such as ``iOS18``.
        specification_version: Of Core ML's model format.
    """

    deployment_target: str
    specification_version: int

    def faults(self) -> Iterator[tuple[bool, str, object, str]]:
        """The model format is that of the system."""
        version = SPECIFICATION_OF.get(self.deployment_target)
        yield version is not None, "deployment_target", self.deployment_target, ", ".join(SPECIFICATION_OF)
        yield (
            self.specification_version in (version, 0),
            "specification_version",
            self.specification_version,
            f"{version}, that of {self.deployment_target}",
        )


@register
class OpenVinoTarget(Target, frozen=True, tag="openvino"):
    """OpenVINO's IR."""


@register
class ExecuTorchTarget(Target, frozen=True, tag="executorch"):
    """An ExecuTorch program for each component, with a method for each graph."""


@register
class LiteRtTarget(Target, frozen=True, tag="litert"):
    """A .tflite file for each component, with a signature for each graph."""


class Source(Struct, frozen=True):
    """Where the model came from.

    Attributes:
        name: Built-in name or directory name.
        path: The directory or file as it was given; None for built-in models.
        sha256: Hash over configuration, weights and scheduler.
        random_weights: Seed as decimal text, where the weights are random and the model is a geometry only.
        components: Hash over configuration and weights of each component beside the UNet; of a text encoder also over
            the files and tokens of `embedding`.
        lora: What was fused into the weights, each as ``FILE:scale``.
        embedding: The textual inversions of which prompts may name the tokens, each as ``FILE:token``.
        vae: What replaced the pipeline's autoencoder, as it was given.
        preview: Where the preview decoder came from, as it was given.
        control: Where each ControlNet came from, as it was given.
        t2i_adapter: Where the T2I-Adapter came from, as it was given.
        prediction_type: What the UNet of a single file was taken to predict.
    """

    name: str
    path: str | None
    sha256: str
    random_weights: str | None = None
    components: dict[str, str] = {}
    lora: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    vae: str | None = None
    preview: str | None = None
    control: tuple[str, ...] = ()
    t2i_adapter: str | None = None
    prediction_type: str | None = None


class Cut(Struct, frozen=True):
    """Where the UNet is divided: `level` high-resolution levels stay outside, `point` says where lowres ends."""

    level: int
    point: str


class Sample(Struct, frozen=True):
    """What the UNet denoises.

    Attributes:
        channels: Channels of a latent, and of what the UNet gives.
        in_channels: Channels that the UNet takes: the latent's, then those of what is concatenated to it (a mask and
            a masked image in inpainting).
        height: Of the usual latent, as is `width`.
        multiple: What height and width of any latent are multiples of.
        concat: What is concatenated to the latent, in this order: the ``mask`` (one channel, 1 where the picture is
            drawn anew), the latent of the ``masked_image``, that of the ``image`` as the encoder gives it, the
            ``depth`` (one channel, -1 to 1). Empty where nothing is, and where only the caller knows what.
        space: ``pixel`` where a latent is an image in [-1, 1], ``latent`` where a decoder comes after it.
    """

    channels: int
    in_channels: int
    height: int
    width: int
    space: Literal["pixel", "latent"]
    multiple: int = 1
    concat: tuple[Concatenated, ...] = ()

    def channels_of(self, name: Concatenated) -> int:
        """How many channels a part of `concat` has."""
        return 1 if name in ("mask", "depth") else self.channels


class Conditioning(Struct, frozen=True):
    """What the UNet is conditioned on.

    Attributes:
        kind: ``none``, ``class`` or ``text``.
        tensors: What a step is handed besides the sample and the timestep: named tensors with a row for each row of
            the sample, which a generation or a ``prompt`` component gives. Integers are int64 here; a graph may
            declare int32.
        labels: Names of the classes, in the order of their indices.
        null_label: Index of the class that means 'no class' in guidance, or None.
    """

    kind: Literal["none", "class", "text"]
    tensors: tuple[Tensor, ...] = ()
    labels: tuple[str, ...] = ()
    null_label: int | None = None


class LoraLayer(Struct, frozen=True):
    """A layer of the UNet whose result low-rank factors add to.

    Attributes:
        name: As diffusers names it.
        inputs: Features of what goes in, as are `outputs` of what comes out.
    """

    name: str
    inputs: int
    outputs: int


class LoraInputs(Struct, frozen=True):
    """The low-rank factors that the UNet's graphs take: a layer's W x becomes W x + up (down x).

    The input ``lora_down_PART`` [1, n] has of each layer of a part ``down`` transposed, [inputs, rank], in C order, one
    after the other; ``lora_up_PART`` [1, m] has ``up`` transposed, [rank, outputs]. Zeros add nothing.

    Attributes:
        layers: By the parts of the UNet that have some, in the order of their factors.
    """

    rank: int
    layers: dict[str, tuple[LoraLayer, ...]]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of the factors by their names."""
        found = {}
        for part, layers in self.layers.items():
            found[f"{LORA_DOWN}{part}"] = (1, self.rank * sum(layer.inputs for layer in layers))
            found[f"{LORA_UP}{part}"] = (1, self.rank * sum(layer.outputs for layer in layers))
        return found


class Encoder(Struct, frozen=True):
    """A text encoder: how it is handed a prompt, and what is taken of what it gives.

    Attributes:
        component: Its name.
        max_length: Tokens that it takes at once, the marks of beginning and end among them.
        bos: Id of the token before a prompt.
        eos: Id of the token after it.
        pad: Id of the tokens that fill the rest.
        hidden: Names of the outputs that stand for the prompt, by the number of layers that are left out at the end
            (``clip_skip``): the first is the usual one.
        pooled: Name of the output that becomes ``text_embeds``; None where it is not used.
        expansions: Ids of tokens that stand for several, two or more in each: where a text has the first, all of them
            take its place.
    """

    component: str
    max_length: int
    bos: int
    eos: int
    pad: int
    hidden: tuple[str, ...]
    pooled: str | None = None
    expansions: tuple[tuple[int, ...], ...] = ()


class Prompt(Struct, frozen=True):
    """How prompts become the UNet's conditioning.

    Attributes:
        encoders: What they give is joined along the features, in this order.
        zeros_without_negative: Guidance without a negative prompt is against zeros; else against an empty prompt.
    """

    encoders: tuple[Encoder, ...]
    zeros_without_negative: bool = False


class Vae(Struct, frozen=True):
    """The autoencoder's latents against those that the UNet denoises.

    Attributes:
        scaling_factor: The decoder takes ``latents / scaling_factor``.
        downscale: Pixels of a side for one of the latent.
        mean: Of each channel, with `std`: the decoder takes ``latents * std / scaling_factor + mean``. None where there
            is one scale for all channels.
        std: Of each channel, or None.
    """

    scaling_factor: float
    downscale: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class TrainedFor(Struct, frozen=True):
    """The operating point that an adaptor was trained for.

    Attributes:
        mask: The clock as a mask, 1 = full.
        guidance_scale: Classifier-free guidance; 1 is off.
    """

    num_inference_steps: int
    scheduler: str
    clock: int | str
    mask: tuple[int, ...]
    guidance_scale: float


class OperatingPoint(TrainedFor, frozen=True):
    """What the bundle is made and verified for; the defaults of a generation.

    Attributes:
        seed: Seed of the evidence's trajectory, as decimal text: JSON's numbers end at 2^53 in most languages.
    """

    seed: str
    num_images: int


class Evidence(Struct, frozen=True):
    """How the bundle was verified.

    Attributes:
        verified: How far: ``full`` or ``graphs`` (no trajectory).
        conditioning: Where the trajectory's conditioning came from: ``labels``, ``prompt``, ``file``, ``synthetic`` or
            ``none``.
        sha256: Hash of that file, or None.
        prompt: The prompt, and the negative one, where it came from those.
        sizes: Height and width of the further latents that graphs were verified with.
    """

    verified: Literal["full", "graphs"]
    conditioning: Literal["none", "labels", "prompt", "file", "synthetic"] = "none"
    sha256: str | None = None
    prompt: tuple[str, str | None] | None = None
    sizes: tuple[tuple[int, int], ...] = ()


class Adaptor(Struct, frozen=True):
    """What stands in for lowres on cached steps.

    Attributes:
        kind: ``identity``, ``resnet``, ``unet`` or ``unet-light``.
        name: Its folder's name; None for the identity.
        path: That folder as it was given; None for the identity and for built-in adaptors.
        sha256: Hash of its weights; None for the identity.
    """

    kind: str
    name: str | None = None
    path: str | None = None
    sha256: str | None = None
    trained_for: TrainedFor | None = None


class Cost(Struct, frozen=True):
    """What a part costs for one sample, counted.

    Attributes:
        macs: Multiply-adds in convolutions and linear layers.
        macs_attention: Multiply-adds in attention matmuls, which both papers leave out.
    """

    parameters: int
    macs: int
    macs_attention: int


def operations_saved(
    cost: dict[str, Cost], steps: Iterable[tuple[bool, int]], steered: bool, attention: bool = True
) -> float:
    """Share of a generation's operations that its cached steps save, of clock 1's; 0 where none is counted.

    Args:
        steps: Of each step that was run, whether it was full, and its rows for an image.
        steered: Whether a ControlNet ran, where the bundle has one: ``full`` counts it.
        attention: Whether attention matmuls count, which both papers leave out.
    """

    def of(name: str) -> int:
        return cost[name].macs + cost[name].macs_attention * attention if name in cost else 0

    full = of("full") - (0 if steered else of(CONTROLNET))
    ran = list(steps)
    always = full * sum(rows for _, rows in ran)
    return 1 - sum(rows * (full if each else of("cached")) for each, rows in ran) / always if always else 0.0


class File(Struct, frozen=True):
    """Size in bytes and hash of a file in the bundle."""

    size: int
    sha256: str


def graphs_at(
    graphs: tuple[Graph, ...], further: Iterable[Sized], sample: Sample, height: int, width: int
) -> tuple[Graph, ...] | None:
    """A component's graphs for a latent of this size; None where it has none.

    Args:
        graphs: Those of the usual size, which `sample` names.
        further: Those of further sizes.
    """
    if any(graph.takes_any_size for graph in graphs):
        fits = height % sample.multiple == width % sample.multiple == 0
        return tuple(graph.at(height, width) for graph in graphs) if fits else None
    if (height, width) == (sample.height, sample.width) or not any(graph.maps for graph in graphs):
        return graphs
    return next((sized.graphs for sized in further if (sized.height, sized.width) == (height, width)), None)


def numbered(name: str, i: int) -> str:
    """The name of what the i-th ControlNet of a bundle is handed, from 0.

    >>> numbered("control_image", 0), numbered("control_image", 1)
    ('control_image', 'control_image_2')
    """
    return f"{name}_{i + 1}" if i else name


def feature_tensors(graphs: Iterable[Graph]) -> tuple[Tensor, ...]:
    """The features of a T2I-Adapter that graphs take, each once."""
    taken = (tensor for graph in graphs for tensor in graph.inputs)
    return tuple({tensor.name: tensor for tensor in taken if tensor.name.startswith(T2I_ADAPTER)}.values())


def share_rows(graphs: Iterable[Graph]) -> bool:
    """Whether graphs are handed a sample once for each image: some take one, and all that do can repeat it."""
    taking = [graph.shares_rows for graph in graphs if graph.takes_sample]
    return bool(taking) and all(taking)


def injects(graphs: Iterable[Graph]) -> bool:
    """Whether rows can take other rows' queries, keys and features: rows depend on each other then."""
    rows = {ATTENTION_ROWS, FEATURE_ROWS}
    return any(tensor.name in rows for graph in graphs for tensor in graph.inputs)


class Manifest(Struct, frozen=True):
    """Everything that a runtime needs to know about a bundle.

    Attributes:
        generator: Name and version of what wrote the bundle.
        license: Licence of the model, or ``unknown``.
        prompt: How prompts become embeddings; None where the bundle has no text encoder.
        vae: How latents become pictures; None where the bundle has no decoder.
        preview: How latents become previews; None where the bundle has no preview decoder.
        lora: The low-rank factors that the UNet's graphs take; None where they take none.
        cost: Cost of each part, of a ``full`` and of a ``cached`` step; of a ``t2i_adapter``, for a picture.
        targets: The graphs by file format; what a runtime does not know is left out.
        config: The recipe that the bundle was made by, as plain data: provenance, which no runtime reads.
        versions: Version of every tool that had a part in it.
        files: Every other file of the bundle but SHA256SUMS and evidence/parity.json.
    """

    format_version: int
    generator: str
    source: Source
    license: str
    cut: Cut
    adaptor: Adaptor
    sample: Sample
    conditioning: Conditioning
    scheduler: SchedulerConfig
    operating_point: OperatingPoint
    evidence: Evidence
    cost: dict[str, Cost]
    cache_bytes: int
    targets: tuple[Target, ...]
    config: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, File]
    prompt: Prompt | None = None
    vae: Vae | None = None
    preview: Vae | None = None
    lora: LoraInputs | None = None

    @property
    def pixels_of_latent(self) -> int:
        """Pixels of a side for one of the latent; 1 where no decoder says."""
        return 1 if self.vae is None else self.vae.downscale

    @property
    def has_decoder(self) -> bool:
        """Whether some target makes pictures: latents are pictures, or there is a decoder for them."""
        return self.sample.space == "pixel" or any("vae_decoder" in target.components for target in self.targets)

    def at(self, height: int, width: int) -> "Manifest":
        """The same with a latent of this size as the usual one, in the targets that take it."""
        if (height, width) == (self.sample.height, self.sample.width):
            return self
        targets = []
        for target in self.targets:
            found = {
                name: graphs_at(component.graphs, component.further, self.sample, height, width)
                for name, component in target.components.items()
            }
            if None not in found.values():
                components = {
                    name: msgspec.structs.replace(component, graphs=found[name], further=())
                    for name, component in target.components.items()
                }
                targets.append(msgspec.structs.replace(target, components=components))
        sample = msgspec.structs.replace(self.sample, height=height, width=width)
        return msgspec.structs.replace(self, sample=sample, targets=tuple(targets))

    def target(self, *names: str) -> Target:
        """The entry of a target, of several names the first that is there; a BundleError where none is."""
        for name in names:
            for target in self.targets:
                if target.target == name:
                    return target
        there = ", ".join(target.target for target in self.targets)
        raise BundleError(f"the bundle has no {' or '.join(map(repr, names))} target; it has: {there}")
