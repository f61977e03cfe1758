import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import pywt
import torch

from edgediff.errors import ConfigError, MissingExtraError
from edgediff.mil import evaluate
from edgediff.mil.coremltools_quiet import import_coremltools, quiet
from edgediff.mil.package import read_package
from edgediff.models import wavelet as module
from edgediff.models.part import Part
from edgediff.models.wavelet import HAAR, ORTHOGONAL, dwt2, idwt2
from edgediff.targets.coreml.mil_operations import mil_ops
from edgediff.targets.onnx import OnnxConfig
from edgediff.targets.onnx.write_onnx import write_graph
from edgediff_runtime.manifest import Graph, Tensor

SIZES = ((8, 6), (2, 2), (7, 5), (1, 3), (20, 33))
# Largest error, as a share of the largest value.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
EXPORTED = ("haar", "db2")


def image(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Noise, far from zero in its mean and different in every channel."""
    numbers = np.random.default_rng(sum(shape)).normal(size=shape)
    return torch.from_numpy(numbers + np.arange(1, shape[1] + 1)[:, None, None]).to(dtype)


def off(got: torch.Tensor, want: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    assert tuple(got.shape) == want.shape
    return float(np.abs(got.double().numpy() - want).max() / np.abs(want).max())


def theirs(x: torch.Tensor, name: str) -> tuple[np.ndarray, ...]:
    """PyWavelets' four bands, in float64."""
    ll, details = pywt.dwt2(x.double().numpy(), name, mode="periodization")
    return ll, *details


# The bands


def test_the_names_are_pywavelets_orthogonal_filters() -> None:
    known = {n for n in pywt.wavelist(kind="discrete") if pywt.Wavelet(n).orthogonal}
    assert known - set(ORTHOGONAL) == {"dmey"}
    assert set(ORTHOGONAL) <= known
    assert len(set(ORTHOGONAL)) == len(ORTHOGONAL)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_filter_gives_pywavelets_bands_and_image(dtype: torch.dtype) -> None:
    for name in ORTHOGONAL:
        for size in SIZES:
            x = image(2, 3, *size, dtype=dtype)
            want = theirs(x, name)
            got = dwt2(x, name)
            largest = max(np.abs(band).max() for band in want)
            for band, expected in zip(got, want, strict=True):
                assert band.dtype == dtype
                assert band.shape == expected.shape == (2, 3, -(-size[0] // 2), -(-size[1] // 2))
                assert np.abs(band.double().numpy() - expected).max() <= TOLERANCE[dtype] * largest, (name, size)
            again = pywt.idwt2((want[0], want[1:]), name, mode="periodization")
            assert off(idwt2(*got, name), again) <= TOLERANCE[dtype], (name, size)


def test_an_image_comes_back() -> None:
    for name in ORTHOGONAL:
        x = image(2, 3, 8, 6)
        again = idwt2(*dwt2(x, name), name)
        # Symlets stand in PyWavelets with 11 to 14 digits: its own come back as well and no better.
        bands = pywt.dwt2(x.numpy(), name, mode="periodization")
        own = off(torch.from_numpy(pywt.idwt2(bands, name, mode="periodization")), x.numpy())
        assert off(again, x.numpy()) <= max(1e-12, 1.5 * own), name
        assert own <= (1e-10 if name.startswith("sym") else 1e-12), name
        assert off(idwt2(*dwt2(x.float(), name), name), x.numpy()) <= 1e-6, name


def test_haar_in_whole_numbers_is_exact() -> None:
    x = torch.arange(96.0).reshape(2, 3, 4, 4)
    for name in HAAR:
        assert torch.equal(idwt2(*dwt2(x, name), name), x)


@pytest.mark.parametrize("name", ["haar", "db2"])
def test_taps_of_less_precision(name: str) -> None:
    x, bank = image(2, 3, 8, 6), pywt.Wavelet(name).filter_bank
    half = pywt.Wavelet("half", filter_bank=[np.float16(taps).astype(float).tolist() for taps in bank])
    ll, details = pywt.dwt2(x.numpy(), half, mode="periodization")
    got = dwt2(x, name, torch.float16)
    if name == "haar":  # by additions, its taps are no numbers that could be rounded
        assert all(torch.equal(*pair) for pair in zip(got, dwt2(x, name), strict=True))
        return
    for band, want in zip(got, (ll, *details), strict=True):
        assert band.dtype == torch.float64
        assert off(band, want) <= 1e-12
    assert off(got[0], theirs(x, name)[0]) > 1e-5
    again = pywt.idwt2((ll, details), half, mode="periodization")
    assert off(idwt2(*got, name, torch.float16), again) <= 1e-12


@pytest.mark.parametrize("name", ["haar", "db3"])
def test_gradients(name: str) -> None:
    x = image(1, 2, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dwt2(x, name), x)
    bands = [image(1, 2, 3, 2).add(i).requires_grad_() for i in range(4)]
    assert torch.autograd.gradcheck(lambda *bands: idwt2(*bands, name), bands)


@pytest.mark.parametrize("name", ["harr", "dmey", "db39", "bior2.2", "", "HAAR"])
def test_wavelets_that_are_not_there(name: str) -> None:
    choices = "choices: haar, db1 to db38, sym2 to sym20, coif1 to coif17"
    with pytest.raises(ConfigError, match=re.escape(f"wavelet {name!r} is unknown; {choices}")):
        dwt2(torch.zeros(1, 1, 2, 2), name)
    with pytest.raises(ConfigError, match="is unknown; choices: haar"):
        idwt2(*[torch.zeros(1, 1, 2, 2)] * 4, name)


def test_other_wavelets_need_pywavelets_and_haar_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pywt", None)
    module._taps.cache_clear()
    dwt2(torch.zeros(1, 1, 2, 2))
    with pytest.raises(MissingExtraError, match="the wavelet db2 needs the 'export' extra"):
        dwt2(torch.zeros(1, 1, 2, 2), "db2")


# The exported transforms, on channels and bands that all differ


class There(Part):
    """The bands, one after another in the channels."""

    def __init__(self, name: str) -> None:
        super().__init__(("x",), ("y",))
        self.name = name
        self.eval()

    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"y": torch.cat(dwt2(tensors["x"], self.name), dim=1)}


class Back(There):
    def compute(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ll, lh, hl, hh = torch.chunk(tensors["x"], 4, dim=1)
        return {"y": idwt2(ll, lh, hl, hh, self.name)}


WAYS = ((There, (3, 6, 8), (12, 3, 4)), (Back, (12, 3, 4), (3, 6, 8)))


def expected(way: type[There], name: str, x: torch.Tensor) -> np.ndarray:
    """PyWavelets' answer; every band and channel of it is another."""
    if way is There:
        want = np.concatenate(theirs(x, name), axis=1)
    else:
        ll, *details = np.split(x.double().numpy(), 4, axis=1)
        want = pywt.idwt2((ll, details), name, mode="periodization")
    flat = want.reshape(-1, *want.shape[2:])
    assert min(np.abs(flat[i] - flat[j]).max() for i in range(len(flat)) for j in range(i)) > 0.1
    return want


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize(("way", "shape", "made"), WAYS)
def test_onnx(way: type[There], shape: tuple[int, ...], made: tuple[int, ...], name: str, tmp_path: Path) -> None:
    x = image(2, *shape, dtype=torch.float32)
    graph = Graph("w", "w.onnx", "step", (Tensor("x", "float32", ("batch", *shape)),),
                  (Tensor("y", "float32", ("batch", *made)),))  # fmt: skip
    write_graph(way(name), graph, {"x": x.numpy()}, tmp_path / "w.onnx", OnnxConfig())
    session = onnxruntime.InferenceSession(tmp_path / "w.onnx", providers=["CPUExecutionProvider"])
    for rows in (x, image(5, *shape, dtype=torch.float32)):
        (got,) = session.run(None, {"x": rows.numpy()})
        assert off(torch.from_numpy(got), expected(way, name, rows)) <= 1e-6
    ops = {node.op_type for node in onnx.load(tmp_path / "w.onnx").graph.node}
    assert ops <= {"Slice", "Split", "Add", "Sub", "Mul", "Concat", "Reshape"} | ({"Conv"} if name != "haar" else set())


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize(("way", "shape"), [one[:2] for one in WAYS])
def test_core_ml(way: type[There], shape: tuple[int, ...], name: str, tmp_path: Path) -> None:
    ct = import_coremltools("a test")
    x = image(2, *shape, dtype=torch.float32)
    with quiet(), torch.no_grad():
        program = torch.export.export(way(name), (x,)).run_decompositions({})
        for dtype, precision in (("fp32", ct.precision.FLOAT32), ("fp16", ct.precision.FLOAT16)):
            ct.convert(
                program, inputs=[ct.TensorType(name="x", shape=x.shape, dtype=np.float32)],
                outputs=[ct.TensorType(name="y", dtype=np.float32)], minimum_deployment_target=ct.target.iOS17,
                compute_precision=precision, skip_model_load=True,
            ).save(str(tmp_path / f"{dtype}.mlpackage"))  # fmt: skip
    want = expected(way, name, x)
    assert off(torch.from_numpy(evaluate(tmp_path / "fp32.mlpackage", {"x": x.numpy()})["y"]), want) <= 1e-6
    assert off(torch.from_numpy(evaluate(tmp_path / "fp16.mlpackage", {"x": x.numpy()})["y"]), want) <= 2e-3
    for dtype in ("fp32", "fp16"):
        ops = list(mil_ops(read_package(tmp_path / f"{dtype}.mlpackage").spec, "main"))
        assert max(len(made.shape) for op in ops for made in op.outputs) == 4
