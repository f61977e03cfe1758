"""The ExecuTorch target: a program with a method for each graph, proved and run like any other."""

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from absent import hide
from command_line import Command, assert_error
from conftest import Export
from safetensors.numpy import load_file
from seals import assert_refused, flip_bit, manifest_of, replace_graph, rows_of, seal
from sized_components import cases, written

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.extras import quiet
from edgediff.models.graphs import graph_list
from edgediff.models.part import Part
from edgediff.models.torch_session import TorchSession
from edgediff.targets.backends import open_session, usual_backend
from edgediff.targets.executorch.import_executorch import import_executorch
from edgediff.targets.executorch.write_executorch import group_norm, write_executorch
from edgediff_runtime import BundleError, EdgePipeline, open_bundle
from edgediff_runtime.manifest import Component, Floors, Graph, Tensor

PROGRAM = "executorch/unet.pte"


@pytest.fixture(scope="module")
def program_bundle(plain_model: Path, export_once: Export) -> Path:
    """That as an ExecuTorch program, 4 steps at clock 2."""
    path = export_once(plain_model, edgediff.ExportConfig(steps=4, targets=("executorch",)))
    measured = {(row["check"], row["part"]) for row in rows_of(path) if row["status"] == "measured"}
    assert measured >= {("graph", "full"), ("graph", "cached"), ("trajectory", "latents")}
    return path


@pytest.mark.long
def test_one_file_has_a_method_for_each_graph_and_weights_once(program_bundle: Path, plain_model: Path) -> None:
    target = manifest_of(program_bundle).target("executorch")
    assert [(g.file, g.function) for g in target.unet.graphs] == [(PROGRAM, "full"), (PROGRAM, "cached")]
    assert (target.unet.layout, target.unet.batch, target.unet.dtype) == ("pair", 2, "fp32")
    assert msgspec.to_builtins(target).keys() == {"target", "components"}
    assert sorted(file.name for file in (program_bundle / PROGRAM).parent.iterdir()) == ["unet.pte"]
    program = (program_bundle / PROGRAM).read_bytes()
    weights = load_file(plain_model / "unet/diffusion_pytorch_model.safetensors")
    # Both methods have the first convolution; XNNPACK's weights have their channels last.
    assert program.count(weights["conv_in.weight"].transpose(0, 2, 3, 1).tobytes()) == 1
    assert program.count(weights["conv_in.bias"].tobytes()) == 1
    # What XNNPACK does not have is named in it.
    assert b"aten::upsample_nearest2d" in program
    assert b"group_norm" not in program


class Normalized(Part):
    """A convolution, a group normalization and an upsampling, which XNNPACK has in part."""

    def __init__(self, *given: str) -> None:
        super().__init__(given, ("out_sample",))
        torch.manual_seed(0)
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4)

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = self.norm(self.conv(sum(tensors.values(), start=torch.zeros(()))))
        return {"out_sample": torch.nn.functional.interpolate(x, scale_factor=2.0)}


@pytest.mark.long
def test_a_program_of_two_methods_computes_what_torch_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal((2, 3, 6, 6)).astype(np.float32) for name in ("sample", "cache")}
    modules = {"full": Normalized("sample"), "cached": Normalized("sample", "cache")}
    graphs = tuple(
        Graph(
            name, PROGRAM, f"{name}_step", tuple(Tensor(key, "float32", (2, 3, 6, 6)) for key in module.inputs),
            (Tensor("out_sample", "float32", (2, 4, 8, 8)),), function=name,
        )
        for name, module in modules.items()
    )  # fmt: skip
    unet = Component("step", "fp32", 2, Floors(100, 100, 80, None), graphs, "pair")
    write_executorch(tmp_path, unet, modules, lambda what: None)
    program = import_executorch("executorch.runtime", "a test").Runtime.get().load_program(tmp_path / PROGRAM)
    for name, module in modules.items():
        given = [torch.from_numpy(values[key]) for key in module.inputs]
        (got,) = program.load_method(name).execute(given)
        torch.testing.assert_close(got, module(*given)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "further"), [("text_encoder", ((12, 20),)), ("vae_encoder", ()), ("preview_decoder", ((12, 20),))]
)
def test_a_component_is_a_program_with_a_method_for_each_size(
    name: str, further: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    entry, part = written("executorch", name, further, tmp_path)
    sized = [graph.function for graph in entry.every_graph]
    assert sized == (["forward", "forward_40x24"] if name == "preview_decoder" else ["forward"])
    assert entry.graphs[0].file == f"executorch/{name}.pte"
    assert (entry.batch, entry.dtype) == (1, "fp32")
    path = tmp_path / str(entry.graphs[0].file)
    program = import_executorch("executorch.runtime", "a test").Runtime.get().load_program(path)
    for graph, value, wanted in cases(entry, part):
        made = program.load_method(str(graph.function)).execute([torch.from_numpy(value)])
        for tensor, want, got in zip(graph.outputs, wanted, made, strict=True):
            assert tuple(got.shape) == tensor.shape
            assert psnr_db(want, got.numpy()) > 100


@pytest.mark.parametrize("shape", [(2, 12, 5, 3), (1, 12, 7), (3, 12, 1, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_in_operations_of_xnnpack(shape: tuple[int, ...], affine: bool) -> None:
    rng = np.random.default_rng(0)
    # Channels whose means lie far from zero and from each other: where a difference of squares loses its digits.
    means = 100 * rng.standard_normal((1, 12, *(1,) * (len(shape) - 2)))
    x = torch.from_numpy((means + rng.standard_normal(shape)).astype(np.float32))
    scale = torch.from_numpy(rng.standard_normal((2, 12)).astype(np.float32)) if affine else (None, None)
    for num_groups in (1, 4, 12):
        exact = [None if each is None else each.double() for each in scale]
        want = torch.nn.functional.group_norm(x.double(), num_groups, *exact, eps=1e-6)
        got = group_norm(x, num_groups, *scale, eps=1e-6)
        # Some 250 are rounded to 1.5e-5, a few times over.
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.long
def test_images_are_those_of_torch(program_bundle: Path, plain_model: Path) -> None:
    bundle = open_bundle(program_bundle)
    assert usual_backend(bundle) == "executorch"
    # Three images of two rows each, and at the end guidance off: groups of two rows with one row repeated.
    request: dict[str, Any] = {"num_images": 3, "guidance_scale": [2.0, 2.0, 1.0, 1.0], "seed": 3}
    got = EdgePipeline(bundle.manifest, open_session(bundle, "executorch"))(**request)
    model = edgediff.load_model(plain_model)
    divided = edgediff.split(model.unet)
    want = EdgePipeline(bundle.manifest, TorchSession(divided.parts, graph_list(divided, model)))(**request)
    assert got.mask == want.mask
    assert psnr_db(want.latents, got.latents) > 90
    again = EdgePipeline(bundle.manifest, open_session(bundle, "executorch", threads=1))(**request)
    assert psnr_db(want.latents, again.latents) > 90


@pytest.mark.long
def test_it_verifies_and_runs_on_the_command_line(program_bundle: Path, command: Command, tmp_path: Path) -> None:
    assert command("verify", program_bundle).code == 0
    said = command("run", program_bundle, "-o", tmp_path / "out.png", "--num-images", 2)
    assert said.code == 0, said.errors
    assert (tmp_path / "out.png").is_file()
    assert said.errors == []
    said = command("inspect", program_bundle)
    assert said.code == 0, said.errors
    assert "executorch fp32, pair" in said.out
    assert "opset" not in said.out
    assert "no placement" not in said.out


@pytest.mark.long
def test_what_is_damaged_or_of_another_shape_is_refused(program_bundle: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(program_bundle, tmp_path / "damaged")
    flip_bit(damaged / PROGRAM)
    assert_refused(damaged, PROGRAM, run=False)
    manifest = manifest_of(program_bundle)
    other = shutil.copytree(program_bundle, tmp_path / "other")
    inputs = manifest.target("executorch").unet.graphs[1].inputs
    seal(other, replace_graph(manifest, 1, inputs=(inputs[1], inputs[0], *inputs[2:])))
    with pytest.raises(BundleError, match=r"cached has the inputs .*; the manifest says"):
        open_session(open_bundle(other), "executorch")
    seal(other, replace_graph(manifest, 1, function="no_such"))
    with pytest.raises(BundleError, match=r"unet\.pte cannot be loaded: 'no_such'"):
        open_session(open_bundle(other), "executorch")


@pytest.mark.long
def test_backends_of_other_targets_say_what_the_bundle_has(
    program_bundle: Path, class_bundle: Path, command: Command, tmp_path: Path
) -> None:
    for bundle, backend, has in ((program_bundle, "onnxruntime", "executorch"), (class_bundle, "executorch", "onnx")):
        assert_error(command("run", bundle, "-o", tmp_path / "out.png", "--backend", backend), "has no", has)


def test_a_dtype_that_no_target_has_is_refused(class_model: Path, place: Path, command: Command) -> None:
    said = command("export", class_model, "-o", place / "bundle", "--target", "executorch", "--dtype", "fp16")
    assert_error(said, "--dtype fp16: ExecuTorch has fp32 alone", "leave target executorch out")
    assert not (place / "bundle").exists()


def test_without_executorch_the_command_that_installs_it_is_named(
    class_model: Path, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "executorch")
    said = command("export", class_model, "-o", place / "bundle", "--target", "executorch")
    assert_error(said, 'pip install "edgediff[executorch]"')
    assert not (place / "bundle").exists()


def test_quiet_hides_the_noise_and_nothing_that_is_raised(capfd: pytest.CaptureFixture[str]) -> None:
    @quiet()
    def fail() -> None:
        os.write(2, b"noise")
        raise ValueError("seen")

    with pytest.raises(ValueError, match="seen"):
        fail()
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"
    with pytest.raises(ModuleNotFoundError):
        import_executorch("edgediff.no_such_module", "a test")
