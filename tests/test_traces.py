from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from traces import fingerprint, remembering

ROWS = (torch.zeros(2, 3),)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).eval()


def test_equal_modules_have_one_fingerprint_and_others_another() -> None:
    mark = fingerprint(layers(), ROWS, opset_version=22)
    assert fingerprint(layers(), (torch.ones(2, 3),), opset_version=22) == mark
    weight, setting, mode, kind, hooked = (layers() for _ in range(5))
    weight[0].bias.data[0] += 1
    setting[1].p = 0.25
    mode.train()
    kind[1] = nn.AlphaDropout(0.5).eval()
    hooked[0].register_forward_hook(lambda *_: None)
    assert mark not in {fingerprint(module, ROWS, opset_version=22) for module in (weight, setting, mode, kind, hooked)}
    assert fingerprint(layers(), (torch.zeros(4, 3),), opset_version=22) != mark
    assert fingerprint(layers(), ROWS, opset_version=23) != mark


def hooking(factor: int) -> nn.Sequential:
    made = layers()
    made[0].register_forward_hook(lambda module, args, out: out * factor, always_call=True)
    return made


def test_hooks_count_by_what_they_do() -> None:
    """transformers hooks its encoders at their first call; each hook is a function of its own."""
    assert fingerprint(hooking(2), ROWS) == fingerprint(hooking(2), ROWS) != fingerprint(hooking(3), ROWS)


def test_where_a_model_lies_and_what_was_left_out_do_not_matter() -> None:
    one, other = layers(), layers()
    one.config = {"_name_or_path": "a", "width": 3, "_use_default_values": ["depth", "width"]}
    other.config = {"_name_or_path": "b", "width": 3, "_use_default_values": ["width", "depth"]}
    assert fingerprint(one, ROWS) == fingerprint(other, ROWS)
    other.config = {"_name_or_path": "b", "width": 4}
    assert fingerprint(one, ROWS) != fingerprint(other, ROWS)


def exported(module: nn.Module, path: Path, outside: bool = False) -> list[np.ndarray]:
    """What a module is exported to computes of some rows."""
    program = torch.onnx.export(module, ROWS, dynamo=True, dynamic_shapes=({0: "rows"},), verbose=False)
    assert program is not None
    program.save(path, external_data=outside)
    return list(ort.InferenceSession(path).run(None, {"input": np.eye(3, dtype=np.float32)}))


def test_a_trace_is_kept_and_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[nn.Module] = []
    real = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda module, *a, **b: traced.append(module) or real(module, *a, **b))
    other, deeper = layers(), nn.Sequential(layers(), nn.ReLU()).eval()
    other[0].weight.data += 1
    kept = tmp_path / "kept"
    kept.mkdir()
    with remembering(kept):
        found = [
            exported(module, tmp_path / f"{i}.onnx", outside=i == 4)
            for i, module in enumerate((layers(), layers(), other, deeper, other))
        ]
    wanted = [module(torch.eye(3)).detach().numpy() for module in (layers(), layers(), other, deeper, other)]
    for one, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one[0], want, rtol=0, atol=1e-6)
    assert (wanted[0] != wanted[2]).any()
    assert len(traced) == 2, "the third has the first one's graph with its own weights"
    assert (tmp_path / "4.onnx.data").exists()
    assert not (tmp_path / "2.onnx.data").exists()


def test_blocks_may_be_nested(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with remembering(tmp_path / "kept"), remembering(tmp_path / "kept"):
        made = exported(layers(), tmp_path / "a.onnx")
    np.testing.assert_allclose(made[0], layers()(torch.eye(3)).detach(), rtol=0, atol=1e-6)


def test_a_kept_graph_is_the_exporters_own(tmp_path: Path) -> None:
    """Nodes and weights, those that the exporter folds too, are those of a module that was traced itself."""
    torch.manual_seed(1)
    one, other = (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 4, bias=False)).eval() for _ in range(2))
    with remembering(tmp_path):
        exported(one, tmp_path / "one.onnx")
        exported(other, tmp_path / "other.onnx")
    exported(other, tmp_path / "plain.onnx")
    made, plain = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("other", "plain"))
    assert [node.op_type for node in made.node] == [node.op_type for node in plain.node]
    weights = [{t.name: numpy_helper.to_array(t) for t in graph.initializer} for graph in (made, plain)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
