import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from command_line import Command, assert_error, unchanged
from diffusers import EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from edgediff import split
from edgediff.errors import ConfigError, EdgediffError, TargetError
from edgediff.models.adaptors import LearnedAdaptor
from edgediff.models.graphs import adaptor_shape
from edgediff.models.load import Model, load_model
from edgediff.models.trained import WEIGHTS, load_adaptor
from edgediff.train.adaptor import AdaptorTrained, train_adaptor
from edgediff.train.claim import CHECKPOINTS
from edgediff.train.rollout import EDITS_APART, FIRST_SEED, TARGET, Rollouts, final_latents
from edgediff.train.settings import AdaptorTraining, load_training, training_from
from edgediff_runtime.loop import initial_latents

TINY = AdaptorTraining(steps=4, rounds=3, images=2, batch=4, learning_rate=1e-3, ema=0.5)


def tiny(**changes: object) -> AdaptorTraining:
    return msgspec.structs.replace(TINY, **changes)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / WEIGHTS)


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rollouts_of(model: Model, settings: AdaptorTraining) -> Rollouts:
    shape = adaptor_shape(split(model.unet, settings.cut), model)
    torch.manual_seed(0)
    part = LearnedAdaptor("resnet", shape)
    torch.nn.init.normal_(part.body.up.weight, std=0.1)
    return Rollouts(model, split(model.unet, settings.cut, part), settings)


# Trajectories


def test_a_teachers_rollout_is_clock_1_and_its_samples_are_the_cached_steps(class_model: Path) -> None:
    model = load_model(class_model)
    rollouts = rollouts_of(model, tiny(output_weight=1.0))
    samples = rollouts.draw(5)
    # 2 images, with their unconditional rows, at the 2 cached steps of 4.
    assert {len(tensor) for tensor in samples.values()} == {8}
    assert set(samples) >= {"highres_feature", "cache", "emb", TARGET, "out_sample", "skip_0"}
    divided = rollouts.split
    with torch.no_grad():
        given = [samples[name] for name in divided.lowres.inputs]
        assert torch.allclose(divided.lowres(*given)[0], samples[TARGET], atol=1e-5)
        of_target = {**samples, "lowres_feature": samples[TARGET]}
        out = divided.highres_out(*(of_target[name] for name in divided.highres_out.inputs))[0]
    assert torch.allclose(out, samples["out_sample"], atol=1e-5)
    assert not torch.equal(samples["cache"], samples[TARGET])


def test_a_students_rollout_feeds_its_own_outputs_back(class_model: Path) -> None:
    model = load_model(class_model)
    settings = tiny(rollout="student", clock="1,0,0,0", images=1, guidance_scale=1.0)
    rollouts = rollouts_of(model, settings)
    samples = rollouts.draw(0)
    assert len(samples[TARGET]) == 3
    with torch.no_grad():
        made = rollouts.split.adaptor(*(samples[name] for name in rollouts.split.adaptor.inputs))[0]
        target = rollouts.split.lowres(*(samples[name] for name in rollouts.split.lowres.inputs))[0]
    assert torch.allclose(made[:-1], samples["cache"][1:], atol=1e-5)
    assert torch.allclose(target, samples[TARGET], atol=1e-5)


def test_what_the_settings_leave_out_is_the_models_own(class_model: Path) -> None:
    model = load_model(class_model)
    euler = replace(model, scheduler=EulerDiscreteScheduler.from_config(model.scheduler.config))
    rollouts = rollouts_of(euler, AdaptorTraining(images=1))
    assert (rollouts.sampler, rollouts.steps, rollouts.guidance) == ("euler", model.usual_steps, model.usual_guidance)
    asked = rollouts_of(euler, AdaptorTraining(images=1, scheduler="ddim", steps=5))
    assert (asked.sampler, asked.steps) == ("ddim", 5)
    with pytest.raises(ConfigError, match="over 1 steps has no cached step"):
        rollouts_of(euler, AdaptorTraining(steps=1))


def test_rollouts_depend_on_seed_and_round_alone(class_model: Path) -> None:
    model = load_model(class_model)
    one, again = rollouts_of(model, TINY), rollouts_of(model, TINY)
    other = rollouts_of(model, tiny(seed=1))
    first = one.draw(3)
    one.draw(4)
    assert all(torch.equal(first[name], value) for name, value in again.draw(3).items())
    assert not torch.equal(first[TARGET], again.draw(4)[TARGET])
    assert not torch.equal(first[TARGET], other.draw(3)[TARGET])


def test_rounds_of_edits_begin_with_pictures_of_other_prompts(class_model: Path) -> None:
    model = load_model(class_model)
    # 4 steps: all of them, two and three; half of each, rounded down, are cached.
    rollouts = rollouts_of(model, tiny(strengths=(0.5, 0.75), guidance_scale=1.0))
    drawn = [rollouts.draw(index) for index in range(6)]
    assert [len(samples[TARGET]) for samples in drawn] == [4, 2, 2, 4, 2, 2]
    plain = rollouts_of(model, tiny(guidance_scale=1.0))
    for index, same_as_plain in ((0, True), (3, True), (1, False), (5, False)):
        assert torch.equal(drawn[index][TARGET][:2], plain.draw(index)[TARGET][:2]) == same_as_plain


def test_rounds_of_edits_are_the_edits_that_a_pipeline_makes(class_model: Path) -> None:
    model = load_model(class_model)
    rollouts = rollouts_of(model, tiny(strengths=(0.5,), guidance_scale=1.0, scheduler="ddim"))
    (start,) = rollouts.starts[1:]
    assert start == 2
    begun = rollouts._latents(FIRST_SEED + 1, start, np.random.default_rng(3))
    fresh = initial_latents(FIRST_SEED + 1 + EDITS_APART, 2, rollouts.shape, 1.0)
    kept = rollouts.scheduler.add_noise(start, np.zeros_like(fresh), fresh)
    # Without its noise it is a picture, scaled as the sampler scales it at that step.
    scale = rollouts.scheduler.add_noise(start, np.ones_like(fresh), np.zeros_like(fresh))
    picture = (begun - kept) / scale
    cond, uncond = rollouts.prompts.draw(np.random.default_rng(3), 2)
    pure = initial_latents(FIRST_SEED + 1, 2, rollouts.shape, rollouts.scheduler.init_noise_sigma)
    asked = rollouts.request(
        rollouts.session, clock=(True,) * 4, latents=pure, cond=cond, uncond=uncond, seed=FIRST_SEED + 1
    )
    assert np.allclose(picture, final_latents(asked, rollouts.session), atol=1e-4)


def test_strengths_that_leave_nothing_to_learn(class_model: Path) -> None:
    model = load_model(class_model)
    with pytest.raises(ConfigError, match=r"'strengths' has 0\.25: of 4 steps it leaves no cached one; expected more"):
        rollouts_of(model, tiny(strengths=(0.25,)))
    with pytest.raises(ConfigError, match=r"'strengths': strength is 0\.1: of 4 steps it leaves none"):
        rollouts_of(model, tiny(strengths=(0.1,)))


def test_a_text_models_prompts_come_from_a_file(text_model: Path, tmp_path: Path) -> None:
    model = load_model(text_model)
    with pytest.raises(ConfigError, match="pass prompts, one a line, or their embeddings"):
        rollouts_of(model, TINY)
    file = tmp_path / "prompts.npz"
    text = np.random.default_rng(0).normal(size=(3, 7, 12))
    np.savez(file, encoder_hidden_states=text)
    with pytest.raises(ConfigError, match=r"negative_encoder_hidden_states is missing; expected \[P, 7, 12\]"):
        rollouts_of(model, tiny(conditioning=str(file)))
    for bad, words in (
        ({"encoder_hidden_states": text[:0]}, r"encoder_hidden_states is float64 \[0, 7, 12\]"),
        ({"encoder_hidden_states": text.astype(str)}, "encoder_hidden_states is str"),
        ({"negative_encoder_hidden_states": text[:0]}, r"negative_encoder_hidden_states is float64 \[0"),
    ):
        np.savez(file, **{"encoder_hidden_states": text, "negative_encoder_hidden_states": text[:1]} | bad)
        with pytest.raises(ConfigError, match=words):
            rollouts_of(model, tiny(conditioning=str(file)))
    np.savez(file, encoder_hidden_states=text, negative_encoder_hidden_states=text[:1])
    rollouts = rollouts_of(model, tiny(conditioning=str(file)))
    cond, uncond = rollouts.prompts.draw(np.random.default_rng(1), 5)
    assert cond["encoder_hidden_states"].shape == uncond["encoder_hidden_states"].shape == (5, 7, 12)
    assert len(rollouts.draw(0)[TARGET]) == 8


# Training


def test_training_lowers_the_loss_and_touches_nothing_but_the_adaptor(class_model: Path, tmp_path: Path) -> None:
    model = load_model(class_model)
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    said: list[tuple[str, float]] = []
    done = train_adaptor(model, tmp_path / "a", tiny(rounds=12), progress=lambda *args: said.append(args))
    assert isinstance(done, AdaptorTrained)
    assert done.updates == 24
    assert done.gain.learned > done.gain.identity
    assert said[-2][1] == 1.0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.unet.state_dict().items())
    found = {file.name for file in (tmp_path / "a").iterdir()}
    assert found == {"README.md", "adaptor.json", WEIGHTS, "loss.png", "training.json"}
    assert load_adaptor(tmp_path / "a").record.trained_for.mask == (1, 0, 1, 0)
    with Image.open(tmp_path / "a" / "loss.png") as picture:
        assert picture.size == (840, 480)
    card = (tmp_path / "a" / "README.md").read_text()
    for part in (
        "4 steps of dpmpp_2m, clock 2, guidance 2",
        "seed 0",
        "accelerate",
        f"identity {done.gain.identity:.2f}",
    ):
        assert part in card
    with unchanged(tmp_path / "a"):
        assert train_adaptor(model, tmp_path / "a", tiny(rounds=12)) is None


@pytest.mark.parametrize(
    "settings",
    [
        tiny(adaptor="unet-light", schedule="cosine", output_weight=0.5, strengths=(0.5,)),
        tiny(rollout="student", clock=4),
        tiny(cut=msgspec.convert({"point": "block:1"}, type(TINY.cut))),
    ],
    ids=["unet-light", "student", "block"],
)
def test_other_settings_train_too(class_model: Path, tmp_path: Path, settings: AdaptorTraining) -> None:
    done = train_adaptor(load_model(class_model), tmp_path / "a", settings)
    assert done is not None
    assert any(
        tensor.abs().max() > 0 for name, tensor in weights(tmp_path / "a").items() if "up" in name or "out" in name
    )
    assert load_adaptor(tmp_path / "a").record.cut == settings.cut


@pytest.mark.long
def test_stored_trajectories_teach_what_fresh_ones_do(class_model: Path, tmp_path: Path) -> None:
    model = load_model(class_model)
    train_adaptor(model, tmp_path / "fresh", TINY)
    train_adaptor(model, tmp_path / "stored", tiny(store_gb=0.1))
    assert same(tmp_path / "fresh", tmp_path / "stored")
    assert not (tmp_path / "stored" / "store").exists()


def interrupted(model: Model, path: Path, settings: AdaptorTraining, visits: int) -> Path:
    """A training that is interrupted after so many passes over a round, and the checkpoint that it leaves."""
    left = [None] * visits

    def stop(what: str, share: float) -> None:
        left.pop()
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_adaptor(model, path, settings, progress=stop)
    (found,) = (path / CHECKPOINTS).iterdir()
    return found


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"rollout": "student"}, id="student", marks=pytest.mark.long),
        pytest.param({"store_gb": 0.1}, id="stored"),
    ],
)
def test_an_interrupted_training_ends_with_the_same_weights(
    class_model: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    model, settings = load_model(class_model), tiny(passes=2, output_weight=0.2, checkpoint_minutes=1e-9, **changes)
    # A round that is not stored is not left between its passes.
    kept = "visit-00000003" if "store_gb" in changes else "visit-00000002"
    assert interrupted(model, tmp_path / "a", settings, visits=4).name == kept
    resumed = train_adaptor(model, tmp_path / "a", settings)
    whole = train_adaptor(model, tmp_path / "whole", settings)
    assert resumed is not None
    assert whole is not None
    assert resumed.updates == whole.updates == 12
    assert same(tmp_path / "a", tmp_path / "whole")


@pytest.mark.long
def test_two_processes_agree(class_model: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_bytes(msgspec.yaml.encode(TINY))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
              "--standalone", "-m", "edgediff", "train", "adaptor", class_model,
              "--config", tmp_path / "settings.yaml", "-o", tmp_path / "a", "--json"]  # fmt: skip
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trained"]
    assert load_adaptor(tmp_path / "a").record.trained_for.num_inference_steps == 4
    assert "2 process(es) on cpu" in (tmp_path / "a" / "README.md").read_text()


# What goes wrong


def test_a_store_that_outgrows_its_bound(class_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 rounds of .* GB take .* GB, more than store_gb: 1e-05; raise it"):
        train_adaptor(load_model(class_model), tmp_path / "a", tiny(store_gb=1e-5))
    assert not (tmp_path / "a" / "store").exists()


def test_folders_of_something_else(class_model: Path, text_model: Path, tmp_path: Path) -> None:
    model = load_model(class_model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(TargetError, match="contains something else"):
        train_adaptor(model, tmp_path / "full", TINY)
    train_adaptor(model, tmp_path / "a", TINY)
    with unchanged(tmp_path / "a", tmp_path / "full"):
        with pytest.raises(TargetError, match="contains a training with steps 4, not 5; choose another folder"):
            train_adaptor(model, tmp_path / "a", tiny(steps=5))
        with pytest.raises(TargetError, match="another model"):
            train_adaptor(load_model(text_model), tmp_path / "a", TINY)
        with pytest.raises(TargetError, match=r"learning_rate 0\.001, not 0\.1"):
            train_adaptor(model, tmp_path / "a", tiny(learning_rate=0.1))
        assert train_adaptor(model, tmp_path / "a", tiny(checkpoint_minutes=1.0)) is None


def test_a_refused_training_leaves_nothing_behind(class_model: Path, text_model: Path, tmp_path: Path) -> None:
    for model, settings in (
        (text_model, TINY),
        (class_model, tiny(cut=msgspec.convert({"level": 7}, type(TINY.cut)))),
        (class_model, tiny(cut=msgspec.convert({"point": "block:9"}, type(TINY.cut)))),
    ):
        with pytest.raises(EdgediffError):
            train_adaptor(load_model(model), tmp_path / "a", settings)
        assert not (tmp_path / "a").exists()


def test_a_damaged_checkpoint_and_stray_files(class_model: Path, tmp_path: Path) -> None:
    model, settings = load_model(class_model), tiny(checkpoint_minutes=1e-9)
    newest = interrupted(model, tmp_path / "a", settings, visits=3)
    (newest.parent / ".DS_Store").write_text("stray")
    (newest.parent / "visit-of-mine.txt").write_text("stray")
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(TargetError, match=r"visit-00000002 is damaged .*to start again"):
            train_adaptor(model, tmp_path / "a", settings)
        (newest / name).write_bytes(whole)
    # A lower rate is not another training: it is what to do after a loss that was not finite.
    done = train_adaptor(model, tmp_path / "a", msgspec.structs.replace(settings, learning_rate=1e-4))
    assert done is not None
    assert done.updates == 6


def test_models_that_cannot_teach(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sd15 is a geometry without weights"):
        train_adaptor(load_model("sd15"), tmp_path / "a", TINY)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clock: 1", "has no cached step: there is nothing to train"),
        ("clock: [1, 1]\nsteps: 2", "no cached step"),
        ("clock: 1,0\nsteps: 3", "2 entries for 3 steps"),
        ("adaptor: identity", "'adaptor': invalid enum value 'identity'; expected one of: resnet, unet, unet-light"),
        ("rollout: both", "expected one of: teacher, student"),
        ("round: 3", "unknown key 'round', did you mean 'rounds'?"),
        ("rounds: 0", "'rounds' is 0; expected a finite number above 0"),
        ("output_weight: -1.0", "'output_weight' is -1.0"),
        ("images: 5000", "'images' is 5000; expected at most 4096"),
        ("seed: 2024-13-45", "not YAML"),
        ("x: " + 3000 * "[", "not YAML"),
        ("strengths: [0.5, 1.5]", "'strengths' has 1.5; expected numbers above 0, 1 at most"),
        ("strengths: [0]", "'strengths' has 0; expected numbers above 0"),
        ("store_gb: 0", "'store_gb' is 0"),
        ("store_gb: 1.0\nrollout: student", "cannot be stored"),
        ("- 3", "expected a mapping of settings, got list"),
    ],
)
def test_settings_that_are_wrong(command: Command, place: Path, text: str, words: str) -> None:
    (place / "settings.yaml").write_text(text)
    said = command("train", "adaptor", "grocery-32", "--config", place / "settings.yaml", "-o", place / "a")
    assert_error(said, words)
    assert not (place / "a").exists()


def test_settings_round_trip(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("model: grocery-32\nclock: [1, 0, 0]\nsteps: 3\ncut: {level: 2}\n")
    assert load_training(tmp_path / "s.yaml", AdaptorTraining) == training_from(
        {"model": "grocery-32", "clock": "1,0,0", "steps": 3, "cut": {"level": 2}}, AdaptorTraining
    )
    assert training_from({"clock": "4"}, AdaptorTraining).clock == 4


def test_the_command_trains_and_says_what_it_is_worth(command: Command, class_model: Path, place: Path) -> None:
    options = ("--steps", 4, "--rounds", 1, "--images", 2, "-o", place / "a")
    said = command("train", "adaptor", class_model, *options, "--json")
    assert said.code == 0, said.errors
    found = json.loads(said.out)
    assert found["trained"]
    assert found["gain"]["images"] == 16
    again = command("train", "adaptor", class_model, *options)
    assert "already there" in again.out
    assert_error(
        command("train", "adaptor", class_model, *options, "--clock", 4), "contains a training with clock 2, not 4"
    )
    assert_error(command("train", "adaptor", "-o", place / "b"), "no model")
    assert_error(command("train", "adaptor", class_model, "-o", place / "b", "--clock", "1"), "no cached step")
