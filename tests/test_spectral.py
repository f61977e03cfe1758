import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from conftest import save_pooled_width
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from unets import CASES, as_built, assert_same_unet, unet2d, unet2d_condition

from edgediff import Cut, load_model, split
from edgediff.errors import ConfigError, UnsupportedError
from edgediff.models.families import efficient
from edgediff.models.slim import plain_config
from edgediff.models.spectral import BANDS, BandGate, WaveletDown, WaveletUp, spectralize
from edgediff.models.wavelet import dwt2, idwt2

POINTS = ("before_upsample", "after_upsample")
# Residual blocks that resample do not pass the time to the gates within them.
NO_TIME = ("2d-attention-everywhere-resnet-resampling", "2d-two-levels", "unclip-like")
T = torch.tensor([371.25])


def spectral(name: str, **settings: Any) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """A case's UNet with wavelet gating, and the inputs of one step."""
    case = CASES[name]
    plain = case.build()
    torch.manual_seed(1)
    return spectralize(plain, **settings), torch.randn(2, plain.config.in_channels, 16, 16), case.cond(2)


def time_layers(unet: torch.nn.Module) -> list[torch.nn.Linear]:
    return [module.time for module in unet.modules() if isinstance(module, BandGate) and module.time is not None]


# The formulas of Spectral Diffusion, section 4.1, in numpy


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gates_of(gate: BandGate, x: np.ndarray) -> np.ndarray:
    """sigmoid(FFN(avgpool(x))): [B, 4, channels of a band]."""
    w = {name: value.numpy() for name, value in gate.double().state_dict().items()}
    hidden = silu(x.mean(axis=(2, 3)) @ w["hidden.weight"].T + w["hidden.bias"])
    numbers = hidden @ w["out.weight"].T + w["out.bias"]
    return (1 / (1 + np.exp(-numbers))).reshape(len(x), 4, -1)


@pytest.mark.parametrize("wavelet", ["haar", "db3"])
@torch.no_grad()
def test_down_is_the_gated_sum_of_the_bands(wavelet: str) -> None:
    torch.manual_seed(0)
    down, x = WaveletDown(8, wavelet), torch.randn(2, 8, 6, 10)
    ll, (lh, hl, hh) = pywt.dwt2(x.double().numpy(), wavelet, mode="periodization")
    want = np.zeros((2, 8, 3, 5))
    got = down(x)
    for i, band in enumerate((ll, lh, hl, hh)):
        want += gates_of(down.gate, x.double().numpy())[:, i, :, None, None] * band
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


@pytest.mark.parametrize("wavelet", ["haar", "db3"])
@torch.no_grad()
def test_up_reads_quarters_of_the_channels_as_gated_bands(wavelet: str) -> None:
    torch.manual_seed(0)
    up, x = WaveletUp(8, wavelet), torch.randn(2, 8, 3, 5)
    got, bands = up(x), []
    for i, band in enumerate(np.split(x.double().numpy(), 4, axis=1)):
        bands.append(gates_of(up.gate, x.double().numpy())[:, i, :, None, None] * band)
    image = pywt.idwt2((bands[0], bands[1:]), wavelet, mode="periodization")
    weight, bias = (value.double().numpy() for value in up.widen.state_dict().values())
    want = np.einsum("oc,bchw->bohw", weight[:, :, 0, 0], image) + bias[:, None, None]
    assert got.shape == (2, 8, 6, 10)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


@torch.no_grad()
def test_gates_are_shares_in_the_order_of_the_bands() -> None:
    torch.manual_seed(0)
    assert BANDS == ("LL", "LH", "HL", "HH")
    gate = BandGate(8, 5)
    gates = gate(10 * torch.randn(3, 8, 4, 4))
    assert gates.shape == (3, 4, 5, 1, 1)
    assert 0 < gates.min() < gates.max() < 1
    # Open one band and close the others: what comes out of a map of it is that map's band alone.
    rows = torch.tensor([1.0, -1.0]).repeat(4)[:, None].expand(1, 8, 8, 8)
    maps = {"LL": torch.ones(1, 8, 8, 8), "LH": rows, "HL": rows.mT, "HH": rows * rows.mT}
    down = WaveletDown(8)
    down.gate.out.weight.zero_()
    for i, opened in enumerate(BANDS):
        down.gate.out.bias.copy_(torch.where(torch.arange(32) // 8 == i, 100.0, -100.0))
        for name, x in maps.items():
            assert down(x).abs().max() == (2.0 if name == opened else 0.0), (name, opened)


def test_gates_have_the_sizes_that_fit_the_published_counts() -> None:
    # FFN C -> C/4 -> 4C on the way down, C -> C/4 -> 4 * C/4 and a 1x1 convolution C/4 -> C on the way up.
    count = [sum(p.numel() for p in module.parameters()) for module in (WaveletDown(64), WaveletUp(64))]
    assert count == [64 * 16 + 16 + 16 * 256 + 256, 64 * 16 + 16 + 16 * 64 + 64 + 16 * 64 + 64]


# UNets of every build


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_build_is_gated_divided_saved_and_loaded(name: str, tmp_path: Path) -> None:
    unet, sample, cond = spectral(name)
    plain, config = CASES[name].build(), plain_config(unet)
    assert config == plain_config(plain) | {"wavelet": "haar", "gate_takes_time": False}
    assert isinstance(unet, type(plain))
    assert not unet.training
    kinds = [type(module) for module in unet.modules()]
    assert not {Downsample2D, Upsample2D} & set(kinds)
    levels = len(unet.down_blocks)
    assert (kinds.count(WaveletDown), kinds.count(WaveletUp)) == (levels - 1, levels - 1)
    want = unet(sample, T, **cond).sample
    assert want.shape == sample.shape
    assert not torch.equal(want, plain(sample, T, **cond).sample)
    # Divided anywhere it is the same bit for bit, and so is a cached step with the cache of the same step.
    blocks = [Cut(1, f"block:{i}") for i in range(len(unet.down_blocks[0].resnets) + 1)]
    for cut in [*blocks, *(Cut(level, point) for level in range(1, levels) for point in POINTS)]:
        full, cache = split(unet, cut).full(sample, T, **cond)
        assert torch.equal(full, want), cut
        assert torch.equal(split(unet, cut).cached(sample, T, cache, **cond)[0], want), cut
    # Saved and loaded as a UNet of diffusers is, by itself and by us.
    unet.save_pretrained(tmp_path)
    save_pooled_width(unet, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == type(unet).__name__
    for loaded in (type(unet).from_pretrained(tmp_path), load_model(tmp_path).unet):
        assert type(loaded) is type(unet)
        assert json.dumps(plain_config(loaded), sort_keys=True) == json.dumps(config, sort_keys=True)
        assert_same_unet(loaded, unet)
        assert torch.equal(as_built(loaded)(sample, T, **cond).sample, want)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_TIME])
@torch.no_grad()
def test_gates_that_take_the_time(name: str, tmp_path: Path) -> None:
    unet, sample, cond = spectral(name, gate_takes_time=True)
    without, *_ = spectral(name)
    want = unet(sample, T, **cond).sample
    for level in range(1, len(unet.down_blocks)):
        for point in POINTS:
            assert torch.equal(split(unet, Cut(level, point)).full(sample, T, **cond)[0], want)
    assert torch.equal(unet(sample, T, **cond, return_dict=False)[0], want)
    unet.save_pretrained(tmp_path)
    save_pooled_width(unet, tmp_path)
    loaded = load_model(tmp_path).unet
    assert_same_unet(loaded, unet)
    assert torch.equal(as_built(loaded)(sample, T, **cond).sample, want)
    # Time moves the gates; where it has no weight, they are the gates that look at the feature alone.
    layers = time_layers(unet)
    assert len(layers) == 2 * (len(unet.down_blocks) - 1)
    for layer in layers:
        layer.weight.zero_()
        layer.bias.zero_()
    still = unet(sample, T, **cond).sample
    assert not torch.equal(still, want)
    assert not without.load_state_dict(unet.state_dict(), strict=False).missing_keys
    assert torch.equal(without(sample, T, **cond).sample, still)


@torch.no_grad()
def test_gates_take_a_time_that_class_embeddings_widen() -> None:
    plain = unet2d_condition(num_class_embeds=3, class_embeddings_concat=True)
    unet, sample = spectralize(plain, gate_takes_time=True), torch.randn(2, 4, 16, 16)
    cond = {"encoder_hidden_states": torch.randn(2, 5, 12), "class_labels": torch.tensor([0, 2])}
    want = unet(sample, T, **cond).sample
    assert torch.equal(split(unet).full(sample, T, **cond)[0], want)
    assert not torch.equal(unet(sample, T, **cond | {"class_labels": torch.tensor([1, 2])}).sample[0], want[0])


@torch.no_grad()
def test_what_is_given_by_position_arrives() -> None:
    unet, sample, cond = spectral("text-and-class", gate_takes_time=True)
    text, labels = cond["encoder_hidden_states"], cond["class_labels"]
    want = unet(sample, T, **cond).sample
    assert torch.equal(unet(sample, T, text, labels).sample, want)
    with pytest.raises(UnsupportedError, match=r"the UNet takes sample, timestep, .*; got attention_mask, "):
        unet(sample, T, text, labels, None, torch.ones(2, 5))
    classes, images, given = spectral("2d-class", gate_takes_time=True)
    assert torch.equal(classes(images, T, given["class_labels"], False)[0], classes(images, T, **given).sample)


@pytest.mark.parametrize("takes_time", [False, True])
@pytest.mark.parametrize("name", ["2d-class", "sd15-like"])
@torch.no_grad()
def test_times_keep_their_fractions(name: str, takes_time: bool) -> None:
    unet, sample, cond = spectral(name, gate_takes_time=takes_time)
    want = unet(sample, torch.tensor([371.75]), **cond).sample
    assert torch.equal(split(unet).full(sample, 371.75, **cond)[0], want)
    assert not torch.equal(unet(sample, torch.tensor([371.0]), **cond).sample, want)
    each = unet(sample, torch.tensor([371.75, 12.0]), **cond).sample
    torch.testing.assert_close(each[:1], want[:1])
    assert not torch.equal(each[1], want[1])


@pytest.mark.parametrize("takes_time", [False, True])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_every_parameter_learns(wavelet: str, takes_time: bool) -> None:
    unet, sample, cond = spectral("2d-class", wavelet=wavelet, gate_takes_time=takes_time)
    unet.train()(sample, T, **cond).sample.square().mean().backward()
    still = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # The null class was not asked for; keys of attention have a bias that softmax takes out again.
    assert [name for name in still if not name.endswith("to_k.bias")] == []


@torch.no_grad()
def test_wavelets_differ() -> None:
    haar, sample, cond = spectral("2d-class")
    other, *_ = spectral("2d-class", wavelet="sym4")
    other.load_state_dict(haar.state_dict())
    assert other.config.wavelet == "sym4"
    assert not torch.allclose(other(sample, T, **cond).sample, haar(sample, T, **cond).sample)


@torch.no_grad()
def test_the_efficient_unet_of_a_student_is_a_student() -> None:
    unet, sample, cond = spectral("sd15-like", wavelet="db2")
    slim = efficient(unet)
    assert type(slim) is type(unet)
    assert plain_config(slim)["wavelet"] == "db2"
    again = type(slim).from_config(slim.config).eval()
    again.load_state_dict(slim.state_dict())
    want = slim(sample, T, **cond).sample
    assert torch.equal(again(sample, T, **cond).sample, want)
    assert torch.equal(split(slim).full(sample, T, **cond)[0], want)


@torch.no_grad()
def test_width_and_a_copy() -> None:
    unet = unet2d(block_out_channels=(16, 32, 48))
    before = copy.deepcopy(unet.state_dict())
    narrow = spectralize(unet, 8)
    assert narrow.config.block_out_channels == (8, 16, 24)
    assert plain_config(spectralize(narrow, wavelet="db2")) == plain_config(narrow) | {"wavelet": "db2"}
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())
    with torch.device("meta"):
        assert all(p.is_meta for p in spectralize(unet, 8).parameters())


@pytest.mark.parametrize("name", ["2d-class", "2d-attention-everywhere-resnet-resampling"])
@torch.no_grad()
def test_where_the_cut_meets_the_wavelets(name: str) -> None:
    unet, sample, cond = spectral(name)
    down, up = unet.down_blocks[0].downsamplers[0], unet.up_blocks[-2].upsamplers[0]
    seen: dict[str, torch.Tensor] = {}
    for place, module in (("down", down), ("up", up)):
        module.register_forward_hook(
            lambda _, args, out, place=place: seen.update({f"{place} in": args[0], f"{place} out": out})
        )
    for point, where in (("before_upsample", "up in"), ("after_upsample", "up out")):
        divided = split(unet, Cut(1, point))
        divided.lowres.register_forward_pre_hook(lambda _, args: seen.update(highres_feature=args[0]))
        cache = divided.full(sample, T, **cond)[1]
        assert torch.equal(seen["highres_feature"], seen["down out"])
        assert torch.equal(cache, seen[where])
    if name == "2d-class":
        gates = down.gate(seen["down in"]).unbind(1)
        gated = [gate * band for gate, band in zip(gates, dwt2(seen["down in"]), strict=True)]
        # The additions are in another order.
        torch.testing.assert_close(sum(gated), seen["down out"])
    else:  # a residual block's shortcut reads the cache as bands
        up = up.upsample
    gates = up.gate(seen["up in"]).unbind(1)
    gated = [gate * band for gate, band in zip(gates, seen["up in"].chunk(4, dim=1), strict=True)]
    assert torch.equal(up.widen(idwt2(*gated)), up(seen["up in"]))


# What is refused


@pytest.mark.parametrize(
    ("name", "takes_time"),
    [(name, takes) for name in ("2d-unconditional", "sd15-like") for takes in (False, True)]
    + [("2d-two-levels", False)],
)
@torch.no_grad()
def test_sizes_that_the_levels_do_not_divide(name: str, takes_time: bool) -> None:
    unet, sample, cond = spectral(name, gate_takes_time=takes_time)
    odd = torch.cat([sample, sample[:, :, :1]], dim=2)
    words = r"a (feature|sample) of 17x16 (has no bands of half its size|cannot be cut: the levels divide)"
    with pytest.raises(UnsupportedError, match=words):
        unet(odd, T, **cond)
    with pytest.raises(UnsupportedError, match=r"a sample of 17x16 cannot be cut: the levels divide by [24]"):
        split(unet).full(odd, T, **cond)


@torch.no_grad()
def test_resamplers_refuse_sizes_that_they_cannot_make() -> None:
    with pytest.raises(UnsupportedError, match="a feature of 5x4 has no bands of half its size; expected even"):
        WaveletDown(8)(torch.zeros(1, 8, 5, 4))
    with pytest.raises(UnsupportedError, match="3x4 cannot become 5x8; expected a sample that the levels divide"):
        WaveletUp(8)(torch.zeros(1, 8, 3, 4), (5, 8))
    assert WaveletUp(8)(torch.zeros(1, 8, 3, 4), (6, 8)).shape == (1, 8, 6, 8)
    with pytest.raises(UnsupportedError, match="6 channels do not divide into four bands; expected a multiple of 4"):
        WaveletUp(6)


@pytest.mark.parametrize("name", NO_TIME)
def test_no_time_for_gates_within_residual_blocks(name: str) -> None:
    with pytest.raises(
        UnsupportedError, match="block that resamples does not pass the time to its gates; expected false"
    ):
        spectral(name, gate_takes_time=True)


def test_what_cannot_be_gated() -> None:
    with pytest.raises(ConfigError, match="wavelet 'harr' is unknown; choices: haar, db1 to db38, sym2"):
        spectralize(unet2d(), wavelet="harr")
    one = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    with pytest.raises(UnsupportedError, match="the UNet has one level and no resampling; expected two levels or more"):
        spectralize(unet2d(**one, add_attention=False))


@torch.no_grad()
def test_gates_that_see_the_time_are_divided_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, sample, cond = spectral("sd15-like", gate_takes_time=True)
    want = split(unet).full(sample, T, **cond)[0]
    twin = copy.deepcopy(unet)
    slim = efficient(unet)
    slim_want = split(slim).full(sample, T, **cond)[0]
    monkeypatch.setattr("edgediff.models.spectral.split", lambda *_: pytest.fail("divided anew"))
    assert torch.equal(unet(sample, T, **cond).sample, want)
    assert torch.equal(slim(sample, T, **cond).sample, slim_want)
    assert not torch.equal(slim_want, want)
    twin.conv_in.weight.zero_()
    assert not torch.equal(twin(sample, T, **cond).sample, want)
    assert torch.equal(unet(sample, T, **cond).sample, want)
    assert not [key for key in unet.state_dict() if "divided" in key]
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(UnsupportedError, match="FreeU is switched on, which cannot be cut; call "):
        unet(sample, T, **cond)
