"""Bundles that are changed and sealed again, so that their hashes tell nothing, and how they are refused."""

import hashlib
import json
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgediff import verify_bundle
from edgediff_runtime import BundleError, EdgePipeline
from edgediff_runtime.bundle import MANIFEST, PARITY, SUMS, render_sums, sha256_of
from edgediff_runtime.manifest import File, Manifest, Target
from edgediff_runtime.manifest_json import parse_manifest, render_manifest

GRAPHS = ("onnx/unet/highres_in.onnx", "onnx/unet/lowres.onnx", "onnx/unet/highres_out.onnx")
REFERENCE = "evidence/reference.safetensors"
# A device opens neither.
UNOPENED = (REFERENCE, "README.md")
FILES = (MANIFEST, SUMS, *GRAPHS, *UNOPENED)


def manifest_of(bundle: Path) -> Manifest:
    return parse_manifest((bundle / MANIFEST).read_bytes())


def rows_of(bundle: Path) -> list[dict[str, Any]]:
    """What verification wrote down of a bundle when it was exported."""
    return json.loads((bundle / PARITY).read_bytes())["rows"]


def replace_graph(manifest: Manifest, number: int, **changes: Any) -> Manifest:
    target = manifest.targets[0]
    graphs = list(target.unet.graphs)
    graphs[number] = msgspec.structs.replace(graphs[number], **changes)
    return msgspec.structs.replace(manifest, targets=(target.with_unet(graphs=tuple(graphs)),))


def reseal(bundle: Path, manifest: Manifest | None = None) -> None:
    """Makes every hash agree with what is there now: a lie that hashes do not catch."""
    found = [file for file in bundle.rglob("*") if file.is_file()]
    names = [name for file in found if (name := file.relative_to(bundle).as_posix()) not in (MANIFEST, SUMS, PARITY)]
    files = {name: File((bundle / name).stat().st_size, sha256_of(bundle / name)) for name in names}
    manifest = manifest_of(bundle) if manifest is None else manifest
    targets = tuple(_without_gone(target, files) for target in manifest.targets)
    seal(bundle, msgspec.structs.replace(manifest, targets=targets, files=files))


def _without_gone(target: Target, files: Container[str]) -> Target:
    """A target whose components name none of the files that are gone."""
    there = {
        name: msgspec.structs.replace(component, files=tuple(file for file in component.files if file in files))
        for name, component in target.components.items()
    }
    return msgspec.structs.replace(target, components=there)


def seal(bundle: Path, manifest: Manifest) -> None:
    data = render_manifest(manifest)
    (bundle / MANIFEST).write_bytes(data)
    (bundle / SUMS).write_bytes(render_sums(manifest, data))


def seal_plain(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest as plain data, so that it may hold what no struct can, and makes its hash agree."""
    data = json.loads((bundle / MANIFEST).read_bytes())
    change(data)
    seal_bytes(bundle, json.dumps(data).encode())


def seal_bytes(bundle: Path, data: bytes) -> None:
    lines = [line for line in (bundle / SUMS).read_text().splitlines() if not line.endswith(MANIFEST)]
    lines.append(f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}")
    (bundle / MANIFEST).write_bytes(data)
    (bundle / SUMS).write_text("".join(f"{line}\n" for line in sorted(lines, key=lambda line: line[66:])))


def flip_bit(file: Path) -> None:
    """Flips one bit in the middle of a file, and seals nothing."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def assert_refused(bundle: Path, match: str, run: bool = True, verify: str | None = None) -> None:
    """Opening to run and verifying refuse a bundle in one line; `verify` where that says something else."""
    for opens, words in ((EdgePipeline.from_pretrained, match if run else None), (verify_bundle, verify or match)):
        if words is not None:
            with pytest.raises(BundleError, match=words) as caught:
                opens(bundle)
            assert "\n" not in str(caught.value), str(caught.value)
