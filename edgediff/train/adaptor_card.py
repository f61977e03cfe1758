"""The card of a trained adaptor."""

import platform
from importlib.metadata import version

from accelerate import Accelerator

from edgediff.models.load import Model
from edgediff.models.trained import AdaptorRecord
from edgediff.train.gain import Gain
from edgediff.train.progress import recent
from edgediff.train.settings import AdaptorTraining

TOOLS = ("edgediff", "torch", "diffusers", "accelerate", "numpy")


def adaptor_card(
    record: AdaptorRecord,
    model: Model,
    settings: AdaptorTraining,
    gain: Gain,
    losses: list[float],
    seconds: float,
    accelerator: Accelerator,
) -> str:
    """Writes the card: operating point, training, gain, versions.

    Args:
        record: What the adaptor fits and was trained for.
        model: What it serves.
        settings: How it was trained.
        gain: What it is worth on unseen seeds.
        losses: Of each update, relative to the identity's.
        seconds: What the training took.
        accelerator: Where it ran.

    Returns:
        Markdown.
    """
    point = record.trained_for
    known = model.conditioning
    data = {
        "class": f"labels alone, drawn from {len(known.labels)} classes; no images",
        "text": f"prompt embeddings alone, from `{settings.conditioning}`; no images",
        "none": "noise alone; no images",
    }[known.kind]
    device = f"{accelerator.num_processes} process(es) on {accelerator.device.type} ({platform.machine()})"
    what = "8-bit images" if gain.space == "pixel" else "latents"
    return "\n".join(
        [
            f"# {record.kind} adaptor for {model.name}",
            "",
            "Stands in for the low-resolution part on cached steps (Clockwork Diffusion, arXiv 2312.08128).",
            "",
            f"- **Serves**: `{model.name}`, sha256 `{model.sha256}`, divided at level {record.cut.level}, "
            f"{record.cut.point}: {record.shape}.",
            f"- **Operating point**: {point.num_inference_steps} steps of {point.scheduler}, clock {point.clock}, "
            f"guidance {point.guidance_scale:g}. Elsewhere it works less well than it could.",
            f"- **Data**: {data}.",
            f"- **Training**: {settings.rollout} rollout; {settings.rounds} rounds of {settings.images} trajectories "
            f"for each process, {settings.passes} pass(es), batch {settings.batch}, Adam at {settings.learning_rate:g} "
            f"({settings.schedule}), weight {settings.output_weight:g} on the output's loss, averaged weights "
            f"({settings.ema:g}), seed {settings.seed}: {len(losses)} updates in {seconds / 60:.1f} minutes, {device}.",
            f"- **Loss** over the last tenth: {recent(losses):.4f} of the identity's ([curve](loss.png)).",
            f"- **Gain**: PSNR of {gain.images} {what} of unseen seeds against clock 1: "
            f"identity {gain.identity:.2f} dB, this {gain.learned:.2f} dB.",
            f"- **Versions**: {', '.join(f'{tool} {version(tool)}' for tool in TOOLS)}, "
            f"Python {platform.python_version()}.",
            f"- **Licence**: as the model's, {model.card.license}.",
            "",
        ]
    )
