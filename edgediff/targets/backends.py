"""Every backend that a bundle can be opened in: the runtime's own, and those that need torch."""

import sys

from edgediff.errors import MissingExtraError
from edgediff_runtime import Bundle, RequestError
from edgediff_runtime import sessions as runtime

MIL_REFERENCE = "mil-reference"
EXECUTORCH = "executorch"
OPENVINO = "openvino"
BACKENDS = (*runtime.BACKENDS, EXECUTORCH, MIL_REFERENCE)
# What verification asks of each target, in this order; one of them must have measured.
BACKENDS_OF_TARGET = {
    "onnx": ("onnxruntime",),
    "coreml": (MIL_REFERENCE, "coreml"),
    EXECUTORCH: (EXECUTORCH,),
    OPENVINO: (OPENVINO,),
}


def open_session(
    bundle: Bundle, backend: str, compute_units: str = "all", threads: int | None = None
) -> runtime.Session:
    """Opens a bundle in a backend.

    Args:
        bundle: The bundle.
        backend: One of `BACKENDS`.
        compute_units: What Core ML may use: ``all``, ``cpu_only``, ``cpu_and_gpu`` or ``cpu_and_ne``.
        threads: How many may be at work on the CPU; the backend's own choice where None.

    Returns:
        The session.

    Raises:
        BundleError: The backend cannot load the bundle.
        RequestError: The backend is unknown, or not to be had on this machine.
        MissingExtraError: What the evaluator or ExecuTorch needs is not installed.
    """
    if backend not in BACKENDS:
        raise RequestError(f"no backend {backend!r}; choices: {', '.join(BACKENDS)}")
    if backend in runtime.BACKENDS:
        return runtime.open_session(bundle, backend, compute_units, threads)
    runtime.refuse_compute_units(backend, compute_units)
    try:
        if backend == EXECUTORCH:
            from edgediff.targets.executorch.executorch_session import ExecuTorchSession

            return ExecuTorchSession(bundle, threads)
        from edgediff.targets.coreml.mil_session import MilSession
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] == "edgediff":
            raise
        what, extra = (
            ("running an ExecuTorch program", EXECUTORCH)
            if backend == EXECUTORCH
            else ("evaluating Core ML packages", "export")
        )
        raise MissingExtraError(what, extra) from e
    return MilSession(bundle)


def usual_backend(bundle: Bundle) -> str:
    """The backend that runs a bundle where none is asked for.

    Args:
        bundle: The bundle.

    Returns:
        ``onnxruntime`` where there are ONNX graphs, else ``coreml`` where there are Core ML packages and this is a Mac,
        else ``openvino`` where there are OpenVINO's models, else ``executorch`` where there is such a program.

    Raises:
        RequestError: There are Core ML packages alone, and this is no Mac.
    """
    there = {target.target for target in bundle.manifest.targets}
    if "onnx" in there:
        return "onnxruntime"
    if "coreml" in there and sys.platform == "darwin":
        return "coreml"
    for name in (OPENVINO, EXECUTORCH):
        if name in there:
            return name
    raise RequestError(
        f"the bundle has Core ML packages alone, which run on a Mac; --backend {MIL_REFERENCE} evaluates them here"
    )
