"""Which weight is stored in which format: the fewest bytes at a floor of PSNR, or the least error at a size.

Storing a weight in fewer bits moves the final latents and the pictures a little. The squared errors of single weights
add up to within a few per cent of the error of all together, and a weight's own error grows with the square of its
rounding. So each weight is measured once, in a format near four bits, and what other formats cost follows from how far
they round it. Then the cheapest byte goes first: every step of every weight to its next format, sorted by the error
that it adds for a byte that it saves. Each beginning of that list is the best plan of its size; the one that meets the
floor is found by measuring.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from edgediff.config.weight_plan import BITS, WeightPlan
from edgediff.errors import ConfigError, TargetError
from edgediff.export.prepare import Prepared
from edgediff.models.stored_weights import fits
from edgediff.models.weight_formats import Scales, store
from edgediff.outputs import write_whole
from edgediff.plan.weight_trials import Errors, Place, Trials, psnr_db
from edgediff.targets import TARGETS
from edgediff_runtime.manifest import WeightFormat

# The bits of the format that a weight is measured in.
MEASURED_BITS = 4
# Points of the frontier that are measured beside those that the search asks for.
POINTS = 8
MEASURED = "measured.jsonl"
MEGABYTE = 10**6


@dataclass(frozen=True)
class Form:
    """A weight in a format: its bytes, and the error that is expected of it."""

    form: WeightFormat | None
    nbytes: int
    errors: Errors


@dataclass(frozen=True)
class Move:
    """A weight's step to its next format.

    Attributes:
        added: Expected errors that it adds.
        saved: Bytes that it saves.
    """

    place: Place
    form: WeightFormat
    added: Errors
    saved: int

    @property
    def price(self) -> float:
        """Error for a byte; of latents and pictures together."""
        return float(self.added.sum()) / self.saved


@dataclass(frozen=True)
class Point:
    """A plan, and what it was measured to do.

    Attributes:
        count: How many moves of the list were made.
        nbytes: Of all weights of the pipeline, in MB those of a bundle's files of weights.
        expected_db, measured_db: The lower PSNR of latents and pictures.
    """

    count: int
    nbytes: int
    expected_db: float
    measured_db: float


@dataclass(frozen=True)
class WeightSearch:
    """What was found.

    Attributes:
        plan: The formats by component and weight.
        frontier: All measured points, the largest first.
        whole: Bytes of all weights as they are.
        elements: How many elements have which format, by component; ``as it is`` among them.
    """

    target: str
    runs: str
    plan: WeightPlan
    chosen: Point
    frontier: tuple[Point, ...]
    whole: int
    elements: dict[str, dict[str, int]]
    floor_db: float | None
    size_mb: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for ``--json`` and search.json."""
        return {
            "model": self.plan.model, "target": self.target, "runs": self.runs, "psnr_floor": self.floor_db,
            "size_mb": self.size_mb, "whole_bytes": self.whole, "chosen": msgspec.to_builtins(_plain(self.chosen)),
            "frontier": [_plain(point) for point in self.frontier], "elements": self.elements,
        }  # fmt: skip


def _plain(point: Point) -> dict[str, Any]:
    found: dict[str, Any] = {"count": point.count, "bytes": point.nbytes}
    for name in ("expected_db", "measured_db"):
        value = getattr(point, name)
        found[name] = value if np.isfinite(value) else None
    return found


def search_weights(
    prepared: Prepared,
    target: str,
    *,
    floor_db: float | None = None,
    size_mb: float | None = None,
    prompts: Sequence[str] | None = None,
    num_images: int | None = None,
    seed: int = 0,
    folder: Path,
    force: bool = False,
    say: Callable[[str], None] = lambda what: None,
) -> WeightSearch:
    """Searches the formats of a pipeline's weights for a target.

    Args:
        floor_db: The least PSNR that latents and pictures are to keep; or
        size_mb: the megabytes (10^6) that all weights may take.
        prompts: One for each picture that is drawn; None for a model without text.
        folder: Where measurements are kept as they are made: a search that was interrupted goes on there.
        force: Begin anew where the folder holds measurements of another search.

    Raises:
        ConfigError: Nothing meets the floor or the size (the nearest is named), both or none are given, the target has
            no formats, or prompts are missing.
        TargetError: The folder holds measurements of another search.
        UnsupportedError: A weight is not finite.
    """
    forms = check_search(target, floor_db, size_mb)
    say("drawing the pictures with the weights as they are")
    trials = Trials(prepared, prompts, num_images, seed, TARGETS[target].int4_scales)
    search = _identity(prepared, target, prompts, num_images, seed)
    measured = _measure(trials, forms, TARGETS[target].int4_scales, _Record(folder, search, force), say)
    half = prepared.config.section(target)
    itemsize = 2 if getattr(half, "dtype", "fp32") == "fp16" else 4
    finest: WeightFormat = max(forms, key=lambda form: (BITS[form] if BITS[form] <= 8 else 0, form))
    moves = sorted(_moves(trials, forms, measured, itemsize, target, say), key=lambda move: move.price)
    others = dict.fromkeys(trials.others, finest)
    spare = sum(store(w.detach().float().numpy(), finest).nbytes for w in trials.others.values())
    fixed = trials.fixed_elements * itemsize + spare
    whole = fixed + itemsize * sum(weight.numel() for weight in trials.weights.values())
    lines = _Lines(trials, moves, whole, say)
    if size_mb is not None:
        chosen = lines.of_size(size_mb * MEGABYTE)
    else:
        assert floor_db is not None
        chosen = lines.at_floor(floor_db)
    frontier = lines.frontier(POINTS)
    made = {**lines.made(chosen.count), **others}
    components: dict[str, dict[str, WeightFormat]] = {}
    for place, form in sorted(made.items(), key=lambda item: str(item[0])):
        components.setdefault(place.component, {})[place.name] = form
    elements: dict[str, Counter[str]] = {}
    for place, weight in (trials.weights | trials.others).items():
        elements.setdefault(place.component, Counter())[made.get(place, "as it is")] += weight.numel()
    return WeightSearch(
        target=target,
        runs=trials.runs,
        plan=WeightPlan(components, prepared.model.name),
        chosen=chosen,
        frontier=frontier,
        whole=whole,
        elements={name: dict(counts) for name, counts in elements.items()},
        floor_db=floor_db,
        size_mb=size_mb,
    )


def check_search(target: str, floor_db: float | None, size_mb: float | None) -> tuple[WeightFormat, ...]:
    """The formats that a target has; a ConfigError says what does not fit."""
    able = [name for name, form in TARGETS.items() if form.weight_formats]
    if target not in able:
        title = TARGETS[target].title if target in TARGETS else target
        raise ConfigError(f"{title} has no formats of fewer bits; choices: {', '.join(able)}")
    if (floor_db is None) == (size_mb is None):
        raise ConfigError("expected one of --psnr-floor and --size-mb")
    for name, value in (("--psnr-floor", floor_db), ("--size-mb", size_mb)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise ConfigError(f"{name} is {value:g}; expected a number above 0")
    return TARGETS[target].weight_formats


class _Record:
    """What was measured, line by line in a file, so that a search goes on where it was interrupted."""

    def __init__(self, folder: Path, search: dict[str, Any], force: bool) -> None:
        self.path = folder / MEASURED
        self.known: dict[str, Errors] = {}
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.is_file() and not force else []
        if lines and _read(lines[0]) != search:
            raise TargetError(
                f"{folder} holds measurements of another search; pass --force to begin anew, or choose another output"
            )
        kept = [json.dumps(search)]
        for line in lines[1:]:
            found = _read(line)
            # The last line may have been cut off.
            if isinstance(found, dict) and set(found) == {"weight", "form", "errors"}:
                self.known[f"{found['weight']} {found['form']}"] = np.array(found["errors"], np.float64)
                kept.append(line)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, lambda path: path.write_text("\n".join(kept) + "\n", encoding="utf-8"))

    def add(self, place: Place, form: str, errors: Errors) -> None:
        """Writes a measurement down."""
        entry = {"weight": str(place), "form": form, "errors": [float(error) for error in errors]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.known[f"{place} {form}"] = errors


def _read(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _identity(
    prepared: Prepared, target: str, prompts: Sequence[str] | None, num_images: int | None, seed: int
) -> dict[str, Any]:
    """What measurements depend on."""
    draft = prepared.draft
    drawn = [draft.source, draft.adaptor, draft.cut, draft.scheduler, draft.operating_point, list(prompts or ()), seed]
    digest = hashlib.sha256(msgspec.json.encode([*drawn, num_images], order="sorted")).hexdigest()
    return {"model": prepared.model.name, "int4_scales": TARGETS[target].int4_scales, "inputs_sha256": digest}


def _formats(weight: torch.Tensor, forms: Sequence[WeightFormat], scales: Scales) -> list[WeightFormat]:
    """What a weight can be stored in."""
    return [form for form in forms if fits(weight, form, scales)]


def _measure(
    trials: Trials,
    forms: Sequence[WeightFormat],
    scales: Scales,
    record: _Record,
    say: Callable[[str], None],
) -> dict[Place, tuple[WeightFormat, Errors]]:
    """The error of each weight alone, in the format that it is measured in."""
    found: dict[Place, tuple[WeightFormat, Errors]] = {}
    for i, (place, weight) in enumerate(trials.weights.items()):
        able = _formats(weight, forms, scales)
        form = min(able, key=lambda form: (abs(BITS[form] - MEASURED_BITS), form))
        key = f"{place} {form}"
        if key not in record.known:
            say(f"measuring {place} in {form}: {i + 1} of {len(trials.weights)} weights ({trials.runs})")
            record.add(place, form, trials.errors({place: form}))
        found[place] = form, record.known[key]
    return found


def _moves(
    trials: Trials,
    forms: Sequence[WeightFormat],
    measured: Mapping[Place, tuple[WeightFormat, Errors]],
    itemsize: int,
    target: str,
    say: Callable[[str], None],
) -> list[Move]:
    """Every step of every weight along its own frontier of bytes and errors."""
    moves = []
    for place, weight in trials.weights.items():
        say(f"rounding {place}")
        array = weight.detach().float().numpy()
        base, errors = measured[place]
        scales = TARGETS[target].int4_scales
        able = _formats(weight, forms, scales)
        stored = {form: store(array, form, str(place), scales) for form in able}
        far = {form: float(np.mean((each.values() - array) ** 2)) for form, each in stored.items()}
        whole = Form(None, itemsize * array.size, np.zeros_like(errors))
        scaled = [Form(form, stored[form].nbytes, errors * far[form] / max(far[base], 1e-30)) for form in stored]
        moves += _along(place, [whole, *scaled])
    return moves


def _along(place: Place, forms: Sequence[Form]) -> list[Move]:
    """The steps along the lower hull of a weight's formats: each costs more for a byte than the one before it."""
    at = forms[0]
    moves: list[Move] = []
    while True:
        smaller = [form for form in forms if form.nbytes < at.nbytes]
        if not smaller:
            return moves
        made = [
            Move(place, form.form, form.errors - at.errors, at.nbytes - form.nbytes)
            for form in smaller
            if form.form is not None
        ]
        best = min(made, key=lambda move: (move.price, -move.saved))
        moves.append(best)
        at = next(form for form in smaller if form.form == best.form)


class _Lines:
    """The plans that are beginnings of the list of moves, measured where it is asked for."""

    def __init__(self, trials: Trials, moves: Sequence[Move], whole: int, say: Callable[[str], None]) -> None:
        self.trials, self.moves, self.say = trials, moves, say
        zero = np.zeros_like(moves[0].added)
        self.nbytes = whole - np.concatenate([[0], np.cumsum([move.saved for move in moves])])
        sums = np.cumsum([zero, *(move.added for move in moves)], axis=0)
        self.expected = [psnr_db(np.maximum(each, 0)) for each in sums]
        self.points: dict[int, Point] = {}

    def made(self, count: int) -> dict[Place, WeightFormat]:
        """The formats after so many moves."""
        return {move.place: move.form for move in self.moves[:count]}

    def point(self, count: int) -> Point:
        """A plan, measured."""
        if count not in self.points:
            size = int(self.nbytes[count])
            self.say(f"measuring a plan of {size / MEGABYTE:.2f} MB (expected {self.expected[count]:.1f} dB)")
            errors = self.trials.errors(self.made(count))
            self.points[count] = Point(count, size, self.expected[count], psnr_db(errors))
        return self.points[count]

    def at_floor(self, floor: float) -> Point:
        """The smallest plan that reaches a floor."""
        # Between a plan that reaches it and one that does not: first where it is expected, then further and further
        # away, and, once it is between two measured plans, in the middle.
        end = len(self.moves) + 1
        good, bad, reach = 0, end, max(len(self.moves) // 32, 1)
        guess = max(k for k in range(end) if self.expected[k] >= floor)
        while bad - good > 1:
            guess = min(max(guess, good + 1), bad - 1)
            if self.point(guess).measured_db >= floor:
                good, further = guess, guess + reach
            else:
                bad, further = guess, guess - reach
            reach *= 2
            guess = (good + bad) // 2 if good and bad < end else further
        if not good:
            move, nearest = self.moves[0], self.point(1).measured_db
            raise ConfigError(
                f"no weight in fewer bits reaches {floor:g} dB: the nearest is {nearest:.1f} dB, with {move.place} in "
                f"{move.form}; ask for that or less"
            )
        return self.point(good)

    def of_size(self, size: float) -> Point:
        """The plan of the least error whose weights take no more bytes."""
        smallest, whole = int(self.nbytes[-1]), int(self.nbytes[0])
        if size < smallest:
            raise ConfigError(
                f"no formats make the weights {size / MEGABYTE:g} MB: the smallest is {smallest / MEGABYTE:.2f} MB, "
                f"from {whole / MEGABYTE:.2f} MB as they are; ask for that or more"
            )
        if size >= whole:
            raise ConfigError(
                f"the weights take {whole / MEGABYTE:.2f} MB as they are, no more than the {size / MEGABYTE:g} MB that "
                "were asked for; export without a plan"
            )
        return self.point(int(np.argmax(self.nbytes <= size)))

    def frontier(self, count: int) -> tuple[Point, ...]:
        """Measured plans, the largest first: those of the search, and some over the range of what is expected."""
        finite = [k for k in range(1, len(self.moves) + 1) if np.isfinite(self.expected[k])]
        wanted = np.linspace(self.nbytes[finite[0]], self.nbytes[-1], count)
        for size in wanted:
            self.point(int(np.argmax(self.nbytes <= size)))
        return tuple(self.points[k] for k in sorted(self.points))
