"""Prompts: emphasis, chunks, and token ids as transformers' own tokenizer gives them."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_pipelines import tokenizer

from edgediff.models.clip_tokenizer import load_tokenizer, write_tokenizer
from edgediff.models.single_file import FOLDER as SINGLE_FILES
from edgediff_runtime.errors import BundleError, RequestError
from edgediff_runtime.manifest import Encoder
from edgediff_runtime.prompt import MAX_CHARACTERS, MAX_CHUNKS, parse, tokenized
from edgediff_runtime.text_encoding import Tokenizer

GOLDEN = Path(__file__).parents[1] / "runtime" / "golden" / "tokens" / "tokenizer.json"
ENCODER = Encoder("text_encoder", 77, bos=524, eos=525, pad=525, hidden=("last_hidden_state",))


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", [("", 1)]),
        ("a red apple", [("a red apple", 1)]),
        ("a (red) apple", [("a ", 1), ("red", 1.1), (" apple", 1)]),
        ("((red)) [apple]", [("red", 1.21), (" ", 1), ("apple", 1 / 1.1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: .5 )(apple:2.)(dog:+1)", [("red", 0.5), ("apple", 2), ("dog", 1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
        ("(a [b] c:1.1)", [("a ", 1.1), ("b", 1), (" c", 1.1)]),
        ("(a:b:0.5)", [("a:b", 0.5)]),
        ("(red:0)", [("red", 0)]),
        (r"\(red\) \[a\] \\ \x", [(r"(red) [a] \ \x", 1)]),
        # What does not match, or is no number, stands for itself.
        ("(red", [("(red", 1)]),
        ("red) :]", [("red) :]", 1)]),
        ("(a]", [("(a]", 1)]),
        ("(a [b) c]", [("(a ", 1), ("b) c", 1 / 1.1)]),
        ("(:1.3) (a:b) (a:nan) (a:1e1) (a:1_0)", [(":1.3", 1.1), (" ", 1), ("a:b", 1.1), (" ", 1), ("a:nan", 1.1),
                                                (" ", 1), ("a:1e1", 1.1), (" ", 1), ("a:1_0", 1.1)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("()(())[]", [("", 1)]),
    ],
)  # fmt: skip
def test_emphasis(prompt: str, pieces: list[tuple[str, float]]) -> None:
    found = parse(prompt)
    assert [piece.text for piece in found] == [text for text, _ in pieces]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("(red:10.5)", "the weight of 'red' is 10.5; expected 0 to 10"),
        ("(red:-1)", "the weight of 'red' is -1"),
        ("(" * 30 + "red" + ")" * 30, "the weight of 'red' is 17.4"),
        ("(" * 9000 + "red" + ")" * 9000, "the weight of 'red' is inf"),
        ("red \ud83d apple", "character 4 is U\\+D83D, a lone surrogate"),
        ("a" * (MAX_CHARACTERS + 1), "100001 characters; expected 100000 at most"),
        ("a " * (75 * MAX_CHUNKS + 1), "4801 tokens; expected 4800 at most"),
    ],
)
def test_prompts_that_nothing_can_encode(prompt: str, part: str) -> None:
    with pytest.raises(RequestError, match=f"^prompt: .*{part}[^\n]*$"):
        tokenized(prompt, _tokenizer(), ENCODER)


@pytest.mark.parametrize("prompt", ["([" * 20_000 + "a" + "])" * 20_000, "(a)" * 33_000, "(" * 99_999, "(a:" * 33_000])
def test_brackets_take_time_in_proportion_to_their_number(prompt: str) -> None:
    before = time.process_time()
    parse(prompt)
    assert time.process_time() - before < 5


def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(GOLDEN)


def test_chunks() -> None:
    words = _tokenizer()
    (empty,) = tokenized("", words, ENCODER)
    assert empty.ids == (524, *[525] * 76)
    one, two = tokenized("red " * 75 + "(dog:1.5)", words, ENCODER)
    assert one.ids == (524, *[513] * 75, 525)
    assert two.ids == (524, 519, *[525] * 75)
    assert (set(one.weights), two.weights[:3]) == ({1.0}, (1.0, 1.5, 1.0))
    (padded,) = tokenized("red", words, Encoder("text_encoder_2", 5, 524, 525, 0, hidden=("x",)))
    assert padded.ids == (524, 513, 525, 0, 0)


def test_padding_and_truncation_in_the_file_are_left_out() -> None:
    theirs = tokenizer()
    theirs("red", padding="max_length", truncation=True, max_length=4)  # what it is asked for stays in it
    assert Tokenizer(theirs.backend_tokenizer)("red " * 9) == [513] * 9


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "none"}}'])
def test_files_that_hold_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match=r"^tokenizer\.json: it cannot be read as a tokenizer .*; export again$"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


# Characters that tokenizers treat in ways of their own.
ALPHABET = (
    *"abcdeREDaple 0123!?.,:;'\"-_()[]\\<|>\t\n\r\0\x7f",
    "\u200d", "\ufe0f", "\u0301", "\u0308", "\u20e3", "\u00a0", "\u2003", "\u200b", "\u2028", "\ufeff",
    "\u202e", "\u05e9", "\u05b8", "\u0633", "\u0627", "\u0640", "\u00e9", "\u00df", "\u0130", "\u0131",
    "\u01c5", "\u1e9e", "\u03a3", "\u03c2", "\uac00", "\u1100", "\u1161", "\u732b", "\u0e33", "\u0915",
    "\u094d", "\U0001f469", "\U0001f373", "\U0001f3fd", "\U0001f1e9", "\U0001f1ea", "\u00bd", "\u2167",
    "\u0664", "\ufb01", "\uff21", "\ue000", "\U000e0067", "\U0010ffff", "'s", "'LL", "apple", "red", "photo",
    "dog", "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "</w>",
)  # fmt: skip


def _texts(count: int, alphabet: Sequence[str] = ALPHABET) -> list[str]:
    draw = random.Random(5)
    texts = ["".join(draw.choices(alphabet, k=draw.choice((1, 3, 8, 20, 60)))) for _ in range(count)]
    return [*texts, "red apple " * 3000, "\U0001f469\u200d" * 3000, "a" * 50_000]


@pytest.mark.parametrize(
    ("count", "pad"),
    [
        (300, "<|endoftext|>"),
        pytest.param(10_000, "<|endoftext|>", marks=pytest.mark.long),
        pytest.param(10_000, "!", marks=pytest.mark.long),
    ],
)
def test_token_ids_are_those_of_transformers(tmp_path: Path, count: int, pad: str) -> None:
    theirs = tokenizer(pad)
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_file(tmp_path / "tokenizer.json")
    for text in _texts(count):
        assert ours(text) == theirs(text, add_special_tokens=False, verbose=False).input_ids, ascii(text)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_token_ids_of_clips_own_vocabulary(tmp_path: Path, count: int) -> None:
    """A bundle's tokenizer.json against transformers' reading of vocab.json and merges.txt."""
    write_tokenizer(SINGLE_FILES / "xl_base" / "tokenizer_2", tmp_path / "tokenizer")
    ours = Tokenizer.from_file(tmp_path / "tokenizer" / "tokenizer.json")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    theirs = load_tokenizer(tmp_path / "tokenizer")
    assert (len(theirs), theirs.pad_token_id) == (49408, 0)
    assert ours("a photo of an astronaut") == [320, 1125, 539, 550, 18376]
    words = [entry.removesuffix("</w>") + " " * entry.endswith("</w>") for entry in theirs.get_vocab()]
    for text in _texts(count, (*ALPHABET, *random.Random(6).sample(words, len(ALPHABET)))):
        assert ours(text) == theirs(text, add_special_tokens=False, verbose=False).input_ids, ascii(text)


def test_the_golden_vocabulary_is_that_of_the_small_pipelines() -> None:
    ours, theirs = _tokenizer(), Tokenizer(tokenizer().backend_tokenizer)
    assert [ours(text) for text in _texts(50)] == [theirs(text) for text in _texts(50)]
