"""A bundle as a browser gets it: it has an ONNX target, and a browser may ask for the files that its manifest lists."""

import logging
import os
from pathlib import Path

from edgediff_runtime import Bundle, open_bundle
from edgediff_runtime.bundle import MANIFEST, SUMS, inside
from edgediff_runtime.errors import BundleError

log = logging.getLogger(__name__)

# The target that onnxruntime-web runs.
TARGET = "onnx"


def open_for_browser(path: Path) -> Bundle:
    """Opens a bundle and checks that a browser can run it; contents of files are the browser's to check.

    Raises:
        BundleError: There is no bundle, it has no ONNX target, or a file of that target is missing or of another size.
    """
    bundle = open_bundle(path)
    there = [target.target for target in bundle.manifest.targets]
    if TARGET not in there:
        raise BundleError(
            f"{path} has no '{TARGET}' target, the one that browsers run; it has: {', '.join(there)}; "
            f"export it with --target {TARGET}"
        )
    for component in bundle.manifest.target(TARGET).components.values():
        for name in component.files:
            bundle.listed(name)
    return bundle


class BundleFiles:
    """The files of a bundle that are served, by its manifest as it is now: an export may replace the bundle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, ...] | None = None
        self._names: frozenset[str] = frozenset()
        self._said = ""

    def find(self, name: str) -> Path | None:
        """A file by its path in the bundle; None where the manifest does not list it, or it is not there."""
        self._look()
        if name not in self._names:
            return None
        try:
            path = inside(self.path, name)
            return path if path.is_file() else None
        except (BundleError, OSError):
            return None

    def _look(self) -> None:
        """Reads the manifest where it is another one than before, and as long as the bundle is not whole."""
        seen = _stamp(self.path / MANIFEST)
        if seen is not None and seen == self._seen:
            return
        try:
            self._names = frozenset({*open_for_browser(self.path).manifest.files, MANIFEST, SUMS})
            self._seen, self._said = seen, ""
        except (BundleError, OSError) as e:
            self._seen, self._names = None, frozenset()
            if self._said != str(e):
                self._said = str(e)
                log.warning("the bundle is not served until it is whole again: %s", e)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What is another after a file was written or replaced; None where there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
