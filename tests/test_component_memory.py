"""What components take in memory, measured at export."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from artefacts import saved_once
from tiny_pipelines import save_sd1

from edgediff import ExportConfig, export_bundle, load_model, verify_bundle
from edgediff.errors import TargetError
from edgediff.export import component_memory
from edgediff_runtime import open_bundle

QUICK = ExportConfig(steps=2, adaptor="identity")

if sys.platform != "linux":
    pytest.skip("memory is measured on Linux", allow_module_level=True)


@pytest.mark.long
def test_peaks_of_the_components_are_in_the_manifest(tmp_path: Path) -> None:
    model = load_model(saved_once("tiny-sd1", save_sd1))
    done = export_bundle(model, tmp_path / "out", QUICK, measure_memory=True)
    bundle = open_bundle(done.path)
    components = bundle.manifest.target("onnx").components
    for name in ("text_encoder", "unet", "vae_decoder"):
        peak = components[name].peak_bytes
        assert peak is not None
        assert sum(bundle.manifest.files[file].size for file in components[name].files) < peak < 2**30
    assert components["vae_encoder"].peak_bytes is None  # no picture goes in
    assert verify_bundle(done.path).ok
    assert export_bundle(model, done.path, QUICK).report is None  # the same bundle, whether it was measured or not


def test_it_runs_without_torch(class_bundle: Path) -> None:
    script = (
        "import sys, json; from pathlib import Path; from edgediff.export.component_memory import peaks; "
        f"found = peaks(Path({str(class_bundle)!r}), 'onnxruntime'); "
        "print(json.dumps([found, sorted({'torch', 'diffusers', 'onnx'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found, loaded = json.loads(done.stdout)
    assert list(found) == ["unet"]
    assert found["unet"] > 0
    assert loaded == []


def test_what_cannot_be_measured_says_why(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"onnxruntime cannot be measured.*no bundle at"):
        component_memory._measured(tmp_path / "nothing", "onnxruntime")
