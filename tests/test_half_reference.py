"""Numbers that fp16 does not hold: the reference of the `program` check has them as the program has them."""

import copy
import math
from pathlib import Path

import pytest
import torch
from conftest import SMALL_CLASS, SMALL_TEXT
from unets import CASES, Case, unet2d, unet2d_condition

import edgediff
from edgediff.bundle.psnr import psnr_db
from edgediff.errors import UnsupportedError
from edgediff.export.half_reference import RoundedPart
from edgediff.mil import open_program
from edgediff.models.part import Part
from edgediff.targets.base import HalfConstants
from edgediff.targets.coreml import CoreMLConfig, half_constants
from edgediff.targets.coreml.write_coreml import write_coreml
from edgediff.targets.layout import modules
from edgediff_runtime.manifest import Graph, Tensor

PLAIN = SMALL_CLASS | {"num_class_embeds": None, "in_channels": 4, "out_channels": 4}
SCALES = {"mid_block_scale_factor": math.sqrt(2), "norm_eps": 3e-6, "center_input_sample": True}
HEADS = {"block_out_channels": (20, 40), "attention_head_dim": 2, "resnet_out_scale_factor": 1.41}
SCALARS = {
    "scales": Case(lambda: unet2d(**PLAIN | SCALES)),
    "heads 10 and 20 wide": Case(lambda: unet2d_condition(**SMALL_TEXT | HEADS), CASES["sd15-like"].cond),
}


def _sharpen(part: Part) -> None:
    """Makes attention as sharp as trained ones are, and features faint, so that a norm's epsilon counts."""
    for name, parameter in part.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter.mul_(5)
        if name.endswith("conv_in.weight"):
            parameter.mul_(0.02)


@pytest.mark.parametrize(
    ("name", "system"),
    [
        pytest.param("scales", "iOS16", marks=pytest.mark.long),
        pytest.param("heads 10 and 20 wide", "iOS18", marks=pytest.mark.long),
        pytest.param("scales", "iOS18", marks=pytest.mark.long),
        pytest.param("heads 10 and 20 wide", "iOS17", marks=pytest.mark.long),
    ],
)
@torch.no_grad()
def test_a_program_has_the_reference_s_constants(name: str, system: str, tmp_path: Path) -> None:
    case, config = SCALARS[name], CoreMLConfig(dtype="fp16", deployment_target=system)
    part = modules(edgediff.split(case.build()), "pair")["full"]
    _sharpen(part)
    torch.manual_seed(1)
    values = {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([637.0]), **case.cond(2)}
    made = dict(zip(part.outputs, part(*(values[key] for key in part.inputs)), strict=True))
    kinds = {"lowres_feature": "float16"}
    inputs, outputs = (
        tuple(Tensor(key, kinds.get(key, "float32"), tuple(tensors[key].shape)) for key in keys)
        for keys, tensors in ((part.inputs, values), (part.outputs, made))
    )
    graph = Graph("full", "coreml/full.mlpackage", "full_step", inputs, outputs)
    write_coreml(tmp_path, (graph,), {"full": part}, config, lambda what: None)
    got = open_program(tmp_path / str(graph.file)).function().run(values, rounded=False)

    def worst(reference: Part) -> float:
        tensors = reference(*(values[key] for key in part.inputs))
        return min(psnr_db(t.numpy(), got[key].numpy()) for key, t in zip(part.outputs, tensors, strict=True))

    assert worst(RoundedPart(part, half_constants(system), None)) > 110
    # One scalar a thousandth off is found.
    half = RoundedPart(part, half_constants(system), None)
    for module in half.modules():
        if hasattr(module, "output_scale_factor"):
            module.output_scale_factor *= 1.001
    assert worst(half) < 90


@torch.no_grad()
def test_the_timestep_s_frequencies_stay_exact() -> None:
    part = edgediff.split(unet2d(**PLAIN)).parts["highres_in"]
    half = RoundedPart(part, half_constants("iOS18"), None)
    (exact,), (rounded,) = ({m for m in p.modules() if type(m).__name__ == "Timesteps"} for p in (part, half))
    want = exact(torch.tensor([637.0]))
    with half.rounding:
        assert torch.equal(rounded(torch.tensor([637.0])), want)
        assert torch.ones(1) / 1.41 != 1 / 1.41


@torch.no_grad()
def test_weights_are_rounded_where_they_are_taken_and_not_copied() -> None:
    part = modules(edgediff.split(unet2d_condition(**SMALL_TEXT)), "pair")["full"]
    torch.manual_seed(1)
    values = {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([637.0]), **CASES["sd15-like"].cond(2)}
    given = [values[name] for name in part.inputs]
    # Nothing but weights is rounded.
    half = RoundedPart(part, HalfConstants("exact", rounds_epsilon=False, divides=True), None)
    assert all(ours is given for ours, given in zip(half.parameters(), part.parameters(), strict=True))
    before = [parameter.clone() for parameter in part.parameters()]
    made = half(*given)
    assert all(torch.equal(old, new) for old, new in zip(before, part.parameters(), strict=True))
    rounded = copy.deepcopy(part)
    for parameter in rounded.parameters():
        parameter.copy_(parameter.half().float())
    exact = rounded(*given)
    assert all(psnr_db(want.numpy(), got.numpy()) > 120 for want, got in zip(exact, made, strict=True))


def test_a_weight_that_fp16_does_not_hold_is_named() -> None:
    part = edgediff.split(unet2d(**PLAIN)).parts["highres_in"]
    name, weight = next(iter(part.named_parameters()))
    with torch.no_grad():
        weight[0] = 7e4
    words = rf"unet: fp16 overflows in the weight {name} \(largest 7e\+04, fp16 holds 65504\); keep it in fp32"
    with pytest.raises(UnsupportedError, match=words):
        RoundedPart(part, half_constants("iOS18"), None)
