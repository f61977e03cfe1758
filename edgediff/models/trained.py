"""A trained adaptor on disk: what it fits, what it was trained for, its weights.

A folder with ``adaptor.json`` and ``adaptor.safetensors``, a card and the loss curve. Built-in ones lie beside their
model in the zoo. An adaptor belongs to one UNet at one cut, and is refused by any other; it was trained for one
operating point, and serves others less well.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from edgediff.config.choices import Cut
from edgediff.errors import ModelError, UnsupportedError
from edgediff.models.adaptors import ADAPTORS, AdaptorShape, IdentityAdaptor, Kind, LearnedAdaptor
from edgediff.models.clockwork import split
from edgediff.models.graphs import adaptor_shape
from edgediff.models.load import Model, one_line
from edgediff.models.part import Part
from edgediff_runtime import RequestError, clock_mask
from edgediff_runtime import manifest as m
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
        model: Name of the model that it serves.
        model_sha256: That model's hash.
        highres: Channels, height and width of ``highres_feature``.
        lowres: The same of ``lowres_feature``.
        emb: Width of ``emb``.
        text: Name and width of the text, where it is looked at.
        trained_for: The operating point.
        rollout: Whose trajectories it learnt from: ``teacher`` or ``student``.
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
        """What it fits."""
        return AdaptorShape(self.highres, self.lowres, self.emb, self.text)


@dataclass(frozen=True)
class TrainedAdaptor:
    """An adaptor with its record.

    Attributes:
        part: The adaptor, in evaluation mode.
        record: What it fits and was trained for; None for the identity.
        path: Its folder; None for the identity.
        is_built_in: Whether it lies in the zoo.
        sha256: Hash of its weights; None for the identity.
    """

    part: Part
    record: AdaptorRecord | None = None
    path: Path | None = None
    is_built_in: bool = False
    sha256: str | None = None

    @property
    def manifest(self) -> m.Adaptor:
        """What a bundle's manifest says of it."""
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
        ModelError: The folder holds no adaptor, or its files are damaged.
    """
    record = read_record(path)
    try:
        data = (path / WEIGHTS).read_bytes()
        state = load(data)
    except (OSError, SafetensorError, ValueError) as e:
        raise ModelError(f"{path / WEIGHTS} cannot be read as weights: {one_line(e)}") from e
    foreign = [name for name, tensor in state.items() if tensor.dtype not in DTYPES]
    if foreign:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ModelError(f"{path / WEIGHTS}: {foreign[0]} is {state[foreign[0]].dtype}; expected one of: {names}")
    state = {name: tensor.float() for name, tensor in state.items()}
    try:
        # Nothing is set aside for weights of which only the record speaks.
        with torch.device("meta"):
            part = LearnedAdaptor(record.kind, record.shape, record.takes_text)
        part.load_state_dict(state, assign=True)
    except (RuntimeError, UnsupportedError) as e:
        raise ModelError(f"{path / WEIGHTS} does not fit its {RECORD}: {one_line(e)[:300]}") from e
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ModelError(f"{path / WEIGHTS}: weights are not finite in {', '.join(bad[:3])}")
    part.eval().requires_grad_(False)
    return TrainedAdaptor(part, record, path, is_built_in, hashlib.sha256(data).hexdigest())


def read_record(path: Path) -> AdaptorRecord:
    """Reads what an adaptor fits and was trained for.

    Raises:
        ModelError: The folder holds no adaptor, or one of a newer format.
    """
    file = path / RECORD
    if not file.is_file():
        raise ModelError(f"{path} is not an adaptor: it has no {RECORD}; expected a folder that train adaptor wrote")
    try:
        record = msgspec.json.decode(file.read_bytes(), type=AdaptorRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ModelError(f"{file} does not describe an adaptor: {one_line(e)}") from e
    if record.edgediff_adaptor != FORMAT:
        raise ModelError(f"{file} is of format {record.edgediff_adaptor}; this edgediff knows {FORMAT}")
    sizes = (*record.highres, *record.lowres, record.emb, *(record.text[1:] if record.text else ()))
    if not all(0 < size <= MAX_SIZE for size in sizes):
        raise ModelError(f"{file} has sizes {', '.join(map(str, sizes))}; expected 1 to {MAX_SIZE}")
    point = record.trained_for
    try:
        mask = tuple(map(int, clock_mask(point.clock, point.num_inference_steps, point.scheduler)))
    except RequestError as e:
        raise ModelError(f"{file}: {e}") from e
    if mask != point.mask or not 0 < point.guidance_scale <= MAX_GUIDANCE:
        raise ModelError(
            f"{file}: mask {point.mask} and guidance {point.guidance_scale:g} are none of clock {point.clock}'s over "
            f"{point.num_inference_steps} steps"
        )
    return record


def choose_adaptor(spec: str | None, model: Model, cut: Cut, point: m.TrainedFor) -> TrainedAdaptor:
    """Finds the adaptor that is asked for, or the one that fits.

    Args:
        spec: The name of a built-in adaptor, or its kind; a folder; ``identity``; None takes the built-in one that was
            trained for this operating point, and the identity where there is none.
        model: What it is to serve.
        cut: Where the model is divided.
        point: The operating point. Of several built-in ones of a kind, the nearest is taken.

    Raises:
        ModelError: The folder holds no adaptor.
        UnsupportedError: There is none of that name, or it serves another UNet or another cut.
    """
    if spec == "identity":
        return TrainedAdaptor(IdentityAdaptor())
    there = {path.name: (path, record) for path, record in built_in_adaptors(model)}
    names = {*there, *(record.kind for _, record in there.values())}
    # A name that is built in means that, whatever lies in the folder that one happens to be in.
    if spec is not None and spec not in names and Path(spec).is_dir():
        found = load_adaptor(Path(spec))
        check_fit(found, model, cut)
        return found
    fits = {name: (path, record) for name, (path, record) in there.items() if record.cut == cut}
    if spec is None:
        exact = [path for path, record in fits.values() if same_point(record.trained_for, point)]
        return load_adaptor(exact[0], is_built_in=True) if exact else TrainedAdaptor(IdentityAdaptor())
    named = [entry for name, entry in fits.items() if spec in (name, entry[1].kind)]
    if not named:
        choices = ", ".join(["identity", *there, "a folder that train adaptor wrote"])
        if spec in there:
            record = there[spec][1]
            raise UnsupportedError(
                f"adaptor {spec} was trained at level {record.cut.level}, {record.cut.point} ({record.shape}); "
                f"this is level {cut.level}, {cut.point} ({_shape(model, cut)})"
            )
        known = "is trained" if spec in ADAPTORS else "of that name lies"
        raise UnsupportedError(
            f"no adaptor {spec!r} {known} beside {model.name} for level {cut.level}, {cut.point}; choices: {choices}"
        )
    nearest = min(named, key=lambda entry: _distance(entry[1].trained_for, point))
    return load_adaptor(nearest[0], is_built_in=True)


def built_in_adaptors(model: Model) -> Iterable[tuple[Path, AdaptorRecord]]:
    """Folder and record of each adaptor that lies beside a built-in model and was trained for its weights."""
    folder = model.path / FOLDER
    if model.is_built_in and folder.is_dir():
        for path in sorted(folder.iterdir()):
            record = read_record(path)
            if record.model_sha256 == model.sha256:
                yield path, record


def check_fit(adaptor: TrainedAdaptor, model: Model, cut: Cut) -> None:
    """Refuses a learned adaptor that was trained for another UNet or another cut.

    Raises:
        UnsupportedError: With both cuts and shapes, or both models.
    """
    record = adaptor.record
    assert record is not None
    shape = _shape(model, cut)
    here = AdaptorShape(shape.highres, shape.lowres, shape.emb, shape.text if record.takes_text else None)
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


def same_point(trained: m.TrainedFor, point: m.TrainedFor) -> bool:
    """Whether steps, sampler, mask and guidance agree, however the clocks are written."""
    return msgspec.structs.replace(trained, clock=point.clock) == point


def _shape(model: Model, cut: Cut) -> AdaptorShape:
    return adaptor_shape(split(model.unet, cut), model)


def _distance(trained: m.TrainedFor, point: m.TrainedFor) -> tuple[float, ...]:
    """How far two operating points are from each other: first the share of full steps, then what else differs."""
    return (
        abs(sum(trained.mask) / len(trained.mask) - sum(point.mask) / len(point.mask)),
        abs(trained.num_inference_steps - point.num_inference_steps),
        abs(trained.guidance_scale - point.guidance_scale),
        float(trained.scheduler != point.scheduler),
    )
