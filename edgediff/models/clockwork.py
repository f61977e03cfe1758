"""The cut: a UNet divided into a high- and a low-resolution part (Clockwork Diffusion, section 3).

Each part is a module with named inputs and outputs: `SplitUNet` here, the exported bundle's manifest, and every runtime
wire the parts by name in the same order. Weights are shared with the UNet, not copied; the UNet is not changed.
"""

import copy
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from edgediff.config.choices import POINTS, Cut, block_of
from edgediff.errors import UnsupportedError
from edgediff.models.adaptors import IdentityAdaptor
from edgediff.models.controlnet import MID, control_names
from edgediff.models.embedding import StepEmbedding
from edgediff.models.injection import Rows, injected, rows_taken
from edgediff.models.layers import AnyLayer, Layer, Mid, flatten
from edgediff.models.lora_inputs import Factors, factors_of, with_lora_layers
from edgediff.models.part import Part
from edgediff.models.t2i_adapter import feature_names, feature_places
from edgediff_runtime.loop import CACHE
from edgediff_runtime.manifest import CONTROLNET, T2I_ADAPTER

UNet: TypeAlias = UNet2DModel | UNet2DConditionModel
TEXT = "encoder_hidden_states"
PROJECTED_TEXT = "encoder_hidden_states_projected"
ADAPTER = "down_intrablock_additional_residuals"
NO_FEATURES: Mapping[int, str] = MappingProxyType({})


def residuals_by_name(given: dict[str, Any]) -> dict[str, Tensor]:
    """A step's tensors with diffusers' lists of residuals and features taken apart.

    They are ``control_0`` and so on and ``control_mid`` of a ControlNet, ``t2i_adapter_0`` and so on of a T2I-Adapter.
    """
    down = given.pop("down_block_additional_residuals", None) or ()
    mid = given.pop("mid_block_additional_residual", None)
    features = given.pop(ADAPTER, None) or ()
    named = dict(zip(control_names(len(down)), down, strict=True))
    named |= dict(zip(feature_names(len(features)), features, strict=True))
    return given | named | ({} if mid is None else {MID: mid})


class WayDown(Part):
    """Layers of the way down, and what a T2I-Adapter adds to what comes out of some of them.

    Attributes:
        features: Names of what is added, by the numbers of the layers.
    """

    layers: nn.ModuleList
    features: Mapping[int, str]

    def run_layers(
        self, count: int, x: Tensor, skips: list[Tensor], tensors: Mapping[str, Tensor], text: Tensor | None
    ) -> Tensor:
        """Runs the first so many layers; skip connections are pushed to `skips`."""
        for i, layer in enumerate(self.layers[:count]):
            x = layer(x, skips, tensors["emb"], text)
            if i in self.features:
                x = x + tensors[self.features[i]]
                if layer.pushes:  # what the layer left there is the same tensor
                    skips[-1] = x
        return x


class HighresIn(WayDown):
    """``highres_in``: the conditioning's embedding, conv_in and the high-resolution way down."""

    def __init__(
        self, unet: UNet, layers: list[AnyLayer], num_skips: int, features: Mapping[int, str] = NO_FEATURES
    ) -> None:
        embedding = StepEmbedding(unet)
        inputs = ["sample", *embedding.inputs]
        if TEXT not in inputs:
            inputs += _text_input(layers, TEXT)
        outputs = ["highres_feature", *skip_names(num_skips), "emb"]
        if embedding.projects_text:
            outputs.append(PROJECTED_TEXT)
        super().__init__((*inputs, *features.values()), tuple(outputs))
        self.features = features
        self.embedding = embedding
        self.conv_in = unet.conv_in
        self.layers = nn.ModuleList(layers)
        self.num_skips = num_skips

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeds the conditioning and runs the way down to the cut."""
        sample = tensors["sample"]
        if self.embedding.center_input:
            sample = 2 * sample - 1.0
        emb = self.embedding(sample, tensors)
        out = {"emb": emb}
        text = tensors.get(TEXT)
        if self.embedding.projects_text:
            text = out[PROJECTED_TEXT] = self.embedding.project_text(tensors[TEXT])
        x = self.conv_in(sample)
        skips = [x]
        x = self.run_layers(len(self.layers), x, skips, {**tensors, "emb": emb}, text)
        # Skips above those that cross the cut are used within lowres.
        return {**out, "highres_feature": x, **dict(zip(skip_names(self.num_skips), skips, strict=False))}


class Lowres(WayDown):
    """``lowres``: everything between the high-resolution ways down and up; not run on cached steps.

    Where it takes the residuals of a ControlNet, they are added to its skip connections and to the middle block's
    output: `control` has their names, the middle's last.
    """

    def __init__(
        self,
        layers: list[AnyLayer],
        text: str,
        carries_skip: bool,
        control: tuple[str, ...] = (),
        features: Mapping[int, str] = NO_FEATURES,
    ) -> None:
        given = (*_text_input(layers, text), *features.values(), *control, *rows_taken(layers))
        super().__init__(("highres_feature", "emb", *given), ("lowres_feature",))
        self.features = features
        self.layers = nn.ModuleList(layers)
        self.text = text
        self.carries_skip = carries_skip
        self.control = control
        # Where the way up begins, and skip connections are taken.
        self.turn = sum(bool(layer.pushes) or isinstance(layer, Mid) for layer in layers)

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs the low-resolution levels."""
        x = tensors["highres_feature"]
        skips = [x] if self.carries_skip else []
        x = self.run_layers(self.turn, x, skips, tensors, tensors.get(self.text))
        if self.control:
            *names, mid = self.control
            skips = [skip + tensors[name] for skip, name in zip(skips, names, strict=True)]
            x = x + tensors[mid]
        for layer in self.layers[self.turn :]:
            x = layer(x, skips, tensors["emb"], tensors.get(self.text), Rows.of(tensors))
        return {"lowres_feature": x}


class HighresOut(Part):
    """``highres_out``: the high-resolution way up and the output layers.

    Where it takes the residuals of a ControlNet, they are added to the skip connections that cross the cut.
    """

    def __init__(
        self, unet: UNet, layers: list[AnyLayer], text: str, num_skips: int, control: tuple[str, ...] = ()
    ) -> None:
        # A UNet2DModel with a Fourier time embedding predicts sigma times its output's scale.
        self.divides_by_time = isinstance(unet, UNet2DModel) and unet.config.time_embedding_type == "fourier"
        given = (*_text_input(layers, text), *control, *rows_taken(layers))
        inputs = ("lowres_feature", *skip_names(num_skips), "emb", *given)
        super().__init__((*inputs, "timestep") if self.divides_by_time else inputs, ("out_sample",))
        self.layers = nn.ModuleList(layers)
        self.conv_norm_out = unet.conv_norm_out
        self.conv_act = unet.conv_act
        self.conv_out = unet.conv_out
        self.text = text
        self.num_skips = num_skips
        self.control = control

    def compute(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs the way up from the cut."""
        x = tensors["lowres_feature"]
        skips = [tensors[name] for name in skip_names(self.num_skips)]
        if self.control:
            skips = [skip + tensors[name] for skip, name in zip(skips, self.control, strict=True)]
        for layer in self.layers:
            x = layer(x, skips, tensors["emb"], tensors.get(self.text), Rows.of(tensors))
        if self.conv_norm_out is not None:
            x = self.conv_act(self.conv_norm_out(x))
        x = self.conv_out(x)
        if self.divides_by_time:
            x = x / tensors["timestep"].expand(x.shape[0]).reshape(-1, 1, 1, 1)
        return {"out_sample": x}


class SplitUNet(nn.Module):
    """A UNet divided at a cut, with an adaptor in place of its low-resolution part on cached steps.

    It keeps no state between calls: the cache is a value that `full` and `cached` return and `cached` takes.

    Attributes:
        factor: Height and width of a sample must be multiples of it.
        controlnet: What makes the residuals that the parts take; None where they are given, or none are taken.
        ignored: Required arguments that the UNet does not use: the text of a conditional one without attention.
        tallies: Results of `edgediff.models.macs.tally`, by the shapes of the inputs.
    """

    def __init__(
        self,
        cut: Cut,
        factor: int,
        highres_in: Part,
        lowres: Part,
        adaptor: Part,
        highres_out: Part,
        controlnet: Part | None = None,
    ) -> None:
        super().__init__()
        self.cut = cut
        self.factor = factor
        self.ignored: tuple[str, ...] = ()
        self.tallies: dict[Any, Any] = {}
        self.highres_in = highres_in
        self.lowres = lowres
        self.adaptor = adaptor
        self.highres_out = highres_out
        self.controlnet = controlnet

    @property
    def parts(self) -> dict[str, Part]:
        """The four parts by name, in the order of a step; before them the ControlNet, where there is one."""
        before = {} if self.controlnet is None else {CONTROLNET: self.controlnet}
        return before | {
            "highres_in": self.highres_in,
            "lowres": self.lowres,
            "adaptor": self.adaptor,
            "highres_out": self.highres_out,
        }

    @property
    def factors(self) -> tuple[Factors, ...]:
        """The low-rank factors that the parts take, in the order of a step; empty where they take none."""
        return tuple(each for part in self.parts.values() for each in part.factors)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of a step's inputs: ``sample``, ``timestep`` and the conditioning."""
        made = {CACHE, *(name for part in self.parts.values() for name in part.outputs)}
        needed = dict.fromkeys(name for part in self.parts.values() for name in part.inputs)
        return tuple(name for name in needed if name not in made)

    def on_meta(self) -> "SplitUNet":
        """A copy whose weights are on the meta device: for counting."""
        memo = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in self.parameters()}
        return copy.deepcopy(self, memo)

    def full(self, sample: Tensor, timestep: Tensor | float, **cond: Any) -> tuple[Tensor, Tensor]:
        """Runs a full step: the undivided UNet's result, bit for bit, and the cache for the steps after it.

        Args:
            sample: [B, C, H, W].
            timestep: A number, or a tensor of shape [], [1] or [B].
            **cond: The UNet's own: ``encoder_hidden_states`` [B, S, D], ``class_labels`` [B], ``added_cond_kwargs`` (a
                mapping with ``text_embeds`` [B, P] and ``time_ids`` [B, K]).

        Returns:
            ``out_sample`` [B, C', H, W] and the cache, ``lowres_feature``.

        Raises:
            UnsupportedError: The levels do not divide the size, or conditioning is missing or not this UNet's.
        """
        before = () if self.controlnet is None else (self.controlnet,)
        parts = (*before, self.highres_in, self.lowres, self.highres_out)
        return self._step(parts, self._tensors(sample, timestep, cond))

    def cached(self, sample: Tensor, timestep: Tensor | float, cache: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """Runs a cached step: the adaptor in place of the low-resolution part; its output is the new cache.

        `cache` is what the step before returned; otherwise as `full`, with the residuals of a ControlNet that its
        part made in a full step.
        """
        residuals = () if self.controlnet is None else self.controlnet.outputs
        tensors = self._tensors(sample, timestep, cond, residuals)
        return self._step((self.highres_in, self.adaptor, self.highres_out), {**tensors, CACHE: cache})

    def _step(self, parts: Iterable[Part], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        for part in parts:
            tensors |= part.run(tensors)
        return tensors["out_sample"], tensors["lowres_feature"]

    def _tensors(
        self, sample: Tensor, timestep: Tensor | float, cond: Mapping[str, Any], more: tuple[str, ...] = ()
    ) -> dict[str, Tensor]:
        check_size(sample.shape[-2], sample.shape[-1], self.factor)
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor([timestep], dtype=torch.float32, device=sample.device)
        given = {"sample": sample, "timestep": timestep.reshape(-1), **cond}
        given.update(given.pop("added_cond_kwargs", None) or {})
        given = residuals_by_name(given)
        tensors = {name: value for name, value in given.items() if value is not None and name not in self.ignored}
        expected = (*self.inputs, *more)
        if set(tensors) != set(expected):
            taken = ", ".join(expected)
            residuals = any(name.startswith("control_") for name in tensors)
            hint = "; divide it with split(unet, takes_control=True)" if residuals and MID not in expected else ""
            features = sum(name.startswith(T2I_ADAPTER) for name in tensors)
            if features != sum(name.startswith(T2I_ADAPTER) for name in expected):
                hint = f"; divide it with split(unet, features={features})"
            raise UnsupportedError(f"the UNet takes {taken}; got {', '.join(sorted(tensors))}{hint}")
        return tensors


def split(
    unet: UNet,
    cut: Cut | None = None,
    adaptor: Part | None = None,
    *,
    controlnet: Part | None = None,
    takes_control: bool = False,
    features: int = 0,
    injects: bool = False,
    lora_rank: int | None = None,
) -> SplitUNet:
    """Divides a UNet at a cut; weights are shared, the UNet is not changed.

    ``split(unet).full(...)`` equals ``unet(...)`` bit for bit.

    Args:
        cut: Where to divide; the paper's cut (level 1, before the upsampler) if None.
        adaptor: Replaces the low-resolution part on cached steps; the identity if None.
        controlnet: A part that makes the residuals of skip connections; it runs first in a full step.
        takes_control: Take such residuals as inputs of a step, by diffusers' names, without what makes them.
        features: How many features of a T2I-Adapter are inputs of a step, by diffusers' name.
        injects: Take ``attention_rows`` and ``feature_rows``, int64 [B], for plug-and-play injection: the row whose
            queries and keys, and whose features, each row takes.
        lora_rank: Take low-rank factors of this rank as inputs of a step; None takes none. With zeros the result is
            the same, bit for bit.

    Raises:
        UnsupportedError: The UNet cannot be cut there, or at all: the message names the block or the setting.
    """
    cut = Cut() if cut is None else cut
    if not isinstance(unet, UNet2DModel | UNet2DConditionModel):
        raise UnsupportedError(f"cannot cut a {type(unet).__name__}; supported: UNet2DModel, UNet2DConditionModel")
    if unet.config.get("attention_type", "default") != "default":
        raise UnsupportedError(f"cannot cut a GLIGEN UNet (attention_type {unet.config.attention_type!r})")
    if lora_rank is not None:
        unet = with_lora_layers(unet)
    down, mid, up = flatten(unet)
    up = injected(up) if injects else up
    if not 1 <= cut.level < len(down):
        count = "1 level" if len(down) == 1 else f"{len(down)} levels"
        choices = ", ".join(str(level) for level in range(1, len(down))) or "none; expected two levels or more"
        raise UnsupportedError(f"cannot cut at level {cut.level}: the UNet has {count}, choices: {choices}")
    way_down = [layer for level in down for layer in level]
    way_up = [layer for level in up for layer in level]
    top, bottom = _places(cut, down, up)
    highres_down, highres_up = way_down[:top], way_up[bottom:]
    lowres = [*way_down[top:], *([] if mid is None else [mid]), *way_up[:bottom]]
    num_skips = sum(layer.pops for layer in highres_up)
    carries_skip = sum(layer.pops - layer.pushes for layer in lowres) > 0
    places = feature_places(unet) if features else []
    if features > len(places):
        raise UnsupportedError(f"the UNet takes {len(places)} features of a T2I-Adapter; got {features}")
    added = {place.layer: name for place, name in zip(places, feature_names(features), strict=False)}
    highres_in = HighresIn(unet, highres_down, num_skips, {i: name for i, name in added.items() if i < top})
    text = PROJECTED_TEXT if PROJECTED_TEXT in highres_in.outputs else TEXT
    residuals: tuple[str, ...] = ()
    if controlnet is not None or takes_control:
        residuals = tuple(control_names(1 + sum(layer.pushes for layer in way_down)))
    divided = SplitUNet(
        cut=cut,
        factor=level_factor(unet),
        highres_in=highres_in,
        lowres=Lowres(
            lowres,
            text,
            carries_skip,
            (*residuals[num_skips:], MID) if residuals else (),
            {i - top: name for i, name in added.items() if i >= top},
        ),
        adaptor=IdentityAdaptor() if adaptor is None else adaptor,
        highres_out=HighresOut(unet, highres_up, text, num_skips, residuals[:num_skips]),
        controlnet=controlnet,
    )
    if isinstance(unet, UNet2DConditionModel) and TEXT not in divided.inputs:
        divided.ignored = (TEXT,)
    if lora_rank is not None:
        for name in ("highres_in", "lowres", "highres_out"):
            part = divided.parts[name]
            part.factors = factors_of(name, part, lora_rank)
            part.inputs += tuple(tensor for each in part.factors for tensor in each.shapes)
    follow_mode(divided, unet)
    return divided


def follow_mode(made: nn.Module, unet: nn.Module) -> None:
    """Gives the modules of `made` that are not the UNet's own the UNet's mode, training or evaluation."""
    own = {id(module) for module in unet.modules()}
    for module in made.modules():
        if id(module) not in own:
            module.training = unet.training


def _places(cut: Cut, down: list[list[AnyLayer]], up: list[list[AnyLayer]]) -> tuple[int, int]:
    """The number of high-resolution layers on the way down, and the index of the first on the way up."""
    layers_up = sum(len(level) for level in up)
    block = block_of(cut.point)
    if block is not None:
        layers = sum(isinstance(layer, Layer) for layer in down[0])
        if cut.level != 1 or block > layers:
            raise UnsupportedError(
                f"cannot cut at level {cut.level}, {cut.point}: the UNet has {layers} layers in its highest level; "
                f"choices: level 1, {', '.join(f'block:{i}' for i in range(layers + 1))}"
            )
        return block, layers_up - (block + 1) - sum(not isinstance(layer, Layer) for layer in up[-1])
    if cut.point not in POINTS:
        raise UnsupportedError(f"cut point {cut.point!r} is unknown; choices: {', '.join(POINTS)}, block:N")
    top = sum(len(level) for level in down[: cut.level])
    bottom = layers_up - sum(len(level) for level in up[-cut.level :])
    return top, bottom - 1 if cut.point == "before_upsample" else bottom


def level_factor(unet: UNet) -> int:
    """What a sample's height and width must be multiples of: two for each level that halves it."""
    return int(2 ** sum(1 for block in unet.down_blocks if block.downsamplers is not None))


def check_size(height: int, width: int, factor: int) -> None:
    """Raises an UnsupportedError for a sample whose height or width the levels do not divide."""
    if height % factor or width % factor:
        raise UnsupportedError(
            f"a sample of {height}x{width} cannot be cut: the levels divide by {factor}; expected multiples of {factor}"
        )


def skip_names(count: int) -> list[str]:
    """The names of skip connections that cross the cut: ``skip_0``, ``skip_1`` and so on."""
    return [f"skip_{i}" for i in range(count)]


def _text_input(layers: list[AnyLayer], text: str) -> tuple[str, ...]:
    return (text,) if any(layer.needs_text for layer in layers) else ()
