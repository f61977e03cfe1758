"""The prompt stage: what runs how often, in which shapes, and what emphasis makes of states."""

from typing import Any

import numpy as np
import pytest

from edgediff_runtime.components import Components
from edgediff_runtime.conditioning import Texts
from edgediff_runtime.errors import NotFiniteError, RequestError
from edgediff_runtime.manifest import Encoder, Graph, Prompt, Tensor
from edgediff_runtime.prompt import emphasize
from edgediff_runtime.text_encoding import Encoded, TextStage

LENGTH, WIDTH = 6, 2
NAMES = ("text_encoder", "text_encoder_2")


class FakeEncoder:
    """A text encoder whose states are its token ids, and a thousand times the layer; it counts its runs."""

    def __init__(self, name: str, batch: int | None, dtype: Any = "int64") -> None:
        self.batch, self.runs = batch, list[tuple[int, ...]]()
        rows: Any = "batch" if batch is None else batch
        states = [Tensor(f"hidden_states.{n}", "float32", (rows, LENGTH, WIDTH)) for n in range(2)]
        pooled = Tensor("text_embeds", "float32", (rows, 3))
        self.graphs = (Graph(name, name, None, (Tensor("input_ids", dtype, (rows, LENGTH)),), (*states, pooled)),)

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def get(self, value: np.ndarray) -> np.ndarray:
        return value

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        ids = tensors["input_ids"]
        assert len(ids) == (self.batch or 1)
        assert ids.dtype == graph.inputs[0].dtype
        self.runs.append(tuple(map(int, ids[0])))
        for n in range(2):
            states = np.repeat(ids[:, :, None], WIDTH, axis=2).astype(np.float32)
            tensors[f"hidden_states.{n}"] = states + 1000 * n
        tensors["text_embeds"] = np.repeat(ids[:, 1:2], 3, axis=1).astype(np.float32)


def stage_of(encoders: int = 1, batch: int | None = None, zeros: bool = False) -> tuple[TextStage, list[FakeEncoder]]:
    fakes = [FakeEncoder(name, batch) for name in NAMES[:encoders]]
    hidden = ("hidden_states.1", "hidden_states.0")
    known = tuple(
        Encoder(name, LENGTH, bos=90, eos=91, pad=92, hidden=hidden, pooled="text_embeds" if last else None)
        for name, last in zip(NAMES[:encoders], [False] * (encoders - 1) + [True], strict=True)
    )

    def tokenize(text: str) -> list[int]:
        return [ord(char) - 96 for char in text if char != " "]

    components = Components.of(dict(zip(NAMES, fakes, strict=False)))
    tokenizers: Any = [tokenize] * encoders
    return TextStage(Prompt(known, zeros), tokenizers, components), fakes


def encode(stage: TextStage, *texts: str, clip_skip: int = 0, any_length: bool = True) -> Encoded:
    rows = [(text,) * len(stage.prompt.encoders) for text in texts]
    return stage(rows, clip_skip, True, any_length)


def test_a_row_for_each_text_and_a_state_for_each_token() -> None:
    stage, _ = stage_of()
    made = encode(stage, "ab", "c")
    assert made.hidden.shape == (2, LENGTH, WIDTH)
    assert made.hidden[:, :, 0].tolist() == [[1090, 1001, 1002, 1091, 1092, 1092], [1090, 1003, 1091, 1092, 1092, 1092]]
    assert made.pooled is not None
    assert made.pooled[:, 0].tolist() == [1, 3]


def test_chunks_of_a_long_text_follow_each_other_and_a_short_one_is_lengthened() -> None:
    stage, (fake,) = stage_of()
    made = encode(stage, "abcde", "c")
    assert made.hidden[:, :, 0].tolist() == [
        [1090, 1001, 1002, 1003, 1004, 1091, 1090, 1005, 1091, 1092, 1092, 1092],
        [1090, 1003, 1091, 1092, 1092, 1092, 1090, 1091, 1092, 1092, 1092, 1092],
    ]
    assert made.pooled is not None
    assert made.pooled[:, 0].tolist() == [1, 3]  # of the first chunk
    assert len(fake.runs) == 4


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_each_distinct_chunk_runs_once_within_a_generation(batch: int | None) -> None:
    stage, (fake,) = stage_of(batch=batch)
    texts = Texts(prompt=["a", "b", "a", "(a:1.5)", ""], negative="")
    given, negative = texts.encode(stage, 5, guided=True, any_length=True)
    assert len(fake.runs) == len(set(fake.runs)) == 3
    assert given["encoder_hidden_states"].shape == negative["encoder_hidden_states"].shape == (5, LENGTH, WIDTH)
    np.testing.assert_array_equal(given["encoder_hidden_states"][4], negative["encoder_hidden_states"][0])
    texts.encode(stage, 5, guided=True, any_length=True)
    assert len(fake.runs) == 6  # nothing is kept for the next generation


def test_texts_that_guidance_does_not_need_do_not_run() -> None:
    stage, (fake,) = stage_of()
    given, negative = Texts("a", negative="b").encode(stage, 4, guided=False, any_length=True)
    assert (len(fake.runs), len(given["encoder_hidden_states"]), negative) == (1, 4, {})


def test_zeros_stand_for_a_negative_prompt_that_was_not_given() -> None:
    stage, (fake,) = stage_of(zeros=True)
    _, negative = Texts("a").encode(stage, 2, guided=True, any_length=True)
    assert len(fake.runs) == 1
    assert {name: (value.shape, value.any()) for name, value in negative.items()} == {
        "encoder_hidden_states": ((2, LENGTH, WIDTH), False),
        "text_embeds": ((2, 3), False),
    }
    _, empty = Texts("a", negative="").encode(stage, 2, guided=True, any_length=True)
    assert empty["encoder_hidden_states"].any()


def test_features_of_two_encoders_stand_side_by_side() -> None:
    stage, fakes = stage_of(encoders=2)
    given, _ = Texts("a", prompt_2="bcdefg").encode(stage, 1, guided=False, any_length=True)
    hidden = given["encoder_hidden_states"]
    assert hidden.shape == (1, 2 * LENGTH, 2 * WIDTH)
    assert hidden[0, 1].tolist() == [1001, 1001, 1002, 1002]
    assert given["text_embeds"].tolist() == [[2, 2, 2]]
    assert [len(fake.runs) for fake in fakes] == [2, 2]


def test_layers_are_left_out_at_the_end() -> None:
    stage, _ = stage_of()
    assert encode(stage, "a", clip_skip=1).hidden[0, :3, 0].tolist() == [90, 1, 91]


@pytest.mark.parametrize("clip_skip", [2, -1, 0.5, True, "1", None])
def test_layers_that_there_are_not(clip_skip: Any) -> None:
    stage, (fake,) = stage_of()
    with pytest.raises(RequestError, match=r"^clip_skip is .*; expected a whole number from 0 to 1$"):
        encode(stage, "a", clip_skip=clip_skip)
    assert not fake.runs


def test_a_long_text_for_graphs_of_one_length() -> None:
    stage, (fake,) = stage_of()
    with pytest.raises(RequestError, match=r"^prompt: it is longer than 4 tokens, .*; shorten it"):
        encode(stage, "abcde", any_length=False)
    assert not fake.runs
    assert encode(stage, "abcd", any_length=False).hidden.shape == (1, LENGTH, WIDTH)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_states_that_are_not_finite_are_a_fault_of_the_bundle(value: float) -> None:
    stage, (fake,) = stage_of()
    run = fake.run

    def overflow(graph: Graph, tensors: dict[str, Any]) -> None:
        run(graph, tensors)
        tensors["hidden_states.1"][0, 2] = value

    fake.run = overflow  # type: ignore[method-assign]
    with pytest.raises(
        NotFiniteError, match=r"^text_encoder: its hidden_states\.1 holds NaN or infinity; export it in"
    ):
        encode(stage, "a")


def test_emphasis_keeps_the_mean() -> None:
    hidden = np.random.default_rng(0).normal(1, 1, (5, 3)).astype(np.float32)
    assert emphasize(hidden, np.ones(5)) is hidden
    weights = np.array([1, 1.3, 0.5, 1, 0])
    made = emphasize(hidden, weights)
    assert made.dtype == np.float32
    assert made.mean() == pytest.approx(hidden.mean(), rel=1e-5)
    np.testing.assert_allclose(made[1] / made[0], 1.3 * hidden[1] / hidden[0], rtol=1e-5)
    assert not made[4].any()
    assert not emphasize(hidden, np.zeros(5)).any()
