"""A bundle's README.md: the model card that travels with it."""

import re
import shlex

from edgediff.inspect.survey import adaptor_in_words
from edgediff.models.load import Model
from edgediff.targets import TARGETS
from edgediff_runtime import Manifest

PATENT_NOTE = (
    "The methods in this bundle (reuse of low-resolution features across denoising steps) may be covered by patents. "
    "No licence to any patent is given with it."
)


def bundle_card(manifest: Manifest, model: Model) -> str:
    """Writes the card: source, data, licence, what was changed, intended use, patent note."""
    source, point, sample = manifest.source, manifest.operating_point, manifest.sample
    origin = f"`{source.name}`, sha256 `{source.sha256}`"
    if source.random_weights is not None:
        origin += f". **Its weights are random (seed {source.random_weights})**: a geometry to measure, not a model"
    saved = 1 - _step_macs(manifest, "cached") / _step_macs(manifest, "full")
    lines = [
        f"# {source.name}, divided by edgediff",
        "",
        f"- **Source**: {origin}.",
        f"- **Data**: {'as the source says below' if model.card.text else 'unknown, the source has no card'}.",
        f"- **Licence**: {manifest.license}."
        + ("" if manifest.license != "unknown" else " The source does not say: ask whoever made it before you ship."),
        f"- **Changed**: the UNet was divided at level {manifest.cut.level}, {manifest.cut.point}; "
        f"weights as in the source, in {_precisions(manifest)}. On cached steps an adaptor, "
        f"{adaptor_in_words(manifest.adaptor)}, stands in for the low-resolution part: {saved:.0%} fewer multiply-adds "
        "in such a step.",
        f"- **Sample**: {sample.channels} x {sample.height} x {sample.width}, {sample.space} space, "
        f"conditioned on: {manifest.conditioning.kind}.",
        *_components(manifest),
        *_tokens(model),
        *_low_rank(manifest),
        f"- **Verified at**: {point.num_inference_steps} steps of {manifest.scheduler.name}, clock {point.clock}, "
        f"guidance {point.guidance_scale:g}; reference conditioning: {manifest.evidence.conditioning}. "
        "The figures stand in evidence/parity.json; `edgediff verify` measures them again.",
        "- **Intended use**: generating images on a device within what the source's licence and card allow.",
        f"- **Patents**: {PATENT_NOTE}",
        "",
        *_how_to_run(manifest),
    ]
    if model.card.text:
        text = re.sub(r"\A---\n.*?\n---\n", "", model.card.text, flags=re.DOTALL)  # without its front matter
        lines += ["", "## The source's own card", "", text.strip()]
    return "\n".join(lines) + "\n"


def _precisions(manifest: Manifest) -> str:
    return ", ".join(f"{entry.unet.dtype} for {TARGETS[entry.target].title}" for entry in manifest.targets)


def _how_to_run(manifest: Manifest) -> list[str]:
    there = {entry.target: entry for entry in manifest.targets}
    hints = [target.run_hint(there[name]) for name, target in TARGETS.items() if name in there]
    if manifest.prompt is None:
        return hints
    asked = "a photo of a red apple" if manifest.evidence.prompt is None else manifest.evidence.prompt[0]
    said = f"Each of them takes a prompt: `--prompt {shlex.quote(asked)}`, and `--negative-prompt`."
    shows = "" if manifest.preview is None else " `--preview FOLDER` shows what each step predicts."
    return [*hints, "", said + shows]


def _components(manifest: Manifest) -> list[str]:
    """What lies beside the UNet, where something does."""
    hashes = manifest.source.components
    if not hashes:
        return []
    named = ", ".join(f"`{name}` (sha256 `{hashes[name][:12]}`...)" for name in hashes)
    return [f"- **Components beside the UNet**: {named}."]


def _tokens(model: Model) -> list[str]:
    """The tokens that were learnt by textual inversion, where there are some."""
    if not model.embedding:
        return []
    named = ", ".join(
        f"`{each.token}` (of {each.path.name}, sha256 `{each.sha256[:12]}`...)" for each in model.embedding
    )
    return [f"- **Textual inversion**: prompts may name {named}."]


def _low_rank(manifest: Manifest) -> list[str]:
    """What LoRAs the graphs take, where they take some."""
    if manifest.lora is None:
        return []
    count = sum(map(len, manifest.lora.layers.values()))
    return [
        f"- **LoRA**: of rank {manifest.lora.rank} at most, of the {count} projections of attention; `edgediff lora` "
        "converts one. Without one the graphs are the model's own. The evidence has one of random numbers."
    ]


def _step_macs(manifest: Manifest, step: str) -> int:
    return manifest.cost[step].macs + manifest.cost[step].macs_attention
