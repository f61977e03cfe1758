import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from command_line import Command, assert_error, unchanged
from learned import CUT, HERE, record_for, trained
from safetensors.torch import save_file
from unets import CASES, unet2d, unet2d_condition

import edgediff
from edgediff import Cut, split
from edgediff.config.floors import VerifyConfig
from edgediff.errors import EdgediffError, ModelError, UnsupportedError
from edgediff.models.adaptors import (
    ADAPTORS,
    LEARNED,
    AdaptorShape,
    IdentityAdaptor,
    LearnedAdaptor,
    adaptor_width,
    make_adaptor,
)
from edgediff.models.graphs import adaptor_shape
from edgediff.models.load import load_model, random_weights
from edgediff.models.macs import tally
from edgediff.models.trained import (
    RECORD,
    WEIGHTS,
    choose_adaptor,
    load_adaptor,
    own_adaptors,
    save_adaptor,
)  # fmt: skip

POINTS = ("before_upsample", "after_upsample", "block:0", "block:1", "block:2")


# Sizes


@pytest.mark.parametrize(
    ("kind", "millions", "tolerance"), [("resnet", 14, 0.05), ("unet", 152, 0.01), ("unet-light", 3, 0.1)]
)
def test_the_papers_sizes_at_sd15(kind: str, millions: float, tolerance: float) -> None:
    model = load_model("sd15")
    with torch.device("meta"):
        part = make_adaptor(kind, adaptor_shape(split(model.unet), model))
    cost = tally(split(model.unet, adaptor=part), model.sample_shape, model.conditioning.tensors).parts["adaptor"]
    assert cost.parameters == pytest.approx(1e6 * millions, rel=tolerance)
    if kind == "resnet":
        assert 2e-9 * cost.macs == pytest.approx(7, rel=0.03)
    assert cost.macs_attention == 0


def test_sizes_follow_the_unet() -> None:
    assert [adaptor_width(kind, 960) for kind in LEARNED] == [352, 640, 96]
    assert [adaptor_width(kind, 144) for kind in LEARNED] == [64, 96, 16]


# Untrained is the identity


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("point", POINTS)
@torch.no_grad()
def test_an_untrained_adaptor_is_the_identity_bit_for_bit(kind: str, point: str) -> None:
    unet = unet2d(sample_size=32)
    cut = Cut(1, point)
    sample = torch.randn(2, 3, 32, 32)
    identity = split(unet, cut)
    stale = identity.full(torch.randn_like(sample), 900)[1]
    shape = AdaptorShape((8, 16, 16) if point.endswith("sample") else (8, 32, 32), tuple(stale.shape[1:]), 32)
    learned = split(unet, cut, make_adaptor(kind, shape))
    for want, got in zip(identity.cached(sample, 500, stale), learned.cached(sample, 500, stale), strict=True):
        assert torch.equal(want, got)
    assert torch.equal(learned.full(sample, 500)[0], unet(sample, 500).sample)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_build_of_unet_takes_an_adaptor(name: str) -> None:
    unet = CASES[name].build()
    for point in POINTS[:3]:
        cut = Cut(1, point)
        divided = split(unet, cut)
        sample, cond = torch.randn(2, unet.config.in_channels, 16, 16), CASES[name].cond(2)
        cache = divided.full(sample, 700, **cond)[1]
        tensors = dict(zip(divided.highres_in.outputs, _highres_in(divided, sample, cond), strict=True))
        shape = AdaptorShape(
            tuple(tensors["highres_feature"].shape[1:]), tuple(cache.shape[1:]), tensors["emb"].shape[1]
        )
        learned = split(unet, cut, make_adaptor("resnet", shape))
        assert torch.equal(learned.cached(sample, 300, cache, **cond)[0], divided.cached(sample, 300, cache, **cond)[0])


def _highres_in(divided: edgediff.SplitUNet, sample: torch.Tensor, cond: dict) -> tuple[torch.Tensor, ...]:
    tensors = divided._tensors(sample, 300.0, cond)
    return divided.highres_in(*(tensors[name] for name in divided.highres_in.inputs))


@torch.no_grad()
def test_a_trained_adaptor_gives_the_cache_back_changed(class_model: Path, tmp_path: Path) -> None:
    model = load_model(class_model)
    part = load_adaptor(trained(model, tmp_path / "a")).part
    divided, labels = split(model.unet, adaptor=part), torch.tensor([1])
    _, cache = divided.full(torch.randn(1, 3, 16, 16), 900, class_labels=labels)
    _, next_cache = divided.cached(torch.randn(1, 3, 16, 16), 800, cache, class_labels=labels)
    assert next_cache.shape == cache.shape
    assert not torch.equal(next_cache, cache)


@torch.no_grad()
def test_text_is_an_input_only_where_it_is_asked_for() -> None:
    unet = unet2d_condition()
    divided = split(unet)
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 12)
    cache = divided.full(sample, 10, encoder_hidden_states=text)[1]
    shape = AdaptorShape((8, 8, 8), tuple(cache.shape[1:]), 32, ("encoder_hidden_states", 12))
    assert "encoder_hidden_states" not in make_adaptor("resnet", shape).inputs
    part = make_adaptor("resnet", shape, takes_text=True)
    assert part.inputs[-1] == "encoder_hidden_states"
    torch.nn.init.normal_(part.body.up.weight)
    learned = split(unet, adaptor=part)
    one, other = (learned.cached(sample, 10, cache, encoder_hidden_states=t)[1] for t in (text, -text))
    assert not torch.equal(one, other)


# What is refused


def test_adaptors_that_do_not_fit() -> None:
    with pytest.raises(UnsupportedError, match="no adaptor 'resnets'; choices: identity, resnet, unet, unet-light"):
        make_adaptor("resnets", AdaptorShape((8, 8, 8), (16, 8, 8), 32))
    with pytest.raises(UnsupportedError, match=r"unet halves lowres_feature 3 times.*lowres_feature 16x4x4"):
        make_adaptor("unet", AdaptorShape((8, 4, 4), (16, 4, 4), 32))
    with pytest.raises(UnsupportedError, match="no multiple of highres_feature"):
        make_adaptor("resnet", AdaptorShape((8, 8, 8), (16, 12, 12), 32))
    with pytest.raises(UnsupportedError, match="the UNet takes no text"):
        make_adaptor("resnet", AdaptorShape((8, 8, 8), (16, 8, 8), 32), takes_text=True)
    assert isinstance(make_adaptor(ADAPTORS[0], AdaptorShape((8, 5, 5), (16, 5, 5), 32)), IdentityAdaptor)


def _choose(model: edgediff.Model, spec: str | None, cut: Cut = CUT) -> object:
    return choose_adaptor(spec, model, cut, HERE)


def test_folders_that_are_no_adaptor(class_model: Path, tmp_path: Path) -> None:
    model = load_model(class_model)

    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match):
            _choose(model, str(tmp_path / "a"))

    (tmp_path / "a").mkdir()
    refused("is not an adaptor: it has no adaptor.json")
    trained(model, tmp_path / "a")
    weights = (tmp_path / "a" / WEIGHTS).read_bytes()
    (tmp_path / "a" / WEIGHTS).write_bytes(weights[:1000])
    refused("cannot be read as weights")
    (tmp_path / "a" / WEIGHTS).write_bytes((class_model / "unet/diffusion_pytorch_model.safetensors").read_bytes())
    refused("do not fit its adaptor.json")
    (tmp_path / "a" / WEIGHTS).unlink()
    refused("cannot be read as weights")
    record = json.loads((tmp_path / "a" / RECORD).read_text())
    for change, match in (
        ({"kind": "transformer"}, "does not describe an adaptor"),
        ({"edgediff_adaptor": 2}, "is of format 2; this edgediff knows 1"),
        ({"colour": "red"}, "does not describe an adaptor.*colour"),
        ({"highres": [10**9, 8, 8]}, "has sizes 1000000000, 8, 8.*expected 1 to 65536"),
        ({"lowres": [16, 0, 8]}, "has sizes"),
        ({"emb": -1}, "has sizes"),
        ({"highres": [60000, 8, 8]}, "cannot be read as weights"),
        ({"trained_for": record["trained_for"] | {"mask": [1, 1, 1, 1]}}, "are none of clock 2's over 4 steps"),
        ({"trained_for": record["trained_for"] | {"clock": 0}}, "clock is 0"),
    ):
        (tmp_path / "a" / RECORD).write_text(json.dumps(record | change))
        refused(match)
    (tmp_path / "a" / RECORD).write_text("{")
    refused("does not describe an adaptor")


def test_weights_that_are_not_finite(class_model: Path, tmp_path: Path) -> None:
    model = load_model(class_model)
    path = trained(model, tmp_path / "a")
    part = load_adaptor(path).part
    assert isinstance(part, LearnedAdaptor)
    part.body.up.bias.data[0] = torch.nan
    save_adaptor(part, record_for(model), path)
    with pytest.raises(ModelError, match=r"not finite in body\.up\.bias"):
        load_adaptor(path)
    save_file({name: tensor.to(torch.complex64) for name, tensor in part.state_dict().items()}, path / WEIGHTS)
    with pytest.raises(ModelError, match=r"weights are complex numbers in body\..*; expected real ones"):
        load_adaptor(path)


@pytest.mark.parametrize("spec", ["./resnet-clock-2", "resnet-clock-2/"])
def test_a_folder_called_as_a_built_in_adaptor_is_found_again(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model("grocery-32-student")
    known = load_adaptor(model.path / "adaptors" / "resnet-clock-2")
    next(known.part.parameters()).data.add_(0.01)
    assert isinstance(known.part, LearnedAdaptor)
    assert known.record is not None
    monkeypatch.chdir(tmp_path)
    save_adaptor(known.part, known.record, Path("resnet-clock-2"))
    own = choose_adaptor(spec, model, Cut(), HERE)
    again = choose_adaptor(own.manifest.path, model, Cut(), HERE)
    assert not own.is_built_in
    assert again.sha256 == own.sha256


# Built-in ones


@pytest.mark.parametrize("name", ["drawings-64", "drawings-64-student", "grocery-32", "grocery-32-student"])
def test_own_adaptors_are_whole_and_belong_to_their_model(name: str) -> None:
    model = load_model(name)
    found = dict(own_adaptors(model))
    assert {path.name for path in found} == {path.name for path in (model.path / "adaptors").iterdir()}
    for path, record in found.items():
        adaptor = load_adaptor(path, is_built_in=True)
        assert adaptor.record == record
        assert {"README.md", "loss.png", "training.json"} <= {file.name for file in path.iterdir()}
        assert _choose(model, path.name, record.cut)


def test_a_model_of_few_steps_is_sampled_as_its_adaptor_was_trained() -> None:
    model = load_model("drawings-64-student-4-steps")
    ((path, record),) = dict(own_adaptors(model)).items()
    point = record.trained_for
    usual = (model.usual_sampler, model.usual_steps, model.usual_guidance)
    assert usual == (point.scheduler, point.num_inference_steps, point.guidance_scale) == ("ddim", 4, 1.0)
    assert load_adaptor(path, is_built_in=True).record == record
    assert choose_adaptor(None, model, record.cut, point).manifest.name == "resnet-clock-2"


def test_the_default_is_the_adaptor_trained_for_the_operating_point() -> None:
    model = load_model("grocery-32")
    by_kind = choose_adaptor("resnet", model, Cut(), msgspec.structs.replace(HERE, num_inference_steps=20))
    assert by_kind.record is not None
    assert by_kind.manifest.kind == "resnet"
    assert by_kind.manifest.path is None
    exact = choose_adaptor(None, model, Cut(), by_kind.record.trained_for)
    assert exact.sha256 == by_kind.sha256
    spelt = msgspec.structs.replace(by_kind.record.trained_for, clock="1,0,1,0,1,0,1,0")
    assert choose_adaptor(None, model, Cut(), spelt).sha256 == by_kind.sha256
    for other in ({"guidance_scale": 3.0}, {"scheduler": "ddim"}):
        point = msgspec.structs.replace(by_kind.record.trained_for, **other)
        assert choose_adaptor(None, model, Cut(), point).manifest.kind == "identity"
    assert choose_adaptor("identity", model, Cut(), by_kind.record.trained_for).manifest.kind == "identity"
    with pytest.raises(EdgediffError, match="level 1, after_upsample"):
        choose_adaptor("resnet", model, Cut(1, "after_upsample"), by_kind.record.trained_for)


def test_a_models_directory_may_have_adaptors(tmp_path: Path) -> None:
    """They are its own if they were trained for its weights; what else lies there does not count."""
    home = shutil.copytree(load_model("grocery-32-student").path, tmp_path / "mine")
    (home / "adaptors" / ".DS_Store").write_text("x")
    (home / "adaptors" / "begun").mkdir()
    model = load_model(home)
    own = dict(own_adaptors(model))
    assert {path.name for path in own} == {"resnet-clock-2", "resnet-clock-4"}
    (record, *_) = own.values()
    found = choose_adaptor(None, model, Cut(), record.trained_for)
    assert found.manifest.path == str(home / "adaptors" / str(found.manifest.name))
    assert choose_adaptor(found.manifest.path, model, Cut(), record.trained_for).sha256 == found.sha256
    assert {path.name for path in dict(own_adaptors(load_model(home / "unet")))} == {path.name for path in own}
    other = random_weights(model, 0)
    assert choose_adaptor(None, other, Cut(), record.trained_for).manifest.kind == "identity"
    with pytest.raises(UnsupportedError, match=r"has other weights, sha256 .*: train one for them"):
        choose_adaptor("resnet-clock-2", other, Cut(), record.trained_for)


def test_a_built_in_name_means_that_whatever_lies_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("grocery-32")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet").mkdir()
    (tmp_path / "resnet-clock-4").mkdir()
    assert choose_adaptor("resnet", model, Cut(), HERE).is_built_in
    assert choose_adaptor("resnet-clock-4", model, Cut(), HERE).is_built_in
    with pytest.raises(ModelError, match="is not an adaptor"):
        choose_adaptor("./resnet", model, Cut(), HERE)


# In bundles


@pytest.mark.long
@pytest.mark.parametrize("layout", ["split", "pair"])
def test_a_learned_adaptor_in_both_targets(
    command: Command, plain_model: Path, place: Path, tmp_path: Path, layout: str
) -> None:
    path = trained(load_model(plain_model), tmp_path / "adaptor")
    bundle = place / "bundle"
    said = command("export", plain_model, "-o", bundle, "--adaptor", path, "--steps", 4, "--target", "onnx",
                   "--target", "coreml", "--layout", layout, "--json")  # fmt: skip
    assert said.code == 0, said.errors
    rows = json.loads(said.out)["rows"]
    part = "adaptor" if layout == "split" else "cached"
    outputs = {(row["check"], row["backend"]): row for row in rows if row["part"] == part}
    for backend in ("onnxruntime", "mil-reference"):
        assert outputs["graph", backend]["ok"]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["adaptor"]["trained_for"]["mask"] == [1, 0, 1, 0]
    for target in manifest["targets"]:
        graph = next(graph for graph in target["components"]["unet"]["graphs"] if graph["name"] == part)
        assert "cache" in [tensor["name"] for tensor in graph["inputs"]]
        assert "lowres_feature" in [tensor["name"] for tensor in graph["outputs"]]
    with unchanged(bundle):
        again = command("export", plain_model, "-o", bundle, "--adaptor", path, "--steps", 4, "--target", "onnx",
                        "--target", "coreml", "--layout", layout)  # fmt: skip
    assert "already there" in again.out
    # Without its adaptor, what needs the source falls back on the evidence; with another one of its name too.
    trained(load_model(plain_model), path, seed=1)
    report = edgediff.verify_bundle(bundle, record=False)
    assert report.ok
    assert {row.note for row in report.rows if row.check == "trajectory" and row.status == "measured"} == {
        "against the evidence's latents: the adaptor has changed"
    }
    shutil.rmtree(path)
    assert edgediff.verify_bundle(bundle, record=False).ok


@pytest.mark.long
def test_a_bundle_without_latents_whose_adaptor_is_lost_says_what_was_not_run(
    command: Command, plain_model: Path, place: Path
) -> None:
    path, bundle = trained(load_model(plain_model), place / "mine"), place / "bundle"
    config = edgediff.ExportConfig(steps=4, adaptor=str(path), verify=VerifyConfig(mode="graphs"))
    edgediff.export_bundle(load_model(plain_model), bundle, config)
    path.rename(place / "moved")
    said = command("verify", bundle, "--model", plain_model, "--json")
    assert (said.code, said.errors) == (0, [])
    rows = {row["check"]: row for row in json.loads(said.out)["rows"]}
    for check in ("trajectory", "caching"):
        assert rows[check]["status"] == "not_run"
        assert rows[check]["note"] == "no latents to compare with: the adaptor is not available"
    assert rows["graph"]["ok"]


def test_bad_adaptors_on_the_command_line(command: Command, class_model: Path, text_model: Path, place: Path) -> None:
    foreign = trained(load_model(text_model), place / "foreign")
    (place / "empty").mkdir()
    own = trained(load_model(class_model), place / "own")
    for spec, options, parts in (
        (foreign, (), ("trained for tiny-text of sha256", "other weights")),
        (own, ("--point", "after_upsample"), ("lowres_feature 16x8x8, emb 32", "after_upsample has", "16x16x16")),
        (place / "empty", (), ("is not an adaptor",)),
        ("resnet", (), ("no adaptor 'resnet' beside tiny-class", "choices: identity")),
    ):
        assert_error(command("export", class_model, "-o", place / "bundle", "--adaptor", spec, *options), *parts)
    assert not (place / "bundle").exists()
