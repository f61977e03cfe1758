"""What each component takes in memory when the pipeline runs, one component at a time, in a process without torch."""

import json
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import msgspec

from edgediff.bundle.reference import REFERENCE, load_reference, prompt_request, reference_request
from edgediff.errors import TargetError
from edgediff.targets import TARGETS
from edgediff.targets.backends import open_pipeline
from edgediff_runtime import Manifest, RequestError, open_bundle
from edgediff_runtime.memory import resident_bytes


def with_peaks(folder: Path, manifest: Manifest) -> Manifest:
    """Measures the components of a bundle that is sealed.

    Returns:
        The manifest with `peak_bytes` of every component that the reference's request runs, in each target that runs on
        this machine's CPU.

    Raises:
        TargetError: The bundle does not run, or the system does not say what a process takes.
    """
    targets = []
    for entry in manifest.targets:
        backend = TARGETS[entry.target].usual_backend()
        peaks = {} if backend is None else _measured(folder, backend)
        for name, peak in peaks.items():
            entry = entry.with_component(name, msgspec.structs.replace(entry.components[name], peak_bytes=peak))
        targets.append(entry)
    return msgspec.structs.replace(manifest, targets=tuple(targets))


def _measured(folder: Path, backend: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "peaks.json"
        command = [sys.executable, "-m", "edgediff.export.component_memory", str(folder), backend, str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise TargetError(f"memory of the components in {backend} cannot be measured: {said[0]}")
        found: dict[str, int] = json.loads(answer.read_bytes())
    return found


def peaks(folder: Path, backend: str) -> dict[str, int]:
    """Runs the reference's request with `low_memory`, in this process.

    Returns:
        For each component, the process's peak while it ran beyond what was resident before the first: weights,
        activations, and what the backend makes of them.
    """
    bundle = open_bundle(folder)
    pipe = open_pipeline(bundle, backend, low_memory=True)
    for package in next(b.packages for form in TARGETS.values() for b in form.backends if b.name == backend):
        import_module(package)  # the backend itself is not a component's
    conditioning = load_reference(folder / REFERENCE).conditioning
    request = reference_request(bundle.manifest, conditioning) | prompt_request(pipe, conditioning)
    before = resident_bytes()
    result = pipe(**request, output_type="image" if pipe.can_decode else "latent")
    if before is None or result.peak_bytes is None:
        raise RequestError("this system does not say what a process takes; it is measured on Linux")
    return {name: max(0, peak - before) for name, peak in result.peak_bytes.items()}


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(peaks(Path(sys.argv[1]), sys.argv[2])), encoding="utf-8")
