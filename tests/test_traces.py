from pathlib import Path

import pytest
import torch
from torch import nn
from traces import fingerprint, remembering

from edgediff.targets.onnx import write_onnx as onnx_module

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


def test_a_trace_is_kept_and_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[nn.Module] = []

    class Program:
        def save(self, path: Path, external_data: bool) -> None:
            path.write_bytes(b"graph %d" % len(traced))

    monkeypatch.setattr(torch.onnx, "export", lambda module, args, **_: traced.append(module) or Program())
    other = layers()
    other[0].bias.data[0] += 1
    saved = []
    with remembering(tmp_path):
        for module in (layers(), layers(), other):
            torch.onnx.export(module, ROWS).save(tmp_path / "saved", external_data=False)
            saved.append((tmp_path / "saved").read_bytes())
        # What is to keep its weights outside is traced each time.
        monkeypatch.setattr(onnx_module, "EXTERNAL_DATA_BYTES", 0)
        assert isinstance(torch.onnx.export(layers(), ROWS), Program)
    assert saved == [b"graph 1", b"graph 1", b"graph 2"]
    assert len(traced) == 3
