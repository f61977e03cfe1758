"""A ladder of bundles of one model: what each is stored in, its size, its PSNR, its time and its picture.

PSNR is what was measured when the bundle was verified, against torch in fp32. Times are of one generation of the
reference's request, the bundles in turns, so that a busy machine is busy for all of them.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgediff.bundle.reference import REFERENCE, load_reference, prompt_request, reference_request
from edgediff.errors import ConfigError
from edgediff.outputs import make_figure, save_figure, write_whole
from edgediff.targets import TARGETS
from edgediff.targets.backends import open_pipeline, usual_backend
from edgediff_runtime import Bundle, EdgePipeline, RequestError, open_bundle
from edgediff_runtime.bundle import PARITY

# Generations of each bundle that are timed, after one that is not.
ROUNDS = 3
WIDTH, DPI = 2.0, 150


@dataclass(frozen=True)
class Rung:
    """One bundle.

    Attributes:
        stored: Millions of elements by what they are stored in, where weights have fewer bits; else the precisions.
        nbytes: Of the files that running it on its backend needs.
        trajectory_db, picture_db: As they were verified, of this backend; None where they were not.
        ms: The median generation, opening apart.
        image: uint8 [H, W, 3]; None where the bundle has no decoder.
    """

    bundle: str
    backend: str
    stored: str
    nbytes: int
    trajectory_db: float | None
    picture_db: float | None
    ms: float
    image: NDArray[np.uint8] | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, without the picture."""
        return {name: value for name, value in asdict(self).items() if name != "image"}


def climb(paths: Sequence[str | Path], say: Callable[[str], None]) -> list[Rung]:
    """Opens bundles of one model, draws with each in turns, and reads what was verified.

    Raises:
        ConfigError: They are of different models or for different steps.
        BundleError: One is damaged.
        RequestError: None of its targets runs here.
    """
    bundles = [open_bundle(path) for path in paths]
    first = bundles[0].manifest
    for path, bundle in zip(paths, bundles, strict=True):
        manifest = bundle.manifest
        if manifest.source.sha256 != first.source.sha256:
            raise ConfigError(f"{path} is of {manifest.source.name}, {paths[0]} of {first.source.name}: a ladder is of "
                              "one model")  # fmt: skip
        if manifest.operating_point != first.operating_point:
            raise ConfigError(f"{path} is for another clock, sampler or guidance than {paths[0]}; export both alike")
    backends = [_backend(bundle) for bundle in bundles]
    pipes: list[EdgePipeline] = []
    for path, bundle, backend in zip(paths, bundles, backends, strict=True):
        say(f"opening {path} in {backend}")
        pipes.append(open_pipeline(bundle, backend))
    given = [load_reference(bundle.path / REFERENCE).conditioning for bundle in bundles]
    requests = [
        reference_request(bundle.manifest, conditioning)
        | prompt_request(pipe, conditioning)
        | {"lora": None}  # pictures are of the model itself
        for bundle, pipe, conditioning in zip(bundles, pipes, given, strict=True)
    ]
    times: list[list[float]] = [[] for _ in pipes]
    images: list[NDArray[np.uint8] | None] = [None for _ in pipes]
    for n in range(ROUNDS + 1):
        for i, pipe in enumerate(pipes):
            say(f"drawing: round {n + 1} of {ROUNDS + 1}, {paths[i]}")
            result = pipe(**requests[i])
            if n:
                times[i].append(result.ms)
            images[i] = None if result.pixels is None else result.images[0]
    return [
        _rung(str(path), bundle, backend, median(taken), image)
        for path, bundle, backend, taken, image in zip(paths, bundles, backends, times, images, strict=True)
    ]


def _backend(bundle: Bundle) -> str:
    """The backend that usually runs a bundle here, or else what evaluates its graphs anywhere."""
    try:
        return usual_backend(bundle)
    except RequestError:
        own = TARGETS[bundle.manifest.targets[0].target].own_backends
        if not own:
            raise
        return own[0]


def _rung(path: str, bundle: Bundle, backend: str, ms: float, image: NDArray[np.uint8] | None) -> Rung:
    rows = [row for row in _rows(bundle) if row["backend"] == backend and row["status"] == "measured"]
    found = {row["check"]: row["psnr_db"] for row in rows if row["check"] in ("trajectory", "picture")}
    names = {row["target"] for row in rows}
    entry = next((each for each in bundle.manifest.targets if each.target in names), bundle.manifest.targets[0])
    elements: Counter[str] = Counter()
    for component in entry.components.values():
        elements.update(component.weights)
    precisions = " ".join(dict.fromkeys(component.dtype for component in entry.components.values()))
    counted = ", ".join(f"{form} {count / 1e6:.2f} M" for form, count in elements.most_common())
    files = {file for component in entry.components.values() for file in component.files}
    return Rung(
        bundle=path,
        backend=backend,
        stored=f"{precisions}: {counted}" if counted else precisions,
        nbytes=sum(bundle.manifest.files[file].size for file in files),
        trajectory_db=found.get("trajectory"),
        picture_db=found.get("picture"),
        ms=ms,
        image=image,
    )


def _rows(bundle: Bundle) -> list[dict[str, Any]]:
    path = bundle.path / PARITY
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_bytes())["rows"]
    return rows


def draw_ladder(rungs: Sequence[Rung], path: Path) -> None:
    """Draws the pictures side by side, each below what it is stored in, as PNG."""
    figure = make_figure(WIDTH * len(rungs), WIDTH + 0.9, DPI)
    for i, rung in enumerate(rungs):
        axes = figure.add_subplot(1, len(rungs), i + 1)
        axes.set_axis_off()
        if rung.image is not None:
            axes.imshow(rung.image)
        near = "" if rung.picture_db is None else f", {rung.picture_db:.1f} dB"
        axes.set_title(
            f"{Path(rung.bundle).name}\n{rung.nbytes / 1e6:.2f} MB{near}\n{rung.ms:.0f} ms", fontsize=7, wrap=True
        )
    write_whole(path, lambda place: save_figure(figure, place))
