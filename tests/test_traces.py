from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from traces import fingerprint, remembering

ROWS = (torch.zeros(2, 3),)


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


def test_where_a_model_lies_does_not_matter() -> None:
    one, other = layers(), layers()
    one.config, other.config = ({"_name_or_path": folder, "width": 3} for folder in ("a", "b"))
    assert fingerprint(one, ROWS) == fingerprint(other, ROWS)
    other.config = {"_name_or_path": "b", "width": 4}
    assert fingerprint(one, ROWS) != fingerprint(other, ROWS)


def test_a_trace_is_kept_and_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[nn.Module] = []

    class Program:
        def save(self, path: Path, external_data: bool) -> None:
            assert not external_data
            weight = numpy_helper.from_array(np.full(100, len(traced), np.float32), "weight")
            onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [weight])), path)

    monkeypatch.setattr(torch.onnx, "export", lambda module, args, **_: traced.append(module) or Program())
    other = layers()
    other[0].bias.data[0] += 1
    numbers, files, kept = [], [], tmp_path / "kept"
    kept.mkdir()
    with remembering(kept):
        for i, (module, outside) in enumerate(((layers(), False), (layers(), False), (other, False), (other, True))):
            (tmp_path / str(i)).mkdir()
            torch.onnx.export(module, ROWS).save(tmp_path / str(i) / "saved", external_data=outside)
            (weight,) = onnx.load(tmp_path / str(i) / "saved").graph.initializer
            numbers.append(numpy_helper.to_array(weight)[0])
            files.append(sorted(file.name for file in (tmp_path / str(i)).iterdir()))
    assert numbers == [1, 1, 2, 2]
    assert files == [["saved"]] * 3 + [["saved", "saved.data"]]
    assert len(traced) == 2
