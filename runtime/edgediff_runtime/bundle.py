"""A bundle on disk, opened with distrust.

manifest.json lists size and hash of every other file; SHA256SUMS holds the same hashes and the manifest's own. The
text of SHA256SUMS follows from the manifest completely, so it is compared as a whole: a byte changed in either is
seen. A runtime checks these two and each file that it opens; nothing is followed out of the bundle.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgediff_runtime.errors import BundleError
from edgediff_runtime.manifest import Graph, Manifest
from edgediff_runtime.manifest_json import parse_manifest

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
PARITY = "evidence/parity.json"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: The directory.
        manifest: What it holds.
    """

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Finds a file of the bundle and checks it.

        Args:
            name: Its path in the bundle, as the manifest gives it.

        Returns:
            Where it lies.

        Raises:
            BundleError: The path leaves the bundle, the file is not listed, missing, a symlink, or other than the
                manifest says.
        """
        path = self._listed(name)
        if sha256_of(path) != self.manifest.files[name].sha256:
            raise BundleError(f"{name} does not have the hash that {MANIFEST} says: it is damaged")
        return path

    def folder(self, name: str) -> set[str]:
        """Finds a folder of the bundle and checks every file in it, for readers that open more than they are told.

        Args:
            name: Its path in the bundle.

        Returns:
            Paths in the bundle of the files that were checked.

        Raises:
            BundleError: As in `file`.
        """
        found = self._files_in(name)
        for file in sorted(found):
            self.file(file)
        return found

    @contextmanager
    def hold(self, graphs: tuple[Graph, ...]) -> Iterator[None]:
        """Checks every file that a backend may read where it is given these graphs, before and while it loads them.

        It reads whatever weights a graph names within its folder: all of that is checked. Weights that lie beside the
        graphs are numbers, which no reader follows; hashing gigabytes of them takes seconds, in which they are loaded.

        Args:
            graphs: Of one target; the block loads them.

        Raises:
            BundleError: As in `file`; when the block is left, where it is the weights' hash.
        """
        files = {graph.file for graph in graphs if graph.file is not None}
        weights = {graph.external_data for graph in graphs if graph.external_data is not None} - files
        folders = {str(PurePosixPath(name).parent) for name in files | weights}
        for name in sorted(files.union(weights, *map(self._files_in, folders))):
            if name in weights:
                self._listed(name)
            else:
                self.file(name)
        with ThreadPoolExecutor(1, "hashes") as beside:
            hashed = [beside.submit(self.file, name) for name in weights]
            try:
                yield
            finally:  # where loading failed too, this is why
                for each in hashed:
                    each.result()

    def _listed(self, name: str) -> Path:
        """Finds a file and holds all but its bytes to the manifest."""
        path = inside(self.path, name)
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{name} is not listed in {MANIFEST}")
        if not path.is_file():
            raise BundleError(f"{name} is missing from the bundle {self.path}")
        if path.stat().st_size != entry.size:
            raise BundleError(f"{name} has {path.stat().st_size} bytes, {MANIFEST} says {entry.size}: it is damaged")
        return path

    def _files_in(self, name: str) -> set[str]:
        """Paths in the bundle of all files in a folder, links and what is no plain file among them."""
        found = inside(self.path, name).rglob("*")
        return {file.relative_to(self.path).as_posix() for file in found if file.is_symlink() or not file.is_dir()}


def open_bundle(path: str | Path) -> Bundle:
    """Opens a bundle and checks its manifest against SHA256SUMS.

    Args:
        path: The directory.

    Returns:
        The bundle; its other files are checked when they are opened.

    Raises:
        BundleError: There is no bundle, or manifest.json or SHA256SUMS is damaged, of a newer version or unsafe.
    """
    path = Path(path)
    if not path.is_dir():
        raise BundleError(f"no bundle at {path}: no such directory")
    data = _read(path, MANIFEST)
    sums = _read(path, SUMS)
    recorded = [line for line in sums.split(b"\n") if line.endswith(b"  " + MANIFEST.encode())]
    if not recorded:
        raise BundleError(f"{SUMS} does not name {MANIFEST}: it is damaged")
    if recorded[0][:64] != hashlib.sha256(data).hexdigest().encode():
        parse_manifest(data)  # a newer version is said first: its sums are its own affair
        raise BundleError(f"{MANIFEST} does not have the hash that {SUMS} says: one of the two is damaged")
    manifest = parse_manifest(data)
    for name in _names(manifest):
        inside(path, name)
    if sums != render_sums(manifest, data):
        raise BundleError(f"{SUMS} does not agree with {MANIFEST}: it is damaged")
    return Bundle(path, manifest)


def _read(path: Path, name: str) -> bytes:
    file = inside(path, name)
    if not file.is_file():
        raise BundleError(f"{path} is not a bundle: {name} is missing")
    return file.read_bytes()


def _names(manifest: Manifest) -> list[str]:
    components = [component for target in manifest.targets for component in target.components.values()]
    graphs = [graph for each in components for graph in (*each.graphs, each.model) if graph is not None]
    named = [name for graph in graphs for name in (graph.file, graph.external_data) if name is not None]
    return [*manifest.files, *named]


def inside(root: Path, name: str) -> Path:
    """Resolves a path in a bundle, never out of it.

    Args:
        root: The bundle's directory.
        name: A relative path with forward slashes.

    Returns:
        The path under `root`.

    Raises:
        BundleError: The name is empty, absolute, climbs with ``..``, is not in its plain form, or goes through a
            symlink.
    """
    parts = PurePosixPath(name).parts
    plain = bool(parts) and "/".join(parts) == name
    if not plain or name.startswith("/") or ".." in parts or any(c in name for c in "\\:\0\n\r"):
        raise BundleError(f"the path {name!r} leaves the bundle or is not plain; expected a relative path inside")
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise BundleError(f"{name} is a symlink; a bundle holds plain files")
    return path


def render_sums(manifest: Manifest, data: bytes) -> bytes:
    """Writes SHA256SUMS as ``sha256sum -c`` reads it.

    Args:
        manifest: The manifest, with the hashes of all other files.
        data: The bytes of manifest.json.

    Returns:
        One line for each file, sorted by path.
    """
    hashes = {name: entry.sha256 for name, entry in manifest.files.items()}
    hashes[MANIFEST] = hashlib.sha256(data).hexdigest()
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()


def sha256_of(path: Path) -> str:
    """Hashes a file without reading it into memory as a whole.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
