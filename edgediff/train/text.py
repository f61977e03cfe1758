"""The text encoder of a training: CLIP's, with its tokenizer; it learns beside the UNet, or is given and stays."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from edgediff.data.batches import Wordings
from edgediff.data.image_folder import ImageSet
from edgediff.errors import ConfigError, ModelError, UnsupportedError
from edgediff.models.clip_tokenizer import load_tokenizer
from edgediff.models.component_loading import text_encoder
from edgediff.models.components import pipeline_components
from edgediff.models.conditioning import Conditioning, TensorSpec
from edgediff.models.load import Model
from edgediff.models.model_files import TRANSFORMERS, read_json, read_state
from edgediff.train.settings import TextGeometry
from edgediff.train.vocabulary import learn_tokenizer

ENCODER, TOKENIZER = "text_encoder", "tokenizer"
STATES = "encoder_hidden_states"


@contextmanager
def no_bars() -> Iterator[None]:
    """Keeps transformers from printing progress of its own."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


@dataclass(frozen=True, eq=False)
class Text:
    """A text encoder and its tokenizer; where it does not learn, it stays as it is."""

    encoder: Any
    tokenizer: Any
    learns: bool

    @property
    def length(self) -> int:
        """Tokens of a caption, padded."""
        return int(self.encoder.config.max_position_embeddings)

    @property
    def conditioning(self) -> Conditioning:
        """What a UNet is given."""
        return Conditioning("text", {STATES: TensorSpec((self.length, self.encoder.config.hidden_size), torch.float32)})

    def tokenize(self, captions: Sequence[str]) -> tuple[torch.Tensor, int]:
        """Token ids, int64 [N, S], of captions, and how many of them were too long and were cut."""
        ids = torch.full((len(captions), self.length), self.tokenizer.pad_token_id)
        cut = 0
        for row, tokens in zip(ids, self.tokenizer(list(captions), verbose=False)["input_ids"], strict=True):
            if len(tokens) > self.length:
                cut += 1
                tokens = [*tokens[: self.length - 1], tokens[-1]]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids, cut

    def wordings(self, data: ImageSet) -> Wordings:
        """The captions of images as batches draw them."""
        captions = [""]
        forms = []
        for caption in data.captions:
            own = []
            for wordings in caption:
                own.append((len(captions), len(wordings)))
                captions += wordings
            first = next(each for each in own if each[1])  # stands for a form that the image lacks
            forms.append([each if each[1] else first for each in own])
        ids, cut = self.tokenize(captions)
        return Wordings(ids, torch.tensor(forms), cut)

    def digest(self) -> str:
        """sha256 over weights, on the CPU, and vocabulary."""
        digest = hashlib.sha256(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        for name, tensor in self.encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def encode(encoder: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """What the UNet sees of token ids, int64 [B, S]: the normalized last states, [B, S, D]."""
    states: torch.Tensor = encoder(input_ids=input_ids).last_hidden_state
    return states


def new_text(geometry: TextGeometry, width: int, captions: Iterable[str], seed: int) -> Text:
    """A new text encoder, as wide as the UNet's cross-attention takes, with a vocabulary learnt from captions.

    Raises:
        ConfigError: The geometry does not fit the width.
    """
    geometry.check()
    heads = geometry.num_attention_heads
    if width % heads:
        raise ConfigError(f"'text.num_attention_heads' is {heads}; expected a divisor of cross_attention_dim {width}")
    tokenizer = learn_tokenizer(captions, geometry.vocab_size, geometry.max_position_embeddings)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=4 * width if geometry.intermediate_size is None else geometry.intermediate_size,
        num_hidden_layers=geometry.num_hidden_layers,
        num_attention_heads=heads,
        max_position_embeddings=geometry.max_position_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPTextModel(config)
    return Text(encoder, tokenizer, learns=True)


def load_text(folder: str | Path) -> Text:
    """A text encoder that stays as it is, from a pipeline's directory; a ModelError where there is none."""
    home = Path(folder) / ENCODER
    config = read_json(home / "config.json")
    if config.get("architectures") != ["CLIPTextModel"]:
        raise ModelError(f"{home / 'config.json'} is of class {config.get('architectures')}; expected CLIPTextModel")
    encoder = text_encoder(config, read_state(home, TRANSFORMERS), home)
    return _checked(Text(encoder, load_tokenizer(Path(folder) / TOKENIZER), learns=False), home)


def text_of(model: Model, learns: bool) -> Text:
    """The text encoder of a model with text.

    Raises:
        ModelError: It has none, or its tokenizer is of another vocabulary.
        UnsupportedError: The model is conditioned on more than one encoder's text.
    """
    if set(model.conditioning.tensors) != {STATES}:
        raise UnsupportedError(
            f"{model.name} takes {', '.join(model.conditioning.tensors)}; supported in training: a text encoder's "
            f"{STATES} alone"
        )
    component = pipeline_components(model).get(ENCODER)
    if component is None:
        raise ModelError(f"{model.path} is conditioned on text and has no {ENCODER}; name a whole pipeline")
    encoder: Any = component.load().encoder
    text = Text(encoder, component.tokenizer, learns)
    return _checked(text, component.folder)


def _checked(text: Text, home: Path) -> Text:
    if len(text.tokenizer) > text.encoder.config.vocab_size:
        raise ModelError(
            f"{home} has {text.encoder.config.vocab_size} tokens, its tokenizer {len(text.tokenizer)}; copy the whole "
            "pipeline"
        )
    return text
