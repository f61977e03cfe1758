"""What an export is asked to do: frozen structs, read from strict YAML.

Rules that tie two fields together stand in `check_config`, in one place.
"""

import math
from pathlib import Path
from typing import get_args

import msgspec

from edgediff.config.choices import POINTS, Cut, SchedulerName, block_of
from edgediff.config.floors import VerifyConfig
from edgediff.config.recipes import find_recipe
from edgediff.config.strict import read_yaml, retyped, spell_clock, strict
from edgediff.errors import ConfigError
from edgediff.targets.configs import (
    FUSED_OPSET,
    CoreMLConfig,
    EightBits,
    ExecuTorchConfig,
    Layout,
    OnnxConfig,
    OpenVinoConfig,
    Target,
    opset_of,
)
from edgediff_runtime.clock import clock_mask, format_mask
from edgediff_runtime.errors import RequestError

# Targets whose weights and products may be of eight bits, and what their files are.
QUANTIZABLE: dict[Target, str] = {"onnx": "ONNX graphs", "openvino": "OpenVINO's models"}


class ExportConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One recipe: a model, a cut, an operating point and the targets.

    Attributes:
        model: A diffusers directory or a built-in name; the command line's argument comes first.
        targets: What is written into the bundle.
        cut: Where the UNet is divided.
        adaptor: What stands in for the low-resolution part on cached steps: ``identity``, a built-in one by its name
            or kind, or a folder that ``train adaptor`` wrote. None takes the built-in one trained for this
            operating point, and the identity where there is none.
        clock: Period (``2``) or mask (``"1,0,1,0"``, 1 = full) of the full steps.
        steps: Denoising steps of the operating point.
        scheduler: Sampler of the operating point.
        guidance_scale: Classifier-free guidance of the operating point; None takes 2.0 for models with classes, 7.5
            for models with text, 1.0 (off) for models with neither.
        layout: How the graphs are packed, where a target does not say otherwise: ``split``, the four parts; or
            ``pair``, a whole full and a whole cached step over the same weights. None takes the faster one that the
            clock allows: all but Core ML in a ``pair``, unless all steps are full or ONNX graphs are to be portable
            (providers for accelerators want weights in the graph's file); else ``split``.
        onnx: How ONNX graphs are written.
        coreml: How Core ML packages are written.
        executorch: How the ExecuTorch program is written.
        openvino: How OpenVINO's models are written.
        verify: What the numbers must hold.
        conditioning: A ``.safetensors`` or ``.npz`` file with the embeddings of the reference trajectory
            (``encoder_hidden_states``, ``negative_encoder_hidden_states``, ``text_embeds``, ...), or None.
        random_weights: Seed of random weights for a built-in geometry, or None: weights are loaded.
        seed: Seed of the reference trajectory.
        license: Licence of the model where the source does not say, an SPDX name.
    """

    model: str | None = None
    targets: tuple[Target, ...] = ("onnx",)
    cut: Cut = Cut()
    adaptor: str | None = None
    clock: int | str = 2
    steps: int = 8
    scheduler: SchedulerName = "dpmpp_2m"
    guidance_scale: float | None = None
    layout: Layout | None = None
    onnx: OnnxConfig = OnnxConfig()
    coreml: CoreMLConfig = CoreMLConfig()
    executorch: ExecuTorchConfig = ExecuTorchConfig()
    openvino: OpenVinoConfig = OpenVinoConfig()
    verify: VerifyConfig = VerifyConfig()
    conditioning: str | None = None
    random_weights: int | None = None
    seed: int = 0
    license: str | None = None


def load_config(path: str | Path) -> ExportConfig:
    """Reads a YAML recipe strictly.

    Args:
        path: The file, or the name of a built-in recipe.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: The file cannot be read, is no mapping, or a key in it is unknown, mistyped or out of range.
    """
    return read_yaml(find_recipe(path), config_from)


def config_from(data: object) -> ExportConfig:
    """Builds a checked configuration from plain data.

    Args:
        data: A mapping as YAML or JSON give it.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: A key is unknown (the nearest valid one is named), missing, mistyped or out of range.

    >>> config_from({"steps": 4, "clock": "1,0,0,1"}).clock
    '1,0,0,1'
    """
    return check_config(strict(spell_clock(data), ExportConfig))


def check_config(config: ExportConfig) -> ExportConfig:
    """Holds the rules that types cannot: ranges, finite numbers, fields that must fit each other.

    Args:
        config: Any configuration, also one built by hand.

    Returns:
        The same configuration, of the declared types throughout.

    Raises:
        ConfigError: With the field, its value and what was expected.
    """
    if isinstance(config.clock, list | tuple):
        config = msgspec.structs.replace(config, clock=format_mask(config.clock))
    config = retyped(config)
    if not config.targets:
        raise ConfigError(f"'targets' is empty; expected at least one of: {', '.join(get_args(Target))}")
    if len(set(config.targets)) != len(config.targets):
        raise ConfigError(f"'targets' names one twice: {', '.join(config.targets)}")
    if config.cut.level < 1:
        raise ConfigError(f"'cut.level' is {config.cut.level}; expected 1 or more")
    block = block_of(config.cut.point)
    if config.cut.point not in POINTS and block is None:
        raise ConfigError(f"'cut.point' is {config.cut.point!r}; expected one of: {', '.join(POINTS)}, block:N")
    if block is not None and config.cut.level != 1:
        raise ConfigError(
            f"'cut.point' is {config.cut.point}, which divides level 1; 'cut.level' is {config.cut.level}"
        )
    if config.steps < 1:
        raise ConfigError(f"'steps' is {config.steps}; expected 1 or more")
    latest = FUSED_OPSET - 1 if config.onnx.portable else FUSED_OPSET
    if not 18 <= opset_of(config.onnx) <= latest:
        why = ", since in 23 attention is an operator that is not portable" if config.onnx.portable else ""
        raise ConfigError(f"'onnx.opset' is {config.onnx.opset}; expected 18 to {latest}{why}")
    for target in QUANTIZABLE:
        _check_eight_bits(config, target)
    if config.onnx.quantize_attention and opset_of(config.onnx) < FUSED_OPSET:
        raise ConfigError(f"'onnx.quantize_attention' needs 'onnx.opset' {FUSED_OPSET}")
    for name, batch in (("coreml", config.coreml.batch), ("executorch", config.executorch.batch)):
        if batch is not None and not 1 <= batch <= 2:
            raise ConfigError(f"'{name}.batch' is {batch}; expected 1, 2 or nothing")
    if (
        "coreml" in config.targets
        and layout_of(config, "coreml") == "pair"
        and config.coreml.deployment_target != "iOS18"
    ):
        raise ConfigError(
            f"layout pair needs Core ML packages of several functions, which {config.coreml.deployment_target} cannot "
            "load; expected 'coreml.deployment_target' iOS18, or layout split"
        )
    if config.guidance_scale is not None and not _positive(config.guidance_scale):
        raise ConfigError(f"'guidance_scale' is {config.guidance_scale}; expected a finite number above 0")
    for kind, floors in (("", config.verify), ("fp16.", config.verify.fp16), ("int8.", config.verify.int8)):
        for name in floors.__struct_fields__:
            floor = getattr(floors, name)
            if name.endswith("_db") and floor is not None and not _positive(floor):
                raise ConfigError(f"'verify.{kind}{name}' is {floor}; expected a finite number of dB above 0")
    for name in ("seed", "random_weights"):
        seed = getattr(config, name)
        if seed is not None and not 0 <= seed < 2**63:
            raise ConfigError(f"'{name}' is {seed}; expected 0 to 2^63 - 1")
    try:
        mask = clock_mask(config.clock, config.steps)
    except RequestError as e:
        raise ConfigError(str(e)) from e
    if all(mask) and any(layout_of(config, target) == "pair" for target in config.targets):
        raise ConfigError(
            f"layout pair with clock {config.clock} over {config.steps} steps: there is no cached step by which the "
            "cached graph could be verified; expected a clock with one, or layout split"
        )
    return config


def _check_eight_bits(config: ExportConfig, target: Target) -> None:
    """Holds what says how one of `QUANTIZABLE` is quantized."""
    said: EightBits = getattr(config, target)
    if said.quantize_nbits is not None and target not in config.targets:
        raise ConfigError(
            f"'{target}.quantize_nbits' is for {QUANTIZABLE[target]}; the targets are: {', '.join(config.targets)}"
        )
    if said.quantize_attention and said.quantize_nbits is None:
        raise ConfigError(f"'{target}.quantize_attention' needs '{target}.quantize_nbits'")
    if said.calibration_images < 1:
        raise ConfigError(f"'{target}.calibration_images' is {said.calibration_images}; expected 1 or more")


def layout_of(config: ExportConfig, target: Target) -> Layout:
    """How a target's graphs are packed.

    Args:
        config: The recipe.
        target: One of its targets.

    Returns:
        The target's own layout, or the recipe's, or else the default, which needs a clock that `check_config` took.

    >>> layout_of(ExportConfig(coreml=CoreMLConfig(layout="pair")), "coreml")
    'pair'
    """
    own: Layout | None = getattr(config, target).layout
    chosen = config.layout if own is None else own
    if chosen is not None:
        return chosen
    if target == "coreml" or (target == "onnx" and config.onnx.portable):
        return "split"
    return "split" if all(clock_mask(config.clock, config.steps)) else "pair"


def _positive(x: float) -> bool:
    return math.isfinite(x) and x > 0
