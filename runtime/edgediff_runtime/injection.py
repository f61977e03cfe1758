"""Plug-and-play injection (Tumanyan et al. 2022): a picture that was inverted is drawn along, and others take of it.

In the first steps each image has one row more: the inverted picture at the step's noise level. Which row each row takes
queries and keys of, and which features, are inputs of the graphs; later, and without an inverted picture, every row
takes its own.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from edgediff_runtime.conditioning import plain, repeated
from edgediff_runtime.errors import RequestError
from edgediff_runtime.inversion import Inverted
from edgediff_runtime.loop import Source
from edgediff_runtime.manifest import ATTENTION_ROWS, FEATURE_ROWS, Graph, injects
from edgediff_runtime.samplers import Scheduler
from edgediff_runtime.sessions import Array

# The authors' shares of the steps.
ATTENTION_SHARE, FEATURE_SHARE = 0.5, 0.8


def check_injection(
    inverted: Inverted | None,
    graphs: Iterable[Graph],
    attention: object,
    features: object,
    latents: object,
    image: object,
) -> None:
    """Refuses shares without an inverted picture, and beside one what a generation would begin with instead.

    Raises:
        RequestError: The same, or the UNet's graphs cannot take other rows.
    """
    if inverted is None:
        for name, given in (("inject_attention", attention), ("inject_features", features)):
            if given is not None:
                raise RequestError(f"{name} was given without an inverted picture; give inverted= (--inverted) too")
        return
    if not isinstance(inverted, Inverted):
        raise RequestError(f"inverted is a {type(inverted).__name__}; expected what invert() gives")
    for name, given in (("latents", latents), ("image", image)):
        if given is not None:
            raise RequestError(
                f"{name} and an inverted picture were given, and a generation begins with one of them; give one"
            )
    if not injects(graphs):
        raise RequestError(
            "an inverted picture was given, but the bundle's UNet takes nothing of other rows; export it with "
            "--injection, or begin with its latents alone: latents= (--latents)"
        )


def source_of(
    inverted: Inverted,
    graphs: Iterable[Graph],
    scheduler: Scheduler,
    cond: Mapping[str, Array],
    guided: bool,
    attention: float | None,
    features: float | None,
) -> Source:
    """What the loop draws along of an inverted picture.

    Args:
        graphs: The UNet's, which can take other rows.
        scheduler: The generation's; its timesteps must be those of the inversion.
        cond: The generation's conditional rows, [N, ...]: what the inversion does not say is taken from here.
        guided: Whether images have an unconditional row too.
        attention: Share of the steps, 0 to 1, in which its queries and keys are taken; None is `ATTENTION_SHARE`.
        features: The same of features; None is `FEATURE_SHARE`.

    Raises:
        RequestError: It was inverted over other timesteps or with a prompt of another length, a share is none, or a
            fixed batch cannot hold an image's rows.
    """
    rows = 3 if guided else 2
    batch = next(t for graph in graphs for t in graph.inputs if t.name == ATTENTION_ROWS).shape[0]
    if isinstance(batch, int) and batch % rows:
        raise RequestError(
            f"the graphs take {batch} rows at a time, and with an inverted picture an image has {rows}; expected a "
            f"guidance that fits, or an export with a batch of {rows}"
        )
    steps = len(inverted.timesteps)
    if not np.array_equal(inverted.timesteps, scheduler.timesteps):
        raise RequestError(
            f"the picture was inverted in {steps} steps of DDIM, whose timesteps {scheduler.name} does not have in "
            f"{len(scheduler.timesteps)} calls; leave scheduler and num_inference_steps out"
        )
    count = len(next(iter(cond.values()), inverted.latents))
    latents = np.stack([repeated(each, count) for each in inverted.trajectory])
    calls = {
        ATTENTION_ROWS: round(_share("inject_attention", attention, ATTENTION_SHARE) * steps),
        FEATURE_ROWS: round(_share("inject_features", features, FEATURE_SHARE) * steps),
    }
    own = {name: repeated(inverted.cond.get(name, given), count) for name, given in cond.items()}
    for name, rows_of_it in own.items():
        if rows_of_it.shape != cond[name].shape:
            raise RequestError(
                f"{name} has shape {list(cond[name].shape)} and the inversion's {list(rows_of_it.shape)}; "
                "expected the same"
            )
    return Source(latents, own, calls)


def _share(name: str, given: Any, usual: float) -> float:
    value = usual if given is None else plain(given)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RequestError(f"{name} is {given!r}; expected a share of the steps, 0 to 1")
    return float(value)
