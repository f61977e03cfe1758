"""``edgediff evaluate retrieval``: is a picture the thing that was asked for?"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from captioned import COLOURS, rows_of, write_rows
from command_line import Command, assert_error
from numpy.typing import NDArray
from photographs import folder_of_images
from PIL import Image
from pipelines import config_of, exported_pipeline, open_in_torch, saved
from seals import manifest_of, seal

import edgediff
from edgediff.data.captions import read_captioned, values_of
from edgediff.data.image_folder import ImageSet
from edgediff.errors import DataError
from edgediff.evaluate import retrieval
from edgediff.evaluate.processes import CPU
from edgediff.evaluate.report import Retrieval
from edgediff.evaluate.retrieval import evaluate_retrieval
from edgediff.evaluate.text_sampler import open_text_sampler
from edgediff.models.classifier import Classifier, ClassifierShape, save_classifier
from edgediff.models.sampling import scheduler_config
from edgediff.models.torch_pipeline import TorchPipeline
from edgediff.train.train_classifier import ClassifierRecipe, train_classifier

SIZE, EACH = 32, 12
RECIPE = ClassifierRecipe(widths=(6, 8), stride=2, epochs=30, batch=16, learning_rate=0.02)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def styled(each: int = EACH) -> list[dict[str, Any]]:
    """A quarter of each colour is held out, in both styles; each drawing has a caption of its own."""
    rows = rows_of(each)
    for i, row in enumerate(rows):
        row["style"] = row["text"].rpartition(", ")[2]
        row["text"] = f"{row['name']} stripes {i % each}, {row['style']}"
        row["split"] = "test" if i % each >= each - each // 4 else "train"
    return rows


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folder_of_images(tmp_path_factory.mktemp("captions") / "drawings", COLOURS, EACH, SIZE)
    write_rows(folder, styled())
    return folder


@pytest.fixture
def own(drawings: Path, tmp_path: Path) -> Path:
    """The drawings, copied for a test to change."""
    return shutil.copytree(drawings, tmp_path / "drawings")


@pytest.fixture(scope="session")
def ruler(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of colours that learnt the drawings of split train, and their styles."""
    data, _ = read_captioned(drawings, SIZE, ("{name}", "{style}"))
    names = tuple(sorted(COLOURS))
    labels = np.array([names.index(name) for name in values_of(data, 0)])
    learnt = train_classifier(ImageSet(data.images, labels, names), RECIPE, styles=values_of(data, 1))
    folder = tmp_path_factory.mktemp("rulers") / "colours"
    save_classifier(learnt.classifier, folder)
    return folder


# The source


@pytest.mark.parametrize("name", ["sd1", "xl", "lcm"])
def test_a_pipeline_in_torch_draws_what_the_runtime_draws(name: str) -> None:
    model = edgediff.load_model(saved(name))
    scheduler = config_of(name).scheduler
    ours = TorchPipeline(model, scheduler_config(model.scheduler, scheduler), CPU)
    assert ours.size == (SIZE, SIZE)
    prompts = ["a red apple", "a (dog)", "a photo"]
    given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 5}
    made = ours(prompts, first_image=0, **given)
    wanted = open_in_torch(name)(prompt=prompts, emphasis=False, clock=1, **given).images
    assert np.abs(made.astype(int) - wanted).max() <= 1
    # Image i is the same in any batch, also where the sampler draws fresh noise.
    later = ours(prompts[1:], first_image=1, **given)
    assert np.abs(made[1:].astype(int) - later).max() <= 1
    assert np.abs(made[0].astype(int) - made[2]).max() > 20


@pytest.mark.long
def test_a_bundle_draws_the_same_at_clock_1() -> None:
    drawn = []
    for source, scheduler in ((exported_pipeline("sd1"), None), (saved("sd1"), "dpmpp_2m")):
        sampler = open_text_sampler(source, backend=None, scheduler=scheduler, device=CPU)
        assert (sampler.size, sampler.steps) == (SIZE, 8)
        asked = {"steps": 2, "guidance_scale": 3.0, "seed": 0}
        sampler.check("1", **asked)
        drawn.append(sampler.draw(["a dog", "red"], 4, clock="1", **asked).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 2


# What is measured


class Stub:
    """A source that gives real drawings: of each prompt the drawing of the prompt that `of` names."""

    name, backend, kind, size, steps, guidance_scale, clocks = "stub", "torch", "model", SIZE, 1, 1.0, ("1",)
    scheduler = scheduler_config({}, "dpmpp_2m")

    def __init__(self, folder: Path, of: Callable[[str], str]) -> None:
        self.of = of
        self.drawings = {}
        for data in read_captioned(folder, SIZE):
            self.drawings |= dict(zip(values_of(data, 0), data.images, strict=True))

    def check(self, *asked: object) -> tuple[bool, ...]:
        return (True,)

    def draw(self, prompts: Sequence[str], first: int, **asked: object) -> NDArray[np.uint8]:
        return np.stack([self.drawings[self.of(prompt)] for prompt in prompts])


def measured(
    monkeypatch: pytest.MonkeyPatch, folder: Path, ruler: Path, of: Callable[[str], str], **asked: Any
) -> Retrieval:
    monkeypatch.setattr(retrieval, "open_text_sampler", lambda source, **options: Stub(folder, of))
    return evaluate_retrieval("stub", folder, features=ruler, **asked)


def test_the_thing_asked_for_is_recognised_and_another_is_not(
    monkeypatch: pytest.MonkeyPatch, drawings: Path, ruler: Path
) -> None:
    right = measured(monkeypatch, drawings, ruler, lambda prompt: prompt)
    assert [(row.split, row.found.num_images) for row in right.rows] == [("train", 36), ("test", 12)]
    for row, asked in zip(right.rows, right.asked, strict=True):
        assert row.found.top_1 == asked.drawings.top_1 == 1
        assert row.found.top_1_spread == 0
        assert (len(row.ranks), set(row.ranks)) == (len(asked.prompts), {1})
        assert [prompt.partition(" ")[0] for prompt in asked.prompts] == list(row.taken_for)
    # Training drawings themselves are copies; of the drawings held out, the nearest is as near as the nearest.
    copied = [row.nearest.share_nearer for row in right.rows if row.nearest is not None]
    assert copied[0] == 1
    assert copied[1] < 0.5
    other = {"red": "green", "green": "blue", "blue": "grey", "grey": "red"}

    def swapped(prompt: str) -> str:
        colour, _, rest = prompt.partition(" ")
        return f"{other[colour]} {rest}"

    wrong = measured(monkeypatch, drawings, ruler, swapped, split="train")
    (row,) = wrong.rows
    assert row.found.top_1 == 0
    assert row.found.top_5 == 1  # of four things
    assert row.found.style == pytest.approx(wrong.asked[0].drawings.style, abs=0.2)
    assert min(row.ranks) > 1
    assert row.taken_for == tuple(other[prompt.partition(" ")[0]] for prompt in wrong.asked[0].prompts)


def test_half_right_has_its_standard_error(monkeypatch: pytest.MonkeyPatch, drawings: Path, ruler: Path) -> None:
    def red(prompt: str) -> str:
        return prompt if prompt.startswith(("red", "blue")) else "red stripes 0, noisy"

    (row,) = measured(monkeypatch, drawings, ruler, red, split="train").rows
    assert row.found.top_1 == 0.5
    assert row.found.top_1_spread == pytest.approx(0.5 / 6)
    all_right = measured(monkeypatch, drawings, ruler, lambda prompt: prompt, split="train").rows[0]
    assert row.distances.kernel_distance > all_right.distances.kernel_distance + 0.1


def test_prompts_are_a_seeded_choice(monkeypatch: pytest.MonkeyPatch, drawings: Path, ruler: Path) -> None:
    def prompts(number: int, seed: int = 0) -> tuple[str, ...]:
        found = measured(
            monkeypatch, drawings, ruler, lambda prompt: prompt, split="train", num_prompts=number, seed=seed
        )
        return found.asked[0].prompts

    assert prompts(6) == prompts(20)[:6]
    assert prompts(20) != prompts(20, seed=1)
    assert len(prompts(1000)) == 36


def test_without_drawings_held_out_nothing_counts_as_copied(
    monkeypatch: pytest.MonkeyPatch, own: Path, ruler: Path
) -> None:
    write_rows(own, [{name: value for name, value in row.items() if name != "split"} for row in styled()])
    found = measured(monkeypatch, own, ruler, lambda prompt: prompt)
    assert [row.split for row in found.rows] == ["train"]
    assert (found.threshold, found.held_out, found.rows[0].nearest) == (None, None, None)


# The command


def test_retrieval_on_the_command_line(drawings: Path, ruler: Path, tmp_path: Path, command: Command) -> None:
    asked = ("evaluate", "retrieval", saved("sd1"), "--images", drawings, "--features", ruler, "--steps", 1,
             "--guidance-scale", 3, "--scheduler", "dpmpp_2m", "--num-prompts", 6)  # fmt: skip
    said = command(*asked, "--json", "--batch", 4)
    assert (said.code, said.errors) == (0, [])
    data = json.loads(said.out)
    assert (data["num_labels"], data["num_train"], data["backend"]) == (4, 36, "torch")
    assert [(row["split"], row["clock"], len(row["ranks"])) for row in data["rows"]] == [
        ("train", "1", 6),
        ("test", "1", 6),
    ]
    said = command(*asked, "--grid", tmp_path / "grid.png")
    assert (said.code, said.errors) == (0, [])
    for words in ("6 train", "6 test", "all test", "drawings", "top 5", "style", "+-", "copies", "grid.png"):
        assert words in said.out
    with Image.open(tmp_path / "grid.png") as grid:
        assert min(grid.size) > 200
    # The second run draws in another batch: the same pictures, the same shares.
    assert f"{100 * data['rows'][0]['found']['top_5']:.1f} +- " in said.out


@pytest.mark.long
def test_clocks_of_a_bundle_stand_in_one_table(drawings: Path, ruler: Path, command: Command) -> None:
    said = command(
        "evaluate", "retrieval", exported_pipeline("sd1"), "--images", drawings, "--features", ruler, "--steps", 2,
        "--guidance-scale", 3, "--split", "test", "--clock", 1, "--clock", 2, "--json",
    )  # fmt: skip
    data = json.loads(said.out)
    assert (said.code, [row["mask"] for row in data["rows"]]) == (0, [[1, 1], [1, 0]])
    one, two = (row["distances"]["kernel_distance"] for row in data["rows"])
    assert one != two


# What is refused


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"--split": "half"}, ("split 'half': expected train or test",)),
        ({"--num-prompts": -1}, ("num_prompts is -1; expected 0",)),
        ({"--num-prompts": 3}, ("3 prompts are left of split train; expected 4 or more",)),
        ({"--batch": 0}, ("batch is 0",)),
        ({"--only": "name"}, ("--only name: expected COLUMN=FILE",)),
        ({"--label": "shape"}, ("no image in", "has the column 'shape'; columns:", "style")),
        ({"--style": "hand"}, ("no image in", "has the column 'hand'; columns:")),
        ({"--features": None}, ("no features", "name the folder of one")),
        ({"--features": "nowhere"}, ("no classifier at nowhere",)),
        ({"--grid": "grid.jpg"}, ("expected a name that ends in .png",)),
        ({"--clock": 2, "--steps": 2}, ("clock 2: a model is sampled with every step full",)),
        ({"--guidance-scale": "nan"}, ("guidance_scale is nan; expected a finite number from 0",)),
        ({"--backend": "onnxruntime"}, ("'onnxruntime' is for bundles",)),
        ({"--images": "nowhere"}, ("no images at nowhere",)),
    ],
)
def test_bad_requests_are_one_line(
    drawings: Path, ruler: Path, command: Command, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    options = {"--images": drawings, "--features": ruler, "--steps": 1, "--scheduler": "dpmpp_2m"} | change
    given = [each for option, value in options.items() if value is not None for each in (option, value)]
    assert_error(command("evaluate", "retrieval", saved("sd1"), *given), *parts)


def test_folders_that_do_not_fit(own: Path, ruler: Path, tmp_path: Path, command: Command) -> None:
    def say(*more: object) -> Any:
        asked = ("--images", own, "--features", ruler, "--steps", 2)
        return command("evaluate", "retrieval", saved("sd1"), *asked, *more)

    rows = styled()
    plain = [{name: value for name, value in row.items() if name not in ("name", "split")} for row in rows]
    write_rows(own, plain)
    assert_error(say(), "has the column 'name'; columns: file_name, keywords, style, text")
    write_rows(own, [{name: value for name, value in row.items() if name != "split"} for row in rows])
    assert_error(say("--split", "test"), "0 prompts are left of split test")
    write_rows(own, [row if i else {**row, "name": ""} for i, row in enumerate(rows)])
    assert_error(say(), "1 of 36 images lack a column that is asked for", "red stripes 0, noisy")
    write_rows(own, [{**row, "name": "pink"} if row["name"] == "red" else row for row in rows])
    assert_error(say(), "the classifier does not know 'pink' among its 4; leave such prompts out (--only)")
    (tmp_path / "things.txt").write_text("green\n")
    assert_error(say("--only", f"name={tmp_path / 'things.txt'}"), "3 prompts are left of split test")


def test_sources_that_do_not_fit(
    drawings: Path, ruler: Path, tmp_path: Path, class_model: Path, text_model: Path, command: Command
) -> None:
    def say(source: Path, features: Path = ruler) -> Any:
        return command("evaluate", "retrieval", source, "--images", drawings, "--features", features, "--steps", 2)

    assert_error(say(class_model), "is conditioned on classes; expected text")
    assert_error(say(text_model), "it has no text encoder; give the directory of a whole pipeline")
    assert_error(say(tmp_path), "is neither a bundle, with a manifest.json, nor a model")
    save_classifier(Classifier(ClassifierShape(16, (4,), ("red",))), tmp_path / "small")
    assert_error(say(saved("sd1"), tmp_path / "small"), "takes 16x16 pixels, the model makes 32x32")


@pytest.mark.long
def test_bundles_without_what_a_prompt_needs(
    text_bundle: Path, class_bundle: Path, drawings: Path, ruler: Path, tmp_path: Path, command: Command
) -> None:
    def say(source: Path) -> Any:
        return command("evaluate", "retrieval", source, "--images", drawings, "--features", ruler, "--steps", 1)

    assert_error(say(class_bundle), "is conditioned on classes; expected text")
    assert_error(say(text_bundle), "the bundle has no text encoder for onnxruntime; export the whole pipeline again")
    undecoded = shutil.copytree(exported_pipeline("sd1"), tmp_path / "undecoded")
    manifest = manifest_of(undecoded)
    targets = tuple(
        msgspec.structs.replace(
            target, components={name: each for name, each in target.components.items() if not name.startswith("vae")}
        )
        for target in manifest.targets
    )
    seal(undecoded, msgspec.structs.replace(manifest, vae=None, targets=targets))
    assert_error(say(undecoded), "the bundle has no decoder for onnxruntime; export the whole pipeline again")


def test_columns_are_read_by_their_first_wording(own: Path) -> None:
    data, _ = read_captioned(own, SIZE, ("{text}", "{keywords}"))
    assert values_of(data, 1)[0] == "paint"
    write_rows(own, [row if i else {**row, "keywords": []} for i, row in enumerate(styled())])
    data, _ = read_captioned(own, SIZE, ("{text}", "{keywords}"))
    with pytest.raises(DataError, match="1 of 36 images lack a column"):
        values_of(data, 1)
