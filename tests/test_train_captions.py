"""Trainings on captions: what comes out is a pipeline of diffusers' that loads, resumes and goes on."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from captioned import COLOURS, KL, TEXT, UNET, captioned_folder, rows_of, training, write_rows
from command_line import Command, assert_error
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import load_file
from tiny_pipelines import SAVE
from trainings import changed, refused, same

from edgediff import ExportConfig, export_bundle, load_model
from edgediff.config.floors import VerifyConfig
from edgediff.data.batches import Batches, Wordings
from edgediff.errors import ConfigError, ModelError, TargetError, UnsupportedError
from edgediff.models.components import pipeline_components, prompt_settings
from edgediff.train import loop as training_loop
from edgediff.train.adaptor import train_adaptor
from edgediff.train.latents import load_autoencoder
from edgediff.train.loop import Loop, begin
from edgediff.train.rollout import Prompts
from edgediff.train.settings import AdaptorTraining, StudentTraining, TeacherTraining, TextGeometry, training_from
from edgediff.train.student import train_student
from edgediff.train.teacher import train_teacher
from edgediff.train.text import encode, load_text, new_text
from edgediff.train.vocabulary import learn_tokenizer

pytestmark = pytest.mark.usefixtures("few_samples")


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return captioned_folder(tmp_path_factory.mktemp("captions") / "drawings")


@pytest.fixture(scope="session")
def pipeline(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that learnt captions."""
    folder = tmp_path_factory.mktemp("pipelines") / "drawn"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgediff.train.unet.NUM_SAMPLES", 4)
        train_teacher(folder, training(drawings))
    return folder


def text_states(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "text_encoder" / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What comes out


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
def test_what_comes_out_is_a_pipeline(pipeline: Path) -> None:
    assert {path.name for path in pipeline.iterdir()} == {
        "README.md", "loss.png", "model_index.json", "samples.png", "scheduler", "text_encoder", "tokenizer",
        "training.json", "unet", "vae",
    }  # fmt: skip
    assert {path.name for path in (pipeline / "tokenizer").iterdir()} == {
        "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    }  # fmt: skip
    theirs = StableDiffusionPipeline.from_pretrained(pipeline)
    theirs.set_progress_bar_config(disable=True)
    made = theirs(["red stripes", "blue"], num_inference_steps=2, output_type="np").images
    assert made.shape == (2, 16, 16, 3)
    model = load_model(pipeline)
    assert (model.space, model.sample_shape, model.conditioning.kind) == ("latent", (4, 8, 8), "text")
    assert model.scheduler.config.prediction_type == "v_prediction"
    found = pipeline_components(model)
    assert set(found) == {"text_encoder", "vae_decoder", "vae_encoder"}
    assert prompt_settings(model, found) is not None
    card = (pipeline / "README.md").read_text()
    assert "12 images with captions, brought to 16x16" in card
    entries = len(json.loads((pipeline / "tokenizer" / "vocab.json").read_text()))
    assert f"8 tokens of a vocabulary of {entries}; trained beside the UNet" in card


@pytest.mark.long
def test_it_exports_and_is_verified(pipeline: Path, tmp_path: Path) -> None:
    export_bundle(
        load_model(pipeline),
        tmp_path / "bundle",
        ExportConfig(steps=1, clock=1, prompt="red", verify=VerifyConfig(mode="graphs")),
    )


@pytest.mark.long
def test_text_and_unet_learn_together(drawings: Path, tmp_path: Path, loops: list[Loop]) -> None:
    settings = training(drawings, updates=60, learning_rate=5e-3, autoencoder=None, label_dropout=0.0, seed=1)
    done = train_teacher(tmp_path / "a", settings)
    assert done is not None
    assert done.held_out < 0.8
    model = load_model(tmp_path / "a")
    assert (model.space, model.conditioning.kind) == ("pixel", "text")
    before = new_text(TextGeometry(**TEXT), 16, [row["text"] for row in rows_of() if row["split"] == "train"], 1)
    after = text_states(tmp_path / "a")
    moved = [name for name, weight in before.encoder.state_dict().items() if not torch.equal(after[name], weight)]
    assert any("mlp" in name for name in moved)
    assert any("token_embedding" in name for name in moved)
    # The averaged weights are those of both.
    learner = loops[0].task.averaged
    assert equal({name: each for name, each in learner.text_encoder.state_dict().items() if name in after}, after)


def test_captions_are_taken_in_all_their_forms_and_dropped(drawings: Path, tmp_path: Path, loops: list[Loop]) -> None:
    forms = ("{text}", "{keywords}")
    train_teacher(tmp_path / "a", training(drawings, captions=forms, label_dropout=0.25, updates=1, autoencoder=None))
    task: Any = loops[0].task
    tokenizer = task.text.tokenizer
    seen = [
        tokenizer.decode(row, skip_special_tokens=True)
        for number in range(100)
        for row in task.draw(task.data, 4 * number, 4, number)["cond"]["input_ids"]
    ]
    empty = sum(not caption for caption in seen) / len(seen)
    texts = sum("stripes" in caption for caption in seen) / len(seen)
    assert abs(empty - 0.25) < 0.06
    assert abs(texts - 0.375) < 0.08
    assert {"paint", "redish", "blueish"} <= set(seen)
    held_out = task.draw(task.held_out, 0, 4, 7, learning=False)["cond"]["input_ids"]
    assert {tokenizer.decode(row, skip_special_tokens=True) for row in held_out} == {
        f"{colour} stripes , flat" for colour in COLOURS
    }


def test_wordings() -> None:
    ids = torch.arange(6)[:, None].repeat(1, 2)
    wordings = Wordings(ids, torch.tensor([[[1, 1], [2, 2]], [[4, 1], [5, 1]]]))
    chosen = torch.tensor([0, 0, 0, 1])
    choice = torch.tensor([[0.4, 0.9], [0.6, 0.4], [0.6, 0.9], [0.99, 0.0]])
    assert wordings.take(chosen, choice, None)[:, 0].tolist() == [1, 2, 3, 5]
    assert wordings.take(chosen, None, None)[:, 0].tolist() == [1, 1, 1, 4]
    drop = torch.tensor([True, False, True, False])
    assert wordings.take(chosen, choice, drop)[:, 0].tolist() == [0, 2, 0, 5]
    _, cond = Batches(torch.zeros(2, 3, 2, 2), {}, seed=0, wordings=wordings).take(0, 2)
    assert sorted(cond["input_ids"][:, 0].tolist()) == [1, 4]


def test_the_vocabulary_is_learnt_and_the_same_every_time() -> None:
    captions = ["red apple, 3d", "a red Apple", "green pear's"] * 3
    one, other = (learn_tokenizer(words, 530, 8) for words in (captions, captions[::-1]))
    assert one.get_vocab() == other.get_vocab()
    assert 514 < len(one) < 530  # no pair is left that occurs twice
    assert len(learn_tokenizer(captions, 520, 8)) == 520
    assert one.decode(one("Red apple, 3D").input_ids, skip_special_tokens=True) == "red apple , 3 d"
    assert len(one("red apple").input_ids) < len(learn_tokenizer([], 530, 8)("red apple").input_ids)


def test_tokens_are_padded_and_cut_as_by_transformers() -> None:
    text = new_text(TextGeometry(**TEXT), 16, ["red"], seed=0)
    captions = ["red", "", "a caption of many words"]
    ids, cut = text.tokenize(captions)
    theirs = text.tokenizer(captions, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
    assert torch.equal(ids, theirs.input_ids)
    assert cut == 1


# Going on


def test_an_interrupted_training_ends_with_the_same_bytes(drawings: Path, tmp_path: Path) -> None:
    settings = training(drawings, updates=4, checkpoint_minutes=1e-9, captions=["{text}", "{name}"], autoencoder=None)

    def stop(what: str, share: float) -> None:
        if what.startswith("update") and share > 0.5:
            raise KeyboardInterrupt

    train_teacher(tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(tmp_path / "a", settings, progress=stop)
    assert train_teacher(tmp_path / "a", settings) is not None
    assert same(tmp_path / "a", tmp_path / "whole")
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json", "model_index.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert train_teacher(tmp_path / "a", settings) is None


def test_a_pipeline_is_trained_further(pipeline: Path, drawings: Path, tmp_path: Path) -> None:
    settings = TeacherTraining(start=str(pipeline), data=str(drawings), updates=1, batch=4, learning_rate=1e-6)
    assert train_teacher(tmp_path / "still", settings) is not None
    assert not equal(text_states(pipeline), text_states(tmp_path / "still"))  # the text encoder learns too
    a, b = load_model(pipeline), load_model(tmp_path / "still")
    for name, weight in a.unet.state_dict().items():
        assert torch.allclose(weight, b.unet.state_dict()[name], atol=1e-5)
    for name, weight in text_states(pipeline).items():
        assert torch.allclose(weight, text_states(tmp_path / "still")[name], atol=1e-5)
    assert (tmp_path / "still" / "vae" / "config.json").is_file()
    assert b.scheduler.config == a.scheduler.config
    train_teacher(tmp_path / "frozen", changed(settings, learning_rate=1e-3, text=str(pipeline)))
    assert equal(text_states(pipeline), text_states(tmp_path / "frozen"))


def test_a_foreign_pipeline_is_trained_further(drawings: Path, tmp_path: Path) -> None:
    SAVE["sd2"](tmp_path / "theirs")
    settings = TeacherTraining(start=str(tmp_path / "theirs"), data=str(big(tmp_path)), updates=1, batch=4)
    assert train_teacher(tmp_path / "a", settings) is not None
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "a").scheduler.config.prediction_type == "v_prediction"
    ours, theirs = (load_text(tmp_path / name) for name in ("a", "theirs"))
    for caption in ("a red apple", "Käse!", ""):
        assert torch.equal(ours.tokenize([caption])[0], theirs.tokenize([caption])[0])


def big(folder: Path) -> Path:
    """Pictures of the size that the tiny pipelines take."""
    from photographs import folder_of_images

    folder_of_images(folder / "big", COLOURS, each=4, size=32)
    write_rows(folder / "big", rows_of())
    return folder / "big"


def test_a_model_of_classes_is_trained_further(class_model: Path, photographs: Path, tmp_path: Path) -> None:
    settings = TeacherTraining(start=str(class_model), data=str(photographs), updates=1, batch=4)
    assert train_teacher(tmp_path / "a", settings) is not None
    assert load_model(tmp_path / "a").labels == load_model(class_model).labels


def test_a_student_learns_captions_from_its_teacher(pipeline: Path, drawings: Path, tmp_path: Path) -> None:
    settings = StudentTraining(teacher=str(pipeline), data=str(drawings), updates=2, batch=4, width=8)
    assert train_student(tmp_path / "a", settings) is not None
    assert equal(text_states(pipeline), text_states(tmp_path / "a"))
    model = load_model(tmp_path / "a")
    assert (model.space, model.conditioning) == ("latent", load_model(pipeline).conditioning)
    assert (tmp_path / "a" / "vae").is_dir()
    further = changed(settings, student=str(tmp_path / "a"), width=None, updates=1)
    assert train_student(tmp_path / "b", further) is not None


@pytest.mark.long
def test_a_student_learns_the_latents_of_a_small_autoencoder(pipeline: Path, drawings: Path, tmp_path: Path) -> None:
    theirs = shutil.copytree(pipeline, tmp_path / "pipeline")
    shutil.rmtree(theirs / "vae")
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    tiny.save_pretrained(theirs / "vae")
    index = json.loads((theirs / "model_index.json").read_text())
    (theirs / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    settings = StudentTraining(teacher=str(theirs), data=str(drawings), updates=1, batch=4, width=8)
    assert train_student(tmp_path / "a", settings) is not None
    assert load_autoencoder(tmp_path / "a").config["_class_name"] == "AutoencoderTiny"
    assert json.loads((tmp_path / "a" / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderTiny"]


def test_an_adaptor_learns_from_prompts(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red stripes\n\nblue stripes, flat\n")
    model = load_model(pipeline)
    settings = AdaptorTraining(
        conditioning=str(tmp_path / "prompts.txt"), rounds=1, images=2, steps=2, guidance_scale=2.0
    )
    assert train_adaptor(model, tmp_path / "adaptor", settings) is not None
    text = load_text(pipeline)
    expected = encode(text.encoder, text.tokenize(["red stripes", "blue stripes, flat", ""])[0]).numpy()
    prompts = Prompts.of(model, True, str(tmp_path / "prompts.txt"))
    np.testing.assert_array_equal(prompts.cond["encoder_hidden_states"], expected[:2])
    np.testing.assert_array_equal(prompts.uncond["encoder_hidden_states"], expected[2:])
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(ConfigError, match="is empty; expected prompts, one a line"):
        Prompts.of(model, True, str(tmp_path / "prompts.txt"))


# Bad input


def test_long_captions_are_cut_and_counted(tmp_path: Path, command: Command) -> None:
    folder = captioned_folder(tmp_path / "drawings")
    rows = rows_of()
    rows[0]["text"] = "a caption that goes on and on and is never as short as it could be"
    rows[1]["text"] = None
    write_rows(folder, rows)
    settings = training(folder, text=TEXT | {"vocab_size": 700}, autoencoder=None, updates=1)
    (tmp_path / "a.yaml").write_bytes(msgspec.yaml.encode(settings))
    said = command("train", "teacher", "--config", tmp_path / "a.yaml", "-o", tmp_path / "a")
    assert said.code == 0
    assert "1 image skipped: 1 without a caption (red/001.png)" in said.errors
    assert "1 captions were longer than the text encoder takes, and were cut" in said.errors


def test_the_command_trains_further(pipeline: Path, drawings: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "some.txt").write_text("red\ngreen\n")
    options = ["--from", pipeline, "--data", drawings, "--only", f"name={tmp_path / 'some.txt'}", "--updates", 1]
    said = command("train", "teacher", *options, "--batch", 4, "-o", tmp_path / "a", "--json")
    assert said.code == 0
    found = json.loads(said.out)
    assert (found["images"], found["updates"], found["cut"]) == (6, 1, 0)
    assert_error(command("train", "teacher", *options, "--only", "name", "-o", tmp_path / "b"), "expected COLUMN=FILE")
    (tmp_path / "drawings").mkdir()
    (tmp_path / "drawings" / "metadata.jsonl").touch()
    empty = command("train", "teacher", "--from", pipeline, "--data", tmp_path / "drawings", "-o", tmp_path / "b")
    assert_error(empty, "metadata.jsonl is empty")
    assert not (tmp_path / "b").exists()


def test_other_captions_under_the_same_name_are_refused(tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "drawings")
    settings = training(folder, updates=1, autoencoder=None)
    train_teacher(tmp_path / "a", settings)
    rows = rows_of()
    rows[0]["text"] = "something else"
    write_rows(folder, rows)
    with pytest.raises(TargetError, match="contains a training with other images; choose another folder"):
        train_teacher(tmp_path / "a", settings)


def test_what_does_not_fit_is_refused(drawings: Path, pipeline: Path, tmp_path: Path) -> None:
    flat: dict[str, Any] = UNET | {
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
        "mid_block_type": "UNetMidBlock2D",
    }  # fmt: skip
    further = TeacherTraining(start=str(pipeline), data=str(drawings), updates=1)
    for settings, kind, words in (
        (training(drawings, text=None), ConfigError, "conditioned on text; expected 'text' in the settings"),
        (training(drawings, unet=flat), ConfigError, "the geometry has no cross-attention"),
        (training(drawings, unet=UNET | {"cross_attention_dim": 24}, text=str(pipeline)), ConfigError, "is 16 wide"),
        (training(drawings, text=TEXT | {"num_attention_heads": 3}), ConfigError, "divisor of cross_attention_dim 16"),
        (training(drawings, text=TEXT | {"vocab_size": 100}), ConfigError, "'text.vocab_size' is 100; expected 514 to"),
        (training(drawings, text=TEXT | {"layers": 1}), ConfigError, "unknown key 'layers'"),
        (training(drawings, text=TEXT | {"num_hidden_layers": 0}), ConfigError, "'num_hidden_layers' is 0"),
        (training(drawings, text=TEXT | {"max_position_embeddings": 2}), ConfigError, "is 2; expected 3 to"),
        (training(drawings, text=str(drawings)), ModelError, "config.json"),
        (training(drawings, captions=[]), ConfigError, "'captions' is empty"),
        (changed(further, size=32), ConfigError, "'size' with 'start': a model that is trained further has its own"),
        (changed(further, autoencoder=KL), ConfigError, "'autoencoder' with 'start'"),
        (changed(further, text=TEXT), ConfigError, "'text' with 'start'"),
        (changed(further, unet=UNET), ConfigError, "'start' and 'unet' were given; expected one of"),
        (changed(further, start="grocery-32", text="x"), ConfigError, "grocery-32 takes no text"),
        (changed(further, start="grocery-32", only={"a": "b"}), ConfigError, "the model learns no captions"),
        (changed(further, start="sd15"), ConfigError, "sd15 is a geometry without weights"),
    ):  # fmt: skip
        refused(tmp_path, settings, kind, words)


def test_models_of_two_texts_are_refused(drawings: Path, tmp_path: Path) -> None:
    SAVE["xl"](tmp_path / "xl")
    further = TeacherTraining(start=str(tmp_path / "xl"), data=str(drawings), updates=1)
    refused(tmp_path, further, UnsupportedError, "text_embeds, time_ids; supported in training")


@pytest.mark.long
def test_a_student_of_other_latents_or_text_is_refused(drawings: Path, pipeline: Path, tmp_path: Path) -> None:
    train_teacher(tmp_path / "other", training(drawings, updates=1, autoencoder=KL | {"seed": 1}))
    train_teacher(tmp_path / "third", training(drawings, seed=2, updates=1, autoencoder=str(pipeline)))
    train_teacher(tmp_path / "six", training(drawings, updates=1, autoencoder=KL | {"latent_channels": 6}))
    train_teacher(tmp_path / "pixels", training(drawings, updates=1, autoencoder=None, size=8))
    settings = StudentTraining(teacher=str(pipeline), data=str(drawings), updates=1, batch=4)
    for student, words in (
        ("other", "the teacher drawn has another autoencoder than the student: expected the same"),
        ("third", "the teacher drawn has another text encoder than the student: expected the same"),
        ("pixels", "in_channels 4, the student 3; out_channels 4, the student 3: expected the same"),
        ("six", "the teacher drawn has in_channels 4, the student 6; out_channels 4, the student 6"),
    ):
        refused(tmp_path, changed(settings, student=str(tmp_path / student)), ConfigError, words)


# Precision


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate has one precision for a process, that of its first training."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("amx", "precision"), [(True, "bf16"), (False, "no")])
@pytest.mark.usefixtures("fresh_accelerate")
def test_bf16_where_the_processor_multiplies_it_faster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, amx: bool, precision: str
) -> None:
    monkeypatch.setattr(training_loop.torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    assert begin(tmp_path, None, "auto")[0].mixed_precision == precision


@pytest.mark.usefixtures("fresh_accelerate")
def test_mixed_precision_learns_text_too(drawings: Path, tmp_path: Path) -> None:
    settings = training(drawings, precision="bf16", updates=2, autoencoder=None)
    done = train_teacher(tmp_path / "a", settings)
    assert done is not None
    assert np.isfinite(done.held_out)
    assert {weight.dtype for weight in text_states(tmp_path / "a").values()} == {torch.float32}


def test_settings_are_read_strictly() -> None:
    asked = {"unet": UNET, "text": TEXT, "only": {"name": "things.txt"}, "captions": ["{name}"], "precision": "auto"}
    settings = training_from(asked, TeacherTraining)
    assert (settings.only, settings.captions) == ({"name": "things.txt"}, ("{name}",))
    with pytest.raises(ConfigError, match="only"):
        training_from(asked | {"only": ["things.txt"]}, TeacherTraining)


def test_the_states_are_those_of_diffusers(pipeline: Path) -> None:
    text = load_text(pipeline)
    theirs = StableDiffusionPipeline.from_pretrained(pipeline)
    expected, _ = theirs.encode_prompt("red stripes", "cpu", 1, False)
    assert torch.equal(encode(text.encoder, text.tokenize(["red stripes"])[0]), expected)
