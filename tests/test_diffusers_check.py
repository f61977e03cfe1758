"""The pipeline in torch against diffusers' own: a setting of the source that is misread ends the export."""

from pathlib import Path

import msgspec
import pytest
from artefacts import saved_once
from tiny_pipelines import save_xl

import edgediff
from edgediff.errors import VerificationError
from edgediff.export import draft, prepare
from edgediff_runtime.manifest import Prompt, Vae


@pytest.fixture(scope="module")
def pipeline() -> Path:
    return saved_once("tiny-xl", save_xl)


def _scaled(vae: Vae | None) -> Vae | None:
    return vae and msgspec.structs.replace(vae, scaling_factor=1.05 * vae.scaling_factor)


def _padded(prompt: Prompt | None) -> Prompt | None:
    """The second encoder padded like the first."""
    assert prompt is not None
    first, second = prompt.encoders
    return msgspec.structs.replace(prompt, encoders=(first, msgspec.structs.replace(second, pad=first.pad)))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "misread"), [("vae_settings", _scaled), ("prompt_settings", _padded)], ids=["scaling factor", "padding"]
)
def test_a_setting_that_is_misread_ends_the_export(
    name: str, misread: object, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(misread)
    read = getattr(draft, name)
    for module in (draft, prepare):
        monkeypatch.setattr(module, name, lambda *args: misread(read(*args)))
    with pytest.raises(VerificationError, match=r"differs from that of diffusers' StableDiffusionXLPipeline: .* dB"):
        edgediff.export_bundle(edgediff.load_model(pipeline), tmp_path / "bundle", edgediff.ExportConfig(steps=2))
    assert not (tmp_path / "bundle").exists()
