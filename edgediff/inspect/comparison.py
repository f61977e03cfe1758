"""Both papers' tables of operations, counted on the same geometries and shown beside the published ones."""

from dataclasses import dataclass, replace
from typing import Any

from edgediff.config.choices import Cut
from edgediff.inspect.model_survey import count_parts
from edgediff.inspect.survey import Survey, check_comparison
from edgediff.models.families import efficient
from edgediff.models.load import load_built_in
from edgediff_runtime import clock_mask
from edgediff_runtime.manifest import Cost

STEPS = 8
CLOCK = 2
ADAPTOR = "resnet"
# Rows of a step, TFLOPs whole and with Clockwork, and the share saved, all as printed. Distilled has the guidance
# distilled in, and so one row a step; the few weights that its UNet has for the scale are not stated and not counted.
CLOCKWORK = {
    "SD v1.5": (2, 10.8, 7.3, 0.32),
    "Efficient": (2, 9.5, 5.9, 0.38),
    "Distilled": (1, 4.7, 2.9, 0.38),
}
# Spectral Diffusion's roles: the suffix of a teacher's name in the zoo, and the source of a row's published figures.
# The paper prints its students' sizes; those of teachers and plain UNets are counts on CompVis' own configurations.
ROLES = {"teacher": ("", "counted"), "plain": ("-lite", "counted"), "student": ("-spectral", "published")}
# Teacher, then parameters and multiply-adds without attention matmuls of each role.
SPECTRAL = {
    "FFHQ/CelebA-HQ/Bedroom": ("ldm-ffhq", ((274.06e6, 96.02e9), (22.41e6, 7.85e9), (21.1e6, 6.7e9))),
    "Church": ("ldm-church", ((294.97e6, 18.64e9), (32.83e6, 2.07e9), (33.8e6, 2.1e9))),
    "ImageNet": ("ldm-imagenet", ((400.92e6, 99.77e9), (47.03e6, 11.10e9), (45.4e6, 9.9e9))),
}


@dataclass(frozen=True)
class ComparisonRow:
    """One line of Clockwork Diffusion's table.

    Attributes:
        survey: Our counts, and the schedule of this line.
        paper_tflops: As printed, of the whole batch and all steps.
        paper_saved: The printed share against the line without Clockwork; None in that line itself.
    """

    survey: Survey
    clockwork: bool
    paper_tflops: float
    paper_saved: float | None

    def tflops(self, attention: bool) -> float:
        """Our count for the whole batch and all steps."""
        return self.survey.tflops(self.survey.mask, attention)

    def saved(self, attention: bool) -> float | None:
        """Share of our count that the clock saves; None without one."""
        return self.survey.saved(attention) if self.clockwork else None

    def to_dict(self) -> dict[str, Any]:
        """The line as plain data."""
        full, cached = self.survey.cost["full"], self.survey.cost["cached"]
        return {
            "model": self.survey.name,
            "clockwork": self.clockwork,
            "mask": [int(step) for step in self.survey.mask],
            "batch": self.survey.batch,
            "tflops": self.tflops(attention=False),
            "tflops_with_attention": self.tflops(attention=True),
            "source": "counted",
            "paper_tflops": self.paper_tflops,
            "paper_source": "published",
            "saved": self.saved(attention=False),
            "saved_with_attention": self.saved(attention=True),
            "paper_saved": self.paper_saved,
            "parameters": full.parameters,
            "macs_without_attention": {"full": full.macs, "cached": cached.macs},
            "macs_attention": {"full": full.macs_attention, "cached": cached.macs_attention},
        }


@dataclass(frozen=True)
class SpectralRow:
    """One line of Spectral Diffusion's table.

    Multiply-adds are without attention matmuls.

    Attributes:
        role: ``teacher``, ``plain`` (a small UNet of its structure) or ``student``.
        source: Of the published figures: ``published``, or ``counted`` on the configurations of CompVis.
    """

    task: str
    role: str
    model: str
    cost: Cost
    published_parameters: int
    published_macs: int
    source: str
    teacher_macs: int

    @property
    def ratio(self) -> float:
        """How many times this UNet's multiply-adds are the teacher's."""
        return self.teacher_macs / self.cost.macs

    def to_dict(self) -> dict[str, Any]:
        """The line as plain data, in whole parameters and multiply-adds."""
        return {
            "task": self.task,
            "role": self.role,
            "model": self.model,
            "parameters": self.cost.parameters,
            "macs": self.cost.macs,
            "macs_attention": self.cost.macs_attention,
            "published_parameters": self.published_parameters,
            "published_macs": self.published_macs,
            "source": self.source,
            "ratio": self.ratio,
        }


def compare(name: str) -> tuple[ComparisonRow, ...] | tuple[SpectralRow, ...]:
    """Counts a paper's table, ``clockwork`` or ``spectral``; a ConfigError for any other name."""
    check_comparison(name)
    return _clockwork() if name == "clockwork" else _spectral()


def _clockwork() -> tuple[ComparisonRow, ...]:
    """8 steps of SD v1.5, Efficient and Distilled, whole and with the paper's cut, clock and learned adaptor."""
    whole = load_built_in("sd15")
    slim = replace(whole, unet=efficient(whole.unet))
    cut = Cut()
    small = count_parts(slim, cut, ADAPTOR)
    counts = {"SD v1.5": count_parts(whole, cut, ADAPTOR), "Efficient": small, "Distilled": small}
    rows = []
    for model, (batch, tflops, tflops_clockwork, saved) in CLOCKWORK.items():
        survey = Survey(
            name=model,
            cut=f"level {cut.level}, {cut.point}",
            cost=counts[model].parts,
            cache_bytes=4 * counts[model].cache_elements,
            clock="1",
            mask=clock_mask(1, STEPS),
            batch=batch,
        )
        clocked = replace(survey, clock=str(CLOCK), mask=clock_mask(CLOCK, STEPS))
        rows.append(ComparisonRow(survey, False, tflops, None))
        rows.append(ComparisonRow(clocked, True, tflops_clockwork, saved))
    return tuple(rows)


def _spectral() -> tuple[SpectralRow, ...]:
    """Teacher, plain small UNet and student of every task."""
    rows = []
    for task, (teacher, figures) in SPECTRAL.items():
        counted: dict[str, Cost] = {}
        for (role, (suffix, source)), (parameters, macs) in zip(ROLES.items(), figures, strict=True):
            model = load_built_in(teacher + suffix)
            counted[role] = count_parts(model, Cut()).parts["full"]
            rows.append(
                SpectralRow(
                    task=task,
                    role=role,
                    model=model.name,
                    cost=counted[role],
                    published_parameters=round(parameters),
                    published_macs=round(macs),
                    source=source,
                    teacher_macs=counted["teacher"].macs,
                )
            )
    return tuple(rows)
