"""What parts cost and what a clock saves, from a bundle or from a model's counts; the JSON of ``inspect``."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from edgediff.errors import ConfigError
from edgediff.targets import TARGETS
from edgediff_runtime import RequestError, clock_mask, open_bundle
from edgediff_runtime.manifest import GUIDANCE, Adaptor, Cost, Manifest, Target, operations_saved

# Papers whose tables of operations are counted anew; here, since the counting imports torch.
COMPARISONS = ("clockwork", "spectral")
PARTS = ("t2i_adapter", "controlnet", "highres_in", "lowres", "adaptor", "highres_out", "full", "cached")


@dataclass(frozen=True)
class Survey:
    """Costs of the parts of a split UNet and its cache for one sample, and of a schedule.

    Attributes:
        batch: UNet rows in a step.
        facts: What else a bundle's manifest says, in words; empty for a model.
        components: Of a pipeline's components what they are and cost, of a bundle's what each target has of them.
    """

    name: str
    cut: str
    cost: dict[str, Cost]
    cache_bytes: int
    clock: str
    mask: tuple[bool, ...]
    batch: int
    facts: dict[str, str] = field(default_factory=dict)
    components: tuple[dict[str, Any], ...] = ()

    def tflops(self, mask: tuple[bool, ...], attention: bool) -> float:
        """TFLOPs of a schedule, 2 per multiply-add, for the whole batch, with or without attention matmuls."""
        steps = [self.cost["full" if full else "cached"] for full in mask]
        macs = sum(cost.macs + (cost.macs_attention if attention else 0) for cost in steps)
        return 2e-12 * self.batch * macs

    def saved(self, attention: bool) -> float:
        """Share of operations that the clock saves against clock 1."""
        return operations_saved(self.cost, [(full, 1) for full in self.mask], steered=True, attention=attention)

    def to_dict(self) -> dict[str, Any]:
        """The survey as plain data; FLOPs for one sample, ``gflops`` without attention matmuls as in both papers."""
        always = (True,) * len(self.mask)
        return {
            "name": self.name,
            "cut": self.cut,
            "facts": self.facts,
            "components": list(self.components),
            "parameters": {part: self.cost[part].parameters for part in PARTS if part in self.cost},
            "gflops": {part: 2e-9 * self.cost[part].macs for part in PARTS if part in self.cost},
            "gflops_attention": {part: 2e-9 * self.cost[part].macs_attention for part in PARTS if part in self.cost},
            "macs_without_attention": {part: self.cost[part].macs for part in PARTS if part in self.cost},
            "cache_bytes": self.cache_bytes,
            "schedule": {
                "clock": self.clock,
                "mask": [int(full) for full in self.mask],
                "batch": self.batch,
                "tflops": self.tflops(self.mask, attention=False),
                "tflops_clock1": self.tflops(always, attention=False),
                "tflops_with_attention": self.tflops(self.mask, attention=True),
                "tflops_clock1_with_attention": self.tflops(always, attention=True),
            },
        }


def survey_bundle(path: Path, clock: int | str | None, steps: int | None, batch: int | None) -> Survey:
    """Reads the costs out of a bundle's manifest; None takes its clock and steps, and 2 rows where it is guided.

    Raises:
        BundleError: The bundle is damaged.
        RequestError: Clock, steps or batch are out of range.
    """
    manifest = open_bundle(path).manifest
    point = manifest.operating_point
    clock = point.clock if clock is None else clock
    mask = clock_mask(clock, point.num_inference_steps if steps is None else steps, manifest.scheduler.name)
    guided = point.guidance_scale > 1 and GUIDANCE not in {tensor.name for tensor in manifest.conditioning.tensors}
    return Survey(
        name=manifest.source.name,
        cut=f"level {manifest.cut.level}, {manifest.cut.point}",
        cost=manifest.cost,
        cache_bytes=manifest.cache_bytes,
        clock=str(clock),
        mask=mask,
        batch=check_batch((2 if guided else 1) if batch is None else batch),
        facts=_facts(manifest),
        components=tuple(_entries(manifest)),
    )


def _entries(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Each component of each target, with its size on disk and the floors in dB that it was verified against."""
    for target in manifest.targets:
        for name, component in target.components.items():
            yield {
                "target": target.target,
                "component": name,
                "stage": component.stage,
                "dtype": component.dtype,
                "batch": component.batch,
                "bytes": sum(manifest.files[file].size for file in component.files),
                "peak_bytes": component.peak_bytes,
                "floors_db": msgspec.to_builtins(component.floors),
            }


def _facts(manifest: Manifest) -> dict[str, str]:
    """What a user wants to know of a bundle besides its costs."""
    sample, known, point = manifest.sample, manifest.conditioning, manifest.operating_point
    size = sum(file.size for file in manifest.files.values())
    facts = {
        "source": f"{manifest.source.name}, sha256 {manifest.source.sha256[:12]}",
        "licence": manifest.license,
        "sample": f"{sample.channels} x {sample.height} x {sample.width}, {sample.space} space",
        "conditioned on": known.kind,
        "made for": f"{point.num_inference_steps} steps of {manifest.scheduler.recipe_name}, clock {point.clock}, "
        f"guidance {point.guidance_scale:g}",
        "adaptor": adaptor_in_words(manifest.adaptor),
        "targets": "; ".join(map(_target_in_words, manifest.targets)),
        "size": f"{size / 1e6:,.1f} MB in {len(manifest.files)} files",
        "verified by its export": manifest.evidence.verified,
    }
    if known.labels:
        facts["labels"] = ", ".join(known.labels)
    return facts


def adaptor_in_words(adaptor: Adaptor) -> str:
    """What stands in for lowres, and what it was trained for."""
    point = adaptor.trained_for
    if point is None:
        return adaptor.kind
    return (
        f"{adaptor.kind} ({adaptor.name}), trained for {point.num_inference_steps} steps of {point.scheduler}, "
        f"clock {point.clock}, guidance {point.guidance_scale:g}"
    )


def check_comparison(name: str) -> None:
    """Refuses an unknown comparison with a ConfigError."""
    if name not in COMPARISONS:
        raise ConfigError(f"no comparison {name!r}; choices: {', '.join(COMPARISONS)}")


def check_batch(batch: int) -> int:
    """Refuses a batch below 1 with a RequestError."""
    if batch < 1:
        raise RequestError(f"batch is {batch}; expected a whole number above 0")
    return batch


def _target_in_words(entry: Target) -> str:
    unet = entry.unet
    words = [f"{entry.target} {unet.dtype}", unet.layout, TARGETS[entry.target].asks_for(entry)]
    return ", ".join(word for word in words if word)
