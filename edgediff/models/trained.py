"""A trained adaptor on disk: what it fits, what it was trained for, its weights.

A folder with ``adaptor.json`` and ``adaptor.safetensors``, a card and the loss curve, anywhere or in ``adaptors/`` of
its model's directory. An adaptor belongs to one UNet at one cut, and is refused by any other. It was trained for
one operating point, and is less good at others.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors.torch import save

from edgediff.config.choices import Cut
from edgediff.errors import ModelError, UnsupportedError
from edgediff.models.adaptors import AdaptorShape, IdentityAdaptor, Kind, LearnedAdaptor
from edgediff.models.clockwork import split
from edgediff.models.graphs import adaptor_shape
from edgediff.models.load import Model
from edgediff.models.model_files import fill, read_tensors
from edgediff.models.part import Part
from edgediff_runtime import RequestError, clock_mask
from edgediff_runtime import manifest as m
from edgediff_runtime.errors import one_line
from edgediff_runtime.manifest_json import MAX_GUIDANCE

RECORD = "adaptor.json"
WEIGHTS = "adaptor.safetensors"
FOLDER = "adaptors"
FORMAT = 1
MAX_SIZE = 2**16
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AdaptorRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``adaptor.json``.

    Attributes:
        edgediff_adaptor: Version of this format.
        highres, lowres, emb, text: As in `AdaptorShape`; text is None where the adaptor does not use it.
        rollout: The trajectories that it was trained on.
    """

    edgediff_adaptor: int
    kind: Kind
    takes_text: bool
    model: str
    model_sha256: str
    cut: Cut
    highres: tuple[int, int, int]
    lowres: tuple[int, int, int]
    emb: int
    text: tuple[str, int] | None
    trained_for: m.TrainedFor
    rollout: Literal["teacher", "student"]

    @property
    def shape(self) -> AdaptorShape:
        """The tensors that it fits."""
        return AdaptorShape(self.highres, self.lowres, self.emb, self.text)


@dataclass(frozen=True)
class TrainedAdaptor:
    """An adaptor in evaluation mode, with its record, folder and the hash of its weights (None for the identity)."""

    part: Part
    record: AdaptorRecord | None = None
    path: Path | None = None
    is_built_in: bool = False
    sha256: str | None = None

    @property
    def manifest(self) -> m.Adaptor:
        """Its entry in a bundle's manifest."""
        if self.record is None or self.path is None:
            return m.Adaptor(kind="identity")
        return m.Adaptor(
            kind=self.record.kind,
            name=self.path.name,
            # A bare name would be read as a built-in adaptor's.
            path=None if self.is_built_in else os.path.join(self.path.parent, self.path.name),
            sha256=self.sha256,
            trained_for=self.record.trained_for,
        )


def save_adaptor(adaptor: LearnedAdaptor, record: AdaptorRecord, path: Path) -> None:
    """Writes the weights, then the record that makes the folder an adaptor."""
    path.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adaptor.state_dict().items()}
    (path / WEIGHTS).write_bytes(save(state))
    partial = path / f"{RECORD}.partial"
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    os.replace(partial, path / RECORD)


def load_adaptor(path: Path, is_built_in: bool = False) -> TrainedAdaptor:
    """Reads an adaptor, in evaluation mode and fp32.

    Raises:
        ModelError: The folder is not an adaptor's, or its files are damaged.
    """
    record, file = read_record(path), path / WEIGHTS
    state = read_tensors(file)
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES:
            choices = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ModelError(f"{file}: {name} is {tensor.dtype}; expected one of: {choices}")
    try:
        # On the meta device: a record alone allocates no memory.
        with torch.device("meta"):
            part = LearnedAdaptor(record.kind, record.shape, record.takes_text)
    except (RuntimeError, UnsupportedError) as e:
        raise ModelError(f"{path / RECORD} does not describe an adaptor: {one_line(e)}") from e
    fill(part, {name: tensor.float() for name, tensor in state.items()}, file, RECORD)
    part.eval().requires_grad_(False)
    return TrainedAdaptor(part, record, path, is_built_in, hashlib.sha256(file.read_bytes()).hexdigest())


def read_record(path: Path) -> AdaptorRecord:
    """Reads what an adaptor fits and was trained for; a ModelError if that is missing, of a newer format, or wrong."""
    file = path / RECORD
    if not file.is_file():
        raise ModelError(f"{path} is not an adaptor: it has no {RECORD}; expected a folder that train adaptor wrote")
    try:
        record = msgspec.json.decode(file.read_bytes(), type=AdaptorRecord)
        point = record.trained_for
        mask = tuple(map(int, clock_mask(point.clock, point.num_inference_steps, point.scheduler)))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RequestError) as e:
        raise ModelError(f"{file} does not describe an adaptor: {one_line(e)}") from e
    if record.edgediff_adaptor != FORMAT:
        raise ModelError(f"{file} is of format {record.edgediff_adaptor}; this edgediff knows {FORMAT}")
    sizes = (*record.highres, *record.lowres, record.emb, *(record.text[1:] if record.text else ()))
    if not all(0 < size <= MAX_SIZE for size in sizes):
        raise ModelError(f"{file} has sizes {', '.join(map(str, sizes))}; expected 1 to {MAX_SIZE}")
    if mask != point.mask or not 0 < point.guidance_scale <= MAX_GUIDANCE:
        raise ModelError(
            f"{file}: mask {point.mask} and guidance {point.guidance_scale:g} are none of clock {point.clock}'s over "
            f"{point.num_inference_steps} steps"
        )
    return record


def choose_adaptor(spec: str | None, model: Model, cut: Cut, point: m.TrainedFor) -> TrainedAdaptor:
    """Finds the adaptor of that name, or the one that fits.

    Args:
        spec: The name of an adaptor in the model's directory, or its kind (the nearest to the operating point); a
            folder; ``identity``; None takes the one in the model's directory that was trained for this operating point,
            and the identity where there is none.

    Raises:
        ModelError: The folder is not an adaptor's.
        UnsupportedError: There is none of that name, or it is for another UNet or another cut.
    """
    if spec == "identity":
        return TrainedAdaptor(IdentityAdaptor())
    own = list(own_adaptors(model))
    if spec is not None and _is_folder(spec, own):
        found = load_adaptor(Path(spec))
        check_fit(found, model, cut)
        return found
    here = [(path, record) for path, record in own if record.cut == cut]
    if spec is None:
        # The clocks may be written in different ways.
        exact = [p for p, r in here if msgspec.structs.replace(r.trained_for, clock=point.clock) == point]
        return load_adaptor(exact[0], model.is_built_in) if exact else TrainedAdaptor(IdentityAdaptor())
    named = [(path, record) for path, record in here if spec in (path.name, record.kind)]
    if named:
        path, _ = min(named, key=lambda entry: _distance(entry[1].trained_for, point))
        return load_adaptor(path, model.is_built_in)
    for path, record in own:
        if path.name == spec:
            raise UnsupportedError(
                f"adaptor {spec} was trained at level {record.cut.level}, {record.cut.point} ({record.shape}); "
                f"this is level {cut.level}, {cut.point} ({adaptor_shape(split(model.unet, cut), model)})"
            )
    for path in _beside(model):
        if path.name == spec:
            check_fit(load_adaptor(path), model, cut)
    choices = ", ".join(["identity", *(path.name for path, _ in own), "a folder that train adaptor wrote"])
    raise UnsupportedError(
        f"no adaptor {spec!r} is trained for {model.name} at level {cut.level}, {cut.point}; choices: {choices}"
    )


def trained_for(spec: str | None, model: Model) -> m.TrainedFor | None:
    """What the adaptor of a folder was trained for; None where `choose_adaptor` looks for no folder.

    Raises:
        ModelError: The folder is not an adaptor's.
    """
    if spec is None or not _is_folder(spec, own_adaptors(model)):
        return None
    return read_record(Path(spec)).trained_for


def _is_folder(spec: str, own: Iterable[tuple[Path, AdaptorRecord]]) -> bool:
    """Whether a folder is meant: the model's own names and ``identity`` come before the working directory's."""
    named = spec == "identity" or any(spec in (path.name, record.kind) for path, record in own)
    return not named and Path(spec).is_dir()


def own_adaptors(model: Model) -> Iterable[tuple[Path, AdaptorRecord]]:
    """Folder and record of each adaptor in a model's directory that was trained for its weights."""
    for path in _beside(model):
        record = read_record(path)
        if record.model_sha256 == model.sha256:
            yield path, record


def _beside(model: Model) -> list[Path]:
    """Folders of the adaptors in a model's directory; what else lies there does not count."""
    return sorted(file.parent for file in (model.home / FOLDER).glob(f"*/{RECORD}"))


def check_fit(adaptor: TrainedAdaptor, model: Model, cut: Cut) -> None:
    """Raises an UnsupportedError for a learned adaptor that was trained for another UNet or another cut."""
    record = adaptor.record
    assert record is not None
    here = adaptor_shape(split(model.unet, cut), model)
    here = here if record.takes_text else replace(here, text=None)
    if record.cut != cut or record.shape != here:
        raise UnsupportedError(
            f"adaptor {adaptor.path} was trained at level {record.cut.level}, {record.cut.point} of {record.model} "
            f"({record.shape}); {model.name} at level {cut.level}, {cut.point} has {here}"
        )
    if record.model_sha256 != model.sha256:
        raise UnsupportedError(
            f"adaptor {adaptor.path} was trained for {record.model} of sha256 {record.model_sha256[:12]}; "
            f"{model.name} has other weights, sha256 {model.sha256[:12]}: train one for them"
        )


def _distance(trained: m.TrainedFor, point: m.TrainedFor) -> tuple[float, ...]:
    """The distance of two operating points: the share of full steps first, then what else differs."""
    return (
        abs(sum(trained.mask) / len(trained.mask) - sum(point.mask) / len(point.mask)),
        abs(trained.num_inference_steps - point.num_inference_steps),
        abs(trained.guidance_scale - point.guidance_scale),
        float(trained.scheduler != point.scheduler),
    )
