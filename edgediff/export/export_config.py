"""What an export is asked to do: a frozen struct, read from strict YAML.

Rules that tie two fields together are in `check_config`; those of one target's section are the target's own.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edgediff.config.choices import POINTS, Cut, SchedulerName, block_of
from edgediff.config.floors import VerifyConfig
from edgediff.config.recipes import find_recipe
from edgediff.config.sizes import read_sizes
from edgediff.config.strict import clock_to_text, read_yaml, retyped, strict
from edgediff.config.weight_plan import formats_of
from edgediff.errors import ConfigError
from edgediff.targets import TARGETS
from edgediff.targets.base import PRECISIONS, CalibratedConfig, Layout, Target
from edgediff_runtime.clock import clock_mask
from edgediff_runtime.errors import RequestError

# Ranks of low-rank factors up to which a step was measured to cost little more (benchmarks/log/editing.md).
MOST_RANK = 32
# What a precision is asked for by name.
COMPONENTS = (
    "text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder", "preview_decoder", "t2i_adapter",
)  # fmt: skip


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One recipe: a model, a cut, an operating point and the targets, without the targets' sections.

    Attributes:
        model: A diffusers directory, a single file or a built-in name; the command line's argument comes first.
        targets: What is written into the bundle, by the names in `edgediff.targets.TARGETS`.
        adaptor: What stands in for the low-resolution part on cached steps: ``identity``, a built-in one by its name
            or kind, or a folder that ``train adaptor`` wrote. None takes the built-in one trained for this
            operating point, and the identity where there is none.
        clock: Period (``2``) or mask (``"1,0,1,0"``, 1 = full) of the full steps.
        steps: Denoising steps; None takes those that the adaptor's folder was trained for, else 4 for distilled models
            (LCM, SDXL-Turbo), 8 for others.
        scheduler: The sampler; None takes the one that the adaptor's folder was trained for, else the model's own.
            That is dpmpp_2m for built-in geometries and for models saved with ``DDPMScheduler``, which is the one of
            trainings.
        guidance_scale: Classifier-free guidance of the operating point; None takes the adaptor's, else 2.0 for models
            with classes, 7.5 for models with text, 8.5 where the UNet is told (LCM), 1.0 (off) for others, SDXL-Turbo
            among them.
        layout: How the graphs are packed, where a target does not say otherwise: ``split``, the four parts; or
            ``pair``, a whole full and a whole cached step over the same weights. None takes the faster one that the
            target and the clock allow: a ``pair``, unless all steps are full, for all but Core ML and portable ONNX.
        dtypes: Precision by component, for each target that has it: ``{vae_decoder: fp32}``. It goes before the
            ``dtype`` of a target's section.
        weights: What weights are stored in by component, for each target: a format by its name, or a plan of
            weights, a file. It goes before the ``weights`` of a target's section.
        lora: What `load_model` fuses into the model, each ``FILE[:scale]``.
        embedding: Textual inversions that `load_model` adds to tokenizers and text encoders, each ``FILE[:token]``.
        vae: A directory or a file with the autoencoder that replaces the pipeline's.
        preview: A directory or a file with an AutoencoderTiny of the same latents, whose decoder makes previews.
        control: Directories with ControlNets of the same base, whose residuals, added up, become inputs of the graphs.
        t2i_adapter: A directory with a T2I-Adapter of the same base, whose features become inputs of the graphs.
        injection: Let rows of a step take the self-attention and features of an inverted picture (plug-and-play).
        lora_inputs: The rank of low-rank factors that become inputs of the graphs, for every projection of attention;
            None has none.
        prediction_type: What the UNet of a single file predicts; None infers it.
        components: Which components are written beside the UNet, of ``text_encoder``, ``text_encoder_2``,
            ``vae_decoder``, ``vae_encoder``, ``preview_decoder`` and ``t2i_adapter``; None takes all that there are.
        sizes: Pictures that the graphs take, each ``WIDTHxHEIGHT`` in pixels (of the sample, where there is no
            autoencoder), or ``any``; the first is the usual one, left out that of the model. With one size graphs are
            fixed, and the passes that want that are applied. With several, or ``any``, graphs of formats that can take
            every size that the levels divide; those of others have a function for each that is named.
        prompt: Prompt of the reference trajectory, where there is a text encoder.
        negative_prompt: What its guidance leads away from; None is what the model takes for none.
        conditioning: A ``.safetensors`` or ``.npz`` file with the embeddings of the reference trajectory
            (``encoder_hidden_states``, ``negative_encoder_hidden_states``, ``text_embeds``, ...), or None.
        random_weights: Seed of random weights for a built-in geometry, or None: weights are loaded.
        seed: Seed of the reference trajectory.
        license: Licence of the model where the source does not say, an SPDX name.
    """

    model: str | None = None
    targets: tuple[str, ...] = ("onnx",)
    cut: Cut = Cut()
    adaptor: str | None = None
    clock: int | str = 2
    steps: int | None = None
    scheduler: SchedulerName | None = None
    guidance_scale: float | None = None
    layout: Layout | None = None
    verify: VerifyConfig = VerifyConfig()
    dtypes: dict[str, str] = {}
    weights: dict[str, str] = {}
    lora: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    vae: str | None = None
    preview: str | None = None
    control: tuple[str, ...] = ()
    t2i_adapter: str | None = None
    injection: bool = False
    lora_inputs: int | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    components: tuple[str, ...] | None = None
    sizes: tuple[str, ...] = ()
    prompt: str = "a photo of a red apple"
    negative_prompt: str | None = None
    conditioning: str | None = None
    random_weights: int | None = None
    seed: int = 0
    license: str | None = None

    def section(self, target: str, component: str = "unet") -> Any:
        """How one target's graphs of a component are written: its own struct, in the component's precision."""
        own = getattr(self, target)
        asked = (("dtype", self.dtypes.get(component)), ("weights", self.weights.get(component)))
        said = {key: value for key, value in asked if value is not None and key in own.__struct_fields__}
        return msgspec.structs.replace(own, **said) if said else own

    def weights_of(self, target: str, component: str) -> str | None:
        """What a component's weights are stored in; None where they stay in its precision."""
        asked: str | None = getattr(self.section(target, component), "weights", None)
        return asked


if TYPE_CHECKING:

    class ExportConfig(Recipe, frozen=True):
        """A recipe with a section for each target, named as the target is."""

        def __init__(self, **fields: Any) -> None: ...

else:
    ExportConfig = msgspec.defstruct(
        "ExportConfig",
        [(name, target.config, target.config()) for name, target in TARGETS.items()],
        bases=(Recipe,),
        namespace={"__doc__": "A recipe with a section for each target, named as the target is."},
        module=__name__,
        frozen=True,
        forbid_unknown_fields=True,
        kw_only=True,
    )


def load_config(path: str | Path) -> ExportConfig:
    """Reads a YAML recipe strictly.

    Args:
        path: The file, or the name of a built-in recipe.

    Raises:
        ConfigError: The file cannot be read, is no mapping, or a key in it is unknown, mistyped or out of range.
    """
    return read_yaml(find_recipe(path), config_from)


def config_from(data: object) -> ExportConfig:
    """Builds a checked configuration from plain data.

    Raises:
        ConfigError: A key is unknown (the nearest valid one is named), missing, mistyped or out of range.

    >>> config_from({"steps": 4, "clock": "1,0,0,1"}).clock
    '1,0,0,1'
    """
    return check_config(strict(clock_to_text(data), ExportConfig))


def check_config(config: ExportConfig) -> ExportConfig:
    """Checks what types cannot: ranges, finite numbers, fields that must fit each other.

    Returns:
        The same configuration, of the declared types throughout.

    Raises:
        ConfigError: With the field, its value and what was expected.
    """
    if isinstance(config.clock, list | tuple):
        config = msgspec.structs.replace(config, clock=",".join(str(bit) for bit in config.clock))
    config = retyped(config)
    if not config.targets:
        raise ConfigError(f"'targets' is empty; expected at least one of: {', '.join(TARGETS)}")
    for i, name in enumerate(config.targets):
        if name not in TARGETS:
            raise ConfigError(f"'targets[{i}]' is {name!r}; expected one of: {', '.join(TARGETS)}")
    if len(set(config.targets)) != len(config.targets):
        raise ConfigError(f"'targets' has a duplicate: {', '.join(config.targets)}")
    if config.control and config.t2i_adapter is not None:
        raise ConfigError("'control' and 't2i_adapter' are both named; a bundle is steered by one of them")
    for key in ("dtypes", "weights"):
        for name in getattr(config, key):
            if name not in COMPONENTS:
                raise ConfigError(f"{key!r} names {name!r}; expected components of: {', '.join(COMPONENTS)}")
    for name, dtype in config.dtypes.items():
        if dtype not in PRECISIONS:
            raise ConfigError(f"'dtypes.{name}' is {dtype!r}; expected one of: {', '.join(PRECISIONS)}")
    if config.cut.level < 1:
        raise ConfigError(f"'cut.level' is {config.cut.level}; expected 1 or more")
    block = block_of(config.cut.point)
    if config.cut.point not in POINTS and block is None:
        raise ConfigError(f"'cut.point' is {config.cut.point!r}; expected one of: {', '.join(POINTS)}, block:N")
    if block is not None and config.cut.level != 1:
        raise ConfigError(
            f"'cut.point' is {config.cut.point}, which divides level 1; 'cut.level' is {config.cut.level}"
        )
    if config.steps is not None and config.steps < 1:
        raise ConfigError(f"'steps' is {config.steps}; expected 1 or more")
    if config.lora_inputs is not None and not 1 <= config.lora_inputs <= MOST_RANK:
        raise ConfigError(f"'lora_inputs' is {config.lora_inputs}; expected a rank from 1 to {MOST_RANK}")
    if config.guidance_scale is not None and not _positive(config.guidance_scale):
        raise ConfigError(f"'guidance_scale' is {config.guidance_scale}; expected a finite number above 0")
    verify = config.verify
    for kind, floors in (("", verify), ("fp16.", verify.fp16), ("int8.", verify.int8), ("weights.", verify.weights)):
        for name in floors.__struct_fields__:
            floor = getattr(floors, name)
            if isinstance(floor, float) and not _positive(floor):
                raise ConfigError(f"'verify.{kind}{name}' is {floor}; expected a finite number of dB above 0")
    for name in ("seed", "random_weights"):
        seed = getattr(config, name)
        if seed is not None and not 0 <= seed < 2**63:
            raise ConfigError(f"'{name}' is {seed}; expected 0 to 2^63 - 1")
    mask = _mask(config)
    sizes = read_sizes(config.sizes)
    for name, target in TARGETS.items():
        section, layout = config.section(name), layout_of(config, name)
        chosen = name in config.targets
        if chosen:
            _check_precisions(config, target)
            _check_weights(config, target)
        target.check(section, layout if chosen else "split")
        if chosen:
            target.check_sizes(section, sizes)
        if isinstance(section, CalibratedConfig) and section.quantize_nbits is not None and not chosen:
            raise ConfigError(
                f"'{name}.quantize_nbits' is for {target.files}; the targets are: {', '.join(config.targets)}"
            )
        if chosen and layout == "pair" and mask is not None and all(mask):
            raise ConfigError(
                f"layout pair with clock {config.clock} over {config.steps} steps: no cached step verifies the cached "
                "graph; expected a clock with one, or layout split"
            )
    return config


def layout_of(config: ExportConfig, target: str) -> Layout:
    """How a target's graphs are packed.

    Args:
        config: The recipe, with a clock that `check_config` takes.

    Returns:
        The target's own layout, or the recipe's, or else the target's default: ``split`` as long as the recipe leaves
        the steps to the model.
    """
    section = config.section(target)
    own: Layout | None = section.layout
    chosen = config.layout if own is None else own
    if chosen is not None:
        return chosen
    mask = _mask(config)
    return "split" if mask is None else TARGETS[target].default_layout(section, mask)


def _mask(config: ExportConfig) -> tuple[bool, ...] | None:
    """The clock as a mask; None where the recipe leaves the steps or the sampler to the model.

    Raises:
        ConfigError: It is no clock, or one of another number of steps.
    """
    entries = len(str(config.clock).split(","))
    try:
        if config.steps is not None and config.scheduler is not None:
            return clock_mask(config.clock, config.steps, config.scheduler)
        # Another number of entries than the sampler calls the UNet is found when the sampler is known.
        clock_mask(config.clock, config.steps if entries == 1 and config.steps is not None else entries)
    except RequestError as e:
        raise ConfigError(str(e)) from e
    return None


def _check_precisions(config: ExportConfig, target: Target) -> None:
    """Checks that a target has the precision that each component is asked for in."""
    for name, dtype in config.dtypes.items():
        if dtype not in target.precisions:
            has = " or ".join(target.precisions)
            raise ConfigError(
                f"'dtypes.{name}' is {dtype}; {target.title} has it in {has} alone: leave target {target.name} out, or "
                f"ask for {has}"
            )


def _check_weights(config: ExportConfig, target: Target) -> None:
    """Checks that a target has the formats that weights are to be stored in."""
    everywhere: str | None = getattr(getattr(config, target.name), "weights", None)
    asked = {component: config.weights.get(component, everywhere) for component in COMPONENTS}
    for component, form in ((c, form) for c, wish in asked.items() for form in sorted(formats_of(wish, c))):
        if form not in target.weight_formats:
            has = ", ".join(target.weight_formats) or "none of fewer bits"
            raise ConfigError(
                f"weights {form} of {component}: {target.title} has {has}; leave target {target.name} out, or ask for "
                "another format"
            )
    section = config.section(target.name)
    if config.weights_of(target.name, "unet") is not None and getattr(section, "quantize_nbits", None) is not None:
        raise ConfigError(
            f"'{target.name}.quantize_nbits' already has the UNet's weights in int8; leave it out to have them stored "
            "in a format and multiplied in fp32, or name the other components: weights: {text_encoder: int8}"
        )


def _positive(x: float) -> bool:
    return math.isfinite(x) and x > 0
