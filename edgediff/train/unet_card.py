"""The card of a trained UNet: what it is, and everything that is needed to train it again."""

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec
from accelerate import Accelerator

from edgediff.config.choices import Cut
from edgediff.data.batches import hash_of
from edgediff.data.image_folder import ImageSet
from edgediff.models.clockwork import split
from edgediff.models.load import Model
from edgediff.models.macs import tally
from edgediff.train.adaptor_card import TOOLS
from edgediff.train.learner import DDPM
from edgediff.train.progress import recent
from edgediff.train.unet_settings import StudentTraining, UNetTraining
from edgediff_runtime.manifest import Cost

if TYPE_CHECKING:
    from edgediff.train.unet_loop import UNetProgress


def unet_card(
    model: Model,
    teacher: Model | None,
    settings: UNetTraining,
    images: tuple[ImageSet, ImageSet],
    state: "UNetProgress",
    accelerator: Accelerator,
) -> str:
    """Writes the card.

    Args:
        model: What was trained.
        teacher: Whose features it learnt from, if any.
        settings: How.
        images: What it learnt from, and what was held out.
        state: Losses and time.
        accelerator: Where it ran.

    Returns:
        Markdown.
    """
    data, held_out = images
    cost = _cost(model)
    size = f"{data.images.shape[1]}x{data.images.shape[2]}"
    lines = [
        f"# {model.name}",
        "",
        f"- **What**: {_what(model)}, {cost.parameters:,} parameters, {cost.macs:,} multiply-adds of a sample without "
        f"and {cost.macs_attention:,} of attention matmuls.",
    ]
    if isinstance(settings, StudentTraining) and teacher is not None:
        theirs = _cost(teacher)
        lines.append(
            f"- **Teacher**: `{teacher.name}`, sha256 `{teacher.sha256}`, {theirs.parameters:,} parameters: "
            f"{theirs.macs / cost.macs:.1f} times the multiply-adds. {_terms(settings)}"
        )
    skipped = f" {data.skipped.in_words()}" if data.skipped.count else ""
    lines += [
        f"- **Data**: {len(data):,} images of {len(data.names)} classes, brought to {size} (centre, Lanczos, mean of "
        f"squares), sha256 `{hash_of(data)}`; {len(held_out):,} held out, sha256 `{hash_of(held_out)}`.{skipped}",
        f"- **Training**: {state.updates:,} updates of {settings.batch * accelerator.num_processes} images in "
        f"{state.seconds / 60:.1f} minutes, {accelerator.num_processes} process(es) on {accelerator.device.type} "
        f"({platform.machine()}).",
        f"- **Loss** (denoising): {recent(state.terms[DDPM]):.4f} over the last tenth, {state.held_out[-1][1]:.4f} of "
        "the averaged weights on held-out images ([curves](loss.png)).",
        "- **Samples**: 20 steps of dpmpp_2m, classes in their order ([grid](samples.png)).",
        f"- **Versions**: {', '.join(f'{tool} {version(tool)}' for tool in TOOLS)}, "
        f"Python {platform.python_version()}.",
        "- **Licence**: not stated; what it learnt from has a say in it.",
        "",
        "Settings (`edgediff train` takes them as they stand, as `--config`):",
        "",
        "```json",
        msgspec.json.format(msgspec.json.encode(settings), indent=1).decode(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _what(model: Model) -> str:
    config = model.unet.config
    widths = "/".join(str(width) for width in config.block_out_channels)
    gated = f", {config.wavelet} wavelet gating" if "wavelet" in config else ""
    return f"{type(model.unet).__name__}, levels {widths}{gated}"


def _terms(settings: StudentTraining) -> str:
    if not settings.distils:
        return "It lent geometry, schedule and classes; nothing was learnt from it."
    return (
        f"Distillation: spatial {settings.spatial:g}, frequency {settings.frequency:g} with alpha {settings.alpha:g}, "
        f"at {', '.join(settings.points)}."
    )


def _cost(model: Model) -> Cost:
    return tally(split(model.unet, Cut()), model.sample_shape, model.conditioning.tensors).parts["full"]
