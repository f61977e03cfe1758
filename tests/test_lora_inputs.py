"""LoRAs as inputs of the graphs: as fused ones draw, off with zeros, and refused where a file is none for a bundle."""

import functools
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from artefacts import exported, saved_once
from command_line import Command
from edits import LORA_AND_INJECTION
from loras import kohya_lora
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipelines import CONFIG, exported_pipeline, open_in_torch, saved
from safetensors.numpy import load_file, save_file

import edgediff
from edgediff.bench.contenders import check
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import REFERENCE, drawn_lora, load_reference
from edgediff.config.floors import QuantizedFloors, VerifyConfig
from edgediff.errors import ConfigError, UnsupportedError
from edgediff.models.graphs import divide
from edgediff.models.lora_factors import lora_factors
from edgediff.models.undivided import undivided_session
from edgediff.targets import TARGETS
from edgediff.targets.backends import open_pipeline
from edgediff.targets.onnx import OnnxConfig
from edgediff.verify.source import open_source
from edgediff_runtime import EdgePipeline, RequestError, open_bundle
from edgediff_runtime.low_rank import DOWN, FORMAT, UP
from edgediff_runtime.manifest import LoraInputs

RANK = 4
FLOOR_DB = 60.0
SCALE = 2.0
APART = "edgediff.targets.onnx.write_onnx.APART_BYTES"
ASKED: dict[str, Any] = {
    "prompt": "a red apple",
    "seed": 3,
    "num_inference_steps": 4,
    "clock": 2,
    "guidance_scale": 5.0,
}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def style(name: str, rank: int = RANK, layers: tuple[str, ...] = PROJECTIONS) -> Path:
    """A LoRA of a small pipeline's UNet as diffusers' training scripts save one, twice as strong as its factors."""

    def save(folder: Path) -> None:
        torch.manual_seed(9)
        pipe = diffusers_pipeline(name)
        settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(layers)}
        pipe.unet.add_adapter(LoraConfig(**settings))
        state = get_peft_model_state_dict(pipe.unet, adapter_name="default")
        drawn = {key: torch.randn(tensor.shape) / 8 for key, tensor in state.items()}
        type(pipe).save_lora_weights(folder, unet_lora_layers=drawn, unet_lora_adapter_metadata=settings)

    folder = saved_once(f"tiny-{name}-style-{rank}-{'-'.join(layers)}", save)
    return folder / "pytorch_lora_weights.safetensors"


def diffusers_pipeline(name: str) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(saved(name))


def bundle(name: str = "sd1-up", **settings: Any) -> Path:
    """Its bundle, which can inject too: one for the tests of both."""
    return exported_pipeline(name, **LORA_AND_INJECTION | settings)


def rows_shared() -> Path:
    """A bundle of the small SD 1.x whose rows share what they have in common, as large models' do."""
    return exported(saved("sd1-up"), msgspec.structs.replace(CONFIG, lora_inputs=RANK), {APART: 0})


@functools.cache
def in_torch() -> EdgePipeline:
    """The small SD 1.x whose divided UNet takes factors, by the source's own modules."""
    return open_in_torch("sd1-up", lora_rank=RANK)


def converted(path: Path, out: Path, inputs: LoraInputs | None = None) -> Path:
    """What the command writes of a file, for the small SD 1.x or the bundle that has these inputs."""
    inputs = inputs or in_torch().manifest.lora
    assert inputs is not None
    save_file(lora_factors(path, inputs), out, FORMAT)
    return out


@pytest.mark.parametrize("cut", [edgediff.Cut(), edgediff.Cut(point="block:1")])
@pytest.mark.parametrize("name", ["sd1-up", "xl"])
def test_a_divided_unet_is_the_fused_one(name: str, cut: edgediff.Cut) -> None:
    plain = edgediff.load_model(saved(name))
    fused = edgediff.load_model(saved(name), lora=[f"{style(name)}:0.5"])
    divided = divide(plain, cut, lora_rank=RANK + 2)
    names = [layer.name for each in divided.factors for layer in each.layers]
    assert len(names) == len(set(names)) == sum(name.endswith(PROJECTIONS) for name, _ in plain.unet.named_modules())
    assert not any("lora" in key for key in plain.unet.state_dict())
    width = plain.unet.config.cross_attention_dim
    torch.manual_seed(0)
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([501.0]), torch.randn(2, 77, width)
    cond: dict[str, Any] = {"encoder_hidden_states": text}
    if name == "xl":
        cond["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)}
    shapes = {key: shape for each in divided.factors for key, shape in each.shapes.items()}
    given = factors(style(name), divided, 0.5)
    assert {key: tuple(each.shape) for key, each in given.items()} == shapes
    with torch.no_grad():
        want = fused.unet(x, t, return_dict=False, **cond)[0]
        before = plain.unet(x, t, return_dict=False, **cond)[0]
        out, cache = divided.full(x, t, **cond, **given)
        off, _ = divided.full(x, t, **cond, **{key: torch.zeros(shape) for key, shape in shapes.items()})
    assert torch.equal(off, before)
    assert psnr_db(before.numpy(), want.numpy()) < 40, "the LoRA changed little: this test proves nothing"
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    apart = divide(fused, cut)
    with torch.no_grad():
        made = divided.cached(x, t, cache, **cond, **given)[0]
        torch.testing.assert_close(made, apart.cached(x, t, cache, **cond)[0], rtol=1e-4, atol=1e-4)


def factors(path: Path, divided: Any, scale: float) -> dict[str, torch.Tensor]:
    """The inputs of a divided UNet, as the runtime makes them of a file."""
    from edgediff.models.lora_inputs import lora_inputs
    from edgediff_runtime.low_rank import spread_over_inputs
    from edgediff_runtime.manifest import Tensor

    inputs = lora_inputs(divided.factors)
    assert inputs is not None
    taken = {name: Tensor(name, "float32", shape) for name, shape in inputs.shapes.items()}
    made = spread_over_inputs(inputs, lora_factors(path, inputs), scale, taken)
    return {name: torch.from_numpy(array) for name, array in made.items()}


@pytest.mark.long
def test_a_bundle_draws_what_the_fused_one_draws(tmp_path: Path) -> None:
    file, path = style("sd1-up"), bundle()
    factors_file = converted(file, tmp_path / "style.safetensors")
    pipe = EdgePipeline.from_pretrained(path, threads=1)
    manifest = pipe.manifest
    assert manifest.lora is not None
    assert manifest.lora.rank == RANK
    assert set(manifest.lora.layers) == {"highres_in", "lowres", "highres_out"}
    assert manifest.target("onnx").unet.model is None, "no other tool hands factors to a UNet"
    assert not [t.name for t in manifest.conditioning.tensors if t.name.startswith("lora_")]
    plain = EdgePipeline.from_pretrained(exported_pipeline("sd1-up"), threads=1)
    off, want = pipe(**ASKED), plain(**ASKED)
    np.testing.assert_allclose(off.latents, want.latents, rtol=1e-5, atol=1e-5)
    assert pipe(**ASKED, lora=factors_file, lora_scale=0).latents.tolist() == off.latents.tolist()
    fused = EdgePipeline.from_pretrained(fused_bundle(file, SCALE), threads=1)
    drawn, wanted = pipe(**ASKED, lora=factors_file, lora_scale=SCALE), fused(**ASKED)
    assert drawn.pixels is not None
    assert wanted.pixels is not None
    assert off.pixels is not None
    assert psnr_db(wanted.pixels, off.pixels) < 40, "the LoRA changed little: this test proves nothing"
    assert psnr_db(wanted.pixels, drawn.pixels) >= FLOOR_DB
    held = load_file(factors_file)
    assert pipe(**ASKED, lora=held, lora_scale=SCALE).latents.tolist() == drawn.latents.tolist()
    # The operations are counted.
    assert manifest.cost["full"].macs > plain.manifest.cost["full"].macs
    assert manifest.cost["cached"].macs > plain.manifest.cost["cached"].macs


def fused_bundle(file: Path, scale: float) -> Path:
    return exported(saved("sd1-up"), msgspec.structs.replace(CONFIG, lora=(f"{file}:{scale}",)), {})


def test_loras_are_joined_while_their_ranks_fit(tmp_path: Path) -> None:
    pipe = in_torch()
    small = converted(style("sd1-up", 2), tmp_path / "small.safetensors")
    once = pipe(**ASKED, lora=small, lora_scale=1.5).latents
    twice = pipe(**ASKED, lora=[small, small], lora_scale=[1.0, 0.5]).latents
    np.testing.assert_allclose(twice, once, rtol=0, atol=1e-4)
    with pytest.raises(RequestError, match="the 3 LoRAs have rank 6 together, the bundle's graphs take 4; give fewer"):
        pipe(**ASKED, lora=[small] * 3)


def test_guidance_that_ends_and_images_apart(tmp_path: Path) -> None:
    """Factors have no rows: they stay where rows come and go, and are the same for each image."""
    pipe = in_torch()
    asked = ASKED | {
        "guidance_scale": [5.0, 1.0, 1.0, 1.0],
        "lora": converted(style("sd1-up"), tmp_path / "a.safetensors"),
    }
    several = pipe(**asked, num_images=2)
    assert [step.guided for step in several.ledger] == [True, False, False, False]
    for i in range(2):
        alone = pipe(**asked, first_image=i)
        np.testing.assert_allclose(alone.latents[0], several.latents[i], rtol=0, atol=1e-4)


LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def refused(given: Any, message: str, **more: Any) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        in_torch()(**ASKED, lora=given, **more)
    assert "\n" not in str(caught.value)


def test_what_is_no_lora_of_the_bundle_is_refused(tmp_path: Path) -> None:
    good = load_file(converted(style("sd1-up"), tmp_path / "good.safetensors"))
    a, b = f"{LAYER}{DOWN}", f"{LAYER}{UP}"
    refused({**good, a: np.zeros((4, 24), np.float32)}, r"attn2.to_k is \[16, 24\] there and \[16, \d+\] in the bundle")
    refused({**good, a: np.zeros((5, good[a].shape[1]), "f"), b: np.zeros((16, 5), "f")}, "rank 5, the bundle's graphs")
    refused({**good, a: good[a][:3]}, r"factors of \S+attn2.to_k are float32 \[3, \d+\] and float32 \[16, 4\]")
    refused({**good, a: np.full_like(good[a], np.nan)}, "hold NaN or infinity")
    refused({a: good[a]}, "which no file of `edgediff lora` has")
    refused({f"{LAYER}.alpha": np.float32(4)}, "alpha, which no file of `edgediff lora` has; convert the LoRA with it")
    other = LAYER.replace("down_blocks.0", "down_blocks.7")
    refused({f"{other}{DOWN}": good[a], f"{other}{UP}": good[b]}, "has no layer down_blocks.7.*take a LoRA of the same")
    ff = LAYER.replace("attn2.to_k", "ff.net.2")
    refused(
        {f"{ff}{DOWN}": good[a], f"{ff}{UP}": good[b]},
        "layer down_blocks.0.*ff.net.2 is not an input of this bundle; export with --lora FILE to fuse it",
    )
    refused({}, "has no layers of the UNet")
    refused(3, "lora is a int; expected a file, a mapping of arrays, or a list of them")
    refused(good, "lora_scale is nan; expected a finite number", lora_scale=float("nan"))
    refused(good, "lora_scale has 2 entries for 1 files", lora_scale=[1, 2])
    refused(good, "beyond the numbers of float32", lora_scale=1e300)
    refused(None, "lora_scale was given without a lora", lora_scale=1.0)
    plain = open_in_torch("sd1-up")
    with pytest.raises(RequestError, match="the bundle's graphs take no LoRA; export with --lora-inputs RANK, or with"):
        plain(**ASKED, lora=good)


def test_files_that_are_damaged_or_not_converted(tmp_path: Path) -> None:
    file = converted(style("sd1-up"), tmp_path / "style.safetensors")
    refused(style("sd1-up"), "was not written by `edgediff lora`; convert it")
    refused(tmp_path / "absent.safetensors", "cannot be read: No such file")
    data = file.read_bytes()
    for name, content in {
        "short": data[:-2], "cut": data[:100], "empty": b"", "text": b"not a file of tensors",
        "header": (8).to_bytes(8, "little") + b"[[[[[[[[",
        "dtype": data.replace(b'"F32"', b'"F31"', 1),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, f"{name} is damaged, or no .safetensors file; write it again with `edgediff lora`")


def test_half_precision_is_read(tmp_path: Path) -> None:
    pipe = in_torch()
    tensors = load_file(converted(style("sd1-up"), tmp_path / "style.safetensors"))
    rounded = {name: torch.from_numpy(each).bfloat16() for name, each in tensors.items()}
    from safetensors.torch import save_file as save_torch

    want = pipe(**ASKED, lora={name: each.float().numpy() for name, each in rounded.items()}).latents
    for dtype in (torch.bfloat16, torch.float32):
        save_torch({name: each.to(dtype) for name, each in rounded.items()}, tmp_path / "a.safetensors", FORMAT)
        assert pipe(**ASKED, lora=tmp_path / "a.safetensors").latents.tolist() == want.tolist()


@pytest.mark.long
def test_the_command_line(tmp_path: Path, command: Command) -> None:
    path, out = bundle(), tmp_path / "style.safetensors"
    said = command("lora", path, style("sd1-up"), "-o", out)
    assert (said.code, said.errors) == (0, []), said
    assert f"of rank {RANK}, of {RANK} that the bundle takes" in said.out
    draw = ("--prompt", "a red apple", "--steps", "2", "--seed", "3", "--threads", "1")
    latents = []
    for spec in (f"{out}:0.5", out, None):
        drawn = tmp_path / "out.npy"
        said = command("run", path, "-o", drawn, *draw, *(() if spec is None else ("--lora", spec)))
        assert said.code == 0, said
        latents.append(np.load(drawn))
    want = EdgePipeline.from_pretrained(path, threads=1)(
        prompt="a red apple", num_inference_steps=2, seed=3, lora=out, lora_scale=0.5
    )
    np.testing.assert_array_equal(latents[0], want.latents)
    assert all((latents[0] != other).any() for other in latents[1:])
    assert json.loads(command("lora", path, style("sd1-up"), "-o", out, "--json").out)["rank"] == RANK


@pytest.mark.long
def test_what_the_command_refuses(tmp_path: Path, command: Command) -> None:
    path, out = bundle(), tmp_path / "style.safetensors"
    whole = kohya_lora(saved("sd1-up"), tmp_path / "kohya.safetensors")
    save_file({"weight": np.zeros(1)}, tmp_path / "none.safetensors")
    save_file({"lora_unet_x.dora_scale": np.zeros(1)}, tmp_path / "dora.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(style("sd1-up").read_bytes()[:-2])
    for given, message in (
        ((path, whole), "has layers of text_encoder, which are no inputs of a bundle; export with --lora FILE to fuse"),
        ((path, whole, "--unet-only"), "is not an input of this bundle; export with --lora FILE to fuse it"),
        ((path, style("sd1-up", 6)), "has rank 6, the bundle's graphs take 4; export with --lora-inputs 6"),
        ((path, style("xl")), "take a LoRA of the same base"),
        ((path, tmp_path / "none.safetensors"), "has no LoRA layers"),
        ((path, tmp_path / "dora.safetensors"), "is a DoRA adapter; supported: LoRA"),
        ((path, tmp_path / "damaged.safetensors"), "damaged or truncated"),
        ((path, tmp_path / "absent.safetensors"), "no such file"),
        ((path, f"{style('sd1-up')}:0.5"), "a scale is given to `edgediff run`"),
        ((path, style("sd1-up"), "-o", tmp_path / "a.npz"), "expected a name that ends in .safetensors"),
        (
            (exported_pipeline("sd1-up"), style("sd1-up")),
            "the bundle's graphs take no LoRA; export with --lora-inputs RANK",
        ),
    ):
        said = command("lora", *given, *(() if "-o" in given else ("-o", out)))
        assert said.code == 2, (given, said)
        assert len(said.errors) == 1, said
        assert message in said.errors[0], said
        assert not out.exists()
    said = command("run", path, "-o", tmp_path / "o.png", "--prompt", "x", "--lora", f"{style('sd1-up')}:much")
    assert (said.code, len(said.errors)) == (2, 1)
    assert "the scale 'much' is no number; expected FILE[:scale]" in said.errors[0]


def test_ranks_that_an_export_refuses() -> None:
    for rank in (0, 33):
        with pytest.raises(ConfigError, match=f"'lora_inputs' is {rank}; expected a rank from 1 to 32"):
            edgediff.export_bundle(edgediff.load_model(saved("sd1-up")), "out", edgediff.ExportConfig(lora_inputs=rank))


def test_a_unet_without_attention(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel(sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
                       down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
                       add_attention=False)  # fmt: skip
    with pytest.raises(UnsupportedError, match="'lora_inputs' is for UNets with attention, and this one has"):
        edgediff.split(unet, lora_rank=4)


@pytest.mark.long
def test_the_evidence_has_factors_once() -> None:
    path = bundle()
    inputs = open_bundle(path).manifest.lora
    assert inputs is not None
    stored = load_file(path / REFERENCE)
    names = [name for name in stored if "lora" in name]
    assert sorted(names) == sorted(f"lora/{name}" for name in inputs.shapes)
    assert all(np.count_nonzero(stored[name]) == stored[name].size for name in names)
    for step in load_reference(path / REFERENCE).steps:
        assert {name: step.tensors[name].shape for name in inputs.shapes} == inputs.shapes
    # The same whatever the order of the parts: a manifest's JSON is sorted.
    turned = LoraInputs(inputs.rank, dict(reversed(inputs.layers.items())))
    one, other = drawn_lora(inputs), drawn_lora(turned)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.long
@pytest.mark.parametrize("target", ["coreml", "openvino", "executorch", "litert"])
def test_every_target(target: str, tmp_path: Path) -> None:
    """Each is verified with factors that are not zero, and with rows that take other rows'; it draws as torch does."""
    name, layout = "sd1-few", "pair" if target == "openvino" else "split"
    exact = open_in_torch(name, lora_rank=RANK, injection=True)
    asked = {"seed": 3, "num_inference_steps": 2}
    asked["lora"] = converted(style(name), tmp_path / "style.safetensors", exact.manifest.lora)
    opened = open_bundle(bundle(name, targets=(target,), components=(), layout=layout))
    pipe = open_pipeline(opened, TARGETS[target].verifiers[0])
    tensor = opened.manifest.conditioning.tensors[0]
    text = np.random.default_rng(0).standard_normal((1, 77, int(tensor.shape[-1]))).astype(np.float32)
    given = asked | {"prompt_embeds": text, "negative_prompt_embeds": -text, "output_type": "latent"}
    want, drawn, off = exact(**given), pipe(**given), pipe(**given | {"lora": None})
    floor = 40.0 if target == "coreml" else FLOOR_DB
    assert psnr_db(want.latents, drawn.latents) >= floor
    assert psnr_db(want.latents, off.latents) < psnr_db(want.latents, drawn.latents) - 10


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"onnx": OnnxConfig(weights="int4")},
        {"onnx": OnnxConfig(dtype="fp16")},
        # The small UNet of random weights comes to 34.8 dB in int8, and to 34.9 without factors.
        {
            "onnx": OnnxConfig(quantize_nbits=8),
            "verify": VerifyConfig(mode="graphs", int8=QuantizedFloors(graph_db=30.0, composed_db=30.0)),
        },
        {"verify": VerifyConfig(mode="full")},
    ],
)
def test_other_forms_of_graphs(settings: dict[str, Any], tmp_path: Path) -> None:
    """Weights in fewer bits, fp16, int8, whole trajectories: factors have the dtype of the features."""
    path = bundle(**settings)
    pipe = EdgePipeline.from_pretrained(path, threads=1)
    file = converted(style("sd1-up"), tmp_path / "style.safetensors")
    off, drawn = pipe(**ASKED), pipe(**ASKED, lora=file, lora_scale=SCALE)
    wanted = EdgePipeline.from_pretrained(bundle(), threads=1)(**ASKED, lora=file, lora_scale=SCALE)
    near = psnr_db(wanted.latents, drawn.latents)
    assert near > psnr_db(wanted.latents, off.latents)
    dtypes = {t.dtype for graph in pipe.session.graphs for t in graph.inputs if t.name.startswith("lora_")}
    assert dtypes == {"float16" if pipe.manifest.target("onnx").unet.dtype == "fp16" else "float32"}


@pytest.mark.long
def test_rows_share_a_sample_beside_factors(tmp_path: Path) -> None:
    """Factors have no rows: what rows share before the text comes in, attention among it, is still computed once."""
    shared = EdgePipeline.from_pretrained(rows_shared(), threads=1)
    assert all(graph.shares_rows for graph in shared.session.graphs if graph.takes_sample)
    file = converted(style("sd1-up"), tmp_path / "style.safetensors")
    pipe = EdgePipeline.from_pretrained(bundle(), threads=1)
    one, other = (each(**ASKED, lora=file, num_images=2).latents for each in (shared, pipe))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.long
def test_the_undivided_unet_takes_factors_too() -> None:
    """What a bench in torch is checked with: the evidence, whose factors are not zero."""
    path = rows_shared()
    manifest = open_bundle(path).manifest
    found, _ = open_source(manifest, edgediff.load_model(saved("sd1-up")))
    assert found is not None
    model, divided = found
    reference = load_reference(path / REFERENCE)
    assert check(undivided_session(model, factors=divided.factors), reference, only_full=True) > 120
    assert check(undivided_session(model), reference, only_full=True) < 60
