"""Core ML packages as the export writes them: layouts, precisions, systems, geometries; and what they cannot hold."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from command_line import Command, assert_error, snapshot
from conftest import SMALL, SMALL_CLASS, SMALL_TEXT, Export
from ml_packages import MODEL, WEIGHTS, Opened, change_package
from seals import assert_refused, manifest_of, replace_graph, reseal, seal
from unets import CASES, Case, unet2d, unet2d_condition

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.config.floors import VerifyConfig
from edgediff.errors import UnsupportedError
from edgediff.export.half_reference import RoundedPart
from edgediff.mil import open_program
from edgediff.models.part import Part
from edgediff.targets.backends import open_session
from edgediff.targets.coreml import CoreMLConfig, half_constants
from edgediff.targets.coreml.write_coreml import write_coreml
from edgediff.targets.layout import modules
from edgediff_runtime import EdgePipeline, open_bundle
from edgediff_runtime.manifest import Graph, Tensor

PACKAGE = "coreml/Unet.mlpackage"
# In turn.
SYSTEMS = ("iOS16", "iOS17", "iOS18")
_TEXT = CASES["sd15-like"].cond
# Two levels of one layer: converting takes seconds and grows with the number of operations.
GEOMETRIES = {
    "sd15": Case(lambda: unet2d_condition(**SMALL_TEXT), _TEXT),
    "sd2": Case(lambda: unet2d_condition(**SMALL_TEXT, use_linear_projection=True, upcast_attention=True), _TEXT),
    "sdxl": Case(
        lambda: unet2d_condition(
            **SMALL,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=34,
        ),
        CASES["sdxl-like"].cond,
    ),
    "bk-sdm": Case(lambda: unet2d_condition(**SMALL_TEXT, mid_block_type=None), _TEXT),
    "ldm": Case(lambda: unet2d(**SMALL_CLASS | {"in_channels": 4, "out_channels": 4}), CASES["2d-class"].cond),
    "fourier": Case(
        lambda: unet2d(
            **SMALL_CLASS | {"num_class_embeds": None, "in_channels": 4, "out_channels": 4},
            time_embedding_type="fourier",
        )
    ),
    "resnet-resampling": Case(
        lambda: unet2d(
            **SMALL,
            in_channels=4,
            out_channels=4,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
        )
    ),
}


@pytest.mark.long
@pytest.mark.parametrize(("name", "dtype"), [*((name, "fp16") for name in GEOMETRIES), ("sd15", "fp32")])
def test_every_geometry_is_converted_and_evaluated(name: str, dtype: Any, tmp_path: Path) -> None:
    number = [*GEOMETRIES].index(name) + (dtype == "fp32")
    config = CoreMLConfig(dtype=dtype, deployment_target=SYSTEMS[number % 3])
    geometry = GEOMETRIES[name]
    whole = modules(edgediff.split(geometry.build()), "pair")["full"]
    torch.manual_seed(1)
    values = {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([637.0]), **geometry.cond(2)}
    values |= values.pop("added_cond_kwargs", {})
    graph = _graph("full", whole, values, dtype)
    done = write_coreml(tmp_path, (graph,), {"full": whole}, config, lambda what: None)
    assert done == 7 + number % 3
    function = open_program(tmp_path / str(graph.file)).function()
    given = {tensor.name: values[tensor.name].to(getattr(torch, tensor.dtype)) for tensor in graph.inputs}
    got = function.run(given)
    for key, value in _run(whole, values).items():
        assert psnr_db(value, got[key].numpy()) > (45 if dtype == "fp16" else 100)
    if dtype == "fp16":
        exact = function.run(given, rounded=False)
        for key, value in _run(RoundedPart(whole, half_constants(config.deployment_target), None), values).items():
            assert psnr_db(value, exact[key].numpy()) > 100


@torch.no_grad()
def _run(module: Part, values: dict[str, torch.Tensor]) -> dict[str, Any]:
    made = module(*(values[key] for key in module.inputs))
    return {key: value.numpy() for key, value in zip(module.outputs, made, strict=True)}


def _graph(name: str, module: Part, values: dict[str, torch.Tensor], dtype: str) -> Graph:
    with torch.no_grad():
        made = dict(zip(module.outputs, module(*(values[key] for key in module.inputs)), strict=True))
    feature = "float16" if dtype == "fp16" else "float32"

    def tensor(key: str, value: torch.Tensor) -> Tensor:
        kind = "int32" if not value.is_floating_point() else feature if key == "lowres_feature" else "float32"
        return Tensor(key, kind, tuple(value.shape))  # type: ignore[arg-type]

    return Graph(
        name, f"coreml/{name}.mlpackage", "full_step",
        tuple(tensor(key, values[key]) for key in module.inputs), tuple(tensor(k, v) for k, v in made.items()),
    )  # fmt: skip


@pytest.mark.long
def test_one_package_of_two_functions_stores_shared_weights_once(
    class_model: Path, coreml_bundle: Path, export_once: Export, tmp_path: Path
) -> None:
    def recipe(layout: Any) -> edgediff.ExportConfig:
        quick = VerifyConfig(mode="graphs")
        return edgediff.ExportConfig(steps=4, targets=("coreml",), layout=layout, verify=quick)

    again = edgediff.export_bundle(edgediff.load_model(class_model), tmp_path / "again", recipe("pair")).path
    # Byte for byte what another export wrote, the package's own manifest too.
    assert snapshot(again / "coreml") == snapshot(coreml_bundle / "coreml")
    found = {}
    for layout, bundle in (("pair", again), ("split", export_once(class_model, recipe("split")))):
        files = [file for file in (bundle / "coreml").rglob("*") if file.is_file()]
        assert {file.name for file in files} == {"Manifest.json", "model.mlmodel", "weight.bin"}
        found[layout] = sum(file.stat().st_size for file in files if file.name == "weight.bin")
    assert found["pair"] <= 1.1 * found["split"]


def test_the_time_embedding_stays_exact_and_so_do_the_borders(coreml_bundle: Path) -> None:
    program = open_program(coreml_bundle / PACKAGE)
    assert program.functions == ("cached", "full")
    for name in program.functions:
        function = program.function(name)
        kinds = {step.op: {spec.dtype for _, spec in step.outputs} for step in function.steps}
        assert kinds["sin"] == kinds["cos"] == {"float32"}
        assert kinds["conv"] == {"float16"}
        wants = {"sample": "float32", "timestep": "float32", "class_labels": "int32", "cache": "float16"}
        assert {key: spec.dtype for key, spec in function.inputs.items()}.items() <= wants.items()
        assert function.outputs["out_sample"].dtype == "float32"


def test_images_of_both_targets_are_alike(
    class_bundle: Path, coreml_bundle: Path, command: Command, place: Path
) -> None:
    request = {"num_images": 3, "guidance_scale": [2.0, 1.0, 1.0, 2.0], "seed": 3}
    latents = []
    for path, backend in ((class_bundle, "onnxruntime"), (coreml_bundle, "mil-reference")):
        bundle = open_bundle(path)
        latents.append(EdgePipeline(bundle.manifest, open_session(bundle, backend))(**request).latents)
    assert psnr_db(*latents) > 45
    said = command("run", coreml_bundle, "-o", place / "out.png", "--backend", "mil-reference", "--num-images", "3")
    assert (said.code, said.errors) == (0, [])
    assert (place / "out.png").stat().st_size > 100


@pytest.mark.long
def test_both_targets_in_one_bundle(plain_model: Path, tmp_path: Path, command: Command) -> None:
    bundle = tmp_path / "bundle"
    said = command(
        "export", plain_model, "-o", bundle, "--target", "onnx", "--target", "coreml", "--dtype", "fp32",
        "--deployment-target", "iOS17", "--steps", "2",
    )  # fmt: skip
    assert (said.code, said.errors) == (0, [])
    assert [(t.target, t.unet.layout, t.unet.dtype, t.unet.batch) for t in manifest_of(bundle).targets] == [
        ("onnx", "pair", "fp32", None),
        ("coreml", "split", "fp32", 2),
    ]
    data = json.loads(command("verify", bundle, "--json").out)
    assert data["ok"]
    assert {row["target"] for row in data["rows"]} == {"onnx", "coreml"}
    said = command("verify", bundle, "--target", "onnx")
    assert said.code == 0
    assert "mil-reference" not in said.out


# What Core ML cannot hold, and packages that are none.


class Wide(Part):
    """Makes a tensor of six dimensions on its way."""

    def __init__(self) -> None:
        super().__init__(("sample",), ("out_sample",))

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = tensors["sample"].reshape(2, 1, 2, 2, 2, 4)
        return {"out_sample": (x.permute(0, 5, 4, 3, 2, 1) * 2.0).reshape(2, 8, 4)}


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_six_dimensions_are_refused_with_the_reason(tmp_path: Path, system: Any, dtype: Any) -> None:
    values = {"sample": torch.randn(2, 8, 4)}
    config = CoreMLConfig(deployment_target=system, dtype=dtype)
    graph = _graph("wide", Wide(), values, dtype)
    with pytest.raises(UnsupportedError, match=rf"wide: conversion to Core ML for {system} failed: .* rank <= 5"):
        write_coreml(tmp_path, (graph,), {"wide": Wide()}, config, lambda what: None)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_systems_that_cannot_load_a_pair_are_refused(command: Command, class_model: Path, place: Path) -> None:
    asked = ("export", class_model, "-o", place / "out", "--target", "coreml", "--layout", "pair")
    said = command(*asked, "--deployment-target", "iOS17")
    assert_error(said, "layout pair needs Core ML packages of several functions", "iOS17 cannot load", "iOS18")
    said = command(*asked, "--deployment-target", "iOS15")
    assert_error(said, "'coreml.deployment_target'", "iOS16, iOS17, iOS18")
    said = command(*asked, "--clock", "1")
    assert_error(said, "layout pair with clock 1", "no cached step")


def test_without_coremltools_the_extra_is_named(
    command: Command, class_model: Path, coreml_bundle: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setitem(sys.modules, "coremltools", None)
    said = command("export", class_model, "-o", place / "out", "--target", "coreml")
    assert_error(said, "exporting to Core ML needs the 'export' extra: pip install \"edgediff[export]\"")
    said = command("run", coreml_bundle, "-o", place / "x.png", "--backend", "mil-reference")
    assert_error(said, "needs the 'export' extra")
    said = command("verify", coreml_bundle)
    assert said.code == 1  # nothing was measured, so nothing holds
    assert "needs the 'export' extra" in said.out.replace("\n", " ")


def _no_manifest(package: Path) -> None:
    (package / "Manifest.json").unlink()


def _newer(package: Path) -> None:
    change_package(package, lambda opened: setattr(opened.spec, "specificationVersion", 99))


def _no_weights(package: Path) -> None:
    (package / WEIGHTS).unlink()


def _short_weights(package: Path) -> None:
    data = (package / WEIGHTS).read_bytes()
    (package / WEIGHTS).write_bytes(data[: len(data) // 2])


def _unknown_op(package: Path) -> None:
    def change(opened: Opened) -> None:
        opened.ops("silu")[0].type = "swish_of_tomorrow"

    change_package(package, change)


def _unknown_dtype(package: Path) -> None:
    def change(opened: Opened) -> None:
        opened.ops("conv")[0].outputs[0].type.tensorType.dataType = 13  # bfloat16

    change_package(package, change)


def _no_model(package: Path) -> None:
    (package / MODEL).write_bytes(b"no model")


def _not_described(package: Path) -> None:
    change_package(package, lambda opened: opened.spec.description.ClearField("functions"))


def _another_type(package: Path) -> None:
    def change(opened: Opened) -> None:
        opened.spec.description.functions[0].output[0].type.multiArrayType.dataType = 131104

    change_package(package, change)


def _two_blocks(package: Path) -> None:
    def change(opened: Opened) -> None:
        function = opened.spec.mlProgram.functions["full"]
        function.block_specializations["CoreML9"].CopyFrom(function.block_specializations[function.opset])

    change_package(package, change)


def _older(package: Path) -> None:
    change_package(package, lambda opened: setattr(opened.spec, "specificationVersion", 5))


def _deep_manifest(package: Path) -> None:
    (package / "Manifest.json").write_text("[" * 100_000)


def _odd_bytes(package: Path) -> None:
    def change(opened: Opened) -> None:
        for block in opened.blocks():
            for op in block.operations:
                if op.type == "const" and op.attributes["val"].immediateValue.tensor.WhichOneof("value") == "bytes":
                    op.attributes["val"].immediateValue.tensor.bytes.values = b"odd"

    change_package(package, change)


def test_a_component_of_files_that_are_not_there_is_refused(coreml_bundle: Path, place: Path) -> None:
    bundle = shutil.copytree(coreml_bundle, place / "bundle")
    manifest = manifest_of(bundle)
    assert f"{PACKAGE}/{WEIGHTS}" in manifest.targets[0].unet.files
    files = {name: file for name, file in manifest.files.items() if name != f"{PACKAGE}/{WEIGHTS}"}
    seal(bundle, msgspec.structs.replace(manifest, files=files))
    assert_refused(bundle, r"files of a component is \['coreml/Unet.mlpackage/.*bin'\]; expected files of the bundle")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_not_described, "does not describe this function"),
        (_another_type, "the package describes"),
        (_two_blocks, "blocks for the opsets CoreML8, CoreML9"),
        (_older, "specification version 5"),
        (_deep_manifest, "is not JSON"),
        (_odd_bytes, "bytes where"),
        (_no_manifest, "is not an .mlpackage: it has no Manifest.json"),
        (_newer, "specification version 99"),
        (_no_weights, "weight"),
        (_short_weights, "cut off"),
        (_unknown_op, "swish_of_tomorrow"),
        (_unknown_dtype, "conv"),
        (_no_model, "not a protobuf"),
    ],
)
def test_a_package_that_is_none_is_one_line(
    command: Command, coreml_bundle: Path, place: Path, damage: Any, words: str
) -> None:
    bundle = shutil.copytree(coreml_bundle, place / "bundle")
    damage(bundle / PACKAGE)
    reseal(bundle)
    before = snapshot(bundle)
    said = command("inspect", bundle)
    assert said.code == 0
    assert "Traceback" not in "".join(said.errors)
    assert_error(command("verify", bundle), words, PACKAGE)
    assert_error(command("run", bundle, "-o", place / "x.png", "--backend", "mil-reference"), words, PACKAGE)
    assert snapshot(bundle) == before
    assert not (place / "x.png").exists()


def test_an_overflow_is_a_failed_check_that_names_the_first_tensor(
    command: Command, coreml_bundle: Path, place: Path
) -> None:
    def change(opened: Opened) -> None:
        opened.change(opened.ops("conv")[1], "weight", lambda w: w * 60000)

    bundle = shutil.copytree(coreml_bundle, place / "bundle")
    change_package(bundle / PACKAGE, change)
    reseal(bundle)
    said = command("verify", bundle, "--json")
    assert said.code == 1
    data = json.loads(said.out)
    assert not data["ok"]
    assert data["findings"][0]["kind"] == "overflow"
    assert "overflows" in command("verify", bundle).out


def test_a_function_that_is_not_there_and_tensors_that_are_others(
    command: Command, coreml_bundle: Path, place: Path
) -> None:
    bundle = shutil.copytree(coreml_bundle, place / "bundle")
    manifest = manifest_of(bundle)
    seal(bundle, replace_graph(manifest, 0, function="half"))
    assert_error(command("verify", bundle), "has no function 'half'; choices: cached, full")
    seal(bundle, replace_graph(manifest, 0, function="cached"))
    assert_error(command("verify", bundle), f"{PACKAGE} has ", "the manifest says")
    seal(bundle, msgspec.structs.replace(manifest, targets=(manifest.targets[0].with_unet(batch=1),)))
    assert_error(command("verify", bundle), "shape of sample is (2, 3, 16, 16); expected 1 first")
