"""ONNX: torch's dynamo exporter, passes over its graphs, int8."""

import contextlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np

from edgediff.errors import ConfigError
from edgediff.extras import needing
from edgediff.outputs import write_json
from edgediff.targets.base import (
    OUTSIDE,
    PRECISIONS,
    Backend,
    ComponentJob,
    HalfConstants,
    Int8Config,
    Job,
    Layout,
    Outline,
    Precision,
    Sizes,
    Target,
    int8_check,
)
from edgediff_runtime import Bundle
from edgediff_runtime import manifest as m
from edgediff_runtime.ort_bound_session import CUDA

if TYPE_CHECKING:
    from edgediff.bundle.rows import Finding
    from edgediff_runtime.sessions import Session

# The first operator set that has attention, and one that is everywhere.
FUSED_OPSET, PORTABLE_OPSET = 23, 21
# The first whose DequantizeLinear takes four bits, and a scale for each block.
BLOCKS_OPSET = 21
FOLDER = "onnx/unet"
# Both install the same package name: one replaces the other.
INSTALL_CUDA = "pip uninstall onnxruntime && pip install onnxruntime-gpu"
WEIGHTS = f"{FOLDER}/weights.bin"


class OnnxConfig(Int8Config, frozen=True):
    """How the ONNX graphs are written.

    Attributes:
        opset: Version of the default operator set, 18 to 23. In 23 attention is one operator; earlier ones have it
            decomposed. None takes 23, or 21 where the graphs are to be portable or in fp16.
        dtype: ``fp16`` has weights, features and arithmetic in fp16, in operators of the standard alone, for WebGPU,
            NVIDIA's GPUs and NPUs; ONNX Runtime's CPU computes it in fp32, more slowly. The timestep's path through
            sine and cosine, the sample, the conditioning and the output stay fp32.
        simplify: Run onnxsim over every graph; its result is checked numerically before it is taken.
        portable: Keep to operators that accelerators know too (ONNX Runtime's providers for Core ML, NNAPI and WebGPU).
            Otherwise graphs have what is fastest on ONNX Runtime's CPU: attention as one operator, its own
            ``MultiHeadAttention`` where there are many keys, one operator for the scale and shift of norms, and, where
            nothing is quantized, convolutions with fewer multiplications and feed-forwards in slices.
        layout: How the graphs are packed; None takes the recipe's.
        weights: What the weights of every component are stored in: ``fp16``, ``int8`` (a scale for each output
            channel), ``int4`` (one for each 32 inputs; the smallest tenth in int8), or a plan of weights, a file. They
            are multiplied in `dtype` all the same. None leaves them in it.
    """

    opset: int | None = None
    dtype: Precision = "fp32"
    simplify: bool = True
    portable: bool = False
    layout: Layout | None = None
    weights: str | None = None


def opset_of(config: OnnxConfig) -> int:
    """The operator set that is asked for, or the one that goes with the operators that are wanted.

    >>> opset_of(OnnxConfig()), opset_of(OnnxConfig(dtype="fp16")), opset_of(OnnxConfig(opset=20))
    (23, 21, 20)
    """
    if config.opset is not None:
        return config.opset
    return PORTABLE_OPSET if is_standard(config) else FUSED_OPSET


def is_standard(config: OnnxConfig) -> bool:
    """Whether graphs keep to operators that accelerators know too."""
    return config.portable or config.dtype == "fp16"


class OnnxTarget(Target):
    """ONNX graphs with a symbolic batch."""

    name, title, files = "onnx", "ONNX", "ONNX graphs"
    config = OnnxConfig
    packages: ClassVar[Mapping[str, str]] = {
        "onnx": "1.23.2",
        "onnxscript": "0.7.2",
        "onnxsim": "0.8.1",
        "onnxruntime": "1.31.1",
    }
    backends = (
        Backend("onnxruntime", ("onnx",), ("onnxruntime",), "pip install edgediff", "run and verify ONNX bundles"),
        Backend(
            "onnxruntime-cuda",
            ("onnx",),
            ("onnxruntime",),
            INSTALL_CUDA,
            verifies=False,
            provider=CUDA,
            on_cpu=False,
        ),
    )
    accelerators = ("coreml-ep", "nnapi-ep", "xnnpack-ep")
    precisions = PRECISIONS
    weight_formats = ("fp16", "int8", "int4")
    takes_any_size = True
    takes_traces = True

    def check(self, config: OnnxConfig, layout: Layout) -> None:
        """Checks the operator set, the precision and the int8 settings."""
        latest = FUSED_OPSET - 1 if is_standard(config) else FUSED_OPSET
        if not 18 <= opset_of(config) <= latest:
            why = ", since in 23 attention is an operator that few accelerators know" if is_standard(config) else ""
            raise ConfigError(f"'onnx.opset' is {config.opset}; expected 18 to {latest}{why}")
        int8_check(self, config)
        if config.weights is not None and opset_of(config) < BLOCKS_OPSET:
            raise ConfigError(f"'onnx.weights' needs 'onnx.opset' {BLOCKS_OPSET} or later, which have scales of blocks")
        if config.quantize_attention and opset_of(config) < FUSED_OPSET:
            raise ConfigError(f"'onnx.quantize_attention' needs 'onnx.opset' {FUSED_OPSET}")

    def default_layout(self, config: OnnxConfig, mask: tuple[bool, ...]) -> Layout:
        """``split`` for portable graphs: providers for accelerators want weights in the graph's own file."""
        return "split" if config.portable else super().default_layout(config, mask)

    def require(self) -> None:
        """Imports onnx and onnxsim."""
        import onnx  # noqa: F401
        import onnxsim  # noqa: F401

    def describe(self, outline: Outline, config: OnnxConfig) -> m.Target:
        """Graphs of symbolic batch with fp32 tensors, over one file of weights unless they are portable."""
        from edgediff.targets.layout import pack

        dtype = config.dtype if config.quantize_nbits is None else "int8"
        weights = () if config.portable else (WEIGHTS,)
        graphs = tuple(
            graph
            if graph.file is None
            else msgspec.structs.replace(graph, file=f"{FOLDER}/{graph.name}.onnx", external_data=weights)
            for graph in outline.sizes.any_size(pack(outline.parts, outline.divided, outline.layout))
        )
        if not config.portable:
            graphs = tuple(graph.with_any_text() for graph in graphs)
        if dtype == "fp16":
            graphs = tuple(map(in_half, graphs))
        return m.OnnxTarget({"unet": outline.unet(graphs, dtype, None)}, opset=opset_of(config), ir_version=0)

    def describe_component(
        self, stage: m.Stage, graph: m.Graph, verify: Any, config: OnnxConfig, sizes: Sizes
    ) -> m.Component | None:
        """One graph of symbolic batch with fp32 inputs and outputs, named as optimum looks for it."""
        graph = msgspec.structs.replace(graph, file=f"onnx/{graph.name}/model.onnx")
        return m.Component(stage, config.dtype, None, verify.floors(config.dtype), sizes.any_size([graph]))

    def pipeline_folder(self, entry: Any) -> str:
        """Optimum's."""
        return "onnx"

    def essence(self, entry: Any) -> m.Target:
        """Without versions and weights' places, which the exporter decides."""
        return essential(msgspec.structs.replace(entry, ir_version=0))

    def asks_for(self, entry: Any) -> str:
        """The operator set."""
        return f"opset {entry.opset}"

    def run_hint(self, entry: Any) -> str:
        """The two commands that run ONNX graphs."""
        return "Run it: `edgediff run . -o out.png`, or `python -m edgediff_runtime . -o out.png` without torch."

    def write(self, job: Job) -> m.Target:
        """Writes the graphs over one file of weights, with the undivided step beside them."""
        from edgediff.targets.onnx.write_onnx import write_onnx, write_undivided

        graphs, versions = write_onnx(job, job.folder, job.target.unet.graphs, job.config)
        # No other tool hands a UNet a control image, or low-rank factors.
        alone = job.config.portable or any(graph.is_steered for graph in graphs)
        model = None if alone else write_undivided(job.folder, graphs, f"{FOLDER}/model.onnx")
        write_json(job.folder / FOLDER / "config.json", job.unet_config)
        return msgspec.structs.replace(job.target.with_unet(graphs=graphs, model=model), **versions)

    def write_component(self, job: ComponentJob) -> m.Component:
        """Writes the graph with its configuration beside it."""
        from edgediff.targets.onnx.write_onnx import write_component

        (graph,) = job.component.graphs
        write_json((job.folder / str(graph.file)).parent / "config.json", job.settings)
        return msgspec.structs.replace(job.component, graphs=(write_component(job, graph),))

    def half_constants(self, entry: Any) -> HalfConstants:
        """Attention's scale as its root, divisions as they are; epsilons are attributes."""
        return HalfConstants("root", rounds_epsilon=False, divides=True)

    def unrounded(
        self, bundle: Bundle, backend: str, session: Any, component: str = "unet"
    ) -> "contextlib.AbstractContextManager[Session] | None":
        """The same graphs with fp32 arithmetic on the weights that they have; None where onnx is not installed."""
        if find_spec("onnx") is None:
            return None
        from edgediff.targets.onnx.unrounded import UnroundedSession

        return contextlib.nullcontext(UnroundedSession(bundle, component))

    def findings(
        self, bundle: Bundle, session: Any, graph: m.Graph, inputs: Mapping[str, np.ndarray]
    ) -> "tuple[Finding, ...]":
        """Overflow and headroom along one run in fp32 arithmetic; nothing where onnx is not installed."""
        if find_spec("onnx") is None:
            return ()
        from edgediff.targets.onnx.unrounded import findings

        return findings(bundle, graph, inputs)

    def operations(self, bundle: Bundle, graph: m.Graph) -> list[Any]:
        """Reads the graph's nodes; what lies outside is not read."""
        with needing(self.extra, "reading an ONNX graph"):
            from edgediff.targets.onnx.onnx_operations import read_onnx

        return read_onnx(bundle.file(str(graph.file)))


def in_half(graph: m.Graph) -> m.Graph:
    """The entry of the same graph in fp16: tensors that cross between graphs are fp16."""
    inputs, outputs = (
        tuple(t if t.name in OUTSIDE else msgspec.structs.replace(t, dtype="float16") for t in side)
        for side in (graph.inputs, graph.outputs)
    )
    return msgspec.structs.replace(graph, inputs=inputs, outputs=outputs)


def essential(entry: m.Target) -> m.Target:
    """The entry without what only writing tells: weights' places, what onnxsim did, which rows are shared."""
    components = {
        name: msgspec.structs.replace(component, graphs=tuple(map(_essential_graph, component.graphs)))
        for name, component in entry.components.items()
    }
    return Target.essence(TARGET, msgspec.structs.replace(entry, components=components))


def _essential_graph(graph: m.Graph) -> m.Graph:
    return msgspec.structs.replace(graph.with_shared_rows(), external_data=(), simplified="", kept_fp32=())


TARGET = OnnxTarget()
