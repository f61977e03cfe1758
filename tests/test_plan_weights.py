"""The search for each weight's format: the frontier, the floor, the size, and going on where it was interrupted."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Command, assert_error
from conftest import Export
from safetensors.torch import load_file, save_file
from seals import rows_of

from edgediff.config.weight_plan import BITS, read_plan
from edgediff.errors import ConfigError
from edgediff.export.export_config import config_from
from edgediff.export.prepare import Prepared, prepare
from edgediff.models.load import load_model
from edgediff.models.weight_formats import store
from edgediff.plan import weight_search
from edgediff.plan.weight_search import Form, WeightSearch, _along, _Lines, search_weights
from edgediff.plan.weight_trials import Errors, Place, Trials, psnr_db
from edgediff_runtime.manifest import WeightFormat


def form(name: WeightFormat | None, nbytes: int, error: float) -> Form:
    return Form(name, nbytes, np.array([error]))


def test_a_weight_goes_along_its_frontier() -> None:
    place = Place("unet", "a")
    forms = [form(None, 400, 0), form("fp16", 200, 1e-9), form("int8", 110, 1e-4), form("int4", 60, 1e-2)]
    assert [move.form for move in _along(place, forms)] == ["fp16", "int8", "int4"]
    # One that costs more for a byte than the next one is passed over.
    dear = [form(None, 400, 0), form("int8", 110, 9e-3), form("int4", 60, 1e-2)]
    assert [(move.form, move.saved) for move in _along(place, dear)] == [("int4", 340)]
    prices = [move.price for move in _along(place, forms)]
    assert prices == sorted(prices)


class Additive:
    """Weights whose errors add up, and a little more."""

    def __init__(self, beyond: float = 1.0) -> None:
        self.beyond, self.drawn = beyond, 0
        shares = np.random.default_rng(0).lognormal(sigma=2, size=40)
        self.forms = {
            Place("unet", str(i)): [form(None, 400, 0), form("int8", 100, 1e-6 * share), form("int4", 50, 1e-4 * share)]
            for i, share in enumerate(shares)
        }
        self.moves = sorted(
            (move for place, forms in self.forms.items() for move in _along(place, forms)), key=lambda move: move.price
        )

    def errors(self, changed: Mapping[Place, WeightFormat]) -> Errors:
        self.drawn += 1
        found = [next(f.errors for f in self.forms[place] if f.form == name) for place, name in changed.items()]
        return self.beyond * np.sum(found, axis=0)

    def lines(self) -> _Lines:
        return _Lines(self, self.moves, 400 * len(self.forms), lambda what: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("beyond", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("floor", [25.0, 40.0, 60.0])
def test_the_smallest_plan_that_reaches_a_floor_is_found(beyond: float, floor: float) -> None:
    trials = Additive(beyond)
    lines = trials.lines()
    chosen = lines.at_floor(floor)
    assert chosen.measured_db >= floor
    drawn = trials.drawn
    assert drawn <= 12
    reaching = [k for k in range(1, len(trials.moves) + 1) if lines.point(k).measured_db >= floor]
    assert chosen.count == max(reaching)
    assert chosen.nbytes == lines.nbytes[chosen.count]


def test_the_largest_size_within_a_limit_is_taken() -> None:
    lines = Additive().lines()
    chosen = lines.of_size(3000)
    assert chosen.nbytes <= 3000 < lines.nbytes[chosen.count - 1]
    frontier = lines.frontier(6)
    assert [p.nbytes for p in frontier] == sorted((p.nbytes for p in frontier), reverse=True)
    assert all(abs(p.measured_db - p.expected_db) < 0.01 for p in frontier)


@pytest.mark.parametrize(
    ("floor", "size", "what"),
    [(300, None, r"no weight in fewer bits reaches 300 dB: the nearest is \d+\.\d dB, with unet/\d+ in int8"),
     (None, 100, "no formats make the weights 0.0001 MB: the smallest is 0.00 MB, from 0.02 MB"),
     (None, 1e6, "the weights take 0.02 MB as they are, no more than the 1 MB")],
)  # fmt: skip
def test_what_nothing_reaches_is_said_with_the_nearest(floor: float | None, size: float | None, what: str) -> None:
    lines = Additive().lines()
    with pytest.raises(ConfigError, match=what):
        lines.at_floor(floor) if floor is not None else lines.of_size(size or 0)


def test_psnr_is_the_lower_of_latents_and_pictures() -> None:
    assert psnr_db(np.array([1e-4, 1e-3])) == pytest.approx(30)
    assert psnr_db(0.0) == math.inf


@pytest.fixture(scope="module")
def prepared(class_model: Path) -> Prepared:
    config = config_from({"steps": 2, "adaptor": "identity", "scheduler": "ddim"})
    return prepare(load_model(class_model), config, lambda what: None)


def test_trials_measure_and_leave_the_weights_as_they_were(prepared: Prepared) -> None:
    before = {name: weight.detach().clone() for name, weight in prepared.model.unet.named_parameters()}
    trials = Trials(prepared, None, 2)
    assert {place.component for place in trials.weights} == {"unet"}
    assert trials.errors({}).max() == 0
    place = next(iter(trials.weights))
    coarse, fine = trials.errors({place: "palette2"}), trials.errors({place: "int8"})
    assert coarse[0] > fine[0] > 0
    for name, weight in prepared.model.unet.named_parameters():
        assert torch.equal(weight, before[name])
    # By hand: the same weight in place.
    weight = dict(prepared.model.unet.named_parameters())[place.name]
    with torch.no_grad():
        weight.copy_(torch.from_numpy(store(weight.detach().numpy(), "palette2").values()))
        changed = Trials(prepared, None, 2)._latents
        weight.copy_(before[place.name])
    error = np.mean((changed.astype(np.float64) - trials._latents) ** 2) / np.abs(trials._latents).max() ** 2
    assert coarse[0] == pytest.approx(error, rel=1e-6)


def search(prepared: Prepared, folder: Path, **asked: float) -> tuple[WeightSearch, list[str]]:
    said: list[str] = []
    found = search_weights(prepared, "onnx", folder=folder, num_images=1, say=said.append, **asked)  # type: ignore[arg-type]
    return found, [line for line in said if line.startswith("measuring unet")]


def test_a_search_goes_on_where_it_was_interrupted(prepared: Prepared, tmp_path: Path) -> None:
    first, said = search(prepared, tmp_path, floor_db=35)
    assert first.chosen.measured_db >= 35
    assert first.chosen.nbytes < 0.6 * first.whole
    assert sum(counts for each in first.elements.values() for counts in each.values()) > 5000
    record = tmp_path / weight_search.MEASURED
    lines = record.read_text().splitlines()
    assert len(lines) == 1 + len(said)
    record.write_text("\n".join(lines[:-3]) + "\n" + lines[-1][:20])
    again, more = search(prepared, tmp_path, floor_db=35)
    assert len(more) == 3
    assert again.plan == first.plan
    small, none = search(prepared, tmp_path, size_mb=1.2 * first.chosen.nbytes / 1e6)
    assert none == []
    assert small.chosen.measured_db >= first.chosen.measured_db


def test_formats_follow_the_target(prepared: Prepared, tmp_path: Path) -> None:
    found = search_weights(prepared, "coreml", floor_db=25, folder=tmp_path, num_images=1)
    formats = {form for each in found.plan.components.values() for form in each.values()}
    assert formats <= {"int8", "palette8", "palette6", "palette4", "palette3", "palette2"}
    assert len(formats) > 1
    assert found.whole < 4 * sum(weight.numel() for weight in prepared.model.unet.parameters())


@pytest.mark.parametrize(
    ("options", "what"),
    [(["--psnr-floor", 40, "--size-mb", 3], "expected one of --psnr-floor and --size-mb"),
     ([], "expected one of --psnr-floor and --size-mb"),
     (["--psnr-floor", -1], "--psnr-floor is -1; expected a number above 0"),
     (["--size-mb", "nan"], "--size-mb is nan; expected a number above 0"),
     (["--psnr-floor", 40, "--target", "executorch"], "ExecuTorch has no formats of fewer bits; choices: onnx, "),
     (["--psnr-floor", 40], "drawings-64-student takes text, and weights are measured along its pictures; give"),
     (["--psnr-floor", 40, "--conditioning", "nothing.txt"], "conditioning nothing.txt cannot be read")],
)  # fmt: skip
def test_bad_requests_are_refused(command: Command, place: Path, options: list[object], what: str) -> None:
    assert_error(command("plan-weights", "drawings-64-student", "-o", place / "plan", *options), what)
    assert {path.name for path in place.iterdir()} <= {"mine.txt", "plan"}


def test_weights_that_are_not_finite_are_named(command: Command, class_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(class_model, tmp_path / "model")
    file = source / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.weight"][0, 0] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    said = command("plan-weights", source, "-o", tmp_path / "plan", "--psnr-floor", 40, "--steps", 2)
    assert_error(said, "weights are not finite in conv_out.weight")


@pytest.mark.long
def test_a_plan_goes_through_an_export(
    command: Command, class_model: Path, tmp_path: Path, export_once: Export
) -> None:
    base = ["plan-weights", class_model, "-o", tmp_path / "plan", "--steps", 2, "--adaptor", "identity"]
    said = command(*base, "--psnr-floor", 38, "--json")
    assert said.code == 0, said
    found = json.loads(said.out)
    assert found["chosen"]["measured_db"] >= 38
    assert (tmp_path / "plan/frontier.png").stat().st_size > 10_000
    assert read_plan(tmp_path / "plan/weights.json").components["unet"]
    assert_error(command(*base, "--psnr-floor", 38, "--seed", 5), "holds measurements of another search; pass --force")
    plan = str(tmp_path / "plan/weights.json")
    recipe = {"steps": 2, "adaptor": "identity", "onnx": {"weights": plan}, "verify": {"weights": {"int4": 15}}}
    rows = {
        (row["check"], row["part"]): row["psnr_db"] for row in rows_of(export_once(class_model, config_from(recipe)))
    }
    assert rows["program", "full"] > 100
    assert rows["trajectory", "latents"] > 25  # of other noise than the plan's, and of a mean over more
    assert set(found["elements"]["unet"]) <= {*BITS, "as it is"}


def test_a_model_without_prompts_to_encode_takes_none(prepared: Prepared) -> None:
    with pytest.raises(ConfigError, match="takes no text; leave the prompts out"):
        Trials(prepared, ["an apple"])
