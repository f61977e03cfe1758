import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from artefacts import discard_if_changed, exported, saved_once, traces_folder
from command_line import Command, Said, exit_code
from guard import guard_stores
from photographs import folder_of_images
from tiny_photographs import make_photographs, write_classifier, write_photographs
from traces import EXPORT, remembering
from trainings import UNET, UPDATES
from unets import unet2d, unet2d_condition

import edgediff
from edgediff.data.image_folder import ImageSet
from edgediff.models.part import Part
from edgediff.train import unet
from edgediff.train.loop import Loop
from edgediff.train.settings import StudentTraining, TeacherTraining

guard_stores()

# As many workers as cores run at once: a second thread of each would only wait for the others.
torch.set_num_threads(1)


# Files of long tests, the longest first: one that is left for the end keeps one worker busy and the others waiting.
LONG = (
    "readme", "export_killed", "preview", "controlnet", "editing", "executorch", "pipelines", "half_onnx", "export",
    "bench", "coreml_export", "lora_inputs", "t2i_adapter", "injection", "spectral_bundle", "train_unet",
    "coreml_pipeline", "adaptors", "litert", "fifth_target", "component_memory", "train_adaptor", "cli",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # what stays frozen at the end is not collected, which onnxsim's bindings report as leaks
    if not hasattr(session.config, "workerinput"):  # the process that ends last
        discard_if_changed()


def pytest_collection_finish() -> None:
    # What is imported by now stays: half a million objects and more, which the collector went through again for each
    # few that an export makes.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


# Two levels of one layer: exporting is what takes time in these tests, and it grows with the number of layers.
SMALL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
}
SMALL_CLASS = SMALL | {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "num_class_embeds": 5,
}
SMALL_TEXT = SMALL | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
DDPM = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "leading",
    "clip_sample": True,
}
LABELS = ["Apple", "Banana", "Kiwi", "Orange"]


def save_model(unet: torch.nn.Module, folder: Path, scheduler: dict | None = None) -> Path:
    """Saves a UNet as a diffusers pipeline directory does."""
    unet.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(DDPM if scheduler is None else scheduler))
    save_pooled_width(unet, folder)
    return folder


def save_pooled_width(unet: torch.nn.Module, folder: Path) -> None:
    """Puts beside an SDXL UNet how wide its pooled text is."""
    if unet.config.get("addition_embed_type") == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        (folder / "text_encoder_2").mkdir()
        (folder / "text_encoder_2" / "config.json").write_text(json.dumps({"projection_dim": pooled}))


def save_class_model(unet: torch.nn.Module, folder: Path) -> None:
    save_model(unet, folder)
    (folder / "classes.json").write_text(json.dumps(LABELS))


def save_text_model(unet: torch.nn.Module, folder: Path) -> None:
    save_model(unet, folder, DDPM | {"beta_schedule": "scaled_linear", "prediction_type": "epsilon", "steps_offset": 1})
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"max_position_embeddings": 7}))


@pytest.fixture(scope="session")
def class_model() -> Path:
    """A class-conditional model of 4 labels and a null class, 16x16 RGB, on disk; copy it before a change."""
    return saved_once("tiny-class", lambda path: save_class_model(unet2d(**SMALL_CLASS), path))


@pytest.fixture(scope="session")
def plain_model() -> Path:
    """A class model of as few operations as can be cut, for converters that take as long as there are operations."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    return saved_once("program", lambda path: save_class_model(unet2d(**SMALL_CLASS | blocks), path))


@pytest.fixture(scope="session")
def text_model() -> Path:
    """A text-conditional latent model, 4x16x16, text of 7 x 12, on disk."""
    return saved_once("tiny-text", lambda path: save_text_model(unet2d_condition(**SMALL_TEXT), path))


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """What any worker traced before by these sources is not traced again."""
    with remembering(traces_folder(), Part):
        yield


@pytest.fixture
def traces_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of tracing: every graph is the exporter's own, of this test."""
    monkeypatch.setattr(torch.onnx, "export", EXPORT)


Export = Callable[..., Path]


@pytest.fixture(scope="session")
def export_once(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Exports a model by a recipe, with constants of modules patched, or copies the bundle that this gave before."""

    def export(model: Path, config: edgediff.ExportConfig, patches: Mapping[str, object] | None = None) -> Path:
        return shutil.copytree(exported(model, config, patches or {}), tmp_path_factory.mktemp("bundles") / model.name)

    return export


@pytest.fixture(scope="session")
def class_bundle(class_model: Path, export_once: Export) -> Path:
    """The class model exported for 4 steps at clock 2; tests copy it before they change it."""
    return export_once(class_model, edgediff.ExportConfig(steps=4, layout="split"))


@pytest.fixture(scope="session")
def text_bundle(text_model: Path, export_once: Export) -> Path:
    """The text model exported for 4 steps at clock 2."""
    return export_once(text_model, edgediff.ExportConfig(steps=4, layout="split"))


@pytest.fixture(scope="session")
def coreml_bundle(class_model: Path, export_once: Export) -> Path:
    """The class model exported to Core ML alone, fp16, as one package of two functions."""
    return export_once(class_model, edgediff.ExportConfig(steps=4, targets=("coreml",), layout="pair"))


@pytest.fixture
def folder(class_model: Path, tmp_path: Path) -> Path:
    """The class model's folder, copied for a test to change."""
    return shutil.copytree(class_model, tmp_path / "model")


@pytest.fixture
def bundle(class_bundle: Path, tmp_path: Path) -> Path:
    """The class bundle, copied for a test to change."""
    return shutil.copytree(class_bundle, tmp_path / "bundle")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def run(*args: object) -> Said:
        capsys.readouterr()
        code = exit_code(monkeypatch, *args)
        return Said.of(code, *capsys.readouterr())

    return run


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file of the user's; what a test makes in it lies in `place`, and all else stays as it was."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.txt").write_text("mine")
    yield tmp_path / "work"
    assert (tmp_path / "work" / "mine.txt").read_text() == "mine"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight 16x16 pictures of each of the class model's four classes."""
    return folder_of_images(tmp_path_factory.mktemp("photographs"), tuple(LABELS), each=8)


@pytest.fixture(scope="session")
def tiny_set() -> ImageSet:
    """Forty photographs of four classes."""
    return make_photographs()


@pytest.fixture(scope="session")
def images(tiny_set: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set as an image folder."""
    return write_photographs(tiny_set, tmp_path_factory.mktemp("tiny-set"))


@pytest.fixture(scope="session")
def classifier(tiny_set: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classifier that learnt the tiny set."""
    return write_classifier(tiny_set, tmp_path_factory.mktemp("features") / "tiny")


@pytest.fixture
def student_training(class_model: Path, photographs: Path) -> StudentTraining:
    """A few updates of a student of the class model."""
    return StudentTraining(
        teacher=str(class_model), data=str(photographs), updates=UPDATES, batch=4, warmup=1, ema=0.5, width=8
    )


@pytest.fixture
def teacher_training(photographs: Path) -> TeacherTraining:
    """A few updates of a tiny teacher."""
    return TeacherTraining(unet=UNET, data=str(photographs), updates=UPDATES, batch=4, warmup=1, ema=0.5)


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample grids of four images."""
    monkeypatch.setattr(unet, "NUM_SAMPLES", 4)


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[Loop]:
    """The loops that run in a test."""
    seen: list[Loop] = []
    run = Loop.run
    monkeypatch.setattr(Loop, "run", lambda self, say: (seen.append(self), run(self, say))[1])
    return seen
