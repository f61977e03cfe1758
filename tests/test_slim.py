import pytest
import torch
from unets import CASES, unet2d, unet2d_condition

from edgediff import split
from edgediff.errors import ConfigError, UnsupportedError
from edgediff.models.load import load_model
from edgediff.models.slim import Width, plain_config, slim, slim_config
from edgediff.models.spectral import spectralize

HEADS = {"block_out_channels": (32, 96), "attention_head_dim": 24, "down_block_types": ("DownBlock2D", "DownBlock2D")}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_build_has_a_narrower_one(name: str) -> None:
    case = CASES[name]
    overrides = {"block_out_channels": tuple(4 * n for n in case.build().config.block_out_channels)}
    wide = type(case.build())(**dict(case.build().config) | overrides).eval()
    made, narrow = slim(wide, 8), case.build()
    assert made.config.block_out_channels == narrow.config.block_out_channels
    assert type(made) is type(narrow)
    assert not made.training
    sample, cond = torch.randn(2, made.config.in_channels, 16, 16), case.cond(2)
    out = made(sample, torch.tensor([371.0]), **cond).sample
    assert torch.equal(split(made).full(sample, torch.tensor([371.0]), **cond)[0], out)
    same = {key for key, value in made.config.items() if wide.config[key] == value}
    assert made.config.keys() - same <= {"block_out_channels", "norm_num_groups", "attention_head_dim"}


@pytest.mark.parametrize(
    ("name", "widths", "groups", "heads"),
    [
        ("ldm-ffhq", (64, 128, 192, 256), 32, 32),
        # Heads of 24 channels do not divide 64.
        ("ldm-church", (64, 128, 128, 256, 256), 32, 16),
        ("ldm-imagenet", (64, 128, 192, 320), 32, 1),
        ("sd15", (64, 128, 256, 256), 32, 8),
        ("sdxl", (64, 128, 256), 32, (4, 8, 16)),
    ],
)
def test_widths_groups_and_heads(name: str, widths: tuple[int, ...], groups: int, heads: object) -> None:
    unet = load_model(name).unet
    with torch.device("meta"):
        made = slim(unet, 64)
    assert made.config.block_out_channels == widths
    assert made.config.norm_num_groups == groups
    found = made.config.attention_head_dim
    assert (tuple(found) if isinstance(found, list | tuple) else found) == heads
    assert unet.config.block_out_channels[0] > 64, "the UNet itself was changed"


@pytest.mark.parametrize(
    ("given", "width", "made"),
    [
        ({"block_out_channels": (32, 48), "norm_num_groups": 16}, 8, {"block_out_channels": (8, 16)}),
        ({"block_out_channels": (32, 64), "norm_num_groups": 32}, 24, {"norm_num_groups": 24}),
        ({"block_out_channels": (48, 96), "norm_num_groups": 32}, 40, {"norm_num_groups": 20}),
        ({"block_out_channels": (32, 64), "norm_num_groups": None}, 8, {"norm_num_groups": None}),
        ({"block_out_channels": (32, 64), "time_embedding_dim": 96}, 8, {"time_embedding_dim": 24}),
        ({"block_out_channels": (32, 64), "attention_head_dim": (5, 24)}, 16, {"attention_head_dim": (4, 16)}),
        ({"block_out_channels": (64, 96), "norm_num_groups": 16}, (24, 64), {"norm_num_groups": 8}),
        # Only levels with attention bind the heads: 24 divides 48, not 16.
        (HEADS | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}, 16, {"attention_head_dim": 24}),
        (HEADS | {"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, 16, {"attention_head_dim": 16}),
    ],
)  # fmt: skip
def test_what_follows_from_a_width(given: dict, width: Width, made: dict) -> None:
    new = slim_config(given, width)
    assert {key: new[key] for key in made} == made
    assert new.keys() == given.keys()


@pytest.mark.parametrize("width", [0, -8, 4, 12, 20, 40, 64])
def test_widths_that_do_not_fit(width: int) -> None:
    with pytest.raises(ConfigError, match=f"width {width}; expected a multiple of 8 from 8 to the UNet's 32"):
        slim(unet2d(block_out_channels=(32, 32, 32)), width)


def test_each_level_may_have_a_width_of_its_own() -> None:
    made = spectralize(unet2d(block_out_channels=(32, 48, 64)), (24, 40, 32))
    assert made.config.block_out_channels == (24, 40, 32)
    for widths, words in (
        ((8, 8), r"width \[8, 8\]; expected one number, or 3, one for each"),
        ((8, 56, 8), "UNet's 48"),
    ):
        with pytest.raises(ConfigError, match=words):
            slim(unet2d(block_out_channels=(32, 48, 64)), widths)


def test_no_width_keeps_all() -> None:
    unet = unet2d_condition()
    assert plain_config(slim(unet, None)) == plain_config(unet)
    assert slim(unet, 8).config.block_out_channels == unet.config.block_out_channels


@torch.no_grad()
def test_a_spectral_unet_becomes_a_plain_one() -> None:
    plain = slim(spectralize(unet2d(block_out_channels=(16, 32, 48)), wavelet="db2"), 8)
    assert type(plain) is type(unet2d())
    assert "wavelet" not in plain.config
    assert plain.state_dict().keys() == unet2d().state_dict().keys()


def test_what_is_no_unet() -> None:
    with pytest.raises(UnsupportedError, match="no slim UNet of a Linear; supported: UNet2DModel, UNet2DCondition"):
        slim(torch.nn.Linear(1, 1), 8)
    with pytest.raises(UnsupportedError, match="no slim UNet of a Linear"):
        spectralize(torch.nn.Linear(1, 1))
