"""Every file of a bundle against the manifest, and the manifest against every file."""

import os
from pathlib import Path

from edgediff_runtime import Bundle, Manifest
from edgediff_runtime.bundle import MANIFEST, PARITY, SUMS, inside, sha256_of
from edgediff_runtime.errors import BundleError
from edgediff_runtime.manifest import File

# A verification that was killed leaves its scratch file; the next one writes over it.
PARITY_SCRATCH = "evidence/.parity.json.new"


def check_files(bundle: Bundle) -> None:
    """Holds every file of a bundle to the manifest.

    Args:
        bundle: The bundle.

    Raises:
        BundleError: A file is damaged, missing, not listed, or no plain file.
    """
    for name in bundle.manifest.files:
        bundle.file(name)
    for name in unlisted(bundle.path, bundle.manifest):
        inside(bundle.path, name)  # a symlink is said to be one
        raise BundleError(f"{name} is in the bundle but not listed in {MANIFEST}")


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Finds what lies in a bundle's folder and is not of the bundle.

    Args:
        folder: The bundle's directory.
        manifest: Its manifest.

    Returns:
        Paths in the folder of files that the manifest does not list, and of symlinks.
    """
    listed = {*manifest.files, MANIFEST, SUMS, PARITY, PARITY_SCRATCH}
    found = []
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            file = Path(where, name)
            relative = file.relative_to(folder).as_posix()
            if file.is_symlink() or (not file.is_dir() and relative not in listed):
                found.append(relative)
    return sorted(found)


def list_files(folder: Path) -> dict[str, File]:
    """Sizes and hashes of all files of a folder, by their paths in it, sorted."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): File(file.stat().st_size, sha256_of(file)) for file in found}
