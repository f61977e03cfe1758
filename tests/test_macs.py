import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import AttentionPooling
from torch import nn
from typer.testing import CliRunner
from unets import CASES, unet2d

from edgediff import Cut, split
from edgediff.cli import app
from edgediff.errors import UnsupportedError
from edgediff.export.export_config import load_config
from edgediff.inspect.model_survey import survey_model
from edgediff.inspect.survey import PARTS, Survey
from edgediff.models.conditioning import TensorSpec
from edgediff.models.load import load_model
from edgediff.models.macs import Tally, tally
from edgediff_runtime import RequestError

COUNTED = ("2d-class", "2d-attention-everywhere-resnet-resampling", "sd15-like", "sdxl-like", "unclip-like")
POINTS = ("before_upsample", "after_upsample")


def specs(cond: dict[str, Any]) -> dict[str, TensorSpec]:
    flat = cond | cond.get("added_cond_kwargs", {})
    flat.pop("added_cond_kwargs", None)
    return {name: TensorSpec(tuple(value.shape[1:]), value.dtype) for name, value in flat.items()}


class HandCount:
    """Multiply-adds of one run of a UNet: convolutions and linear layers by their shapes, attention by its formula."""

    def __init__(self, unet: nn.Module) -> None:
        self.plain = self.attention = 0
        for module in unet.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(self._convolution)
            elif isinstance(module, nn.Linear):
                module.register_forward_hook(self._linear)
            elif isinstance(module, Attention):
                module.register_forward_pre_hook(self._attention, with_kwargs=True)
            elif isinstance(module, AttentionPooling):
                module.register_forward_pre_hook(self._pooling)

    def _convolution(self, conv: nn.Conv2d, _: Any, out: torch.Tensor) -> None:
        self.plain += out.numel() * conv.in_channels // conv.groups * math.prod(conv.kernel_size)

    def _linear(self, linear: nn.Linear, _: Any, out: torch.Tensor) -> None:
        self.plain += out.numel() * linear.in_features

    def _attention(self, attention: Attention, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        x = args[0]
        batch = x.shape[0]
        queries = x[0, 0].numel() if x.ndim == 4 else x.shape[1]
        text = kwargs.get("encoder_hidden_states")
        keys = queries if text is None else text.shape[1]
        if attention.add_k_proj is not None:  # feature and text together
            keys += queries
        # Queries against keys, then weights against values.
        self.attention += 2 * batch * queries * keys * attention.inner_dim

    def _pooling(self, _: nn.Module, args: tuple[torch.Tensor]) -> None:
        batch, tokens, width = args[0].shape
        self.attention += 2 * batch * (tokens + 1) * width  # one query against the tokens and their mean


def test_the_hand_count_on_a_layer_known_by_heart() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    count = HandCount(layer)
    layer(torch.zeros(1, 3, 4, 4))
    assert count.plain == 16 * 8 * 3 * 9 + 128 * 10
    attention = Attention(query_dim=6, heads=2, dim_head=4, cross_attention_dim=5)
    count = HandCount(attention)
    attention(torch.zeros(1, 7, 6), encoder_hidden_states=torch.zeros(1, 3, 5))
    assert count.attention == 2 * 2 * (7 * 3 * 4)
    assert count.plain == 7 * 6 * 8 + 2 * 3 * 5 * 8 + 7 * 8 * 6


@pytest.mark.parametrize("name", COUNTED)
@torch.no_grad()
def test_a_full_step_counts_what_the_undivided_unet_does(name: str) -> None:
    case = CASES[name]
    unet, cond = case.build(), case.cond(1)
    shape = (unet.config.in_channels, 16, 16)
    cuts = (Cut(1, "before_upsample"), Cut(2, "after_upsample"))
    counted = {cut: tally(split(unet, cut), shape, specs(cond)).parts for cut in cuts}
    hand = HandCount(unet)
    unet(torch.randn(1, *shape), 371, **cond)
    assert hand.plain > 1_000_000
    assert hand.attention > 10_000
    for cut, parts in counted.items():
        assert parts["full"].macs == hand.plain, cut
        assert parts["full"].macs_attention == hand.attention, cut
        assert parts["full"].parameters == sum(p.numel() for p in unet.parameters()), cut


@pytest.mark.parametrize("point", POINTS)
def test_parts_add_up(point: str) -> None:
    unet = unet2d(num_class_embeds=5)
    parts = tally(split(unet, Cut(1, point)), (3, 16, 16), {"class_labels": TensorSpec((), torch.int64)}).parts
    assert ("t2i_adapter", "controlnet", *parts) == PARTS
    for field in ("parameters", "macs", "macs_attention"):
        of = {name: getattr(count, field) for name, count in parts.items()}
        assert of["full"] == of["highres_in"] + of["lowres"] + of["highres_out"]
        assert of["cached"] == of["highres_in"] + of["highres_out"]
        assert of["adaptor"] == 0
        assert of["lowres"] > 0


def test_counting_leaves_the_unet_as_it_was() -> None:
    unet = unet2d()
    divided = split(unet)
    before = {name: (id(p), p.device, p.requires_grad) for name, p in unet.named_parameters()}
    tally(divided, (3, 16, 16), {})
    assert {name: (id(p), p.device, p.requires_grad) for name, p in unet.named_parameters()} == before
    assert divided.full(torch.zeros(1, 3, 16, 16), 1)[0].device.type == "cpu"


def test_counting_needs_no_weights() -> None:
    unet = unet2d()
    assert tally(split(unet.to("meta")), (3, 16, 16), {}) == tally(split(unet2d()), (3, 16, 16), {})


def test_sizes_that_the_levels_do_not_divide() -> None:
    with pytest.raises(UnsupportedError, match=r"18x16.*multiples of 4"):
        tally(split(unet2d()), (3, 18, 16), {})


# Stable Diffusion v1.5, held to the papers' figures


@pytest.fixture(scope="module")
def sd15() -> Survey:
    return survey_model("sd15", None, None, None, None, None)


@pytest.fixture(scope="module")
def sd15_after_upsample() -> Tally:
    model = load_model("sd15")
    return tally(split(model.unet, Cut(1, "after_upsample")), model.sample_shape, model.conditioning.tensors)


def gflops(survey: Survey, part: str, attention: bool) -> float:
    cost = survey.cost[part]
    return 2e-9 * (cost.macs + (cost.macs_attention if attention else 0))


def test_sd15_without_attention(sd15: Survey) -> None:
    assert gflops(sd15, "full", attention=False) == pytest.approx(677.8, rel=0.005)
    highres = gflops(sd15, "highres_in", attention=False) + gflops(sd15, "highres_out", attention=False)
    assert highres == pytest.approx(228.4, rel=0.005)


@pytest.mark.parametrize(("recipe", "cached"), [("sd15-deepcache", 41.4), ("sd15-clockwork-code", 197.9)])
def test_recipes_of_other_cuts_cost_what_their_papers_say(recipe: str, cached: float) -> None:
    config = load_config(recipe)
    model = load_model("sd15")
    cost = tally(split(model.unet, config.cut), model.sample_shape, model.conditioning.tensors).parts
    assert config.adaptor == "identity"
    assert 2e-9 * cost["cached"].macs == pytest.approx(cached, abs=0.05)
    assert 2e-9 * cost["full"].macs == pytest.approx(677.8, rel=0.005)


def test_inspect_counts_an_adaptor() -> None:
    found = survey_model("grocery-32", None, None, None, None, None, "resnet")
    assert found.cost["adaptor"].parameters == 418_848
    assert found.cost["cached"].macs == sum(found.cost[p].macs for p in ("highres_in", "adaptor", "highres_out"))
    with pytest.raises(UnsupportedError, match="no adaptor 'rest'; choices: identity, resnet"):
        survey_model("grocery-32", None, None, None, None, None, "rest")


def test_sd15_with_attention(sd15: Survey) -> None:
    assert gflops(sd15, "full", attention=True) == pytest.approx(803.3, rel=0.001)
    highres = gflops(sd15, "highres_in", attention=True) + gflops(sd15, "highres_out", attention=True)
    assert highres == pytest.approx(337.5, rel=0.001)


def test_sd15_parameters(sd15: Survey) -> None:
    assert sd15.cost["full"].parameters == 859_520_964


def test_sd15_schedule(sd15: Survey) -> None:
    assert (sd15.batch, sd15.mask) == (2, (True, False) * 4)
    schedule = sd15.to_dict()["schedule"]
    assert schedule["tflops_clock1"] == pytest.approx(10.84, abs=0.005)
    assert schedule["tflops"] == pytest.approx(7.24, abs=0.005)
    assert sd15.saved(attention=False) == pytest.approx(1 - 7.2427 / 10.8355, abs=1e-4)


def test_sd15_cache(sd15: Survey, sd15_after_upsample: Tally) -> None:
    assert sd15.cache_bytes == 1280 * 32 * 32 // 2 * 4 == 2621440
    assert 4 * sd15_after_upsample.cache_elements == 4 * sd15.cache_bytes


def test_sd15_is_one_whole_wherever_it_is_cut(sd15: Survey, sd15_after_upsample: Tally) -> None:
    whole, moved = sd15_after_upsample.parts["full"], sd15_after_upsample.parts["lowres"]
    assert (whole.parameters, whole.macs) == (sd15.cost["full"].parameters, sd15.cost["full"].macs)
    # The upsampler, a 3x3 convolution of 640 channels at 64x64, belongs to lowres now.
    assert moved.macs - sd15.cost["lowres"].macs == 64 * 64 * 640 * 640 * 9


def test_inspect_prints_the_survey_as_json(sd15: Survey) -> None:
    result = CliRunner().invoke(app, ["inspect", "sd15", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == sd15.to_dict()
    for key in ("parameters", "gflops", "gflops_attention", "macs_without_attention"):
        assert {"t2i_adapter", "controlnet", *printed[key]} == set(PARTS)
    assert printed["schedule"]["mask"] == [1, 0] * 4


def test_inspect_takes_cut_clock_steps_and_batch() -> None:
    options = ["--level", "2", "--point", "after_upsample", "--clock", "1,0,0", "--steps", "3", "--batch", "5"]
    result = CliRunner().invoke(app, ["inspect", "grocery-32", "--json", *options])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["cut"] == "level 2, after_upsample"
    schedule, macs = printed["schedule"], printed["macs_without_attention"]
    assert (schedule["mask"], schedule["batch"]) == ([1, 0, 0], 5)
    assert schedule["tflops"] == pytest.approx(5 * 2e-12 * (macs["full"] + 2 * macs["cached"]))
    assert schedule["tflops_clock1"] == pytest.approx(5 * 2e-12 * 3 * macs["full"])


@pytest.mark.parametrize(
    ("clock", "steps", "batch", "words"),
    [
        ("0", None, None, "clock is 0; expected a period of 1 or more"),
        ("1,0", 3, None, "clock mask 1,0 has 2 entries for 3 steps"),
        (None, 0, None, "steps is 0; expected a whole number above 0"),
        (None, None, 0, "batch is 0; expected a whole number above 0"),
    ],
)
def test_surveys_out_of_range(clock: str | None, steps: int | None, batch: int | None, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        survey_model("grocery-32", None, None, clock, steps, batch)


def test_an_unconditional_model_runs_one_row(tmp_path: Path) -> None:
    found = survey_model(str(save_model(unet2d(), tmp_path)), None, None, None, None, None)
    assert found.batch == 1
