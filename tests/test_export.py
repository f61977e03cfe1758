import copy
import dataclasses
import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from conftest import SMALL, save_model
from pipelines import exported_pipeline
from traces import EXPORT
from unets import unet2d_condition

import edgediff
from edgediff.config.floors import VerifyConfig
from edgediff.errors import ConfigError, TargetError, UnsupportedError, VerificationError
from edgediff.targets.onnx import OnnxConfig, passes
from edgediff.targets.onnx import write_onnx as onnx_module
from edgediff_runtime import EdgePipeline, RequestError, open_bundle


def _files(path: Path, leave_out: tuple[str, ...] = ("evidence/parity.json",)) -> dict[str, bytes]:
    found = {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    return {name: data for name, data in found.items() if name not in leave_out}


def test_the_bundle_holds_what_the_design_says(class_bundle: Path) -> None:
    assert set(_files(class_bundle, ())) == {
        "README.md", "SHA256SUMS", "evidence/parity.json", "evidence/reference.safetensors", "manifest.json",
        *(f"onnx/unet/{name}.onnx" for name in ("highres_in", "highres_out", "lowres", "model")),
        "onnx/unet/config.json", "onnx/unet/weights.bin",
    }  # fmt: skip
    manifest = open_bundle(class_bundle).manifest
    assert manifest.operating_point.mask == (1, 0, 1, 0)
    assert manifest.conditioning.labels == ("Apple", "Banana", "Kiwi", "Orange")
    assert manifest.conditioning.null_label == 4
    assert manifest.license == "unknown"
    assert manifest.cache_bytes == 4 * 16 * 8 * 8
    assert manifest.cost["full"].macs > manifest.cost["cached"].macs > 0
    graphs = manifest.targets[0].unet.graphs
    assert [graph.frequency for graph in graphs] == ["step", "full_step", "cached_step", "step"]
    assert graphs[2].file is None


def test_sha256sum_agrees(class_bundle: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=class_bundle, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_graphs_are_what_the_manifest_says(class_bundle: Path) -> None:
    target = open_bundle(class_bundle).manifest.targets[0]
    for graph in target.unet.graphs:
        if graph.file is None:
            continue
        model = onnx.load(class_bundle / graph.file)
        onnx.checker.check_model(model, full_check=True)
        assert model.opset_import[0].version == target.opset == 23
        assert model.ir_version == target.ir_version
        for said, found in ((graph.inputs, model.graph.input), (graph.outputs, model.graph.output)):
            assert [tensor.name for tensor in said] == [value.name for value in found]
            for tensor, value in zip(said, found, strict=True):
                dims = value.type.tensor_type.shape.dim
                assert [dim.dim_param or dim.dim_value for dim in dims] == list(tensor.shape)
                dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                assert dtype == np.dtype(tensor.dtype)


def test_graphs_name_nothing_of_the_exporting_machine(class_bundle: Path) -> None:
    home = str(Path(edgediff.__file__).parent).encode()
    for file in (class_bundle / "onnx/unet").iterdir():
        assert b"stack_trace" not in file.read_bytes()
        assert home not in file.read_bytes()


def test_weights_are_in_the_bundle_once(class_bundle: Path, class_model: Path) -> None:
    weights = (class_model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    graphs = sum(file.stat().st_size for file in (class_bundle / "onnx/unet").iterdir())
    assert graphs < 1.3 * weights + 2e5


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_batch_is_symbolic(class_bundle: Path, rows: int) -> None:
    result = EdgePipeline.from_pretrained(class_bundle)(num_images=rows, guidance_scale=1, num_inference_steps=2)
    assert result.latents.shape == (rows, 3, 16, 16)


@pytest.mark.long
@pytest.mark.usefixtures("traces_anew")
def test_exporting_twice_gives_the_same_bytes(plain_model: Path, tmp_path: Path) -> None:
    for name in ("once", "again"):
        model = edgediff.load_model(plain_model)
        edgediff.export_bundle(model, tmp_path / name, edgediff.ExportConfig(steps=4, layout="split"))
    want, got = _files(tmp_path / "once"), _files(tmp_path / "again")
    assert want.keys() == got.keys()
    assert [name for name in want if want[name] != got[name]] == []


def test_what_is_there_and_valid_is_not_exported_again(
    class_bundle: Path, class_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "bundle"
    shutil.copytree(class_bundle, there)
    monkeypatch.setattr("edgediff.targets.onnx.write_onnx.write_onnx", lambda *a: pytest.fail("exported again"))
    said: list[str] = []
    model = edgediff.load_model(class_model)
    done = edgediff.export_bundle(model, there, edgediff.ExportConfig(steps=4, layout="split"), progress=said.append)
    assert done.report is None
    assert any("already there" in line for line in said)
    with pytest.raises(TargetError, match="holds another bundle; pass --force"):
        edgediff.export_bundle(model, there, edgediff.ExportConfig(steps=5))
    assert _files(there) == _files(class_bundle)


def test_a_bundle_with_other_files_in_it_is_never_replaced(
    class_bundle: Path, class_model: Path, tmp_path: Path
) -> None:
    there = tmp_path / "bundle"
    shutil.copytree(class_bundle, there)
    (there / "onnx" / "notes.txt").write_text("mine")
    with pytest.raises(TargetError, match=r"onnx/notes\.txt, which is not the bundle's"):
        edgediff.export_bundle(edgediff.load_model(class_model), there, edgediff.ExportConfig(steps=5), force=True)
    assert (there / "onnx" / "notes.txt").read_text() == "mine"


@pytest.mark.long
@pytest.mark.parametrize(("portable", "weights"), [(False, "weights.bin"), (True, "lowres.onnx.data")])
def test_large_graphs_keep_their_weights_outside_and_are_simplified_without_them(
    plain_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portable: bool, weights: str
) -> None:
    monkeypatch.setattr(onnx_module, "EXTERNAL_DATA_BYTES", 10_000)
    floors = VerifyConfig(graph_db=100, composed_db=100, trajectory_db=80)
    config = edgediff.ExportConfig(steps=2, layout="split", verify=floors, onnx=OnnxConfig(portable=portable))
    if not portable:  # in one of the two the exporter itself writes the weights outside
        monkeypatch.setattr(torch.onnx, "export", EXPORT)
    edgediff.export_bundle(edgediff.load_model(plain_model), tmp_path / "bundle", config)
    manifest = open_bundle(tmp_path / "bundle").manifest
    external = {name for graph in manifest.targets[0].unet.graphs for name in graph.external_data}
    assert f"onnx/unet/{weights}" in external
    assert external <= manifest.files.keys()
    assert any(name.endswith(".data") for name in manifest.files) == portable
    assert (tmp_path / "bundle" / "onnx/unet/lowres.onnx").stat().st_size < 200_000


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "level", "point", "scheduler", "clock", "conditioning"),
    [
        ("text_model", 1, "after_upsample", "euler", "1,0,1", "synthetic"),
        ("plain_model", 1, "before_upsample", "ddim", 1, "labels"),
    ],
)
def test_other_cuts_samplers_and_clocks(
    model: str, level: int, point: str, scheduler: str, clock: int | str, conditioning: str, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    config = edgediff.ExportConfig(
        cut=edgediff.Cut(level, point), scheduler=scheduler, clock=clock, steps=3, onnx=OnnxConfig(opset=18),
        verify=VerifyConfig(graph_db=100, composed_db=100, trajectory_db=80),
    )  # fmt: skip
    loaded = edgediff.load_model(request.getfixturevalue(model))
    done = edgediff.export_bundle(loaded, tmp_path / "bundle", config)
    assert done.report is not None
    statuses = {row.check: row.status for row in done.report.rows}
    assert statuses["caching"] == ("not_run" if clock == 1 else "measured")
    assert open_bundle(tmp_path / "bundle").manifest.evidence.conditioning == conditioning


@pytest.fixture
def sdxl(tmp_path: Path) -> edgediff.Model:
    unet = unet2d_condition(
        **SMALL,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
    )
    return edgediff.load_model(save_model(unet, tmp_path / "sdxl"))


EMBEDDINGS = {"encoder_hidden_states": (1, 77, 12), "text_embeds": (1, 10), "time_ids": (1, 6)}


@pytest.mark.long
def test_sdxl_conditioning_and_a_file_of_embeddings(sdxl: edgediff.Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    given = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in EMBEDDINGS.items()}
    given |= {f"negative_{n}": rng.standard_normal(EMBEDDINGS[n]).astype(np.float32) for n in list(EMBEDDINGS)[:2]}
    np.savez(tmp_path / "prompt.npz", **given)
    config = edgediff.ExportConfig(steps=2, layout="split", conditioning=str(tmp_path / "prompt.npz"))
    edgediff.export_bundle(sdxl, tmp_path / "bundle", config)
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.evidence.conditioning == "file"
    graphs = {graph.name: [tensor.name for tensor in graph.inputs] for graph in manifest.targets[0].unet.graphs}
    assert graphs["highres_in"] == ["sample", "timestep", "text_embeds", "time_ids"]
    assert "encoder_hidden_states" in graphs["lowres"]


def test_a_file_that_lacks_embeddings_is_refused(sdxl: edgediff.Model, tmp_path: Path) -> None:
    assert sdxl.conditioning.tensors["text_embeds"].shape == (10,)
    short = tmp_path / "short.npz"
    np.savez(short, encoder_hidden_states=np.zeros(EMBEDDINGS["encoder_hidden_states"], np.float32))
    with pytest.raises(ConfigError, match="lacks text_embeds, time_ids"):
        edgediff.export_bundle(sdxl, tmp_path / "b2", edgediff.ExportConfig(conditioning=str(short)))


@pytest.fixture
def geometry(class_model: Path) -> edgediff.Model:
    """The class model without its weights."""
    model = edgediff.load_model(class_model)
    return dataclasses.replace(model, unet=type(model.unet)(**_plain(model.unet.config)).to("meta"))


def test_a_geometry_needs_random_weights_and_a_model_refuses_them(
    geometry: edgediff.Model, class_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--random-weights SEED"):
        edgediff.export_bundle(geometry, tmp_path / "b")
    with pytest.raises(ConfigError, match="has weights of its own"):
        edgediff.export_bundle(
            edgediff.load_model(class_model), tmp_path / "b", edgediff.ExportConfig(random_weights=0)
        )


@pytest.mark.long
def test_a_bundle_of_random_weights_says_so(geometry: edgediff.Model, tmp_path: Path) -> None:
    config = edgediff.ExportConfig(random_weights=3, steps=2, verify=VerifyConfig(mode="graphs"))
    done = edgediff.export_bundle(geometry, tmp_path / "b", config)
    assert done.report is not None
    assert done.report.ok
    assert {row.check: row.status for row in done.report.rows}["trajectory"] == "not_run"
    manifest = open_bundle(tmp_path / "b").manifest
    assert manifest.source.random_weights == "3"
    assert "weights are random" in (tmp_path / "b" / "README.md").read_text()


def _plain(config: dict) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def test_a_graph_that_computes_something_else_is_not_put_in_place(
    class_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_graph = onnx_module.write_graph

    def wrong(part: torch.nn.Module, *args: object) -> onnx_module.Written:
        if hasattr(part, "conv_out"):
            part = copy.deepcopy(part)
            part.conv_out.bias.data += 0.05
        return write_graph(part, *args)

    monkeypatch.setattr("edgediff.targets.onnx.write_onnx.write_graph", wrong)
    config = edgediff.ExportConfig(steps=2, layout="split")
    with pytest.raises(VerificationError, match=r"highres_out \(out_sample, onnxruntime\).*nothing was written"):
        edgediff.export_bundle(edgediff.load_model(class_model), tmp_path / "bundle", config)
    assert list(tmp_path.iterdir()) == []


def test_parts_that_are_not_the_unet_are_not_exported(
    class_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = edgediff.load_model(class_model)
    forward = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda *a, **k: (forward(*a, **k)[0] * 1.0001,))
    with pytest.raises(VerificationError, match="the divided UNet differs from the undivided one: its out_sample is 9"):
        edgediff.export_bundle(model, tmp_path / "bundle", edgediff.ExportConfig(steps=2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_channels_that_are_concatenated_go_all_the_way() -> None:
    bundle = open_bundle(exported_pipeline("inpaint"))
    assert (bundle.manifest.sample.channels, bundle.manifest.sample.in_channels) == (4, 9)
    pipe = EdgePipeline.from_pretrained(bundle.path)
    embeds = {
        "prompt_embeds": np.ones((1, 77, 32), np.float32),
        "negative_prompt_embeds": np.zeros((1, 77, 32), np.float32),
    }
    masked = np.ones((1, 5, 16, 16), np.float32)
    made = [pipe(**embeds, concat_latents=value, num_images=2).latents for value in (masked, -masked)]
    assert made[0].shape == (2, 4, 16, 16)
    assert np.abs(made[0] - made[1]).max() > 0.01
    with pytest.raises(RequestError, match="takes mask and masked image beside the latent; give image="):
        pipe(**embeds)
    with pytest.raises(RequestError, match=r"concat_latents has shape \[1, 4, 16, 16\]"):
        pipe(**embeds, concat_latents=masked[:, :4])


def test_another_text_length_is_another_bundle(text_bundle: Path, text_model: Path, tmp_path: Path) -> None:
    shutil.copytree(text_bundle, tmp_path / "bundle")
    shutil.copytree(text_model, tmp_path / "model")
    config = edgediff.ExportConfig(steps=4, layout="split")
    # The same model from another path is the same bundle.
    (tmp_path / "model").rename(tmp_path / "tiny-text")
    there = edgediff.export_bundle(edgediff.load_model(tmp_path / "tiny-text"), tmp_path / "bundle", config)
    assert there.report is None
    (tmp_path / "tiny-text" / "text_encoder" / "config.json").write_text('{"max_position_embeddings": 9}')
    with pytest.raises(TargetError, match="holds another bundle"):
        edgediff.export_bundle(edgediff.load_model(tmp_path / "tiny-text"), tmp_path / "bundle", config)


def test_a_pass_that_fails_names_itself_and_those_before_it() -> None:
    def fail(model: onnx.ModelProto) -> onnx.ModelProto:
        raise UnsupportedError("no")

    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    with pytest.raises(UnsupportedError, match=r"pass bad: no \(passes before it: strip-metadata\)"):
        passes.run_passes(model, (passes.STRIP_METADATA, passes.Pass("bad", fail)))


def test_strip_metadata_removes_and_nothing_else() -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"], doc_string="from here")
    node.metadata_props.add(key="stack_trace", value="File /home/me")
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", value[:1], value[1:]))
    stripped = passes.strip_metadata(model)
    assert b"stack_trace" not in stripped.SerializeToString()
    assert [n.op_type for n in stripped.graph.node] == ["Relu"]


def test_the_simplifier_is_held_to_the_numbers(
    monkeypatch: pytest.MonkeyPatch, class_model: Path, tmp_path: Path
) -> None:
    def damage(model: onnx.ModelProto) -> onnx.ModelProto:
        for tensor in model.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            if array.ndim == 4:
                tensor.CopyFrom(onnx.numpy_helper.from_array(array * 1.01, tensor.name))
        return model

    monkeypatch.setattr(onnx_module, "SIMPLIFY", passes.Pass("onnxsim", damage))
    with pytest.raises(UnsupportedError, match="highres_in: pass onnxsim: highres_feature changed"):
        edgediff.export_bundle(
            edgediff.load_model(class_model), tmp_path / "b", edgediff.ExportConfig(steps=4, layout="split")
        )
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_round_trips(class_bundle: Path) -> None:
    from edgediff_runtime.manifest_json import parse_manifest, render_manifest

    data = (class_bundle / "manifest.json").read_bytes()
    manifest = parse_manifest(data)
    assert render_manifest(manifest) == data
    assert msgspec.to_builtins(manifest)["format_version"] == 2
