"""A bundle on disk, which may come from anybody.

manifest.json lists size and hash of every other file; SHA256SUMS holds the same hashes and the manifest's own. The
text of SHA256SUMS follows from the manifest, so it is compared as a whole. A runtime checks these two and each file
that it opens, and follows no path out of the bundle but the links of a Hugging Face cache into its own blobs.
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
AGAIN = "download or copy the bundle again"
LOCAL_DIR = "download the bundle with --local-dir, which makes no links"
# What Finder, Windows, zip and the Hugging Face Hub leave in a folder; nothing reads it.
LEFTOVERS = {".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX", ".gitattributes", ".cache"}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its directory and its manifest."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Checks a file, given by its path in the bundle, and says where it lies.

        Raises:
            BundleError: The path leaves the bundle, or the file is not listed, missing, or not what the manifest says.
        """
        path = self.listed(name)
        if sha256_of(path) != self.manifest.files[name].sha256:
            raise BundleError(f"{name} does not have the hash in {MANIFEST}: it is damaged; {AGAIN}")
        return path

    def listed(self, name: str) -> Path:
        """Checks all of a file but its content, which takes no time, and says where it lies.

        Raises:
            BundleError: As in `file`, but for the hash.
        """
        path = inside(self.path, name)
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{name} is not listed in {MANIFEST}; delete it")
        if not path.is_file():
            raise BundleError(f"{name} is missing from the bundle {self.path}; {AGAIN}")
        if path.stat().st_size != entry.size:
            size = path.stat().st_size
            raise BundleError(f"{name} has {size} bytes, {entry.size} in {MANIFEST}: it is damaged; {AGAIN}")
        return path

    def folder(self, name: str) -> set[str]:
        """Checks every file in a folder, for readers that open more than they are told; the paths in the bundle.

        Raises:
            BundleError: As in `file`, or one is a link, which readers of packages refuse.
        """
        found = self._files_in(name)
        for file in sorted(found):
            if self.file(file).is_symlink():
                raise BundleError(f"{file} is a link, which a package cannot hold; {LOCAL_DIR}")
        return found

    @contextmanager
    def hold(self, graphs: tuple[Graph, ...]) -> Iterator[None]:
        """Checks every file that a backend may read when the block loads these graphs of one target.

        A backend reads whatever weights a graph names in its folder, so all of the folder is checked. Weights in files
        of their own are only numbers: they are hashed, which takes seconds for gigabytes, while the block loads them.

        Raises:
            BundleError: As in `file`; of weights' hashes at the end of the block.
        """
        files = {graph.file for graph in graphs if graph.file is not None}
        weights = {name for graph in graphs for name in graph.external_data} - files
        folders = {str(PurePosixPath(name).parent) for name in files | weights}
        for name in sorted(files.union(weights, *map(self._files_in, folders))):
            if name in weights:
                self.listed(name)
            else:
                self.file(name)
        with ThreadPoolExecutor(1, "hashes") as beside:
            hashed = [beside.submit(self.file, name) for name in weights]
            try:
                yield
            finally:  # damaged weights may also be why loading failed
                for each in hashed:
                    each.result()

    def _files_in(self, name: str) -> set[str]:
        """Paths in the bundle of all that lies in a folder, links too, leftovers not."""
        found = inside(self.path, name).rglob("*")
        paths = {file.relative_to(self.path).as_posix() for file in found if file.is_symlink() or not file.is_dir()}
        return {path for path in paths if not is_leftover(self.path, path)}


def open_bundle(path: str | Path) -> Bundle:
    """Opens a bundle and checks its manifest against SHA256SUMS; other files are checked when they are opened.

    Raises:
        BundleError: There is no bundle, or manifest.json or SHA256SUMS is damaged, of a newer version or unsafe.
    """
    path = Path(path)
    if not path.is_dir():
        raise BundleError(f"no bundle at {path}: no such directory; expected a folder that export wrote")
    data = _read(path, MANIFEST)
    sums = _read(path, SUMS)
    recorded = [line for line in sums.split(b"\n") if line.endswith(b"  " + MANIFEST.encode())]
    if not recorded:
        raise BundleError(f"{SUMS} does not list {MANIFEST}: it is damaged; {AGAIN}")
    if recorded[0][:64] != hashlib.sha256(data).hexdigest().encode():
        parse_manifest(data)  # check the version first: a newer one may have another format of sums
        raise BundleError(f"{MANIFEST} does not have the hash in {SUMS}: one of the two is damaged; {AGAIN}")
    manifest = parse_manifest(data)
    for name in _names(manifest):
        inside(path, name)
    if sums != render_sums(manifest, data):
        raise BundleError(f"{SUMS} does not agree with {MANIFEST}: it is damaged; {AGAIN}")
    return Bundle(path, manifest)


def _read(path: Path, name: str) -> bytes:
    file = inside(path, name)
    if not file.is_file():
        within = sorted(path.glob(f"*/{MANIFEST}"))  # unpacking a zip adds a folder
        hint = f"did you mean {within[0].parent}?" if within else "expected a folder that export wrote"
        raise BundleError(f"{path} is not a bundle: {name} is missing; {hint}")
    return file.read_bytes()


def _names(manifest: Manifest) -> list[str]:
    components = [component for target in manifest.targets for component in target.components.values()]
    graphs = [graph for each in components for graph in (*each.graphs, each.model) if graph is not None]
    named = [name for graph in graphs for name in graph.files]
    return [*manifest.files, *named]


def inside(root: Path, name: str) -> Path:
    """Resolves a path in a bundle, never out of it: relative, in its plain form with forward slashes.

    Raises:
        BundleError: The name is empty, absolute, climbs with ``..``, is not in its plain form, or goes through a
            symlink that is not one of a Hugging Face cache.
    """
    parts = PurePosixPath(name).parts
    plain = bool(parts) and "/".join(parts) == name
    if not plain or name.startswith("/") or ".." in parts or any(c in name for c in "\\:\0\n\r"):
        raise BundleError(f"the path {name!r} leaves the bundle or is not plain; expected a relative path inside")
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink() and not _is_blob(root, path):
            raise BundleError(f"{name} is a symlink out of the bundle; put the file itself in its place")
    return path


def _is_blob(root: Path, link: Path) -> bool:
    """Whether a link leads to a file of the Hugging Face cache that the bundle is a snapshot of."""
    snapshots = next((folder for folder in root.resolve().parents if folder.name == "snapshots"), None)
    target = link.resolve()
    return snapshots is not None and target.parent == snapshots.parent / "blobs" and target.is_file()


def is_leftover(root: Path, name: str) -> bool:
    """Whether a path in a bundle is something that a system or a tool leaves in folders, and no link."""
    parts = PurePosixPath(name).parts
    known = any(part in LEFTOVERS or part.startswith("._") for part in parts)
    return known and not (root / name).is_symlink()


def render_sums(manifest: Manifest, data: bytes) -> bytes:
    """Writes SHA256SUMS as ``sha256sum -c`` reads it, sorted by path; `data` is the bytes of manifest.json."""
    hashes = {name: entry.sha256 for name, entry in manifest.files.items()}
    hashes[MANIFEST] = hashlib.sha256(data).hexdigest()
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()


def sha256_of(path: Path) -> str:
    """Hashes a file without reading it into memory as a whole: 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
