"""LoRA files: weights become W + scale * alpha / r * (up @ down) before anything is cut (Hu et al. 2021, section 4.1).

diffusers reads the names, its own and kohya's; the sum is ours, so that peft is not needed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers.utils import state_dict_utils as names
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from edgediff.errors import ConfigError, ModelError, UnsupportedError
from edgediff.extras import needing
from edgediff.models.model_files import BAD_SETTINGS, check_finite, file_sha256, read_tensors
from edgediff_runtime.errors import one_line
from edgediff_runtime.low_rank import file_and_scale

UNET, TEXT = "unet", ("text_encoder", "text_encoder_2")
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
# What a name of another kind of adapter contains.
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoCon with a Tucker core",
}


@dataclass(frozen=True)
class Layer:
    """A layer's update: ``down`` [r, in, ...], ``up`` [out, r, ...], and what the file scales it by."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it is added to."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, scale: float) -> Tensor:
        """What is added to the weight, float32."""
        down, up = self.down.float(), self.up.float()
        if down.ndim == 2:
            product = up @ down
        elif down.shape[2:] == (1, 1):
            product = (up.flatten(1) @ down.flatten(1))[:, :, None, None]
        else:
            product = F.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
        return product * (self.scale * scale)


@dataclass(frozen=True)
class Lora:
    """A LoRA file and its scale.

    Attributes:
        unet_config: Configuration of the UNet that it is for; kohya's names of blocks are read with it.
    """

    path: Path
    scale: float
    unet_config: Any = field(repr=False, compare=False)

    @cached_property
    def sha256(self) -> str:
        """Hash over the file and the scale."""
        return f"{file_sha256(self.path).hex()}:{self.scale!r}"

    @property
    def spec(self) -> str:
        """As `read_spec` reads it."""
        return f"{self.path}:{self.scale!r}"

    def layers(self) -> dict[str, dict[str, Layer]]:
        """The updates by component (``unet``, ``text_encoder``, ``text_encoder_2``), then by the layer's name.

        Raises:
            ModelError: The file is damaged, or no LoRA.
            UnsupportedError: It is an adapter of another kind.
        """
        with needing("export", "a LoRA"):
            import transformers  # noqa: F401 - without it, diffusers has no such loader
        from diffusers.loaders import StableDiffusionLoraLoaderMixin

        tensors = read_tensors(self.path)
        for part, kind in OTHER_KINDS.items():
            if any(part in name for name in tensors):
                raise UnsupportedError(f"{self.path} is a {kind} adapter; supported: LoRA")
        if not any("lora" in name for name in tensors):
            raise ModelError(f"{self.path} has no LoRA layers; expected names of diffusers or kohya")
        check_finite(tensors, self.path)
        try:
            state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=self.unet_config)
            parts = _by_component({**state, **(alphas or {})})
            return {name: self._paired(name, part) for name, part in parts.items()}
        except BAD_SETTINGS as e:
            raise ModelError(f"{self.path} cannot be read as a LoRA: {one_line(e)[:300]}") from e

    def _paired(self, component: str, part: dict[str, Any]) -> dict[str, Layer]:
        downs = [name.removesuffix(DOWN) for name in part if name.endswith(DOWN)]
        alphas = {
            name.removesuffix(ALPHA).removesuffix(DOWN): float(value)
            for name, value in part.items()
            if name.endswith(ALPHA)
        }
        used = {f"{name}{end}" for name in downs for end in (DOWN, UP, ALPHA, DOWN + ALPHA)}
        left = [name for name in part if name not in used]
        if left:
            raise ModelError(
                f"{self.path}: {len(left)} of its weights match nothing, among them {component}.{left[0]}; expected a "
                "LoRA of the model"
            )
        settings = self._settings(component)
        return {
            name: Layer(part[name + DOWN], part[name + UP], _scale(name, len(part[name + DOWN]), alphas, settings))
            for name in downs
        }

    def _settings(self, component: str) -> dict[str, Any]:
        """The settings that peft writes into the file's header; none in kohya's files."""
        if self.path.suffix != ".safetensors":
            return {}
        with safe_open(self.path, "pt") as file:
            header = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        settings: dict[str, Any] = json.loads(header)
        return {key.removeprefix(f"{component}."): value for key, value in settings.items()
                if key.startswith(f"{component}.")}  # fmt: skip

    def check(self, component: str, module: nn.Module, layers: Mapping[str, Layer]) -> None:
        """Refuses updates that do not fit a module, which may be on the meta device."""
        bad = []
        for name, layer in layers.items():
            weight = _weight(module, name)
            if weight is None:
                bad.append(f"{component}.{name}, which the model does not have")
            elif tuple(weight.shape) != layer.shape:
                bad.append(f"{component}.{name}, which is {list(layer.shape)} there and {list(weight.shape)} here")
        if bad:
            raise ModelError(
                f"{self.path} is a LoRA of another model: {len(bad)} of its {len(layers)} layers in {component} do not "
                f"fit, among them {bad[0]}; take one that was trained on this architecture"
            )

    def fuse(self, component: str, module: nn.Module) -> None:
        """Adds the updates to a module's weights; nothing where the file has none for it."""
        layers = self.layers().get(component, {})
        self.check(component, module, layers)
        for name, layer in layers.items():
            target = module.get_submodule(_own_name(module, name))
            weight: Any = target.weight
            # Not in place: the weights may be the mapped file's.
            target.weight = nn.Parameter(weight + layer.delta(self.scale), requires_grad=False)


def read_spec(spec: str) -> tuple[Path, float]:
    """The file and the scale of ``FILE[:scale]``.

    Raises:
        ConfigError: There is no such file, or the scale is no finite number.
    """
    path, number = file_and_scale(spec)
    try:
        scale = float(number)
    except ValueError as e:
        raise ConfigError(f"LoRA {spec!r}: the scale {number!r} is no number; expected FILE or FILE:SCALE") from e
    if not path.is_file():
        raise ConfigError(f"LoRA {spec!r}: no such file; expected FILE or FILE:SCALE")
    if not math.isfinite(scale):
        raise ConfigError(f"LoRA {spec!r}: the scale is {scale}; expected a finite number")
    return path, scale


def _by_component(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Divides by component, each with peft's names."""
    if not any(name.startswith((f"{UNET}.", *(f"{each}." for each in TEXT))) for name in state):
        state = {f"{UNET}.{name}": value for name, value in state.items()}  # diffusers' files of attention layers alone
    parts: dict[str, dict[str, Any]] = {}
    for name, value in state.items():
        component, _, rest = name.partition(".")
        parts.setdefault(component, {})[rest] = value
    return {
        component: names.convert_unet_state_dict_to_peft(part)
        if component == UNET
        else names.convert_state_dict_to_peft(names.convert_state_dict_to_diffusers(part))
        for component, part in parts.items()
    }


def _scale(name: str, rank: int, alphas: Mapping[str, float], settings: Mapping[str, Any]) -> float:
    alpha = alphas.get(name)
    if alpha is None:
        alpha = (settings.get("alpha_pattern") or {}).get(name, settings.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _own_name(module: nn.Module, name: str) -> str:
    # transformers' text encoders have lost a level that files of LoRA still name.
    return name if hasattr(module, "text_model") else name.removeprefix("text_model.")


def _weight(module: nn.Module, name: str) -> Tensor | None:
    try:
        target = module.get_submodule(_own_name(module, name))
    except AttributeError:
        return None
    weight = getattr(target, "weight", None)
    return weight if isinstance(weight, Tensor) else None
