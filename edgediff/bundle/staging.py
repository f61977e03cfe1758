"""A directory that is whole or not there: written beside its place under another name, then renamed.

A process that was killed leaves its temporary sibling behind; the next export there removes it first. A lock marks the
siblings of running processes: it ends with the process, and process numbers are reused.
"""

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from edgediff.bundle.files import unlisted
from edgediff.errors import TargetError
from edgediff.outputs import check_folder, lock, unlock
from edgediff_runtime.bundle import MANIFEST, SUMS
from edgediff_runtime.errors import BundleError
from edgediff_runtime.manifest_json import parse_manifest


def bundle_strays(folder: Path) -> list[str] | None:
    """Files in a bundle that are not its own, as paths in it; None where export did not write the folder.

    Of a bundle whose manifest cannot be read nothing is known, and nothing is a stray.
    """
    if not _looks_like_a_bundle(folder):
        return None
    try:
        manifest = parse_manifest((folder / MANIFEST).read_bytes())
    except BundleError:
        return []
    return unlisted(folder, manifest)


def check_place(
    target: Path, force: bool, what: str = "bundle", strays: Callable[[Path], list[str] | None] = bundle_strays
) -> None:
    """Refuses to write where something is that must not be lost.

    Args:
        target: Where the folder is to be.
        force: Whether a folder of the same kind may be replaced.
        what: The kind of folder that is written, for the message.
        strays: Says of a folder which files in it are not its own; None where it is of another kind.

    Raises:
        TargetError: The target exists and `force` is off, or it is something else than a bundle or an empty folder, or
            a bundle with other files in it, which is never replaced; or its parent cannot be written.
    """
    if target.is_symlink():
        raise TargetError(f"{target} is not a directory; choose another output")
    check_folder(target, replaced=True)
    if target.is_dir() and any(target.iterdir()):
        found = strays(target)
        if found is None:
            raise TargetError(f"{target} is a folder that is not a {what}, never replaced; choose another output")
        if found:
            raise TargetError(f"{target} holds {found[0]}, which is not the {what}'s; choose another output")
        if not force:
            raise TargetError(f"{target} holds another {what}; pass --force to replace it, or choose another output")


def check_outside(folder: Path, bundle: Path) -> None:
    """Refuses a folder in a bundle, this one or another.

    Raises:
        TargetError: It is in one.
    """
    here = folder.resolve()
    inside = next((parent for parent in (here, *here.parents) if _looks_like_a_bundle(parent)), None)
    if inside is not None or bundle.resolve() in (here, *here.parents):
        raise TargetError(
            f"{folder} is in the bundle {inside or bundle}, which contains only its own files; choose another output"
        )


def _looks_like_a_bundle(folder: Path) -> bool:
    """Whether export wrote it, damaged or not: a web page's folder has a manifest.json too."""
    manifest = folder / MANIFEST
    return manifest.is_file() and ((folder / SUMS).is_file() or b'"format_version"' in manifest.read_bytes())


@contextlib.contextmanager
def staged(target: Path, what: str = "bundle") -> Iterator[Path]:
    """Gives a temporary sibling, an empty directory, to write into and puts it in place when the block ends well.

    What is there already is replaced: `check_place` comes first. `what` is for messages.

    Raises:
        TargetError: The disk is full, or the place cannot be written. What was there is as it was.
    """
    target = target.absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f"{_prefix(target)}{os.getpid()}")
        existed = target.exists()
        scratch.mkdir()
    except OSError as e:
        raise TargetError(f"cannot write beside {target}: {e.strerror or e}") from e
    held = None
    try:
        held = lock(scratch)
        yield scratch
        if target.exists() and not existed:
            raise TargetError(f"{target} appeared while the {what} was written; nothing was replaced, write it again")
        _swap(scratch, target)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TargetError(f"the disk is full: {target} was not written, what was there is as it was") from e
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        unlock(held)


def _swap(scratch: Path, target: Path) -> None:
    if not target.exists():
        os.rename(scratch, target)
        return
    old = scratch.with_name(scratch.name + ".old")
    try:
        held = lock(target)
    except BlockingIOError as e:
        raise TargetError(f"{target}: another process is writing it; wait for it to end") from e
    try:
        os.rename(target, old)
        try:
            os.rename(scratch, target)
        except BaseException:  # an interrupt too
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        unlock(held)


def _prefix(target: Path) -> str:
    return f".{target.name}.edgediff-"


def clear_stale(target: Path) -> None:
    """Removes what killed exports to this place left, first of all; a bundle that one moved aside is put back."""
    target = target.absolute()
    for left in sorted(target.parent.glob(f"{glob.escape(_prefix(target))}*")):
        if not left.name.removeprefix(_prefix(target)).removesuffix(".old").isdigit():
            continue
        try:
            held = lock(left)
        except OSError:  # another export is running there, or the folder is another user's
            continue
        try:
            if left.name.endswith(".old") and not target.exists():
                os.rename(left, target)
            else:
                shutil.rmtree(left, ignore_errors=True)
        finally:
            unlock(held)
