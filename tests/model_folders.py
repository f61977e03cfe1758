"""What lies in a model's folder, ways to change it, and how it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgediff import load_model
from edgediff.errors import EdgediffError
from edgediff.models.components import pipeline_components, prompt_settings
from edgediff.models.load import Model
from edgediff.models.model_files import WEIGHTS

SAFE = f"unet/{WEIGHTS}.safetensors"
BIN = f"unet/{WEIGHTS}.bin"
INDEX = f"{SAFE}.index.json"
CONFIG = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
PIPELINE = "model_index.json"
CLASSES = "classes.json"
TEXT_ENCODER = "text_encoder/config.json"
TEXT_ENCODER_2 = "text_encoder_2/config.json"


def write(file: Path, text: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode() if isinstance(text, str) else text)


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_config(folder: Path, **changes: Any) -> None:
    change_json(folder / CONFIG, **changes)


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Puts tensors in the place of those of their names, a dot written as two underscores; None takes one away."""
    state = load_file(folder / SAFE)
    changed = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    state = {key: tensor for key, tensor in (state | changed).items() if tensor is not None}
    save_file(state, folder / SAFE)


def as_bin(folder: Path) -> Path:
    torch.save(load_file(folder / SAFE), folder / BIN)
    (folder / SAFE).unlink()
    return folder / BIN


def load_whole(source: Path, **options: Any) -> Model:
    """A model of which every component was loaded once."""
    model = load_model(source, **options)
    components = pipeline_components(model)
    prompt_settings(model, components)
    for component in components.values():
        component.load()
    return model


def refused(folder: Path, kind: type[EdgediffError], *words: str) -> str:
    with pytest.raises(EdgediffError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in message, message
    assert [word for word in words if word not in message] == [], message
    return message
