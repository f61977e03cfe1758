"""Every backend that a bundle can be opened in: the runtime's own, and those that a target brings."""

from edgediff.targets import TARGETS
from edgediff_runtime import Bundle, RequestError
from edgediff_runtime import sessions as runtime

BACKENDS = (*runtime.BACKENDS, *(name for target in TARGETS.values() for name in target.own_backends))


def open_session(
    bundle: Bundle, backend: str, compute_units: str = "all", threads: int | None = None
) -> runtime.Session:
    """Opens a bundle as the runtime's `open_session` does, or in a target's own backend."""
    if backend not in BACKENDS:
        raise RequestError(f"no backend {backend!r}; choices: {', '.join(BACKENDS)}")
    if backend in runtime.BACKENDS:
        return runtime.open_session(bundle, backend, compute_units, threads)
    runtime.check_threads(threads)
    runtime.refuse_compute_units(backend, compute_units)
    target = next(target for target in TARGETS.values() if backend in target.own_backends)
    return target.open_session(bundle, backend, threads)


def usual_backend(bundle: Bundle) -> str:
    """The backend where none is asked for: of the first target that runs here; a RequestError where none does."""
    there = [TARGETS[entry.target] for entry in bundle.manifest.targets]
    for target in TARGETS.values():
        backend = target.usual_backend() if target in there else None
        if backend is not None:
            return backend
    only = there[0]
    raise RequestError(
        f"bundle: it has only {only.files}, which do not run on this machine; "
        f"--backend {only.own_backends[0]} evaluates them"
    )
