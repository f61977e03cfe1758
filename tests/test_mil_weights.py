"""The storage of weights, and weights that coremltools compressed against those that it decompresses itself."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mil_programs import floats, save

from edgediff.errors import ProgramError
from edgediff.mil import evaluate, open_program
from edgediff.mil.coremltools_quiet import import_coremltools, quiet
from edgediff.mil.dtypes import DTYPES
from edgediff.mil.ops_constexpr import constexpr_lut_to_dense, constexpr_lut_to_sparse
from edgediff.mil.weight_file import WeightFile

LUT, SPARSE_LUT = "constexpr_lut_to_dense", "constexpr_lut_to_sparse"
AFFINE, SPARSE = "constexpr_affine_dequantize", "constexpr_sparse_to_dense"
BLOCKS, SPARSE_BLOCKS = "constexpr_blockwise_shift_scale", "constexpr_sparse_blockwise_shift_scale"
COUNT = 11
BLOBS = {
    "float32": np.linspace(-3, 3, COUNT, dtype=np.float32),
    "float16": np.linspace(-3, 3, COUNT, dtype=np.float16),
    "uint8": np.arange(250, 250 + COUNT, dtype=np.uint16).astype(np.uint8),
    "int8": np.arange(-5, COUNT - 5, dtype=np.int8),
    "uint16": np.arange(65000, 65000 + COUNT, dtype=np.uint16),
    "int16": np.arange(-500, COUNT - 500, dtype=np.int16),
    "int32": np.arange(-(10**6), COUNT - 10**6, dtype=np.int32),
    "uint32": np.arange(2**32 - COUNT, 2**32, dtype=np.uint32),
    "int4": (np.arange(COUNT) - 5).astype(np.int8),
    **{f"uint{bits}": (np.arange(COUNT) * 5 % 2**bits).astype(np.uint8) for bits in (1, 2, 3, 4, 6)},
}


@pytest.fixture
def blobs(tmp_path: Path) -> tuple[Path, dict[str, int]]:
    """A file as Apple's own writer writes it, and where each blob lies."""
    import_coremltools("this test")
    from coremltools.libmilstoragepython import _BlobStorageWriter

    path = tmp_path / "weight.bin"
    writer = _BlobStorageWriter(str(path))
    offsets = {}
    for name, array in BLOBS.items():
        if name == "float16":
            offsets[name] = writer.write_fp16_data(array.view(np.uint16))
        else:
            write = getattr(writer, "write_float_data" if name == "float32" else f"write_{name}_data")
            offsets[name] = write(array)
            del write
    del writer  # which closes the file
    return path, offsets


def test_every_dtype_of_a_weight_file_is_read(blobs: tuple[Path, dict[str, int]]) -> None:
    path, offsets = blobs
    file = WeightFile(path)
    assert set(BLOBS) == {name for name, dtype in DTYPES.items() if dtype.blob is not None}
    for name, offset in offsets.items():
        np.testing.assert_array_equal(file.read(offset, name, COUNT), BLOBS[name], strict=True)


@pytest.mark.parametrize(
    ("damage", "dtype", "count", "fault"),
    [
        (lambda data, at: data[:40], "float16", COUNT, "40 bytes are not a weights file, whose header takes 64"),
        (lambda data, at: struct.pack("<II", 1, 3) + data[8:], "float16", COUNT, "storage version 3; expected 2"),
        (lambda data, at: data[: at + 32], "float16", COUNT, "out of the file's"),
        (lambda data, at: data[: at + 64 + 8], "float16", COUNT, "the file is cut off at"),
        (lambda data, at: data[:at] + b"\0" * 4 + data[at + 4 :], "float16", COUNT, "expected the sentinel 0xdeadbeef"),
        (lambda data, at: data, "float32", COUNT, "is float16; the program says float32"),
        (lambda data, at: data, "float16", COUNT + 1, "has 22 bytes; 12 elements of float16 take 24"),
        (lambda data, at: data[: at + 4] + b"\x63" + data[at + 5 :], "float16", COUNT, "of unknown dtype 99"),
        (lambda data, at: data, "bfloat16", COUNT, "dtype bfloat16 is not known"),
    ],
)
def test_damaged_weight_file_is_refused(
    blobs: tuple[Path, dict[str, int]], damage: Callable[[bytes, int], bytes], dtype: str, count: int, fault: str
) -> None:
    path, offsets = blobs
    path.write_bytes(damage(path.read_bytes(), offsets["float16"]))
    with pytest.raises(ProgramError, match=fault) as caught:
        WeightFile(path).read(offsets["float16"], dtype, count)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or dtype == "bfloat16"


def _palettized(**how: Any) -> Callable[[Any, Any], Any]:
    def compress(cto: Any, model: Any) -> Any:
        config = cto.OpPalettizerConfig(mode="uniform", weight_threshold=0, **how)
        return cto.palettize_weights(model, cto.OptimizationConfig(config), joint_compression=_is_joint(model))

    return compress


def _quantized(**how: Any) -> Callable[[Any, Any], Any]:
    def compress(cto: Any, model: Any) -> Any:
        config = cto.OptimizationConfig(cto.OpLinearQuantizerConfig(weight_threshold=0, **how))
        return cto.linear_quantize_weights(model, config, joint_compression=_is_joint(model))

    return compress


def _pruned(cto: Any, model: Any) -> Any:
    config = cto.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=0)
    return cto.prune_weights(model, cto.OptimizationConfig(config))


def _pruned_and(second: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda cto, model: second(cto, _pruned(cto, model))


def _is_joint(model: Any) -> bool:
    return any(op.startswith("constexpr_") for op in _ops(model.get_spec()))


def _ops(spec: Any) -> set[str]:
    function = spec.mlProgram.functions["main"]
    return {op.type for op in function.block_specializations[function.opset].operations}


# Opset, compression, and the ops that it comes to.
RECIPES: dict[str, tuple[str, Callable[[Any, Any], Any], set[str]]] = {
    "iOS16 palette of 16": ("iOS16", _palettized(nbits=4), {LUT}),
    "iOS16 palette of 64": ("iOS16", _palettized(nbits=6), {LUT}),
    "iOS16 symmetric": ("iOS16", _quantized(mode="linear_symmetric"), {AFFINE}),
    "iOS16 affine": ("iOS16", _quantized(mode="linear", dtype=np.uint8), {AFFINE}),
    "iOS16 sparse": ("iOS16", _pruned, {SPARSE}),
    "iOS18 palettes": ("iOS18", _palettized(nbits=3, granularity="per_grouped_channel", group_size=8), {LUT}),
    "iOS18 palette of 2": ("iOS18", _palettized(nbits=1), {LUT}),
    "iOS18 blocks": ("iOS18", _quantized(mode="linear", dtype="int4", granularity="per_block", block_size=8), {BLOCKS}),
    "iOS18 uint4": ("iOS18", _quantized(mode="linear", dtype="uint4", granularity="per_tensor"), {BLOCKS}),
    "iOS18 int8": ("iOS18", _quantized(mode="linear_symmetric"), {BLOCKS}),
    "iOS18 sparse": ("iOS18", _pruned, {SPARSE}),
    "iOS18 sparse palette": ("iOS18", _pruned_and(_palettized(nbits=4)), {SPARSE_LUT, SPARSE}),
    "iOS18 sparse int8": ("iOS18", _pruned_and(_quantized(mode="linear_symmetric")), {SPARSE_BLOCKS, SPARSE}),
}
COMPRESSIONS = {"constexpr_cast"}.union(*(ops for _, _, ops in RECIPES.values()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_compressed_weights_are_those_that_coremltools_decompresses(recipe: str, tmp_path: Path) -> None:
    ct = import_coremltools("this test")
    opset, compress, ops = RECIPES[recipe]
    save(_small_model(opset), opset, tmp_path / "plain.mlpackage")
    with quiet():
        model = compress(ct.optimize.coreml, ct.models.MLModel(str(tmp_path / "plain.mlpackage"), skip_model_load=True))
        model.save(str(tmp_path / "compressed.mlpackage"))
        ct.optimize.coreml.decompress_weights(model).save(str(tmp_path / "decompressed.mlpackage"))
    assert {op for op in _ops(model.get_spec()) if op.startswith("constexpr_")} == ops
    feeds = {"x": floats(1, 16, 6, 6)}
    results = {
        name: evaluate(tmp_path / f"{name}.mlpackage", feeds) for name in ("plain", "compressed", "decompressed")
    }
    np.testing.assert_array_equal(results["compressed"]["out"], results["decompressed"]["out"])
    assert not np.array_equal(results["compressed"]["out"], results["plain"]["out"])


def _small_model(opset: str) -> Any:
    ct = import_coremltools("this test")
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    with quiet():

        @mb.program(input_specs=[mb.TensorSpec((1, 16, 6, 6), types.fp16)], opset_version=getattr(ct.target, opset))
        def program(x: Any) -> Any:
            y = mb.conv(x=x, weight=floats(32, 16, 3, 3).astype(np.float16), pad_type="valid")
            y = mb.reduce_mean(x=y, axes=[2, 3])
            return mb.linear(x=y, weight=floats(48, 32).astype(np.float16), name="out")

    return program


def test_constexpr_cast_is_float16_in_float32(tmp_path: Path) -> None:
    ct = import_coremltools("this test")
    from coremltools.converters.mil import Builder as mb

    weight = floats(5, 4).astype(np.float16)
    with quiet():

        @mb.program(input_specs=[mb.TensorSpec((2, 4))], opset_version=ct.target.iOS16)
        def program(x: Any) -> Any:
            return mb.linear(x=x, weight=mb.constexpr_cast(source_val=weight, output_dtype="fp32"), name="out")

        save(program, "iOS16", tmp_path / "a.mlpackage")
    x = floats(2, 4)
    got = evaluate(tmp_path / "a.mlpackage", {"x": x})["out"]
    np.testing.assert_allclose(got, x @ weight.astype(np.float32).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_palettes_of_vectors(axis: int) -> None:
    """coremltools makes them with scikit-learn only; what it makes of them is asked of its own decompression."""
    import_coremltools("this test")
    from coremltools.converters.mil.mil.ops.defs.iOS18 import compression

    rng = np.random.default_rng(0)
    indices = rng.integers(0, 4, (4, 6, 2)).astype(np.uint8)
    lut = rng.normal(size=(2, 1, 1, 4, 3)).astype(np.float32)
    mask = rng.integers(0, 2, (4, 6, 2)).astype(np.uint8)
    nonzero = indices[mask != 0]
    tensors = [torch.from_numpy(array) for array in (indices, lut, mask, nonzero)]
    if axis == 0:
        lut = lut[:1]  # the axis of the vectors has one palette
        tensors[1] = tensors[1][:1]
    dense = compression.constexpr_lut_to_dense.decompress(indices, lut, axis)
    got = constexpr_lut_to_dense(tensors[0], tensors[1], vector_axis=axis)
    np.testing.assert_array_equal(got.numpy(), dense)
    got_mask, got_data = constexpr_lut_to_sparse(tensors[2], tensors[3], tensors[1], axis)
    want_mask, want_data = compression.constexpr_lut_to_sparse.decompress(mask, nonzero, lut, axis)
    np.testing.assert_array_equal(got_mask.numpy(), want_mask)
    np.testing.assert_array_equal(got_data.numpy(), want_data)


def test_constants_are_unpacked_once(tmp_path: Path) -> None:
    save(_small_model("iOS17"), "iOS17", tmp_path / "a.mlpackage")
    function = open_program(tmp_path / "a.mlpackage").function()
    conv = next(step for step in function.steps if step.op == "conv")
    assert conv.fixed["weight"].dtype == torch.float32
    before = conv.fixed["weight"].data_ptr()
    function.run({"x": floats(1, 16, 6, 6)})
    assert conv.fixed["weight"].data_ptr() == before
