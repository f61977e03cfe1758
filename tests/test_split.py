import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_model
from unets import CASES, unet2d, unet2d_condition

from edgediff import Cut, load_model, split
from edgediff.errors import UnsupportedError
from edgediff.models.clockwork import SplitUNet
from edgediff.models.graphs import adaptor_shape, graph_list
from edgediff.models.macs import tally
from edgediff.models.undivided import undivided_session

POINTS = ("before_upsample", "after_upsample")


def _cuts(unet: torch.nn.Module) -> list[Cut]:
    """Every cut that a UNet allows."""
    layers = len(unet.down_blocks[0].resnets)
    levels = [Cut(level, point) for level in range(1, len(unet.down_blocks)) for point in POINTS]
    return levels + [Cut(1, f"block:{i}") for i in range(layers + 1)]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_composed_equals_the_undivided_unet_bit_for_bit(name: str) -> None:
    unet = CASES[name].build()
    before = copy.deepcopy(unet.state_dict())
    sample = torch.randn(2, unet.config.in_channels, 16, 16)
    cond = CASES[name].cond(2)
    want = unet(sample, torch.tensor([371.0]), **cond).sample
    for cut in _cuts(unet):
        divided = split(unet, cut)
        full, cache = divided.full(sample, torch.tensor([371.0]), **cond)
        cached, kept = divided.cached(sample, torch.tensor([371.0]), cache, **cond)
        assert torch.equal(full, want), cut
        assert torch.equal(cached, want), cut
        assert torch.equal(kept, cache)
    after = unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(unet(sample, torch.tensor([371.0]), **cond).sample, want)


@pytest.mark.parametrize("timestep", [371, 371.25, torch.tensor(371), torch.tensor([371.0]), torch.tensor([371, 12])])
@torch.no_grad()
def test_timestep_forms(timestep: float | torch.Tensor) -> None:
    unet = unet2d_condition()
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 12)
    want = unet(sample, timestep, encoder_hidden_states=text).sample
    assert torch.equal(split(unet).full(sample, timestep, encoder_hidden_states=text)[0], want)


@torch.no_grad()
def test_fractional_times_are_not_truncated() -> None:
    # UNet2DModel makes an integer of a Python number; a tensor keeps its fraction, and so does the split.
    unet = unet2d()
    sample = torch.randn(1, 3, 16, 16)
    want = unet(sample, torch.tensor([371.75])).sample
    assert torch.equal(split(unet).full(sample, 371.75)[0], want)


def test_weights_are_shared_and_nothing_is_added() -> None:
    unet = unet2d(num_class_embeds=5)
    names = dict(unet.named_modules()).keys()
    divided = split(unet)
    assert {id(p) for p in divided.parameters()} == {id(p) for p in unet.parameters()}
    assert dict(unet.named_modules()).keys() == names
    assert sum(p.numel() for p in divided.adaptor.parameters()) == 0


def test_mode_follows_the_unet() -> None:
    unet = unet2d()
    assert not any(module.training for module in split(unet).modules())
    unet.train()
    assert all(module.training for module in split(unet).modules())


@torch.no_grad()
def test_the_cache_is_what_before_upsample_makes_small() -> None:
    unet, sample = unet2d(), torch.randn(1, 3, 16, 16)
    small = split(unet, Cut(1, "before_upsample")).full(sample, 5)[1]
    large = split(unet, Cut(1, "after_upsample")).full(sample, 5)[1]
    assert small.shape == (1, 16, 8, 8)
    assert large.shape == (1, 16, 16, 16)


@torch.no_grad()
def test_a_stale_cache_changes_the_output_and_nothing_is_kept() -> None:
    unet, sample = unet2d(), torch.randn(1, 3, 16, 16)
    divided = split(unet)
    _, cache = divided.full(sample, 900)
    fresh = divided.full(sample, 100)[0]
    stale = divided.cached(sample, 100, cache)[0]
    assert not torch.equal(fresh, stale)
    assert torch.equal(divided.full(sample, 100)[0], fresh)


@pytest.mark.parametrize("level", [0, 3, 4, -1])
def test_levels_that_are_not_there(level: int) -> None:
    with pytest.raises(UnsupportedError, match=f"cannot cut at level {level}: the UNet has 3 levels, choices: 1, 2"):
        split(unet2d(), Cut(level))


@pytest.mark.parametrize(("level", "point"), [(1, "block:3"), (2, "block:0")])
def test_blocks_that_are_not_there(level: int, point: str) -> None:
    words = (
        f"cannot cut at level {level}, {point}: the UNet has 2 layers in its highest level; choices: level 1, block:0"
    )
    with pytest.raises(UnsupportedError, match=words):
        split(unet2d(), Cut(level, point))


@torch.no_grad()
def test_the_first_block_leaves_one_layer_outside() -> None:
    # DeepCache's branch 0: conv_in on the way down, the last layer of the last block on the way up.
    divided = split(unet2d(), Cut(1, "block:0"))
    assert len(divided.highres_in.layers) == 0
    assert len(divided.highres_out.layers) == 1
    assert divided.full(torch.randn(1, 3, 16, 16), 5)[1].shape == (1, 8, 16, 16)
    whole = split(unet2d(), Cut(1, "block:2"))
    assert [len(whole.highres_in.layers), len(whole.highres_out.layers)] == [2, 3]


def test_sizes_that_the_levels_do_not_divide() -> None:
    words = "a sample of 18x16 cannot be cut: the levels divide by 4; expected multiples of 4"
    with pytest.raises(UnsupportedError, match=words):
        split(unet2d()).full(torch.randn(1, 3, 18, 16), 1)


def test_missing_and_foreign_conditioning() -> None:
    divided, sample = split(unet2d(num_class_embeds=5)), torch.randn(1, 3, 16, 16)
    takes = "the UNet takes sample, timestep, class_labels; got "
    with pytest.raises(UnsupportedError, match=f"{takes}sample, timestep$"):
        divided.full(sample, 1)
    given = {"class_labels": torch.zeros(1, dtype=torch.long), "encoder_hidden_states": torch.zeros(1, 5, 12)}
    with pytest.raises(UnsupportedError, match=f"{takes}class_labels, encoder_hidden_states, sample, timestep$"):
        divided.full(sample, 1, **given)


@torch.no_grad()
def test_a_conditional_unet_without_attention() -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    unet = unet2d_condition(**blocks, mid_block_type="UNetMidBlock2D")
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 12)
    want = unet(sample, 5, encoder_hidden_states=text).sample
    assert split(unet).inputs == ("sample", "timestep")
    assert torch.equal(split(unet).full(sample, 5, encoder_hidden_states=text)[0], want)


SKIP = {
    "down_block_types": ("SkipDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "SkipUpBlock2D"),
    "block_out_channels": (32, 32, 32),
}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: unet2d(**SKIP), "cannot cut a UNet with a SkipDownBlock2D; supported blocks: DownBlock2D, "),
        (lambda: unet2d_condition(attention_type="gated"), "cannot cut a GLIGEN UNet (attention_type 'gated')"),
        (
            lambda: unet2d_condition(encoder_hid_dim=6, encoder_hid_dim_type="image_proj"),
            "the UNet's encoder_hid_dim_type is 'image_proj'; supported: None, text_proj",
        ),
        (lambda: torch.nn.Linear(1, 1), "cannot cut a Linear; supported: UNet2DModel, UNet2DConditionModel"),
    ],
    ids=["skip blocks", "GLIGEN", "image", "no UNet"],
)
def test_what_cannot_be_cut_is_refused_by_name(build: Callable[[], torch.nn.Module], words: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(words)):
        split(build())


@pytest.mark.parametrize("point", ["in_the_middle", "block:12345"])
def test_an_unknown_point_is_refused(point: str) -> None:
    words = f"cut point '{point}' is unknown; choices: before_upsample, after_upsample, block:N"
    with pytest.raises(UnsupportedError, match=words):
        split(unet2d(), Cut(1, point))


def test_freeu_is_refused() -> None:
    unet = unet2d_condition()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(UnsupportedError, match="FreeU is switched on, which cannot be cut; call "):
        split(unet)
    unet.disable_freeu()
    split(unet)


@pytest.mark.parametrize("channels", [9, 8, 5], ids=["inpainting", "instruct-pix2pix", "depth"])
@torch.no_grad()
def test_a_unet_that_takes_more_than_it_gives(channels: int, tmp_path: Path) -> None:
    model = load_model(save_model(unet2d_condition(in_channels=channels), tmp_path))
    assert (model.sample_shape, model.out_channels, model.space) == ((channels, 16, 16), 4, "latent")
    model.check_schedule()
    sample, text = torch.randn(2, channels, 16, 16), torch.randn(2, 5, 12)
    want = model.unet(sample, torch.tensor([371.0]), encoder_hidden_states=text).sample
    for cut in _cuts(model.unet):
        divided = split(model.unet, cut)
        assert torch.equal(divided.full(sample, 371.0, encoder_hidden_states=text)[0], want)
    graphs = {graph.name: graph for graph in graph_list(divided, model)}
    assert graphs["highres_in"].inputs[0].shape == ("batch", channels, 16, 16)
    assert graphs["highres_out"].outputs[0].shape == ("batch", 4, 16, 16)
    plain = split(unet2d_condition())
    more = (channels - 4) * unet2d_condition().conv_in.weight[:, 0].numel()
    ours, theirs = (
        tally(d, (n, 16, 16), model.conditioning.tensors).parts["full"] for d, n in ((divided, channels), (plain, 4))
    )
    assert ours.parameters - theirs.parameters == more
    assert ours.macs - theirs.macs == more * 16 * 16
    assert undivided_session(model).graphs[0].outputs[0].shape == ("batch", 4, 16, 16)


def test_shapes_and_counts_of_a_split_are_computed_once(class_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(class_model)
    divided = split(model.unet)
    first = graph_list(divided, model)
    monkeypatch.setattr(SplitUNet, "on_meta", lambda self: pytest.fail("the parts were run again"))
    assert graph_list(divided, model) == first
    assert adaptor_shape(divided, model).highres == (8, 8, 8)
    assert tally(divided, model.sample_shape, model.conditioning.tensors).cache_elements == 16 * 8 * 8


def test_a_learned_variance_is_refused(tmp_path: Path) -> None:
    model = load_model(save_model(unet2d(out_channels=6), tmp_path))
    with pytest.raises(UnsupportedError, match=r"takes 3 channels and gives 6, a learned variance.*; expected a UNet"):
        model.check_schedule()
