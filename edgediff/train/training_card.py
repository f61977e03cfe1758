"""What a training leaves for readers: the card, which has all that is needed to repeat it, and the loss curves."""

import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
from accelerate import Accelerator

from edgediff.config.choices import Cut
from edgediff.data.batches import hash_of
from edgediff.data.image_folder import ImageSet
from edgediff.models.clockwork import split
from edgediff.models.load import Model
from edgediff.models.macs import tally
from edgediff.models.trained import AdaptorRecord
from edgediff.train.gain import Gain, Nearness
from edgediff.train.latents import Autoencoder
from edgediff.train.learner import DDPM
from edgediff.train.loop import Progress, recent
from edgediff.train.settings import AdaptorTraining, DecoderTraining, FewStepsTraining, StudentTraining, UNetTraining
from edgediff.train.text import Text
from edgediff_runtime.manifest import Cost

CARD = "README.md"
LOSSES = "loss.png"
TOOLS = ("edgediff", "torch", "diffusers", "accelerate", "numpy")
# Of the means; single updates are drawn lighter in the same colour.
COLOURS = ("#1f4e79", "#2e7d32", "#b9770e", "#7d3c98")
_POINTS = "#b03a2e"


def adaptor_card(
    record: AdaptorRecord,
    model: Model,
    settings: AdaptorTraining,
    gain: Gain,
    state: Progress,
    accelerator: Accelerator,
) -> str:
    """The card of an adaptor, in Markdown: operating point, training, gain, versions."""
    point = record.trained_for
    known = model.conditioning
    data = {
        "class": f"labels alone, drawn from {len(known.labels)} classes; no images",
        "text": f"prompts alone, from `{settings.conditioning}`; no images",
        "none": "noise alone; no images",
    }[known.kind]
    what = "8-bit images" if gain.space == "pixel" else "latents"
    strengths = ", ".join(f"{strength:g}" for strength in settings.strengths)
    edits = f", by turns from noise and of edits at strength {strengths}" if strengths else ""
    return f"""# {record.kind} adaptor for {model.name}

Stands in for the low-resolution part on cached steps (Clockwork Diffusion, arXiv 2312.08128).

- **Serves**: `{model.name}`, sha256 `{model.sha256}`, divided at level {record.cut.level}, {record.cut.point}: \
{record.shape}.
- **Operating point**: {point.num_inference_steps} steps of {point.scheduler}, clock {point.clock}, guidance \
{point.guidance_scale:g}. Elsewhere it works less well than it could.
- **Data**: {data}.
- **Training**: {settings.rollout} rollout; {settings.rounds} rounds of {settings.images} trajectories for each \
process{edits}, {settings.passes} pass(es), batch {settings.batch}, Adam at {settings.learning_rate:g} \
({settings.schedule}), weight {settings.output_weight:g} on the output's loss, averaged weights \
({settings.ema:g}), seed {settings.seed}: {state.updates} updates in {_where(state, accelerator)}.
- **Loss** over the last tenth: {recent(state.losses):.4f} of the identity's ([curve]({LOSSES})).
- **Gain**: PSNR of {gain.images} {what} of unseen seeds against clock 1: identity {gain.identity:.2f} dB, this \
{gain.learned:.2f} dB.
- **Versions**: {_versions()}.
- **Licence**: as the model's, {model.card.license}.
"""


def few_steps_card(
    model: Model,
    teacher: Model,
    settings: FewStepsTraining,
    sampler: str,
    guidance: float,
    nearness: Nearness,
    state: Progress,
    accelerator: Accelerator,
) -> str:
    """The card of a model that was distilled to a few steps, with what it is sampled with in its front matter."""
    what = "8-bit images" if model.space == "pixel" else "latents"
    cached = "" if nearness.cached is None else f", at clock {settings.clock} {nearness.cached:.2f} dB"
    adaptor = (
        "" if nearness.cached is None else f"; a {settings.adaptor} adaptor for clock {settings.clock} learnt beside it"
    )
    said = "" if model.card.license == "unknown" else f"license: {model.card.license}\n"
    text = re.sub(r"\A---\s*\n.*?\n---\s*\n", "", model.card.text, flags=re.DOTALL)
    of_model = f"\n## The card of the model before\n\n{text}" if text else ""
    return f"""---
{said}inference:
  parameters:
    num_inference_steps: {settings.steps}
    guidance_scale: 1.0
---
# {model.name} in {settings.steps} steps

- **What**: `{model.name}`, sha256 `{model.sha256}`, distilled to {settings.steps} steps of DDIM, trailing, without \
guidance{adaptor}.
- **Teacher**: `{teacher.name}`, sha256 `{teacher.sha256}`: trajectories of {settings.from_steps} steps of \
{sampler}, trailing, with guidance {guidance:g}.
- **Data**: {settings.rounds * settings.images * accelerator.num_processes:,} trajectories from pure noise; no images.
- **Training**: {settings.passes} pass(es), AdamW at {settings.learning_rate:g} ({settings.schedule}), averaged \
weights ({settings.ema:g}), seed {settings.seed}: {state.updates:,} updates of \
{min(settings.batch, settings.images) * accelerator.num_processes} trajectories in {_where(state, accelerator)}; loss \
{recent(state.losses):.4f} ([curve]({LOSSES})).
- **Nearness**: PSNR of {nearness.images} {what} of unseen seeds against the teacher's: {nearness.full:.2f} \
dB{cached}; the model before, in {settings.steps} steps with guidance, {nearness.before:.2f} dB.
- **Versions**: {_versions()}.
- **Licence**: as the model's, {model.card.license}.

Settings (`edgediff train few-steps` takes them as they stand, as `--config`):

```json
{msgspec.json.format(msgspec.json.encode(settings), indent=1).decode()}
```
{of_model}"""


def unet_card(
    model: Model,
    teacher: Model | None,
    text: Text | None,
    settings: UNetTraining,
    images: tuple[ImageSet, ImageSet],
    state: Progress,
    accelerator: Accelerator,
) -> str:
    """The card of a UNet, in Markdown; `images` are those that it learnt from, and those held out."""
    data, held_out = images
    cost, config = _cost(model), model.unet.config
    size = f"{data.images.shape[1]}x{data.images.shape[2]}"
    widths = "/".join(str(width) for width in config.block_out_channels)
    gated = f", {config.wavelet} wavelet gating" if "wavelet" in config else ""
    taught = ""
    if isinstance(settings, StudentTraining) and teacher is not None:
        theirs = _cost(teacher)
        taught = (
            f"- **Teacher**: `{teacher.name}`, sha256 `{teacher.sha256}`, {theirs.parameters:,} parameters: "
            f"{theirs.macs / cost.macs:.1f} times the multiply-adds. {_terms(settings)}\n"
        )
    if text is not None:
        how = "trained beside the UNet" if text.learns else "given, and left as it is"
        count = sum(each.numel() for each in text.encoder.parameters())
        taught += (
            f"- **Text**: CLIP's encoder, {count:,} parameters, {text.length} tokens of a vocabulary of "
            f"{len(text.tokenizer):,}; {how}.\n"
        )
    what = "with captions" if text is not None else f"of {len(data.names)} classes"
    asked = "captions that it learnt" if text is not None else "classes in their order"
    skipped = f" {data.skipped.in_words()}" if data.skipped.count else ""
    return f"""# {model.name}

- **What**: {type(model.unet).__name__}, levels {widths}{gated}, {cost.parameters:,} parameters, {cost.macs:,} \
multiply-adds of a sample without and {cost.macs_attention:,} of attention matmuls.
{taught}- **Data**: {len(data):,} images {what}, brought to {size} (centre, Lanczos, mean of \
squares), sha256 `{hash_of(data)}`; {len(held_out):,} held out, sha256 `{hash_of(held_out)}`.{skipped}
- **Training**: {state.updates:,} updates of {settings.batch * accelerator.num_processes} images in \
{_where(state, accelerator)}.
- **Loss** (denoising): {recent(state.terms[DDPM]):.4f} over the last tenth, {state.held_out[-1][1]:.4f} of the \
averaged weights on held-out images ([curves]({LOSSES})).
- **Samples**: 20 steps of dpmpp_2m, {asked} ([grid](samples.png)).
- **Versions**: {_versions()}.
- **Licence**: not stated; what it learnt from has a say in it.

Settings (`edgediff train` takes them as they stand, as `--config`):

```json
{msgspec.json.format(msgspec.json.encode(settings), indent=1).decode()}
```
"""


def decoder_card(
    vae: Autoencoder,
    source: Autoencoder,
    settings: DecoderTraining,
    images: tuple[ImageSet, ImageSet],
    db: tuple[float, float],
    state: Progress,
    accelerator: Accelerator,
) -> str:
    """The card of a decoder, in Markdown; `db` is the PSNR of held-out images with the one before, and with this."""
    data, held_out = images
    decoder, encoder = (sum(each.numel() for each in part.parameters()) for part in (vae.decoder, vae.encoder))
    what = "trained further" if settings.tiny is None else "small, with an encoder for the same latents"
    return f"""# Decoder for the latents of {settings.model}

- **What**: {type(vae).__name__}, {what}; decoder {decoder:,} parameters, encoder {encoder:,}.
- **Data**: {len(data):,} images, {data.images.shape[1]}x{data.images.shape[2]}, sha256 `{hash_of(data)}`; \
{len(held_out):,} held out, sha256 `{hash_of(held_out)}`.
- **Training**: {state.updates:,} updates of {settings.batch * accelerator.num_processes} images in \
{_where(state, accelerator)}; details weigh {settings.edge_weight:g}, noise on the latents {settings.latent_noise:g}.
- **PSNR** of held-out images, encoded and decoded: {db[1]:.2f} dB; {type(source).__name__} before {db[0]:.2f} dB \
([pictures](samples.png): image, before, this; [curves]({LOSSES})).
- **Versions**: {_versions()}.
- **Licence**: not stated; what it learnt from has a say in it.

Settings (`edgediff train decoder` takes them as they stand, as `--config`):

```json
{msgspec.json.format(msgspec.json.encode(settings), indent=1).decode()}
```
"""


def _where(state: Progress, accelerator: Accelerator) -> str:
    device = f"{accelerator.num_processes} process(es) on {accelerator.device.type} ({platform.machine()})"
    if accelerator.mixed_precision != "no":
        device += f", {accelerator.mixed_precision}"
    return f"{state.seconds / 60:.1f} minutes, {device}"


def _versions() -> str:
    return f"{', '.join(f'{tool} {version(tool)}' for tool in TOOLS)}, Python {platform.python_version()}"


def _terms(settings: StudentTraining) -> str:
    if not settings.distils:
        return "It lent geometry, schedule and classes; nothing was learnt from it."
    return (
        f"Distillation: spatial {settings.spatial:g}, frequency {settings.frequency:g} with alpha {settings.alpha:g}, "
        f"at {', '.join(settings.points)}."
    )


def _cost(model: Model) -> Cost:
    return tally(split(model.unet, Cut()), model.sample_shape, model.step_tensors).parts["full"]


def draw_losses(
    curves: Mapping[str, Sequence[float]],
    path: Path,
    title: str,
    what: str,
    *,
    level: tuple[float, str] | None = None,
    points: tuple[str, Sequence[tuple[int, float]]] | None = None,
) -> None:
    """Draws the losses of a training, one for each update by name, to a ``.png``.

    `what` is the label of their axis, `level` a horizontal line and its name, `points` the name of a curve that is
    measured now and then, with its updates and losses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, losses), colour in zip(curves.items(), COLOURS, strict=False):
        updates = np.arange(1, len(losses) + 1)
        window = max(1, len(losses) // 100)
        single = window == 1
        axes.plot(
            updates, losses, color=colour, alpha=1 if single else 0.25, linewidth=0.6, label=name if single else None
        )
        if not single:
            mean = np.convolve(losses, np.ones(window) / window, mode="valid")
            axes.plot(updates[window - 1 :], mean, color=colour, linewidth=1.6, label=f"{name}, mean of {window}")
    if points is not None and points[1]:
        axes.plot(*zip(*points[1], strict=True), "o-", color=_POINTS, markersize=3, linewidth=1, label=points[0])
    if level is not None:
        axes.axhline(level[0], color=_POINTS, linewidth=1, linestyle="--", label=level[1])
    axes.set_yscale("log")
    axes.set_xlabel("update")
    axes.set_ylabel(what)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
