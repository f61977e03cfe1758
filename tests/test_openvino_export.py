"""The OpenVINO target: models in IR, proved and run like any other, and read by nothing that was not checked."""

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from absent import hide
from command_line import Command, assert_error, snapshot
from conftest import Export
from seals import assert_refused, flip_bit, manifest_of, replace_graph, reseal, rows_of, seal
from tiny_pipelines import save_sd1, save_tiny_vae, tokenizer

import edgediff
from edgediff.bench.run_bench import run_bench
from edgediff.bundle.psnr import psnr_db
from edgediff.config.floors import VerifyConfig
from edgediff.config.recipes import find_recipe
from edgediff.errors import ConfigError
from edgediff.export.export_bundle import Exported
from edgediff.export.export_config import ExportConfig, config_from, load_config
from edgediff.extras import import_extra
from edgediff.models.graphs import graph_list
from edgediff.models.torch_session import TorchSession
from edgediff.targets import TARGETS
from edgediff.targets.backends import open_session, usual_backend
from edgediff.targets.onnx import OnnxConfig
from edgediff.targets.openvino import OpenVinoConfig
from edgediff_runtime import Bundle, BundleError, EdgePipeline, RequestError, open_bundle
from edgediff_runtime.__main__ import main
from edgediff_runtime.manifest import ExecuTorchTarget
from edgediff_runtime.openvino_session import KEPT, OpenVinoSession

pytest.importorskip("openvino")

FILES = ("cached.xml", "full.xml", "openvino_model.bin", "openvino_model.xml")
UNET = "openvino/unet"


@pytest.fixture(scope="module")
def ir_bundle(class_model: Path, export_once: Export) -> Path:
    """The class model for OpenVINO alone, 4 steps at clock 2."""
    path = export_once(class_model, ExportConfig(steps=4, targets=("openvino",)))
    rows = rows_of(path)
    assert {(row["check"], row["part"]) for row in rows if (row["backend"], row["ok"]) == ("openvino", True)} >= {
        *((check, name) for check in ("graph", "composed") for name in ("full", "cached")), ("trajectory", "latents"),
    }  # fmt: skip
    assert min(row["psnr_db"] for row in rows if row["floor_db"] is not None and row["psnr_db"] is not None) > 100
    return path


@pytest.fixture
def changed(ir_bundle: Path, tmp_path: Path) -> Path:
    """That, copied for a test to change."""
    return shutil.copytree(ir_bundle, tmp_path / "changed")


def test_each_graph_is_a_model_with_its_weights(ir_bundle: Path) -> None:
    target = manifest_of(ir_bundle).target("openvino")
    assert [(g.file, g.external_data) for g in target.unet.graphs] == [
        (f"{UNET}/{name}.xml", (f"{UNET}/openvino_model.bin",)) for name in ("full", "cached")
    ]
    assert (target.unet.layout, target.unet.batch, target.unet.dtype) == ("pair", None, "fp32")
    assert msgspec.to_builtins(target).keys() == {"target", "components"}
    assert sorted(file.name for file in (ir_bundle / UNET).iterdir()) == sorted([*FILES, "config.json"])
    assert not list(ir_bundle.glob(".*"))
    core = import_extra("openvino", "a test", "openvino").Core()
    assert target.unet.model is not None
    assert target.unet.model.file == f"{UNET}/openvino_model.xml"
    for graph in (*target.unet.graphs, target.unet.model):
        # What other tools open, OpenVINO finds the weights of by itself.
        weights = {} if graph is target.unet.model else {"weights": ir_bundle / graph.external_data[0]}
        model = core.read_model(ir_bundle / str(graph.file), **weights)
        assert [port.get_names() for port in model.inputs] == [{tensor.name} for tensor in graph.inputs]
        assert [port.get_names() for port in model.outputs] == [{tensor.name} for tensor in graph.outputs]
        assert model.input("sample").get_partial_shape()[0].is_dynamic


def test_images_are_those_of_torch(ir_bundle: Path, class_model: Path) -> None:
    bundle = open_bundle(ir_bundle)
    assert usual_backend(bundle) == "openvino"
    # Three images of two rows each, and at the end guidance off: the models meet six rows, then three.
    request: dict[str, Any] = {"num_images": 3, "guidance_scale": [2.0, 2.0, 1.0, 1.0], "seed": 3}
    got = EdgePipeline.from_pretrained(ir_bundle, backend="openvino")(**request)
    model = edgediff.load_model(class_model)
    divided = edgediff.split(model.unet)
    want = EdgePipeline(bundle.manifest, TorchSession(divided.parts, graph_list(divided, model)))(**request)
    assert got.mask == want.mask
    assert psnr_db(want.latents, got.latents) > 100
    assert np.abs(got.images.astype(int) - want.images).max() <= 1
    again = EdgePipeline(bundle.manifest, open_session(bundle, "openvino", threads=1))(**request)
    assert psnr_db(want.latents, again.latents) > 100


@pytest.mark.long
@pytest.mark.parametrize(
    ("targets", "onnx"),
    [(("onnx", "openvino"), OnnxConfig()), (("openvino", "onnx"), OnnxConfig(quantize_nbits=8, calibration_images=1))],
    ids=["fp32", "int8-last"],
)
def test_files_are_the_same_beside_onnx_graphs_and_are_traced_once(
    ir_bundle: Path,
    class_model: Path,
    export_once: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    targets: tuple[str, ...],
    onnx: OnnxConfig,
) -> None:
    alone = export_once(class_model, ExportConfig(steps=4, onnx=onnx))
    export, traced = torch.onnx.export, []

    def counted(part: torch.nn.Module, *args: Any, **settings: Any) -> Any:
        traced.append(part)
        return export(part, *args, **settings)

    monkeypatch.setattr(torch.onnx, "export", counted)
    config = ExportConfig(steps=4, targets=targets, onnx=onnx, verify=VerifyConfig(mode="graphs"))
    done = edgediff.export_bundle(edgediff.load_model(class_model), tmp_path / "both", config)
    assert len(traced) == 2
    assert not list(done.path.glob(".*"))
    graphs = {name: data for name, data in snapshot(alone).items() if name.startswith("onnx/")}
    assert len(graphs) > 4
    assert {name: data for name, data in snapshot(done.path).items() if name.startswith("onnx/")} == graphs
    for name in FILES:
        assert (done.path / UNET / name).read_bytes() == (ir_bundle / UNET / name).read_bytes(), name
    if onnx == OnnxConfig():
        _check_backends_of_both(done)


def _check_backends_of_both(done: Exported) -> None:
    assert done.report is not None
    assert {(row.target, row.backend) for row in done.report.rows if row.status == "measured"} == {
        ("onnx", "onnxruntime"), ("openvino", "openvino"),
    }  # fmt: skip
    bundle = open_bundle(done.path)
    assert usual_backend(bundle) == "onnxruntime"
    # OpenVINO runs what was made for it, and the ONNX graphs where there is nothing else: the same numbers.
    session = OpenVinoSession(bundle)
    assert session.graphs == bundle.manifest.target("openvino").unet.graphs
    alone = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, targets=bundle.manifest.targets[:1]))
    other = OpenVinoSession(alone)
    assert other.graphs == bundle.manifest.target("onnx").unet.graphs
    made = [EdgePipeline(bundle.manifest, each)(seed=1, num_images=1).latents for each in (session, other)]
    assert psnr_db(made[1], made[0]) > 120


@pytest.mark.long
def test_eight_bits_in_four_graphs_are_smaller(
    ir_bundle: Path, class_model: Path, place: Path, command: Command
) -> None:
    said = command(
        "export", class_model, "-o", place / "int8", "--target", "openvino", "--steps", 4, "--quantize-nbits", 8,
        "--layout", "split",
    )  # fmt: skip
    assert said.code == 0, said
    target = manifest_of(place / "int8").target("openvino")
    assert (target.unet.dtype, target.unet.layout, target.unet.floors.graph) == ("int8", "split", 35.0)
    assert [graph.name for graph in target.unet.graphs if graph.file] == ["highres_in", "lowres", "highres_out"]
    assert b'element_type="i8"' in (place / "int8/openvino/unet/lowres.xml").read_bytes()
    whole = (ir_bundle / UNET / "openvino_model.bin").stat().st_size
    assert sum(file.stat().st_size for file in (place / "int8" / UNET).glob("*.bin")) < 0.5 * whole


def test_it_verifies_and_runs_on_the_command_line(
    ir_bundle: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("verify", ir_bundle).code == 0
    for more in ((), ("--backend", "openvino")):
        said = command("run", ir_bundle, "-o", tmp_path / "out.png", "--num-images", 2, *more)
        assert (said.code, said.errors) == (0, []), said.errors
    said = command("inspect", ir_bundle)
    assert said.code == 0, said.errors
    assert "openvino fp32, pair" in said.out
    arguments = ["edgediff_runtime", str(ir_bundle), "-o", str(tmp_path / "light.png"), "--num-images", "2"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--backend", "openvino"])
    assert main() == 0
    assert (tmp_path / "light.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    monkeypatch.setattr(sys, "argv", arguments)
    capsys.readouterr()
    assert main() == 2
    assert capsys.readouterr().err == "error: the bundle has no 'onnx' target; it has: openvino\n"


@pytest.mark.long
def test_bench_times_it_against_its_undivided_step_and_names_what_cannot_run_it(ir_bundle: Path) -> None:
    found = run_bench([ir_bundle], ["onnxruntime", "openvino"], rounds=1, threads=1)
    other, mine = found.contenders
    assert (other.status, other.says) == ("absent", "runs onnx graphs, the bundle has openvino")
    assert (mine.status, mine.undivided) == ("measured", "undivided"), mine.says
    assert mine.psnr_db is not None
    assert mine.psnr_db > 90


# What is refused


@pytest.mark.parametrize("name", FILES)
def test_what_is_damaged_is_not_read(changed: Path, command: Command, tmp_path: Path, name: str) -> None:
    flip_bit(changed / UNET / name)
    assert_refused(changed, name, run=False)
    for args in (("verify", changed), ("run", changed, "-o", tmp_path / "out.png")):
        assert_error(command(*args), f"{UNET}/{name} does not have the hash", "damaged")


def test_what_lies_beside_a_model_unlisted_is_not_read(changed: Path) -> None:
    (changed / UNET / "full.onnx").write_bytes(b"more")
    with pytest.raises(BundleError, match=r"openvino/unet/full\.onnx is not listed"):
        OpenVinoSession(open_bundle(changed))


@pytest.mark.parametrize("data", [b"", b"<?xml version='1.0'?><net", b"not a model"])
def test_what_is_no_model_is_one_line(changed: Path, data: bytes) -> None:
    (changed / UNET / "full.xml").write_bytes(data)
    reseal(changed)
    with pytest.raises(BundleError, match=r"openvino/unet/full\.xml cannot be read by OpenVINO: ") as caught:
        OpenVinoSession(open_bundle(changed))
    assert "\n" not in str(caught.value)


def test_weights_that_are_cut_off_are_one_line(changed: Path) -> None:
    weights = changed / UNET / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    reseal(changed)
    with pytest.raises(BundleError, match=r"openvino/unet/full\.xml cannot be read by OpenVINO: ") as caught:
        OpenVinoSession(open_bundle(changed))
    assert "\n" not in str(caught.value)


def test_a_model_of_other_tensors_than_the_manifests_is_refused(changed: Path) -> None:
    manifest = manifest_of(changed)
    full = manifest.target("openvino").unet.graphs[0]
    feature = full.outputs[1]
    half = msgspec.structs.replace(feature, shape=(*feature.shape[:-1], 4))
    for change, says in (
        (
            {"inputs": (full.inputs[1], full.inputs[0], *full.inputs[2:])},
            "has the inputs sample, timestep, class_labels",
        ),
        ({"outputs": (*full.outputs[:1], half)}, r"has lowres_feature as float32 \['\?', 16, 8, 8\]; .*'batch', 16"),
        (
            {"inputs": (*full.inputs[:2], msgspec.structs.replace(full.inputs[2], dtype="int32"))},
            "has class_labels as int64",
        ),
    ):
        seal(changed, replace_graph(manifest, 0, **change))
        with pytest.raises(BundleError, match=rf"openvino/unet/full\.xml {says}"):
            OpenVinoSession(open_bundle(changed))


def test_other_targets_and_backends_are_named(ir_bundle: Path, command: Command, tmp_path: Path) -> None:
    said = command("run", ir_bundle, "-o", tmp_path / "out.png", "--backend", "onnxruntime")
    assert_error(said, "has no 'onnx' target", "it has: openvino")
    manifest = manifest_of(ir_bundle)
    other = ExecuTorchTarget(manifest.targets[0].components)
    with pytest.raises(BundleError, match="has no 'openvino' or 'onnx' target; it has: executorch"):
        OpenVinoSession(Bundle(ir_bundle, msgspec.structs.replace(manifest, targets=(other,))))


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("--quantize-nbits", 4), ("openvino.quantize_nbits",)),
        (("--dtype", "fp16", "--quantize-nbits", 8), ("openvino.dtype' is fp16, and 'openvino.quantize_nbits'",)),
        (("--clock", 1, "--layout", "pair"), ("layout pair with clock 1",)),
    ],
)
def test_settings_that_it_has_not_are_refused(
    command: Command, class_model: Path, place: Path, args: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    assert_error(command("export", class_model, "-o", place / "b", "--target", "openvino", *args), *parts)
    assert not (place / "b").exists()


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"quantize_nbits": 8, "calibration_images": 0}, r"openvino\.calibration_images' is 0"),
        ({"quantize_attention": True}, r"openvino\.quantize_attention' needs 'openvino\.quantize_nbits'"),
        ({"dtype": "bf16"}, r"openvino\.dtype"),
        ({"layout": "four"}, r"openvino\.layout"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(said: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config_from({"targets": ["openvino"], "openvino": said})


def test_eight_bits_are_for_a_target_that_is_asked_for() -> None:
    with pytest.raises(
        ConfigError, match=r"'openvino\.quantize_nbits' is for OpenVINO's models; the targets are: onnx"
    ):
        config_from({"targets": ["onnx"], "openvino": {"quantize_nbits": 8}})
    both = config_from({"targets": ["onnx", "openvino"], "openvino": {"quantize_nbits": 8}})
    assert (both.onnx, both.openvino) == (OnnxConfig(), OpenVinoConfig(quantize_nbits=8))


def test_recipes_name_the_target() -> None:
    for name in ("grocery-32-openvino", "sd15-openvino-int8"):
        assert load_config(find_recipe(name)).targets == ("openvino",)


# Without OpenVINO


def test_without_openvino_the_command_that_installs_it_is_named(
    ir_bundle: Path, class_model: Path, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    said = command("export", class_model, "-o", place / "bundle", "--target", "openvino")
    assert_error(said, 'pip install "edgediff[openvino]"')
    assert not (place / "bundle").exists()
    with pytest.raises(RequestError, match="needs OpenVINO, which is not installed; pip install openvino"):
        open_session(open_bundle(ir_bundle), "openvino")
    report = edgediff.verify_bundle(ir_bundle, record=False)
    assert not report.ok
    assert {row.status for row in report.rows} == {"not_run"}
    assert all("pip install openvino" in row.note for row in report.rows)


def test_what_openvino_itself_lacks_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        import_extra("openvino", "a test", "openvino")


def test_graphs_stay_compiled_for_a_few_numbers_of_rows_only(ir_bundle: Path) -> None:
    session = OpenVinoSession(open_bundle(ir_bundle), threads=1)
    pipe = EdgePipeline(open_bundle(ir_bundle).manifest, session)
    first = pipe(num_images=1, num_inference_steps=2, seed=1).latents
    for num_images in range(1, 9):
        pipe(num_images=num_images, num_inference_steps=2)
        assert len(session._compiled) <= KEPT * len(session.graphs)
        assert len(session._requests.known) <= KEPT * len(session.graphs)
    assert len(session._compiled) == KEPT * len(session.graphs)
    assert np.array_equal(pipe(num_images=1, num_inference_steps=2, seed=1).latents, first)


def _tree(folder: Path) -> Path:
    tokenizer().save_pretrained(folder / "tokenizer")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize(
    ("kind", "settings", "lacks"),
    [
        ("DPMSolverMultistepScheduler", {}, "DPMSolverMultistepScheduler"),
        ("UniPCMultistepScheduler", {}, "UniPCMultistepScheduler"),
        ("DDIMScheduler", {}, "DDIM that clips samples"),
        ("DDIMScheduler", {"clip_sample": False}, None),
        ("LCMScheduler", {}, None),
    ],
)
def test_a_sampler_that_genai_lacks_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, settings: dict[str, Any], lacks: str | None
) -> None:
    getattr(diffusers, kind)(**settings).save_pretrained(tmp_path / "scheduler")
    TARGETS["openvino"].finish_pipeline(tmp_path, lambda _: None)
    assert [record.message for record in caplog.records] == (
        []
        if lacks is None
        else [
            f"{tmp_path.name}: OpenVINO GenAI has no {lacks} and will not open it; edgediff's runtimes do. For GenAI, "
            "export it with another --scheduler, such as euler"
        ]
    )


def test_tokenizers_are_written_for_genai(tmp_path: Path) -> None:
    openvino_tokenizers = pytest.importorskip("openvino_tokenizers")
    said: list[str] = []
    trees = [_tree(tmp_path / name) for name in ("one", "two")]
    for tree in trees:
        TARGETS["openvino"].finish_pipeline(tree, said.append)
    assert said == []
    files = [{file.name: file.read_bytes() for file in (tree / "tokenizer").glob("openvino_*")} for tree in trees]
    assert files[0].keys() == {"openvino_tokenizer.xml", "openvino_tokenizer.bin"}
    assert files[0] == files[1]
    openvino = import_extra("openvino", "a test", "openvino")
    core = openvino.Core()
    core.add_extension(str(openvino_tokenizers._ext_path))
    model = core.compile_model(tmp_path / "one" / "tokenizer" / "openvino_tokenizer.xml", "CPU")
    assert model(["a red apple"])["input_ids"].tolist() == [tokenizer()("a red apple")["input_ids"]]


def test_without_openvino_tokenizers_the_export_says_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    said: list[str] = []
    TARGETS["openvino"].finish_pipeline(_tree(tmp_path), said.append)
    assert said == ["openvino-tokenizers is not installed: the tokenizers that OpenVINO GenAI reads are left out"]
    assert not list(tmp_path.rglob("openvino_*"))


@pytest.mark.long
def test_fp16_is_verified_in_the_arithmetic_of_the_cpu(tmp_path: Path) -> None:
    """The tiny decoder divides by 3, which OpenVINO makes a product with a rounded third."""
    save_sd1(tmp_path / "model")
    save_tiny_vae(tmp_path / "tiny")
    model = edgediff.load_model(tmp_path / "model", preview=tmp_path / "tiny")
    config = {"steps": 1, "clock": 1, "adaptor": "identity", "targets": ["openvino"], "preview": str(tmp_path / "tiny"),
              "components": ["preview_decoder"], "openvino": {"dtype": "fp16"}}  # fmt: skip
    done = edgediff.export_bundle(model, tmp_path / "bundle", config_from(config))
    assert done.report is not None
    exact = {row.part: row.psnr_db for row in done.report.rows if row.check == "program"}
    assert {"highres_in", "lowres", "highres_out", "preview_decoder"} <= exact.keys()
    assert all(number is not None and number > 100 for number in exact.values()), exact
    components = manifest_of(tmp_path / "bundle").target("openvino").components
    assert {name: component.dtype for name, component in components.items()} == {
        "unet": "fp16", "preview_decoder": "fp16"
    }  # fmt: skip
    assert b'element_type="f16"' in (tmp_path / "bundle/openvino/unet/lowres.xml").read_bytes()
