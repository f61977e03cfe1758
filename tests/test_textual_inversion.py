"""Textual inversion: a token that was learnt works in prompts as in diffusers, and every misuse is one clear line."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Command
from diffusers.loaders import TextualInversionLoaderMixin
from embeddings import TOKENS, save_embedding, vectors
from pipelines import Pair, embedding_file, exported_pipeline, guided_embeds, open_in_diffusers, open_in_torch, saved
from safetensors.torch import load_file, save_file
from single_files import save_single
from tiny_pipelines import WIDTH
from torch import nn

from edgediff import ExportConfig, export_bundle, load_model
from edgediff.errors import ConfigError, EdgediffError, ModelError
from edgediff.models.clip_tokenizer import entry_of, load_tokenizer
from edgediff.models.components import PipelineComponent, pipeline_components, prompt_settings
from edgediff.models.model_files import read_json
from edgediff.models.single_file import FOLDER as SINGLE_FILES
from edgediff.models.textual_inversion import PARTS
from edgediff.models.torch_pipeline import source_tokenizers
from edgediff.targets.backends import open_pipeline
from edgediff_runtime import EdgePipeline, open_bundle
from edgediff_runtime.prompt import tokenized
from edgediff_runtime.text_encoding import Tokenizer

FLOOR_DB = 60.0
BOTH = tuple(TOKENS)
PROMPT, NEGATIVE = "a photo of a <cat-toy>, style", "bad style, red"

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@functools.cache
def opened(backend: str, name: str) -> Pair:
    if backend == "torch":
        ours = open_in_torch(name, embeddings=BOTH)
    else:
        ours = EdgePipeline.from_pretrained(exported_pipeline(name, embeddings=BOTH), threads=1)
    return Pair(ours, open_in_diffusers(name, embeddings=BOTH))


@pytest.fixture(params=["torch", pytest.param("onnx", marks=pytest.mark.long)])
def pair(request: pytest.FixtureRequest) -> Callable[[str], Pair]:
    return functools.partial(opened, request.param)


# Pictures


@pytest.mark.parametrize("name", ["sd1", "xl"])
@pytest.mark.parametrize("prompt", ["a <cat-toy> photo", "a photo, style", PROMPT])
def test_the_picture_is_diffusers_own(pair: Callable[[str], Pair], name: str, prompt: str) -> None:
    both = pair(name)
    asked = {"prompt": prompt, "guidance_scale": 5.0}
    assert both.psnr(asked) >= FLOOR_DB
    plain = open_in_torch(name)(seed=0, num_inference_steps=2, **asked).latents
    changed = both.ours(seed=0, num_inference_steps=2, **asked).latents - plain
    assert np.abs(changed).max() > 0.01, "the embedding changed nothing: this test proves nothing"


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_in_the_negative_prompt(pair: Callable[[str], Pair], name: str) -> None:
    asked = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 5.0}
    assert pair(name).psnr(asked) >= FLOOR_DB


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_emphasis(pair: Callable[[str], Pair], name: str) -> None:
    """Each of a token's vectors has its weight."""
    pieces = [("a photo of a ", 1.0), ("<cat-toy>", 1.3), (", ", 1.0), ("style style_1 style_2", 1 / 1.1)]
    want = guided_embeds(pair(name).theirs, pieces, [("style style_1 style_2", 1.2)])
    asked = {
        "prompt": "a photo of a (<cat-toy>:1.3), [style]", "negative_prompt": "(style:1.2)", "guidance_scale": 5.0
    }  # fmt: skip
    assert pair(name).psnr(asked, {**want, "guidance_scale": 5.0}) >= FLOOR_DB


def test_the_text_encoders_of_sdxl_may_be_told_different_tokens(pair: Callable[[str], Pair]) -> None:
    assert pair("xl").psnr({"prompt": "a <cat-toy>", "prompt_2": "a style", "guidance_scale": 5.0}) >= FLOOR_DB


def test_with_a_lora() -> None:
    both = Pair(open_in_torch("sd1", ("kohya",), embeddings=BOTH), open_in_diffusers("sd1", ("kohya",), BOTH))
    assert both.psnr({"prompt": PROMPT, "guidance_scale": 5.0}) >= FLOOR_DB


def test_with_little_memory() -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 2, "num_inference_steps": 2, "guidance_scale": 5.0}
    small = open_in_torch("xl", low_memory=True, embeddings=BOTH)
    np.testing.assert_array_equal(small(**asked).latents, opened("torch", "xl").ours(**asked).latents)


# Bundles


@pytest.mark.long
def test_a_bundle_with_little_memory() -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 2, "num_inference_steps": 2, "guidance_scale": 5.0}
    small = EdgePipeline.from_pretrained(exported_pipeline("xl", embeddings=BOTH), threads=1, low_memory=True)
    np.testing.assert_array_equal(small(**asked).latents, opened("onnx", "xl").ours(**asked).latents)


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "floor_db"),
    [({"dtypes": {"text_encoder": "fp16"}}, 50.0), ({"weights": {"text_encoder": "int8"}}, 30.0)],
)
def test_a_text_encoder_in_fewer_bits(settings: dict[str, Any], floor_db: float) -> None:
    """The exporter verifies it with all tokens, whatever the reference's prompt says."""
    bundle = open_bundle(exported_pipeline("sd1", embeddings=BOTH, **settings))
    ids = load_file(bundle.file("evidence/reference.safetensors"))["components/text_encoder/input_ids"]
    assert {526, 527, 528, 529} <= {*ids.flatten().tolist()}
    drawn = Pair(open_pipeline(bundle, "onnxruntime"), open_in_diffusers("sd1", embeddings=BOTH))
    assert drawn.psnr({"prompt": PROMPT, "guidance_scale": 5.0}) >= floor_db


@pytest.mark.long
def test_core_ml_reads_the_tokens() -> None:
    """Its ids are float32, unlike those of the other targets."""
    bundle = open_bundle(exported_pipeline("sd1", targets=("coreml",), embeddings=BOTH))
    drawn = Pair(open_pipeline(bundle, "mil-reference"), open_in_diffusers("sd1", embeddings=BOTH))
    assert drawn.psnr({"prompt": PROMPT, "guidance_scale": 5.0}) >= 35.0


@pytest.mark.long
def test_transformers_and_diffusers_read_the_tokens_in_a_bundle() -> None:
    """As optimum does, whose pipelines are diffusers'."""
    bundle = open_bundle(exported_pipeline("sd1", embeddings=BOTH))
    assert bundle.manifest.prompt is not None
    (encoder,) = bundle.manifest.prompt.encoders
    assert encoder.expansions == ((527, 528, 529),)
    file = bundle.manifest.target("onnx").components["text_encoder"].tokenizer
    assert file is not None
    theirs = load_tokenizer(bundle.file(file).parent)
    converted = TextualInversionLoaderMixin().maybe_convert_prompt(PROMPT, theirs)
    (chunk,) = tokenized(PROMPT, Tokenizer.from_file(bundle.file(file)), encoder)
    assert theirs(converted, padding="max_length").input_ids == [*chunk.ids]
    assert read_json(bundle.path / "onnx/text_encoder/config.json")["vocab_size"] == 530
    assert "prompts may name `<cat-toy>` (of learned_embeds.safetensors" in (bundle.path / "README.md").read_text()


@pytest.mark.long
def test_the_command_line_and_a_recipe(tmp_path: Path, command: Command) -> None:
    file, out = embedding_file("sd1", 3), tmp_path / "out"
    (tmp_path / "recipe.yaml").write_text(
        f"model: {saved('sd1')}\nsteps: 1\nclock: 1\nprompt: a photo, Style\nembedding: ['{file}:Style']\n"
    )
    said = command("export", "--config", tmp_path / "recipe.yaml", "-o", out)
    assert said.code == 0, said
    model = load_model(saved("sd1"), embedding=[f"{file}:Style"])
    source = json.loads((out / "manifest.json").read_text())["source"]
    found = pipeline_components(model)["text_encoder"].sha256
    assert (source["embedding"], source["components"]["text_encoder"]) == ([f"{file}:Style"], found)
    again = command(
        "export", saved("sd1"), "-o", out, "--embedding", f"{file}:Style", "--config", tmp_path / "recipe.yaml"
    )
    assert "nothing was exported" in again.out, again


# Files


FORMS = {
    "diffusers": ("a.safetensors", {"style": vectors(3)}, "style"),
    "diffusers, one vector": ("a.safetensors", {"<toy>": vectors(1)[0]}, "<toy>"),
    "AUTOMATIC1111": ("easy-neg.safetensors", {"emb_params": vectors(3).half()}, "easy-neg"),
    "AUTOMATIC1111's .pt": (
        "a.pt",
        {"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(vectors(3))}, "name": "nova", "step": 9},
        "nova",
    ),
    "the paper's .pt": (
        "late.pt",
        {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": vectors(3)})},
        "late",
    ),
    "diffusers' .bin": ("learned_embeds.bin", {"<toy>": vectors(1)[0]}, "<toy>"),
}


def table(component: PipelineComponent) -> torch.Tensor:
    """A text encoder's rows."""
    part: Any = component.load()
    weight: torch.Tensor = part.encoder.get_input_embeddings().weight
    return weight


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_files(tmp_path: Path, form: str) -> None:
    name, contents, token = FORMS[form]
    file = tmp_path / name
    if file.suffix == ".safetensors":
        save_file(contents, file)  # type: ignore[arg-type]
    else:
        torch.save(contents, file)
        with pytest.raises(ModelError, match=f"{name} is a pickle.*--allow-pickle"):
            load_model(saved("sd1"), embedding=[str(file)])
    model = load_model(saved("sd1"), embedding=[str(file), f"{file}:other"], allow_pickle=True)
    assert [each.token for each in model.embedding] == [token, "other"]
    component = pipeline_components(model)["text_encoder"]
    count = model.embedding[0].count
    want = vectors(count).half().float() if "emb_params" in contents else vectors(count)
    rows = table(component)
    assert rows.shape == (526 + 2 * count, WIDTH)
    torch.testing.assert_close(rows[526:], torch.cat([want, want]), rtol=0, atol=0)
    before = pipeline_components(load_model(saved("sd1")))["text_encoder"]
    assert component.sha256 != before.sha256
    torch.testing.assert_close(rows[:526], table(before), rtol=0, atol=0)


def test_a_single_file(tmp_path: Path) -> None:
    file = save_single(saved("xl"), "xl", tmp_path / "model.safetensors")
    spec = f"{embedding_file('xl', 3)}:style"
    whole, single = load_model(saved("xl"), embedding=[spec]), load_model(file, configs=saved("xl"), embedding=[spec])
    for name in PARTS:
        tables = [table(pipeline_components(model)[name]) for model in (whole, single)]
        torch.testing.assert_close(*tables, rtol=0, atol=0)


@pytest.mark.parametrize("folder", ["v1/tokenizer", "v2/tokenizer", "xl_base/tokenizer", "xl_base/tokenizer_2"])
def test_the_vocabulary_of_the_published_models(folder: str) -> None:
    tokenizer = load_tokenizer(SINGLE_FILES / folder, ["<cat-toy>", "EasyNegative"])
    assert tokenizer("a <cat-toy>, easynegative", add_special_tokens=False).input_ids == [320, 49408, 267, 49409]
    assert [entry_of(tokenizer, word) for word in ("toy", "Cat", "sks")] == [5988, 2368, 48136]
    assert entry_of(tokenizer, "inkwash") is None


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"string_to_param": {"*": vectors(1)}, "name": Harmful()}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="is not a plain file of tensors and was not opened"):
        load_model(saved("sd1"), embedding=[str(tmp_path / "a.pt")], allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_the_case_of_a_token_does_not_matter() -> None:
    """As transformers' tokenizer has it: prompts are looked at in small letters."""
    model = load_model(saved("sd1"), embedding=[f"{embedding_file('sd1', 3)}:EasyNeg"])
    found = pipeline_components(model)
    settings = prompt_settings(model, found)
    assert settings is not None
    (tokenizer,), (encoder,) = source_tokenizers(found, settings), settings.encoders
    for prompt in ("EasyNeg", "easyneg", "EASYNEG", "xEasyNegx"):
        (chunk,) = tokenized(prompt, tokenizer, encoder)
        assert [i for i in chunk.ids if i >= 526] == [526, 527, 528], prompt


def test_the_pooled_text_is_that_of_the_end(tmp_path: Path) -> None:
    """Where a configuration has OpenAI's id 2, transformers would pool at the token of the highest id, a learnt one."""
    folder = tmp_path / "xl"
    shutil.copytree(saved("xl"), folder)
    config = folder / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(read_json(config) | {"eos_token_id": 2}))
    pooled = []
    for source in (saved("xl"), folder):
        component = pipeline_components(load_model(source, embedding=[str(embedding_file("xl", 3)) + ":style"]))
        ids = torch.tensor([[524, 526, 527, 528, *[525] * 73]])
        pooled.append(component["text_encoder_2"].load().run({"input_ids": ids})["text_embeds"])
    torch.testing.assert_close(*pooled, rtol=0, atol=0)


# Refusals


def refused(model: Path, embedding: list[str], kind: type[EdgediffError], *words: str) -> None:
    with pytest.raises(EdgediffError) as caught:
        load_model(model, embedding=embedding)
    message = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_an_embedding_of_another_kind_of_model(tmp_path: Path) -> None:
    one, two = embedding_file("sd1", 1), embedding_file("xl", 1)
    refused(saved("sd1"), [str(two)], ModelError, "for another kind of model", "32 (clip_l) and 32 (clip_g) wide")
    refused(saved("xl"), [str(one)], ModelError, "its vectors are 32 wide", "are 32 (clip_l) and 32 (clip_g); take one")
    save_file({"wide": vectors(2, width=48)}, tmp_path / "a.safetensors")
    refused(saved("sd1"), [str(tmp_path / "a.safetensors")], ModelError, "are 48 wide", "are 32; take one")
    save_file({"clip_l": vectors(2), "clip_g": vectors(2, width=48)}, tmp_path / "a.safetensors")
    refused(saved("xl"), [str(tmp_path / "a.safetensors")], ModelError, "are 32 (clip_l) and 48 (clip_g) wide")
    save_file({"clip_l": vectors(2), "clip_g": vectors(3)}, tmp_path / "a.safetensors")
    refused(saved("xl"), [str(tmp_path / "a.safetensors")], ModelError, "has 2 and 3 vectors for the two text encoders")


@pytest.mark.parametrize("token", ["dog", "Dog", "photo", "phot", "<|endoftext|>", "x"])
def test_a_token_that_the_tokenizer_has(token: str) -> None:
    spec = f"{embedding_file('sd1', 1)}:{token}"
    refused(saved("sd1"), [spec], ConfigError, f"the tokenizer already has {token!r}; name another token: FILE:TOKEN")


def test_a_token_that_is_none(tmp_path: Path) -> None:
    file = embedding_file("sd1", 1)
    refused(saved("sd1"), [f"{file}:"], ConfigError, "its token is empty; expected FILE or FILE:TOKEN")
    for token in ("my style", "style\n", "a\u00a0b", "\ud83d"):
        refused(saved("sd1"), [f"{file}:{token}"], ConfigError, "has spaces or is no valid text; name one without")
    save_file({"emb_params": vectors(1)}, tmp_path / "my style.safetensors")
    refused(saved("sd1"), [str(tmp_path / "my style.safetensors")], ConfigError, "'my style' has spaces")
    save_file({"emb_params": vectors(1)}, tmp_path / "a:b.safetensors")
    assert load_model(saved("sd1"), embedding=[f"{tmp_path}/a:b.safetensors:c:d"]).embedding[0].token == "c:d"


def test_tokens_that_are_in_each_others_way() -> None:
    one, three = embedding_file("sd1", 1), embedding_file("sd1", 3)
    refused(saved("sd1"), [f"{one}:style", f"{three}:Style"], ConfigError, "before it has the same token, in any case")
    refused(saved("sd1"), [f"{three}:style", f"{one}:style_1"], ConfigError, "already has 'style_1'")
    for specs in ([f"{one}:style", f"{one}:style_1"], [f"{three}:style", f"{one}:style_3"]):
        refused(saved("sd1"), specs, ConfigError, "would be taken for one of its own vectors")
    # SD 2 pads with an exclamation mark, which stands alone wherever it is.
    refused(saved("sd2"), [f"{one}:wow!"], ConfigError, "the tokenizer divides 'wow!'; name another")


def test_files_that_are_no_embedding(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    refused(saved("sd1"), [str(file)], ConfigError, "no such file; expected FILE or FILE:TOKEN")
    refused(saved("sd1"), [f"{file}:token"], ConfigError, "no such file; expected FILE or FILE:TOKEN")
    (tmp_path / "a.png").write_bytes(b"")
    refused(saved("sd1"), [str(tmp_path / "a.png")], ModelError, "of another kind; expected an embedding")
    nothing: list[dict[str, torch.Tensor]] = [
        {}, {"a": vectors(1), "b": vectors(1)}, {"a": torch.zeros(1, 1, WIDTH)}, {"a": torch.zeros(0, WIDTH)},
        {"a": torch.zeros(WIDTH, dtype=torch.int64)}, {"a": torch.tensor(1.0)},
    ]  # fmt: skip
    for contents in nothing:
        save_file(contents, file)
        refused(saved("sd1"), [str(file)], ModelError, "has no embedding; expected vectors")
    for pickled in (
        {"string_to_param": 5},
        {"string_to_param": {}},
        [vectors(1)],
        vectors(1),
        {"string_to_param": {1: 2}},
    ):
        torch.save(pickled, tmp_path / "a.pt")
        with pytest.raises(ModelError, match="has no embedding; expected vectors"):
            load_model(saved("sd1"), embedding=[str(tmp_path / "a.pt")], allow_pickle=True)
    save_embedding(file, 3, is_xl=False)
    file.write_bytes(file.read_bytes()[:-2])
    refused(saved("sd1"), [str(file)], ModelError, "damaged or truncated")


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for bad in (float("nan"), float("inf")):
        save_file({"style": torch.full((2, WIDTH), bad)}, file)
        refused(saved("sd1"), [str(file)], ModelError, "weights are not finite in style")


def test_more_vectors_than_fit(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"style": vectors(76)}, file)
    refused(saved("sd1"), [str(file)], ModelError, "has 76 vectors, and the text encoder of", "takes 75 tokens at once")
    save_file({"style": vectors(75)}, file)
    assert load_model(saved("sd1"), embedding=[str(file)]).embedding[0].count == 75


def test_a_model_without_a_text_encoder(tmp_path: Path) -> None:
    spec = str(embedding_file("sd1", 1))
    with pytest.raises(ConfigError, match="grocery-32 has no text encoder; name a whole pipeline with one"):
        load_model("grocery-32", embedding=[spec])
    with pytest.raises(ConfigError, match="sd15 is a geometry without weights"):
        load_model("sd15", embedding=[spec])


def test_a_recipe_that_does_not_fit_what_was_loaded(tmp_path: Path) -> None:
    one, three = str(embedding_file("sd1", 1)), str(embedding_file("sd1", 3))
    plain, loaded = load_model(saved("sd1")), load_model(saved("sd1"), embedding=[f"{one}:toy"])
    for model, specs in ((plain, [one]), (loaded, [three]), (loaded, [f"{one}:other"]), (loaded, [one, three])):
        with pytest.raises(ConfigError, match="was not loaded with; pass embedding= to load_model"):
            export_bundle(model, tmp_path / "out", ExportConfig(embedding=tuple(specs)))
    with pytest.raises(ConfigError, match="'components' has no text encoder, which 'embedding' adds tokens to"):
        export_bundle(loaded, tmp_path / "out", ExportConfig(components=("vae_decoder",)))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_text_encoder(tmp_path: Path) -> None:
    shutil.copytree(saved("sd1"), tmp_path / "sd1")
    tokenizer = load_tokenizer(tmp_path / "sd1" / "tokenizer", ["more"])
    tokenizer.save_pretrained(tmp_path / "sd1" / "tokenizer")
    spec = str(embedding_file("sd1", 1))
    refused(tmp_path / "sd1", [spec], ModelError, "the text encoder has 526 tokens, its tokenizer 527; copy the whole")


def test_the_command_says_it_in_one_line(tmp_path: Path, command: Command) -> None:
    (tmp_path / "keep").write_text("kept")
    said = command("export", saved("sd1"), "-o", tmp_path / "out", "--embedding", f"{embedding_file('sd1', 1)}:dog")
    assert said.code == 2, said
    (line,) = said.errors
    assert "the tokenizer already has 'dog'; name another token: FILE:TOKEN" in line
    assert [each.name for each in tmp_path.iterdir()] == ["keep"]
