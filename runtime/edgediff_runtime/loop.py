"""The denoising loop: one, for the device, for verification and for training.

In each step it runs the graphs of a full or of a cached step, on a table of tensors that lives from step to step; what
the last step left under ``lowres_feature`` is this step's ``cache``. All state belongs to the generator: generations
are independent, and leaving the generator cancels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import numpy as np

from edgediff_runtime.errors import NotFiniteError
from edgediff_runtime.manifest import (
    ATTENTION_ROWS,
    CACHE,
    CONTROLNET,
    FEATURE_ROWS,
    LOWRES_FEATURE,
    SAMPLE,
    TIMESTEP,
    Graph,
    share_rows,
)
from edgediff_runtime.noise import noise
from edgediff_runtime.schedulers import Scheduler
from edgediff_runtime.sessions import Array, Session

# A normalization squares its input: above this float32 overflows, and the result may be finite and wrong.
OVERFLOW = 1e18
# What a step spends outside of its graphs; "other" is hand-off and clock.
OUTSIDE = ("guidance", "scheduler", "other")

# What a row of an image is: the inverted picture that is drawn along; without text; so beside an image; with text.
Part = Literal["source", "uncond", "image", "cond"]

__all__ = ["CACHE", "LOWRES_FEATURE", "OUTSIDE", "Kept", "Request", "Source", "Step", "denoise", "initial_latents"]


@dataclass(frozen=True, eq=False)
class Source:
    """An inverted picture that is drawn along, so that others take of it (Tumanyan et al. 2022, section 4).

    Attributes:
        latents: What the UNet sees of it at each call, [calls, N, C, H, W].
        cond: Its rows of each conditioning tensor, [N, ...].
        calls: For how many calls, from the first, others take its ``attention_rows`` and its ``feature_rows``.
    """

    latents: Array
    cond: Mapping[str, Array]
    calls: Mapping[str, int]

    def is_drawn(self, i: int) -> bool:
        """Whether it has rows in a call: some row takes of it."""
        return i < max(self.calls.values())


@dataclass(frozen=True)
class Kept:
    """What stays as it was while the rest is drawn anew: inpainting with a UNet that knows nothing of masks.

    Attributes:
        mask: float32 [N, 1, H, W], 1 where the picture is drawn anew, 0 where it stays.
        latents: Finished latents of what stays, [N, C, H, W].
        noise: What they are under at every step, the same shape, standard normal.
    """

    mask: Array
    latents: Array
    noise: Array

    def joined(self, drawn: Array, kept: Array) -> Array:
        """Latents of both, each where the mask says."""
        return np.where(self.mask > 0, drawn, kept)


@dataclass(frozen=True)
class Request:
    """One generation, completely described.

    Attributes:
        graphs: The graphs in the order in which a step runs them.
        clock: One entry for each of the scheduler's steps, each a call of the UNet; True = full.
        guidance: Guidance scale of each; a step at or below 1 runs the conditional rows alone.
        latents: Initial latents [N, C, H, W], already scaled by the scheduler's initial sigma.
        cond: Conditional rows of each conditioning tensor, [N, ...].
        uncond: Unconditional rows, [N, ...]; empty where no step is guided.
        seed: Seed of the noise that a stochastic sampler draws on its way.
        first_image: Number of the first image, which that noise depends on.
        concat: Channels that the UNet takes after the latent's, [N, C', H, W]; a mask and a masked image in inpainting.
            The scheduler does not scale them.
        start: Index of the first step that is run, for editing: `latents` are at that step's noise level then.
        image_guidance: How far results go towards the image in `concat`, of a UNet that is guided by it and by the text
            (Brooks et al. 2023, equation 3): guided steps have three rows for an image. None has two.
        kept: What does not change.
        source: An inverted picture that is drawn along, in rows before the others', for graphs that inject.
        fixed: What graphs take that is the same for all rows and steps: low-rank factors.
    """

    graphs: tuple[Graph, ...]
    scheduler: Scheduler
    clock: tuple[bool, ...]
    guidance: tuple[float, ...]
    latents: Array
    cond: Mapping[str, Array]
    uncond: Mapping[str, Array] = field(default_factory=dict)
    seed: int = 0
    concat: Array | None = None
    start: int = 0
    first_image: int = 0
    image_guidance: float | None = None
    kept: Kept | None = None
    source: Source | None = None
    fixed: Mapping[str, Array] = field(default_factory=dict)

    def parts(self, i: int) -> tuple[Part, ...]:
        """What the rows of an image are in a step, in their order; the last is the conditional one."""
        guided: tuple[Part, ...] = ("uncond",) if self.image_guidance is None else ("uncond", "image")
        drawn: tuple[Part, ...] = ("source",) if self.source is not None and self.source.is_drawn(i) else ()
        return (*drawn, *(guided if self.guidance[i] > 1 else ()), "cond")

    def rows_of(self, part: Part) -> Mapping[str, Array]:
        """The conditioning of one of them, [N, ...] by name."""
        if part == "source":
            assert self.source is not None
            return self.source.cond
        return self.cond if part == "cond" else self.uncond


@dataclass(frozen=True)
class Step:
    """What one step did.

    Attributes:
        index: Number of the step, from 0.
        timestep: The time that the UNet was told.
        guided: Whether unconditional rows ran too.
        rows: How many rows an image had.
        latents: Latents after the step, [N, C, H, W], read-only; a new array for each step.
        predicted: Finished latents as this step predicts them (x_0), the same way: what a preview shows without noise.
        ms: Milliseconds in each graph, in ``guidance`` where there is any, in the ``scheduler`` and in everything
            ``other`` (hand-off, clock).
        tensors: The table of tensors of each chunk of rows, in the backend's form; the next step changes it. Empty in
            a finished generation's ledger, which would keep them all in memory.
    """

    index: int
    timestep: float
    full: bool
    guided: bool
    rows: int
    latents: Array
    predicted: Array
    ms: dict[str, float]
    tensors: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """The step's line of the ledger as plain data."""
        return {"step": self.index, "full": self.full, "ms": self.ms}


def denoise(request: Request, session: Session) -> Iterator[Step]:
    """Denoises step by step; a NotFiniteError where the model's output is not finite."""
    scheduler = request.scheduler
    num_images = len(request.latents)
    graphs = {full: [graph for graph in request.graphs if graph.runs(full)] for full in (True, False)}
    # Rows of one image begin with the same sample: graphs that can repeat it take it once.
    shared = share_rows(request.graphs) and request.image_guidance is None
    x_t = request.latents
    state: Any = None
    chunks: list[_Chunk] = []
    parts_before: tuple[Part, ...] = ()
    start = perf_counter()
    timesteps = [session.put(_as_timestep(t, request.graphs)) for t in scheduler.timesteps]
    fixed = {name: session.put(array) for name, array in request.fixed.items()}
    for i in range(request.start, len(scheduler.timesteps)):
        is_first = i == request.start
        if not is_first:  # work before the first step counts as that step's
            start = perf_counter()
        parts = request.parts(i)
        # Full, since there is no cache yet, or none for rows that join.
        full = request.clock[i] or is_first or not set(parts) <= set(parts_before)
        if parts != parts_before:
            chunks = _regroup(request, session, chunks, parts, parts_before, keep_cache=not full)
            for chunk in chunks:
                chunk.tensors.update(fixed)
        parts_before = parts
        x_in = scheduler.scale_model_input(i, x_t)
        rows = _sample_rows(request, i, x_in, parts[-1:] if shared and "source" not in parts else parts)
        for chunk in chunks:
            chunk.tensors[SAMPLE] = session.put(rows if chunk.whole else rows[chunk.rows])
            chunk.tensors[TIMESTEP] = timesteps[i]
            chunk.take_rows(request.source, i)
            if LOWRES_FEATURE in chunk.tensors:
                chunk.tensors[CACHE] = chunk.tensors[LOWRES_FEATURE]
        ms = _run(session, graphs[full], chunks)
        out = _gather(session, chunks, "out_sample", len(parts) * num_images)
        model_output = out[num_images:] if "source" in parts else out
        guided = "uncond" in parts
        if guided:
            before = perf_counter()
            model_output = _guided(model_output, request.guidance[i], request.image_guidance)
            ms["guidance"] = 1e3 * (perf_counter() - before)
        before = perf_counter()
        fresh = _fresh_noise(request, i) if scheduler.needs_noise else None
        x_before = x_t
        with np.errstate(over="ignore", invalid="ignore"):
            x_t, state = scheduler.step(i, x_t, model_output, state, fresh, is_first)
            predicted = scheduler.predicted(i, x_before, model_output)
            if request.kept is not None:
                kept = request.kept
                x_t = kept.joined(x_t, scheduler.add_noise(i + 1, kept.latents, kept.noise))
                predicted = kept.joined(predicted, kept.latents)
        ms["scheduler"] = 1e3 * (perf_counter() - before)
        if not np.abs(x_t).max() < OVERFLOW:  # so that NaN is refused too
            raise NotFiniteError(
                f"the model's output is not finite at step {i}: latents hold NaN, infinity or more than {OVERFLOW:g}"
            )
        ms["other"] = 1e3 * (perf_counter() - start) - sum(ms.values())
        shown = x_t.view()
        shown.flags.writeable = predicted.flags.writeable = False
        tensors = tuple(chunk.tensors for chunk in chunks)
        yield Step(i, float(scheduler.timesteps[i]), full, guided, len(parts), shown, predicted, ms, tensors)


def initial_latents(seed: int, num_images: int, shape: Sequence[int], sigma: float, first: int = 0) -> Array:
    """Draws float32 [N, C, H, W] that images `first` to `first` + N - 1 begin with, each the same whatever N is."""
    drawn = [noise(seed, tuple(shape), image=first + i) for i in range(num_images)]
    return np.stack(drawn) * np.float32(sigma)


def _sample_rows(request: Request, i: int, x_in: Array, parts: Sequence[Part]) -> Array:
    """The sample of every row; without an image for a row that sees none in the concatenated channels."""
    rows = dict.fromkeys(parts, x_in)
    if request.source is not None and "source" in rows:
        rows["source"] = request.source.latents[i]
    if request.concat is not None:
        beside = dict.fromkeys(parts, request.concat)
        if "image" in parts:
            beside["uncond"] = np.zeros_like(request.concat)
        rows = {part: np.concatenate([x, beside[part]], axis=1) for part, x in rows.items()}
    return np.ascontiguousarray(np.concatenate(list(rows.values())) if len(rows) > 1 else rows[parts[-1]])


def _guided(out: Array, scale: float, image_scale: float | None) -> Array:
    """What guidance makes of the rows' outputs."""
    with np.errstate(over="ignore", invalid="ignore"):  # not finite: refused by the loop
        if image_scale is None:
            u, c = np.split(out, 2)
            guided: Array = u + np.float32(scale) * (c - u)
            return guided
        u, image, c = np.split(out, 3)
        guided = u + np.float32(image_scale) * (image - u) + np.float32(scale) * (c - image)
        return guided


def _as_timestep(t: float, graphs: Iterable[Graph]) -> Array:
    """A timestep as the graphs take it: float32 [1]; the undivided step of another tool may take a scalar, or int64."""
    taken = next(tensor for graph in graphs for tensor in graph.inputs if tensor.name == TIMESTEP)
    return np.full([size for size in taken.shape if isinstance(size, int)], t, dtype=taken.dtype)


def _fresh_noise(request: Request, i: int) -> Array:
    shape = request.latents.shape
    numbers = range(request.first_image, request.first_image + shape[0])
    return np.stack([noise(request.seed, shape[1:], image=n, draw=i + 1) for n in numbers])


@dataclass
class _Chunk:
    """Rows that go through the graphs together, and their table of tensors.

    Attributes:
        own, taken: Which of them each takes of itself, and of the source, as the graphs take it; None where they take
            none.
    """

    rows: Array
    whole: bool
    tensors: dict[str, Any]
    own: Any = None
    taken: Any = None

    def take_rows(self, source: Source | None, i: int) -> None:
        """Says of which rows the step takes queries, keys and features."""
        if self.own is not None:
            for name in (ATTENTION_ROWS, FEATURE_ROWS):
                takes = source is not None and i < source.calls[name]
                self.tensors[name] = self.taken if takes else self.own


def _regroup(
    request: Request,
    session: Session,
    old: list[_Chunk],
    parts: tuple[Part, ...],
    parts_before: tuple[Part, ...],
    keep_cache: bool,
) -> list[_Chunk]:
    """Rearranges the rows: those of all images for the first part, then those for the next, the conditional ones last.

    A graph of a fixed batch gets the rows of an image together, padded with the last row where they do not come out
    even. Where rows are left out, the others' cache is kept, and their residuals of a ControlNet.
    """
    num_images = len(request.latents)
    total = len(parts) * num_images
    order = np.arange(total).reshape(len(parts), num_images).T.reshape(-1)
    batch = session.batch
    if batch is None:
        groups = [np.arange(total)]
    else:
        order = np.concatenate([order, np.repeat(order[-1:], -total % batch)])
        groups = list(order.reshape(-1, batch))
    by_part = [request.rows_of(part) for part in parts]
    named = {name: np.concatenate([rows[name] for rows in by_part]) for name in request.cond}
    kept: dict[str, Array] = {}
    if old and keep_cache:
        for name in (LOWRES_FEATURE, *_residuals(request.graphs)):
            values = np.split(_gather(session, old, name, len(parts_before) * num_images), len(parts_before))
            kept[name] = np.concatenate([values[parts_before.index(part)] for part in parts])
    dtype = next((t.dtype for graph in request.graphs for t in graph.inputs if t.name == ATTENTION_ROWS), None)
    chunks = []
    for rows in groups:
        tensors = {name: session.put(np.ascontiguousarray(values[rows])) for name, values in named.items()}
        tensors |= {name: session.put(np.ascontiguousarray(values[rows])) for name, values in kept.items()}
        chunk = _Chunk(rows, whole=batch is None, tensors=tensors)
        if dtype is not None:
            own = np.arange(len(rows), dtype=dtype)
            chunk.own = session.put(own)
            if "source" in parts:
                places = {int(row): place for place, row in enumerate(rows)}
                chunk.taken = session.put(np.array([places[int(row) % num_images] for row in rows], dtype=dtype))
        chunks.append(chunk)
    return chunks


def _residuals(graphs: Iterable[Graph]) -> list[str]:
    """What a ControlNet makes in full steps for the cached ones after them; nothing where none runs."""
    return [tensor.name for graph in graphs if graph.name == CONTROLNET for tensor in graph.outputs]


def _run(session: Session, graphs: Sequence[Graph], chunks: Sequence[_Chunk]) -> dict[str, float]:
    """Runs a step's graphs for all rows; the milliseconds that each took."""
    ms = {graph.name: 0.0 for graph in graphs}
    for chunk in chunks:
        for graph in graphs:
            if graph.file is not None:
                before = perf_counter()
                session.run(graph, chunk.tensors)
                ms[graph.name] += 1e3 * (perf_counter() - before)
    return ms


def _gather(session: Session, chunks: Sequence[_Chunk], name: str, num_rows: int) -> Array:
    """All rows of a tensor in their order, however they are grouped."""
    gathered: Array | None = None
    for chunk in chunks:
        value = session.get(chunk.tensors[name])
        if chunk.whole:
            return value
        if gathered is None:
            gathered = np.empty((num_rows, *value.shape[1:]), dtype=value.dtype)
        gathered[chunk.rows] = value
    assert gathered is not None
    return gathered
