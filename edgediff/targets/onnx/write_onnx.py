"""ONNX graphs through torch's dynamo exporter: one file per part, symbolic batch, fixed or symbolic sizes."""

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import torch

from edgediff.bundle.psnr import psnr_db
from edgediff.errors import UnsupportedError
from edgediff.models.part import Part
from edgediff.models.stored_weights import StoredWeights
from edgediff.targets.base import ComponentJob, Job, Say, converter_errors
from edgediff.targets.calibration import Calibration, calibrate_for
from edgediff.targets.onnx import OnnxConfig, is_standard, opset_of
from edgediff.targets.onnx.half_precision import Converting, to_half
from edgediff.targets.onnx.half_ranges import beyond_half
from edgediff.targets.onnx.measured_ranges import measure_ranges, open_graph
from edgediff.targets.onnx.passes import (
    ATTENTION,
    DECOMPOSE_ATTENTION,
    FASTER,
    GROUP_NORM,
    NAME_BY_MODULE,
    PORTABLE_GROUP_NORM,
    SEPARATE_GATES,
    SHARED_ROWS,
    SIMPLIFY,
    SIMPLIFY_UNMERGED,
    SIMPLIFY_UNSCALED,
    SLICE_ATTENTION,
    STRIP_METADATA,
    Pass,
    check,
    run_passes,
    weight_bytes,
)
from edgediff.targets.onnx.pool_weights import WeightFile, locations, move_weights, pool_weights, remove_weights
from edgediff.targets.onnx.quantize import WEIGHT_LEVELS, quantizing
from edgediff.targets.onnx.shared_rows import has_shared_rows
from edgediff.targets.onnx.store_weights import storing
from edgediff.targets.onnx.undivided_model import join_full_step, undivided_graph
from edgediff_runtime.manifest import TIMESTEP, Graph, Tensor
from edgediff_runtime.ort_session import APART_BYTES

# A graph whose weights are larger than this keeps them in a file of its own: one protobuf ends at 2 GiB, and readers
# that map weights into memory want them outside of it.
EXTERNAL_DATA_BYTES = 2**30
# Steps of a graph, spread over the trajectories, that say what an fp16 graph keeps in fp32.
RANGE_STEPS = 6
# Simplifying changes constants, not arithmetic: only rounding may differ.
SIMPLIFIED_DB = 100.0


@dataclass(frozen=True)
class Written:
    """What became of one graph.

    Attributes:
        shares_rows: Whether the graph takes a sample once for each image.
        external_data: File names of the weights that lie outside of the graph's file.
        simplified: Whether onnxsim's result was taken, or why it was left out.
        stored: The names of the weights that it has in fewer bits.
        kept: The operations of an fp16 graph that compute in fp32, since fp16 does not hold their numbers.
    """

    shares_rows: bool
    external_data: tuple[str, ...]
    opset: int
    ir_version: int
    simplified: str
    stored: frozenset[str] = frozenset()
    kept: tuple[str, ...] = ()


def write_onnx(
    job: Job, folder: Path, graphs: Iterable[Graph], config: OnnxConfig, weight_levels: int = WEIGHT_LEVELS
) -> tuple[tuple[Graph, ...], dict[str, int]]:
    """Writes ONNX graphs, and their weights once where they lie in one file.

    Args:
        job: Its modules and inputs; its own graphs may be of another target, which reads these.
        folder: The graphs' files are named from here.
        weight_levels: Largest magnitude of int8 weights.

    Returns:
        The graphs with what is known now, and the versions of their format: ``opset`` and ``ir_version``.

    Raises:
        UnsupportedError: The exporter, a pass or onnx.checker failed.
        VerificationError: A graph that is to be quantized is not what torch computed.
    """
    examples, calibration = job.examples(), calibrate_for(job)
    graphs = tuple(graphs)
    counted = all(graph.can_count_rows for graph in graphs if graph.takes_sample)
    # OrtSession runs the rows of smaller graphs on separate threads, which saves more than sharing does.
    share = counted and _weights(job.modules.values(), config) > APART_BYTES and not is_standard(config)
    finished, stored = [], set[str]()
    for graph in graphs:
        if graph.file is not None:
            job.say(f"exporting {graph.name} to ONNX")
            path = folder / graph.file
            path.parent.mkdir(parents=True, exist_ok=True)
            runs = None
            if calibration is not None and config.dtype == "fp16":
                runs = calibration.runs(graph, RANGE_STEPS)
            done = write_graph(
                job.modules[graph.name], graph, examples[graph.name], path, config, share, job.traces, job.weights, runs
            )
            _say_kept(job.say, graph.name, done)
            stored |= done.stored
            if calibration is not None and config.quantize_nbits is not None:
                job.say(f"measuring ranges and quantizing {graph.name}")
                done = _quantize(done, path, graph, calibration, config, weight_levels, share)
            external = graph.external_data or _beside(graph, done.external_data)
            written = graph.with_shared_rows() if done.shares_rows else graph
            graph = msgspec.structs.replace(
                written, external_data=external, simplified=done.simplified, kept_fp32=done.kept
            )
        finished.append(graph)
    if job.weights is not None:
        job.weights.check_found("unet", stored, "graphs")
    pooled = [i for i, drafted in enumerate(graphs) if drafted.external_data]
    if pooled:
        job.say("storing shared weights once")
        paths = [folder / str(finished[i].file) for i in pooled]
        for i, names in zip(pooled, pool_weights(paths, folder / graphs[pooled[0]].external_data[0]), strict=True):
            finished[i] = msgspec.structs.replace(finished[i], external_data=_beside(finished[i], names))
        for path in paths:
            check(str(path))
    return tuple(finished), {"opset": done.opset, "ir_version": done.ir_version}


def write_component(job: ComponentJob, graph: Graph) -> Graph:
    """Writes the graph of a component beside the UNet, its weights inside unless they are too many.

    Raises:
        UnsupportedError: The exporter, a pass or onnx.checker failed.
    """
    job.say(f"exporting {job.name} to ONNX")
    path = job.folder / str(graph.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = msgspec.structs.replace(job.config, quantize_nbits=None, quantize_attention=False)
    done = write_graph(job.part, graph, job.inputs, path, config, weights=job.weights)
    if job.weights is not None:
        job.weights.check_found(job.name, done.stored, "graphs")
    external = _beside(graph, done.external_data)
    _say_kept(job.say, job.name, done)
    return msgspec.structs.replace(graph, external_data=external, simplified=done.simplified, kept_fp32=done.kept)


def _beside(graph: Graph, names: Iterable[str]) -> tuple[str, ...]:
    """The paths in the bundle of files in a graph's folder."""
    return tuple(f"{Path(str(graph.file)).parent}/{name}" for name in names)


def write_undivided(folder: Path, graphs: Iterable[Graph], file: str) -> Graph:
    """Writes the undivided step over the weights that the graphs of a full step have."""
    full = [graph for graph in graphs if graph.runs(full=True)]
    model = join_full_step([onnx.load(folder / str(graph.file), load_external_data=False) for graph in full])
    (folder / file).write_bytes(model.SerializeToString(deterministic=True))
    check(str(folder / file))
    return undivided_graph(full, file, Tensor(TIMESTEP, "float32", ()))


def write_graph(
    part: Part,
    graph: Graph,
    inputs: Mapping[str, np.ndarray],
    path: Path,
    config: OnnxConfig,
    share: bool = False,
    traces: Path | None = None,
    weights: StoredWeights | None = None,
    runs: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> Written:
    """Exports a module to an ONNX file, large weights beside it.

    Args:
        inputs: Real inputs by name, for tracing and for the check of the simplified graph.
        config: How to write; with int8, what is written is in fp32 and ready to be quantized.
        share: Whether rows of one image may share what they have in common.
        traces: A folder in which the traced graph is kept, or found where it was traced before.
        weights: The formats of weights that are stored in fewer bits.
        runs: Inputs along real trajectories, which say what an fp16 graph keeps in fp32; None takes `inputs` alone.

    Raises:
        UnsupportedError: The exporter, a pass or onnx.checker failed.
    """
    names = [tensor.name for tensor in graph.inputs]
    args = tuple(_at_least_two(_single(inputs[name]), graph, name) for name in names)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting-") as scratch:
        traced = Path(scratch if traces is None else traces) / f"{graph.name}-{opset_of(config)}.onnx"
        if not traced.exists():
            _trace(part, graph, args, traced, opset_of(config))
        given = dict(zip(names, args, strict=True))
        return _finish(traced, path, graph, given, config, share, weights, runs)


def _trace(part: Part, graph: Graph, args: tuple[torch.Tensor, ...], path: Path, opset: int) -> None:
    # A name lets the exporter find the range itself: diffusers' upsamplers look at the batch (copies from 64 rows on),
    # which a fixed range would contradict, and every contradiction costs another attempt of export.
    dynamic = tuple(
        {place: size for place, size in enumerate(tensor.shape) if isinstance(size, str)} or None
        for tensor in graph.inputs
    )
    with converter_errors(f"{graph.name}: torch.onnx.export"), _quiet():
        program = torch.onnx.export(
            part,
            args,
            dynamo=True,
            opset_version=opset,
            input_names=[tensor.name for tensor in graph.inputs],
            output_names=[tensor.name for tensor in graph.outputs],
            dynamic_shapes=(dynamic,),
            verbose=False,
        )
        assert program is not None  # None is what the old exporter returns
        program.save(path, external_data=_parameter_bytes(part) > EXTERNAL_DATA_BYTES)


def _finish(
    traced: Path,
    path: Path,
    graph: Graph,
    inputs: Mapping[str, torch.Tensor],
    config: OnnxConfig,
    share: bool,
    weights: StoredWeights | None,
    runs: Sequence[Mapping[str, np.ndarray]] | None,
) -> Written:
    """Passes, checks, and the file in its final form."""
    model = onnx.load(traced, load_external_data=False)
    large = weight_bytes(model) > EXTERNAL_DATA_BYTES
    try:
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        is_plain = config.quantize_nbits is None and weights is None
        simplify = SIMPLIFY if is_plain else SIMPLIFY_UNMERGED if weights is None else SIMPLIFY_UNSCALED
        if not large:
            simplify = _checked(simplify, feeds)
        # Only the graph's verification checks group normalization: the pass is nearer to torch than ONNX Runtime's own
        # expansion, by more than rounding where means are large. The same goes for the last passes.
        group_norm = PORTABLE_GROUP_NORM if is_standard(config) else GROUP_NORM
        named = (NAME_BY_MODULE,) if config.dtype == "fp16" else ()
        passes = (*named, STRIP_METADATA, group_norm, ATTENTION)
        found: set[str] = set()
        last: tuple[Pass, ...] = (storing(weights, found, traced.parent),) if weights is not None else ()
        if not is_standard(config) and config.quantize_nbits is None:
            last = _last(FASTER if is_plain else last, share)
        elif is_standard(config):
            last = (*last, SLICE_ATTENTION)
        model = run_passes(model, (*passes, *((simplify,) if config.simplify else ()), *last))
        _restore_names(model, graph)
        halves = traced.with_name(f"{graph.name}-half.bin")
        kept: tuple[str, ...] = ()
        if config.dtype == "fp16":
            beyond = beyond_half(model, traced.parent, [feeds] if runs is None else runs)
            kept = tuple(node.name for node in model.graph.node if node.output[0] in beyond)
            with WeightFile(halves, math.inf) if large else contextlib.nullcontext() as file:
                model = to_half(model, (*graph.inputs, *graph.outputs), Converting(traced.parent, file), beyond)
        external = _save(model, path, traced.parent)
        halves.unlink(missing_ok=True)
        check(str(path))
    except UnsupportedError as e:
        raise UnsupportedError(f"{graph.name}: {e}") from e
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    simplified = _how_simplified(config, large)
    return Written(has_shared_rows(model), external, opset, model.ir_version, simplified, frozenset(found), kept)


def _say_kept(say: Say, name: str, done: Written) -> None:
    if done.kept:
        say(f"{name}: {len(done.kept)} operations stay fp32, which fp16 is too narrow for, such as {done.kept[0]}")


def _last(passes: tuple[Pass, ...], share: bool) -> tuple[Pass, ...]:
    return (*passes, SHARED_ROWS) if share else passes


def _save(model: onnx.ModelProto, path: Path, folder: Path) -> tuple[str, ...]:
    """Writes a graph whose weights lie inside or in a folder; the names of the files beside it, where they are many."""
    remove_weights(path)
    if weight_bytes(model) > EXTERNAL_DATA_BYTES:
        with WeightFile(path.with_name(f"{path.name}.data")) as file:
            move_weights(model, folder, file)
    else:
        move_weights(model, folder, None)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return locations(model)


def _quantize(
    done: Written,
    path: Path,
    graph: Graph,
    calibration: Calibration,
    config: OnnxConfig,
    weight_levels: int,
    share: bool,
) -> Written:
    """Quantizes a graph's file in place."""
    try:
        passes = (SEPARATE_GATES, DECOMPOSE_ATTENTION) if config.quantize_attention else (SEPARATE_GATES,)
        _save(run_passes(onnx.load(path), passes), path, path.parent)
        ranges = measure_ranges(path, graph, calibration)
        model = run_passes(onnx.load(path), _last((quantizing(ranges, weight_levels),), share))
        external = _save(model, path, path.parent)
        check(str(path))
    except UnsupportedError as e:
        raise UnsupportedError(f"{graph.name}: {e}") from e
    return replace(done, shares_rows=has_shared_rows(model), external_data=external)


def _checked(step: Pass, feeds: Mapping[str, np.ndarray]) -> Pass:
    """A pass whose result is compared with the model before it, on real inputs."""
    # One row is enough, and half the memory of two where attention is large.
    feeds = {name: array[:1] for name, array in feeds.items()}

    def compared(before: onnx.ModelProto) -> onnx.ModelProto:
        want = _run(before.SerializeToString(), feeds)
        after = step.apply(before)
        got = _run(after.SerializeToString(), feeds)
        for name in want:
            number = psnr_db(want[name], got[name])
            if number < SIMPLIFIED_DB:
                raise UnsupportedError(f"{name} changed: {number:.1f} dB of what it was before")
        return after

    return Pass(step.name, compared)


def _how_simplified(config: OnnxConfig, large: bool) -> str:
    if not config.simplify:
        return "no: switched off in the recipe"
    if large:
        return "yes, without its weights; checked by the graph's own verification"
    return "yes"


def _run(model: bytes, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = open_graph(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _restore_names(model: onnx.ModelProto, graph: Graph) -> None:
    """Gives the graph its inputs and outputs in the manifest's order, with its symbols, and checks their names."""
    for values, said in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
        names = [tensor.name for tensor in said]
        if sorted(value.name for value in values) != sorted(names):
            raise UnsupportedError(
                f"the exported graph has {', '.join(value.name for value in values)}, not {', '.join(names)}"
            )
        ordered = sorted(values, key=lambda value: names.index(value.name))
        for value, tensor in zip(ordered, said, strict=True):
            if tensor.takes_any_size:
                for dim, size in zip(value.type.tensor_type.shape.dim[2:], tensor.shape[2:], strict=True):
                    dim.dim_param = str(size)
        del values[:]
        values.extend(ordered)


def _single(array: np.ndarray) -> torch.Tensor:
    """An input as the module in torch takes it, in fp32 whatever the graph is to be in."""
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float16 else array)


def _at_least_two(tensor: torch.Tensor, graph: Graph, name: str) -> torch.Tensor:
    """Two rows or more: the exporter takes a batch of one for a constant."""
    spec = next(entry for entry in graph.inputs if entry.name == name)
    if spec.shape[:1] != ("batch",) or len(tensor) > 1:
        return tensor
    return torch.cat([tensor, tensor])


def _parameter_bytes(part: Part) -> int:
    return sum(p.numel() * p.element_size() for p in part.parameters())


def _weights(parts: Iterable[Part], config: OnnxConfig) -> int:
    """Bytes of the weights of parts that may have some in common; in int8, as if none stayed in fp32."""
    count = sum(p.numel() for p in {p for part in parts for p in part.parameters()})
    return count * (4 if config.quantize_nbits is None else config.quantize_nbits // 8)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's chatter (missing torchvision, progress marks) off the screen; its errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
