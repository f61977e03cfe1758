"""Whole programs: parts of UNets through the converter, functions that share weights, and what float16 may damage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_CLASS, SMALL_TEXT
from mil_programs import Case, build, floats, save
from unets import unet2d, unet2d_condition

from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.rows import Finding
from edgediff.errors import ProgramError
from edgediff.mil import evaluate, open_program
from edgediff.mil.coremltools_quiet import import_coremltools, quiet
from edgediff.models.clockwork import split
from edgediff.models.part import Part
from edgediff.targets.coreml.headroom import findings

TEXT = {"encoder_hidden_states": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))}
# What is built, its conditioning, and the precision and opset that it is converted to: each takes seconds. Fourier
# features stay in fp32: float16 does not resolve how far those of a timestep near 500 turn.
UNETS: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor], str, str]] = {
    "class": (lambda: unet2d(**SMALL_CLASS), {"class_labels": torch.tensor([1, 4])}, "float16", "iOS17"),
    "fourier": (
        lambda: unet2d(**SMALL_CLASS | {"num_class_embeds": None}, time_embedding_type="fourier"),
        {},
        "float32",
        "iOS16",
    ),
    "text": (lambda: unet2d_condition(**SMALL_TEXT), TEXT, "float16", "iOS18"),
    "text-no-mid": (
        lambda: unet2d_condition(**SMALL_TEXT, mid_block_type=None, use_linear_projection=True),
        TEXT,
        "float32",
        "iOS18",
    ),
}
FP16_FLOOR_DB = 45
FP32_FLOOR_DB = 90


def convert(part: Part, tensors: dict[str, torch.Tensor], dtype: str, opset: str, path: Path) -> None:
    ct = import_coremltools("this test")
    arguments = tuple(tensors[name] for name in part.inputs)
    with quiet():
        program = torch.export.export(part, arguments).run_decompositions({})
        inputs = [
            ct.TensorType(name, tensor.shape, np.float32 if tensor.is_floating_point() else np.int32)
            for name, tensor in zip(part.inputs, arguments, strict=True)
        ]
        ct.convert(
            program,
            inputs=inputs,
            outputs=[ct.TensorType(name) for name in part.outputs],
            convert_to="mlprogram",
            compute_precision=ct.precision.FLOAT16 if dtype == "float16" else ct.precision.FLOAT32,
            minimum_deployment_target=getattr(ct.target, opset),
            skip_model_load=True,
        ).save(str(path))


@pytest.mark.parametrize(
    "name", [name if name == "class" else pytest.param(name, marks=pytest.mark.long) for name in UNETS]
)
@torch.no_grad()
def test_parts_of_a_unet(name: str, tmp_path: Path) -> None:
    make, cond, dtype, opset = UNETS[name]
    unet = make()
    sample = torch.randn(2, unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    tensors = {"sample": sample, "timestep": torch.tensor([500.0]), **cond}
    numbers = []
    for graph, part in split(unet).parts.items():
        if graph == "adaptor":
            continue
        expected = dict(zip(part.outputs, part(*(tensors[key] for key in part.inputs)), strict=True))
        path = tmp_path / f"{graph}.mlpackage"
        convert(part, tensors, dtype, opset, path)
        got = evaluate(path, {key: tensors[key].numpy() for key in part.inputs})
        assert list(got) == list(part.outputs)
        numbers += [psnr_db(tensor.numpy(), got[key]) for key, tensor in expected.items()]
        # The converter refuses inputs of other strides, as an attention block leaves them.
        tensors.update({key: tensor.contiguous() for key, tensor in expected.items()})
    assert min(numbers) >= (FP32_FLOOR_DB if dtype == "float32" else FP16_FLOOR_DB)
    # Were nothing rounded, float16 would be better than it can be.
    assert dtype == "float32" or min(numbers) < FP32_FLOOR_DB


def test_functions_share_their_constants(tmp_path: Path) -> None:
    ct = import_coremltools("this test")
    from coremltools.converters.mil import Builder as mb

    weight = floats(6, 4)
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, bias in (("plain", np.zeros(6, dtype=np.float32)), ("raised", np.arange(12, 18, dtype=np.float32))):
        with quiet():

            @mb.program(input_specs=[mb.TensorSpec((3, 4))], opset_version=ct.target.iOS18)
            def program(x: Any) -> Any:
                return mb.linear(x=x, weight=weight, bias=bias, name="out")  # noqa: B023, called at once

            save(program, "iOS18", tmp_path / f"{name}.mlpackage")
            descriptor.add_function(str(tmp_path / f"{name}.mlpackage"), "main", name)
    descriptor.default_function_name = "raised"
    with quiet():
        ct.utils.save_multifunction(descriptor, str(tmp_path / "both.mlpackage"))

    program = open_program(tmp_path / "both.mlpackage")
    assert (program.functions, program.default) == (("plain", "raised"), "raised")
    weights = {program.function(name).steps[0].fixed["weight"].data_ptr() for name in program.functions}
    assert len(weights) == 1
    x = floats(3, 4)
    plain = evaluate(tmp_path / "both.mlpackage", {"x": x}, "plain")["out"]
    np.testing.assert_allclose(plain, x @ weight.T, rtol=1e-5, atol=1e-5)
    raised = evaluate(tmp_path / "both.mlpackage", {"x": x})["out"]
    np.testing.assert_allclose(raised - plain, np.broadcast_to(np.arange(12, 18), (3, 6)), rtol=1e-5)
    with pytest.raises(ProgramError, match="has no function 'main'; choices: plain, raised"):
        program.function("main")


def test_findings_name_what_float16_damages(tmp_path: Path) -> None:
    x = np.array([1.0, 100.0, 200.0, 300.0], dtype=np.float32)
    cases = [
        ("large", Case("mul", {"x": x, "y": np.float32([1, 100, 200, 200])}, torch.mul), "float16"),
        ("over", Case("mul", {"x": x, "y": x}, torch.mul), "float16"),
        ("tiny", Case("rsqrt", {"x": x}, torch.rsqrt, {"epsilon": np.float32(1e-6)}), "float16"),
        ("zero", Case("rsqrt", {"x": x}, torch.rsqrt, {"epsilon": np.float32(0)}), "float16"),
        ("single", Case("mul", {"x": x, "y": x}, torch.mul), "float32"),
        ("fine", Case("add", {"x": x, "y": x}, torch.add), "float16"),
    ]
    feeds = build(cases, "iOS17", tmp_path / "a.mlpackage")
    found = findings(open_program(tmp_path / "a.mlpackage").function(), feeds)
    assert [(item.kind, item.tensor, item.warns) for item in found] == [
        ("overflow", "mul_1", True),
        ("overflow", "over_0", True),
        ("headroom", "mul_0", True),
        ("headroom", "large_0", True),
        ("headroom", "add_0", False),
        ("small-constant", "rsqrt_0_epsilon_0", True),
    ]
    assert found[0] == Finding("overflow", "main", "mul_1", "mul", 1.0)
    assert found[2].value == pytest.approx(60000 / 65504, rel=1e-3)
    assert found[5].value == pytest.approx(1e-6, rel=0.05)


def test_watch_sees_every_result_as_it_is_rounded(tmp_path: Path) -> None:
    case = Case("square", {"x": floats(4, 5)}, torch.square)
    feeds = build([("y", case, "float16")], "iOS17", tmp_path / "a.mlpackage")
    function = open_program(tmp_path / "a.mlpackage").function()
    seen: list[tuple[str, str, str]] = []
    exact = function.run(feeds, rounded=False)["y_0"]

    def watch(op: str, name: str, value: torch.Tensor, dtype: str) -> None:
        seen.append((op, name, dtype))
        assert torch.equal(value, exact.half().float())

    function.run(feeds, watch=watch)
    assert seen == [("square", "square_0", "float16"), ("identity", "y_0", "float16")]
