"""What many tests need and takes seconds to make: models, bundles and traced graphs, made once for all workers.

They lie in .pytest_cache/edgediff, one folder for each state of the sources and tools, and are there for the next run
too. Whatever is there is whole: it was made beside its place and renamed. Tests get copies of bundles, and a test that
changes what is kept fails, rather than another worker's test that reads it meanwhile.
"""

import functools
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import FunctionType

import msgspec
import pytest
import torch
from guard import ROOT, STORES, locked, making

import edgediff

KEPT_STORES = 2
# All that an artefact follows from, but its own settings.
HELPERS = ("artefacts", "conftest", "guard", "tiny_pipelines", "traces", "unets")
SOURCES = ("edgediff", "runtime/edgediff_runtime", *(f"tests/{name}.py" for name in HELPERS))


def state_of(sources: list[Path]) -> str:
    """A hash of files, folders of files, the installed packages and the processor's instructions."""
    digest = hashlib.sha256(f"{sys.version} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}".encode())
    digest.update(str(sorted((each.name, each.version) for each in metadata.distributions())).encode())
    for source in sources:
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(source)} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()[:16]


def _state() -> str:
    return state_of([ROOT / source for source in SOURCES])


# Of what this process imports, now or later.
STATE = _state()


@functools.cache
def store() -> Path:
    """The folder of this state's artefacts."""
    return open_store(STORES, STATE)


def discard_if_changed() -> None:
    """Removes what was made while somebody changed the sources: nobody knows of which state it is."""
    if _state() != STATE:
        with making():
            shutil.rmtree(STORES / STATE, ignore_errors=True)


def open_store(stores: Path, state: str) -> Path:
    """The folder of a state; of the others all but the newest are removed."""
    folder = stores / state
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    with making(), locked(stores / "stores"):
        others = sorted((path for path in stores.iterdir() if path.is_dir() and path != folder), key=_age, reverse=True)
        for old in others[KEPT_STORES - 1 :]:
            shutil.rmtree(old)
    return folder


def _age(path: Path) -> float:
    return path.stat().st_mtime


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """A file or folder of a store, made by `make` at the path that it is given, unless it is there."""
    with making(), locked(path):
        if not path.exists():
            scratch = path.with_name(f"{path.name}.part")
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            scratch.mkdir()
            make(scratch / path.name)
            os.replace(scratch / path.name, path)
            scratch.rmdir()
    return path


def saved_once(name: str, save: FunctionType) -> Path:
    """The folder of a model, at one place for as long as the file that `save` stands in is what it is."""
    folder = store() / hashlib.sha256(Path(save.__code__.co_filename).read_bytes()).hexdigest()[:12]
    folder.mkdir(exist_ok=True)
    return made_once(folder / name, save)


def traces_folder() -> Path:
    (store() / "traces").mkdir(exist_ok=True)
    return store() / "traces"


def exported(model: Path, config: edgediff.ExportConfig, patches: Mapping[str, object]) -> Path:
    """The kept bundle of a model, exported with the values of the constants of edgediff's modules patched.

    Its name follows from the model's files, the recipe and the patches; whoever changes it copies it first.
    """
    files = [(str(file), file.read_bytes()) for file in sorted(model.rglob("*")) if file.is_file()]
    said = repr([msgspec.json.encode(config), sorted(patches.items()), files])

    def export(path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in patches.items():
                patch.setattr(name, value)
            loaded = edgediff.load_model(
                model, lora=config.lora, embedding=config.embedding, preview=config.preview, control=config.control,
                t2i_adapter=config.t2i_adapter,
            )  # fmt: skip
            edgediff.export_bundle(loaded, path, config)

    return made_once(store() / hashlib.sha256(said.encode()).hexdigest()[:24], export)
