"""Textual inversion: learnt vectors that a token of a prompt stands for (Gal et al. 2022, section 4).

Each vector becomes an entry of the tokenizer, by diffusers' names (``style``, ``style_1``, ...), and a row of the text
encoder's table. A prompt has the first alone, and whoever tokenizes it puts the others after it: see `expansions`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgediff.errors import ConfigError, ModelError
from edgediff.models.clip_tokenizer import add_tokens, entry_of, normalized
from edgediff.models.model_files import check_finite, file_sha256, read_saved
from edgediff.models.single_file import PICKLED, SAFE, check_file

# What the vectors of a file for SDXL are called, by the text encoder that they are for.
PARTS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
# AUTOMATIC1111's names: of the only tensor of a .safetensors, whose token is the file's name, and in its .pt.
ONLY, PICKLED_AS = "emb_params", "string_to_param"
TABLE = "embeddings.token_embedding.weight"
FORM = "expected FILE or FILE:TOKEN"


@dataclass(frozen=True)
class Embedding:
    """A file's vectors and the token that stands for them.

    Attributes:
        vectors: For each text encoder of the model, by its name: float32 [n, D].
    """

    path: Path
    token: str
    vectors: dict[str, Tensor] = field(repr=False, compare=False)

    @cached_property
    def sha256(self) -> str:
        """Hash over the file and the token."""
        return f"{file_sha256(self.path).hex()}:{self.token}"

    @property
    def spec(self) -> str:
        """As `read_spec` reads it."""
        return f"{self.path}:{self.token}"

    @property
    def count(self) -> int:
        """The number of its vectors, the same for each text encoder."""
        return len(next(iter(self.vectors.values())))

    @property
    def tokens(self) -> tuple[str, ...]:
        """An entry of the tokenizer for each vector, named as diffusers names them."""
        return (self.token, *(f"{self.token}_{i}" for i in range(1, self.count)))


def read_spec(spec: str) -> tuple[Path, str | None]:
    """The file and the token of ``FILE[:token]``; None takes the file's own.

    Raises:
        ConfigError: There is no such file, or the token is empty or has spaces.
    """
    path, token = Path(spec), None
    if not path.is_file():
        ends = [i for i, character in enumerate(spec) if character == ":" and Path(spec[:i]).is_file()]
        if not ends:
            raise ConfigError(f"embedding {spec!r}: no such file; {FORM}")
        path, token = Path(spec[: ends[0]]), spec[ends[0] + 1 :]
        _check_token(spec, token)
    return path, token


def read_embedding(
    spec: str, model: str, encoders: Mapping[str, Mapping[str, Any]], allow_pickle: bool = False
) -> Embedding:
    """Reads the file of ``FILE[:token]``, which may be diffusers', AUTOMATIC1111's, or one for SDXL.

    Args:
        model: Its name, for messages.
        encoders: The configurations of its text encoders, by their names.
        allow_pickle: Read a ``.pt`` or ``.bin`` too, tensors and plain data only.

    Raises:
        ConfigError: There is no such file, or its token cannot be one.
        ModelError: The file is damaged, no embedding, or one for another model.
    """
    path, given = read_spec(spec)
    if path.suffix not in (*SAFE, *PICKLED):
        raise ModelError(f"{path} is a file of another kind; expected an embedding, .safetensors or .pt")
    check_file(path, allow_pickle)
    own, found = _named(path, read_saved(path))
    token = own if given is None else given
    _check_token(spec, token)
    vectors = _by_encoder(path, found, model, encoders)
    check_finite({str(name or token): tensor for name, tensor in found.items()}, path)
    return Embedding(path, token, vectors)


def _check_token(spec: str, token: str) -> None:
    if not token:
        raise ConfigError(f"embedding {spec!r}: its token is empty; {FORM}")
    if any(character.isspace() or 0xD800 <= ord(character) < 0xE000 for character in token):
        raise ConfigError(
            f"embedding {spec!r}: its token {token!r} has spaces or is no valid text; name one without: FILE:TOKEN"
        )


def _named(path: Path, saved: object) -> tuple[str, dict[str | None, Tensor]]:
    """The file's own token, and its vectors by their part's name; None where they are for the only text encoder."""
    contents: dict[Any, Any] = dict(saved) if isinstance(saved, dict) else {}
    token = path.stem
    found: dict[str | None, Any] = {}
    if PICKLED_AS in contents:
        named = contents[PICKLED_AS]
        values = list(named.values()) if isinstance(named, dict | nn.ParameterDict) else []
        found = {None: values[0]} if len(values) == 1 else {}
        token = str(contents.get("name") or token)
    elif contents.keys() & {*PARTS.values()}:
        found = {name: contents[name] for name in PARTS.values() if name in contents}
    elif len(contents) == 1:
        ((name, value),) = contents.items()
        found = {None: value}
        token = token if name == ONLY else str(name)
    good = (isinstance(each, Tensor) and each.is_floating_point() and each.ndim in (1, 2) for each in found.values())
    if not found or not all(good) or not all(each.numel() for each in found.values()):
        raise ModelError(
            f"{path} has no embedding; expected vectors [width] or [n, width] by their token's name, as {ONLY}, in "
            f"{PICKLED_AS}, or as {' and '.join(PARTS.values())}"
        )
    return token, found


def _by_encoder(
    path: Path, found: Mapping[str | None, Tensor], model: str, encoders: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """The vectors for each text encoder, float32 [n, D]."""
    only = next(iter(encoders)) if len(encoders) == 1 else None
    parts = {PARTS[name]: name for name in encoders}
    matched = {only if part is None else parts.get(part): tensor for part, tensor in found.items()}
    widths = {name: int(config["hidden_size"]) for name, config in encoders.items()}
    vectors = {
        name: tensor.detach().float().reshape(-1, tensor.shape[-1])
        for name, tensor in matched.items()
        if name is not None
    }
    fits = matched.keys() == widths.keys() and len(found) == len(widths)
    if not fits or any(each.shape[1] != widths[name] for name, each in vectors.items()):
        there = " and ".join(f"{tensor.shape[-1]}{f' ({part})' if part else ''}" for part, tensor in found.items())
        here = " and ".join(f"{width}{f' ({PARTS[name]})' if only is None else ''}" for name, width in widths.items())
        raise ModelError(
            f"{path} is an embedding for another kind of model: its vectors are {there} wide, those of {model} are "
            f"{here}; take one that was learnt for this kind"
        )
    counts = {len(each) for each in vectors.values()}
    most = min(int(config.get("max_position_embeddings", 77)) for config in encoders.values()) - 2
    if len(counts) > 1:
        raise ModelError(f"{path} has {' and '.join(map(str, sorted(counts)))} vectors for the two text encoders; "
                         "expected as many for each")  # fmt: skip
    if max(counts) > most:
        raise ModelError(
            f"{path} has {max(counts)} vectors, and the text encoder of {model} takes {most} tokens at once; take one "
            "of fewer vectors"
        )
    return vectors


def check_tokens(embeddings: Sequence[Embedding], tokenizer: Any, rows: int) -> None:
    """Refuses tokens that a prompt could not name; the tokenizer is left with them.

    Args:
        tokenizer: Of a text encoder, without the tokens.
        rows: Of the encoder's table.

    Raises:
        ConfigError: A token is named twice, or is one of the tokenizer's already.
        ModelError: The tokenizer has more tokens than the table has rows.
    """
    if len(tokenizer) > rows:
        raise ModelError(
            f"the text encoder has {rows} tokens, its tokenizer {len(tokenizer)}; copy the whole pipeline again"
        )
    written = [normalized(tokenizer, each.token) for each in embeddings]
    for i, each in enumerate(embeddings):
        if written[i] in written[:i]:
            raise ConfigError(
                f"embedding {each.spec!r}: an embedding before it has the same token, in any case; name another: "
                "FILE:TOKEN"
            )
    for each in embeddings:
        for token in each.tokens:
            if entry_of(tokenizer, token) is not None:
                raise ConfigError(
                    f"embedding {each.spec!r}: the tokenizer already has {token!r}; name another token: FILE:TOKEN"
                )
        add_tokens(tokenizer, each.tokens)
    for each in embeddings:
        if len(tokenizer(each.token, add_special_tokens=False)["input_ids"]) != 1:
            raise ConfigError(
                f"embedding {each.spec!r}: the tokenizer divides {each.token!r}; name another token: FILE:TOKEN"
            )
        # diffusers counts a token's vectors by their names.
        if entry_of(tokenizer, f"{each.token}_{each.count}") is not None:
            raise ConfigError(
                f"embedding {each.spec!r}: the token {each.token}_{each.count} of another would be taken for one of "
                "its own vectors; name another token: FILE:TOKEN"
            )


def all_tokens(embeddings: Sequence[Embedding]) -> tuple[str, ...]:
    """What is added to the tokenizer, in order."""
    return tuple(token for each in embeddings for token in each.tokens)


def with_rows(
    state: Mapping[str, Tensor], embeddings: Sequence[Embedding], encoder: str, tokens: int
) -> dict[str, Tensor]:
    """A text encoder's weights with the vectors as rows of its table, where their ids are.

    Args:
        encoder: The text encoder's name.
        tokens: In its tokenizer, those of the embeddings at the end.
    """
    rows = torch.cat([each.vectors[encoder] for each in embeddings])
    first = tokens - len(rows)

    def extended(table: Tensor) -> Tensor:
        return torch.cat([table[:first].float(), rows, table[tokens:].float()])

    return {name: extended(tensor) if name.endswith(TABLE) else tensor for name, tensor in state.items()}


def with_tokens(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A text encoder's configuration for a tokenizer with added tokens.

    Where the configuration has the id 2 for the token at the end, as OpenAI's did, transformers takes the state of the
    highest id in its place, which now is an added token's: the tokenizer's own id takes the state of the end again.
    """
    rows = max(rows_of(config), len(tokenizer))
    return {**config, "vocab_size": rows, "eos_token_id": tokenizer.eos_token_id}


def rows_of(config: Mapping[str, Any]) -> int:
    """Rows of a text encoder's table."""
    return int(config.get("vocab_size", 49408))


def expansions(embeddings: Sequence[Embedding], tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """The ids of each token of several vectors: where a prompt has the first, it gets all of them."""
    found = []
    for each in embeddings:
        first = entry_of(tokenizer, each.token)
        assert first is not None
        if each.count > 1:
            found.append(tuple(range(first, first + each.count)))
    return tuple(found)
