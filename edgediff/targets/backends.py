"""Every backend that a bundle can be opened in: the runtime's own, and those that a target brings."""

from pathlib import Path

from edgediff.targets import TARGETS
from edgediff.targets.base import Target
from edgediff_runtime import Bundle, EdgePipeline, RequestError
from edgediff_runtime import sessions as runtime

BACKENDS = (*runtime.BACKENDS, *(name for target in TARGETS.values() for name in target.own_backends))


def open_session(
    bundle: Bundle,
    backend: str,
    compute_units: str = "all",
    threads: int | None = None,
    component: str = "unet",
    cache: Path | None = None,
    low_memory: bool = False,
) -> runtime.Session:
    """Opens a component of a bundle as the runtime's `open_session` does, or in a target's own backend."""
    _check_backend(backend)
    if backend in runtime.BACKENDS:
        return runtime.open_session(bundle, backend, compute_units, threads, component, cache, low_memory)
    runtime.check_threads(threads)
    runtime.refuse_compute_units(backend, compute_units)
    return _owner(backend).open_session(bundle, backend, threads, component)


def open_pipeline(
    bundle: Bundle,
    backend: str,
    compute_units: str = "all",
    threads: int | None = None,
    low_memory: bool = False,
    cache: Path | None = None,
) -> EdgePipeline:
    """Opens a bundle's pipeline as `EdgePipeline.from_pretrained` does, or in a target's own backend."""
    _check_backend(backend)
    runtime.check_cache(cache)
    targets = runtime.TARGETS_OF[backend] if backend in runtime.TARGETS_OF else (_owner(backend).name,)
    return EdgePipeline.of_bundle(
        bundle,
        targets,
        lambda name: open_session(bundle, backend, compute_units, threads, name, cache, low_memory),
        low_memory,
    )


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise RequestError(f"no backend {backend!r}; choices: {', '.join(BACKENDS)}")


def _owner(backend: str) -> Target:
    return next(target for target in TARGETS.values() if backend in target.own_backends)


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
