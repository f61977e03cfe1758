"""An .mlpackage on disk: its manifest, the model's protobuf, and where its weights lie.

Read without Apple's runtime and without coremltools' own loader, which compiles on a Mac and copies elsewhere: what is
evaluated is the saved file.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgediff.errors import ProgramError
from edgediff.mil.coremltools_quiet import import_coremltools
from edgediff_runtime.coreml_session import ARRAY_TYPES

MANIFEST = "Manifest.json"
WEIGHTS_PREFIX = "@model_path/"


@dataclass(frozen=True)
class Package:
    """A saved ML Program.

    Attributes:
        folder: What ``@model_path`` stands for in the program: where the protobuf lies.
        default: The function that runs where none is named.
    """

    path: Path
    spec: Any
    folder: Path
    specification_version: int
    functions: tuple[str, ...]
    default: str

    def weights(self, name: str) -> Path:
        """Finds a file of weights, such as ``@model_path/weights/weight.bin``; a ProgramError outside the package."""
        if not name.startswith(WEIGHTS_PREFIX):
            raise ProgramError(f"{self.path}: weights {name!r} are not in the package; expected {WEIGHTS_PREFIX}...")
        return _inside(self.path, self.folder.relative_to(self.path).as_posix(), name.removeprefix(WEIGHTS_PREFIX))

    def check_opset(self, opset: str) -> None:
        """Refuses an opset, such as ``CoreML8``, newer than the specification version, which Core ML would not load."""
        number = opset.removeprefix("CoreML")
        # CoreML5 came with version 6, and each since with the next.
        if not number.isdigit() or int(number) + 1 > self.specification_version:
            raise ProgramError(f"the opset {opset!r} does not match specification version {self.specification_version}")

    def check_description(self, function: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Checks the package's description of a function, which Core ML uses, against the program's own tensors.

        Those have a `dtype` and a `shape`. ProgramError: the package describes something else.
        """
        described = self.spec.description
        if len(self.functions) > 1:
            named = {item.name: item for item in described.functions}
            if function not in named or self.default not in self.functions:
                raise ProgramError("the package does not describe this function, or names no default one")
            described = named[function]
        for said, found, what in ((described.input, inputs, "inputs"), (described.output, outputs, "outputs")):
            if {item.name for item in said} != set(found):
                names = ", ".join(sorted(item.name for item in said)) or "none"
                raise ProgramError(
                    f"the package describes the {what} {names}; the program has {', '.join(sorted(found))}"
                )
            for item in said:
                array = item.type.multiArrayType
                if item.type.WhichOneof("Type") != "multiArrayType":
                    continue
                spec = found[item.name]
                known = ARRAY_TYPES.get(array.dataType)
                # Core ML needs no shapes of outputs.
                if known != spec.dtype or (array.shape and not spec.takes(tuple(array.shape))):
                    raise ProgramError(
                        f"the package describes {item.name} as {known} {list(array.shape)}; "
                        f"the program has {spec.dtype} {list(spec.shape)}"
                    )


def read_package(path: str | Path) -> Package:
    """Reads an .mlpackage, without its weights.

    Raises:
        ProgramError: It is no .mlpackage, damaged, no ML Program, or newer than the installed coremltools.
        MissingExtraError: coremltools is not installed.
    """
    path = Path(path)
    if not path.is_dir():
        raise ProgramError(f"{path} is {'a file' if path.exists() else 'not there'}; expected an .mlpackage directory")
    root = _root(path)
    coremltools = import_coremltools("reading an ML Program")
    spec = coremltools.proto.Model_pb2.Model()
    try:
        spec.ParseFromString(root.read_bytes())
    except Exception as e:  # protobuf's DecodeError: its module differs between protobuf's implementations
        if type(e).__name__ != "DecodeError":
            raise
        raise ProgramError(f"{root} is not a Core ML model: it is not a protobuf") from e
    known = max(coremltools._OPSET)
    if spec.specificationVersion > known:
        raise ProgramError(
            f"{path} has specification version {spec.specificationVersion}; coremltools {coremltools.__version__} "
            f"knows those up to {known}: install a newer coremltools"
        )
    kind = spec.WhichOneof("Type")
    if kind != "mlProgram":
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind or "").lower()
        found = f"{'an' if words[0] in 'aeiou' else 'a'} {words}" if words else "empty: it contains no model"
        raise ProgramError(f"{path} is {found}; expected an ML Program")
    functions = tuple(sorted(spec.mlProgram.functions))
    default = spec.description.defaultFunctionName
    if not default:
        default = functions[0] if len(functions) == 1 else "main"
    return Package(path, spec, root.parent, spec.specificationVersion, functions, default)


def _root(path: Path) -> Path:
    """The model file that the manifest names."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise ProgramError(f"{path} is not an .mlpackage: it has no {MANIFEST}")
    try:
        content = json.loads(manifest.read_bytes())
        item = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
    except (ValueError, RecursionError) as e:
        raise ProgramError(f"{manifest} is not JSON: {e}") from e
    except (KeyError, TypeError) as e:
        raise ProgramError(f"{manifest} names no root model") from e
    if not isinstance(item, str):
        raise ProgramError(f"{manifest} names no root model")
    root = _inside(path, "Data", item)
    if not root.is_file():
        raise ProgramError(f"{path}: the root model {item} is missing")
    return root


def _inside(package: Path, folder: str, name: str) -> Path:
    """A path in the package; refused where it leads out of it, by itself or through a symlink."""
    relative = PurePosixPath(folder, name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise ProgramError(f"{package}: {name!r} leads out of the package")
    path = package
    for part in relative.parts:
        path = path / part
        if path.is_symlink():
            raise ProgramError(f"{package}: {path.relative_to(package)} is a symlink; expected the file itself")
    return path
