"""What a request says of the condition, checked and made into rows: labels, embeddings, further tensors by name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgediff_runtime.errors import RequestError, one_line
from edgediff_runtime.manifest import TOKENS, Conditioning, Tensor
from edgediff_runtime.manifest_json import MAX_GUIDANCE
from edgediff_runtime.sessions import Array
from edgediff_runtime.text_encoding import TextStage

# All images of a generation are in memory at once.
MAX_IMAGES = 4096
Label = str | int | Sequence[str | int] | None
Text = str | Sequence[str] | None


@dataclass(frozen=True)
class Texts:
    """What a request says in words.

    Attributes:
        prompt: One text for all images, or one for each.
        prompt_2: What the second text encoder is told instead, where there are two.
        negative: What guidance leads away from; None is an empty prompt, or zeros where the model wants those.
        clip_skip: How many layers are left out at the text encoders' end.
        emphasis: Read ``(word:1.2)`` and ``[word]`` as weights.
    """

    prompt: Text
    prompt_2: Text = None
    negative: Text = None
    negative_2: Text = None
    clip_skip: int = 0
    emphasis: bool = True

    def count(self) -> int:
        """The number of images that a list of texts is for; 1 where one text is for all."""
        for name, texts in (("prompt", self.prompt), ("prompt_2", self.prompt_2)):
            if isinstance(texts, list | tuple):
                if not texts:
                    raise RequestError(f"{name} is an empty list; expected a text, or a list with one for each image")
                return len(texts)
        return 1

    def encode(
        self, stage: TextStage, count: int, guided: bool, any_length: bool
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Embeddings of every image and, where guidance needs them, of what it leads away from; by tensor names."""
        positive = self._texts("prompt", self.prompt, self.prompt_2, stage, count)
        zeros = self.negative is None and self.negative_2 is None and stage.prompt.zeros_without_negative
        no_words = "" if self.negative is None else self.negative
        negative = (
            self._texts("negative_prompt", no_words, self.negative_2, stage, count) if guided and not zeros else []
        )
        distinct = list(dict.fromkeys([*positive, *negative]))
        made = stage(distinct, self.clip_skip, self.emphasis, any_length)

        def embeds(texts: list[tuple[str, ...]]) -> dict[str, Array]:
            places = [distinct.index(text) for text in texts]
            pooled = {} if made.pooled is None else {"text_embeds": made.pooled[places]}
            return {"encoder_hidden_states": made.hidden[places], **pooled}

        given = embeds(positive)
        if not guided:
            return given, {}
        return given, {name: np.zeros_like(value) for name, value in given.items()} if zeros else embeds(negative)

    @staticmethod
    def _texts(name: str, first: Text, second: Text, stage: TextStage, count: int) -> list[tuple[str, ...]]:
        """For each image, the text of each encoder."""
        encoders = len(stage.prompt.encoders)
        if second is not None and encoders < 2:
            raise RequestError(f"{name}_2 was given, but the bundle has one text encoder; leave it out")
        columns = [_one_each(name, first, count)]
        columns += [_one_each(f"{name}_2", first if second is None else second, count)] * (encoders - 1)
        return list(zip(*columns, strict=True))


def _one_each(name: str, text: Text, count: int) -> list[str]:
    texts = [text] * count if isinstance(text, str) else list(text) if isinstance(text, list | tuple) else [text]
    for each in texts:
        if not isinstance(each, str):
            raise RequestError(f"{name} is a {type(each).__name__}; expected a text, or a list with one for each image")
    if len(texts) != count:
        raise RequestError(f"{name} has {len(texts)} entries for {count} images; expected one each")
    return cast(list[str], texts)


def time_ids(width: int, height_px: int, width_px: int, negative: bool) -> Array:
    """What SDXL is told of a picture's size, float32 [1, width]: original size, crop, target size.

    The refiner's five end in an aesthetic score instead of a target: 6, and for guidance 2.5.

    Raises:
        RequestError: The model wants another number of ids.
    """
    size = [height_px, width_px, 0, 0]
    ends: dict[int, list[float]] = {6: [height_px, width_px], 5: [2.5 if negative else 6.0]}
    if width not in ends:
        raise RequestError(f"the model needs added_cond with time_ids of width {width}; only 6 and 5 have a usual form")
    return np.array([[*size, *ends[width]]], dtype=np.float32)


def guidance_embedding(scale: float, width: int, count: int) -> Array:
    """What a latent consistency model is told of the guidance (Luo et al. 2023, section 4.2): float32 [count, width].

    Sines, then cosines, of ``1000 * (scale - 1)`` at frequencies from 1 down to 1/10000.
    """
    half = width // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0) / (half - 1)))
    angles = np.float32((scale - 1) * 1000) * frequencies
    row = np.zeros(width, dtype=np.float32)
    row[:half], row[half : 2 * half] = np.sin(angles), np.cos(angles)
    return np.repeat(row[None], count, axis=0)


def class_rows(
    known: Conditioning, label: Label, num_images: int | None, guided: bool, dtype: str
) -> tuple[dict[str, Array], dict[str, Array], int]:
    """Class indices of every image, those of guidance, and the number of images."""
    labels = known.labels
    one = label is None or (isinstance(label, str | int) and not isinstance(label, bool))
    if not one and (not isinstance(label, Sequence) or isinstance(label, bytes)):
        raise RequestError(f"label is {label!r}; expected a name, an index, or a list with one for each image")
    given = [label] if one else [plain(entry) for entry in label]  # type: ignore[union-attr]
    count = len(given) if num_images is None else num_images
    check_count(count)
    given = given * count if one else given
    if len(given) != count:
        raise RequestError(f"label has {len(given)} entries for {count} images; expected one each")
    indices = [i % len(labels) for i in range(count)] if label is None else [_class_index(labels, x) for x in given]
    cond = {"class_labels": np.array(indices, dtype=dtype)}
    if not guided:
        return cond, {}, count
    if known.null_label is None:
        raise RequestError("guidance_scale is above 1, but the model has no null class; give 1")
    return cond, {"class_labels": np.full(count, known.null_label, dtype=dtype)}, count


def _class_index(labels: Sequence[str], label: object) -> int:
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        return label
    if label not in labels:
        raise RequestError(f"no label {label!r}; choices: {', '.join(labels)}")
    return labels.index(str(label))


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy or torch as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def factor(name: str, given: Any) -> float:
    """A finite number from 0, as float32 holds it; a RequestError for anything else."""
    value = plain(given)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_GUIDANCE:
        raise RequestError(f"{name} is {given!r}; expected a finite number from 0")
    return float(value)


def arrays(embeds: object, added: object, which: str) -> dict[str, Array]:
    """Conditioning tensors by name, as numpy arrays; torch's may have gradients or be bfloat16."""
    if not isinstance(added, Mapping | None):
        raise RequestError(f"{which}added_cond is a {type(added).__name__}; expected arrays by name")
    found: dict[str, Array] = {}
    for name, value in {"encoder_hidden_states": embeds, **(added or {})}.items():
        if value is None:
            continue
        found[name] = as_array(value, f"{which}{name}")
    return found


def as_array(value: Any, name: str, wanted: str = "numbers in rows of one length") -> NDArray[Any]:
    """An array of numpy's or torch's, or nested lists, as numpy's; a RequestError for what is none."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as e:  # rows of different lengths; torch's with gradients in a list
        raise RequestError(f"{name} is not an array ({one_line(e, 200)}); expected {wanted}") from e


def rows_of(needed: Mapping[str, Tensor], given: Mapping[str, Array], count: int, which: str) -> dict[str, Array]:
    """Checks arrays, `given` by name, against the graphs' inputs and repeats single rows for every image."""
    unknown = sorted(set(given) - set(needed))
    if unknown:
        raise RequestError(f"{which}{unknown[0]} is not an input of this model; it takes {', '.join(needed)}")
    rows: dict[str, Array] = {}
    for name, tensor in needed.items():
        array = given.get(name)
        if array is None:
            argument = {"encoder_hidden_states": "prompt_embeds"}.get(name, name)
            prompt = "a prompt, or " if argument == "prompt_embeds" and not which else ""
            raise RequestError(f"the model needs {prompt}{which}{argument} of shape {spell_shape(tensor.shape)}")
        if array.dtype.kind not in "biuf":
            raise RequestError(f"{which}{name} holds {array.dtype.name}; expected numbers")
        if not _fits(array.shape, tensor.shape) or len(array) not in (1, count):
            raise RequestError(
                f"{which}{name} has shape {list(array.shape)}; expected {spell_shape(tensor.shape)} with 1 or {count} "
                "rows"
            )
        if not np.isfinite(array).all():
            raise RequestError(f"{which}{name} holds NaN or infinity")
        array = _cast(array, tensor.dtype, f"{which}{name}")
        rows[name] = repeated(array, count)
    return rows


def repeated(array: Array, count: int) -> Array:
    """So many rows of an array of as many, or of one, which they share: [count, ...]."""
    return np.ascontiguousarray(np.broadcast_to(array, (count, *array.shape[1:])))


def _fits(shape: tuple[int, ...], wanted: Sequence[int | str]) -> bool:
    """Whether all sizes but the first are those that a graph declares, any length of text where it takes any."""
    return len(shape) == len(wanted) and all(
        have > 0 if want == TOKENS else have == want for have, want in zip(shape[1:], wanted[1:], strict=True)
    )


def _cast(array: Array, dtype: str, name: str) -> Array:
    with np.errstate(over="ignore"):
        cast: Array = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise RequestError(f"{name} has numbers beyond the range of {dtype}")
    return cast


def check_count(num_images: object) -> None:
    """Refuses a number of images that is not whole, or too large."""
    if isinstance(num_images, bool) or not isinstance(num_images, int) or not 1 <= num_images <= MAX_IMAGES:
        raise RequestError(f"num_images is {num_images!r}; expected a whole number above 0, {MAX_IMAGES} at most")


def spell_shape(shape: Sequence[int | str]) -> str:
    """A shape as messages show it."""
    return f"[{', '.join(str(size) for size in shape)}]"
