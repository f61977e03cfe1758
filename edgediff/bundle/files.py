"""Every file of a bundle against the manifest, and the manifest against every file."""

import os
from collections.abc import Container, Iterable
from pathlib import Path, PurePosixPath

from edgediff_runtime import Bundle, Manifest
from edgediff_runtime.bundle import MANIFEST, PARITY, SUMS, inside, is_leftover, sha256_of
from edgediff_runtime.errors import BundleError
from edgediff_runtime.manifest import Component, File

# A verification that was killed leaves its scratch file; the next one writes over it.
PARITY_SCRATCH = "evidence/.parity.json.new"


def check_files(bundle: Bundle) -> None:
    """Checks every file against the manifest; a BundleError where one is damaged, missing, not listed or a link out."""
    for name in bundle.manifest.files:
        bundle.file(name)
    for name in unlisted(bundle.path, bundle.manifest):
        inside(bundle.path, name)  # raises for a symlink
        raise BundleError(f"{name} is in the bundle but not listed in {MANIFEST}; delete it")


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Finds files and symlinks in a bundle's folder that are not the bundle's, as paths in it."""
    return strangers(folder, {*manifest.files, MANIFEST, SUMS, PARITY, PARITY_SCRATCH})


def strangers(folder: Path, listed: Container[str]) -> list[str]:
    """Finds files that are not listed, and symlinks, in a folder, as paths in it.

    What systems and tools leave in folders (``.DS_Store``, ``Thumbs.db``) does not count.
    """
    found = []
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            file = Path(where, name)
            relative = file.relative_to(folder).as_posix()
            if is_leftover(folder, relative):
                continue
            if _leads_out(folder, relative) or (relative not in listed and (file.is_symlink() or not file.is_dir())):
                found.append(relative)
    return sorted(found)


def list_files(folder: Path) -> dict[str, File]:
    """Sizes and hashes of all files of a folder, by their paths in it, sorted."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): File(file.stat().st_size, sha256_of(file)) for file in found}


def _leads_out(folder: Path, name: str) -> bool:
    try:
        inside(folder, name)
    except BundleError:
        return (folder / name).is_symlink()
    return False


def component_files(component: Component, files: Iterable[str]) -> tuple[str, ...]:
    """The files that a component consists of: its graphs, their weights, packages' contents and config.json."""
    graphs = [graph for graph in (*component.graphs, component.model) if graph is not None]
    named = {name for graph in graphs for name in graph.files}
    named |= {str(PurePosixPath(name).with_name("config.json")) for name in named}
    named |= {name for name in (component.tokenizer,) if name is not None}
    return tuple(sorted(file for file in files if file in named or any(file.startswith(f"{name}/") for name in named)))
