import json
from io import StringIO
from itertools import product

import pytest
import torch
from command_line import Command
from rich.console import Console

from edgediff.cli.render.tables import spectral_table
from edgediff.inspect.comparison import ROLES, SPECTRAL, SpectralRow, compare
from edgediff.models.load import load_model
from edgediff.models.slim import plain_config, slim
from edgediff.models.spectral import spectralize
from edgediff.zoo import FOLDER

TASKS = {"FFHQ/CelebA-HQ/Bedroom": "ldm-ffhq", "Church": "ldm-church", "ImageNet": "ldm-imagenet"}
# Teacher over student, multiply-adds without attention matmuls: the published 8 to 18 times.
RATIOS = {"ldm-ffhq": 14.3, "ldm-church": 8.9, "ldm-imagenet": 10.1}
# How far a count of ours may be from the figure that it is held to.
BARS = {"teacher": 0.01, "plain": 0.01, "student": 0.05}

pytestmark = pytest.mark.long  # whole geometries are counted


@pytest.fixture(scope="module")
def rows() -> tuple[SpectralRow, ...]:
    return compare("spectral")


@pytest.fixture(scope="module")
def by_name(rows: tuple[SpectralRow, ...]) -> dict[str, SpectralRow]:
    return {row.model: row for row in rows}


def test_every_task_has_a_teacher_a_plain_unet_and_a_student(rows: tuple[SpectralRow, ...]) -> None:
    assert [(row.task, row.role) for row in rows] == [*product(TASKS, BARS)]
    for row in rows:
        assert row.model == TASKS[row.task] + {"teacher": "", "plain": "-lite", "student": "-spectral"}[row.role]
        assert row.source == ("published" if row.role == "student" else "counted")


def test_counts_are_near_the_figures_that_they_are_held_to(rows: tuple[SpectralRow, ...]) -> None:
    for row in rows:
        assert row.cost.parameters == pytest.approx(row.published_parameters, rel=BARS[row.role]), row.model
        assert row.cost.macs == pytest.approx(row.published_macs, rel=BARS[row.role]), row.model


def test_the_figures_are_those_of_the_papers(by_name: dict[str, SpectralRow]) -> None:
    figures = {name: (row.published_parameters, row.published_macs) for name, row in by_name.items()}
    assert figures == {
        "ldm-ffhq": (274_060_000, 96_020_000_000),
        "ldm-ffhq-lite": (22_410_000, 7_850_000_000),
        "ldm-ffhq-spectral": (21_100_000, 6_700_000_000),
        "ldm-church": (294_970_000, 18_640_000_000),
        "ldm-church-lite": (32_830_000, 2_070_000_000),
        "ldm-church-spectral": (33_800_000, 2_100_000_000),
        "ldm-imagenet": (400_920_000, 99_770_000_000),
        "ldm-imagenet-lite": (47_030_000, 11_100_000_000),
        "ldm-imagenet-spectral": (45_400_000, 9_900_000_000),
    }


def test_a_student_costs_what_the_paper_says_of_its_teacher(by_name: dict[str, SpectralRow]) -> None:
    for teacher, published in RATIOS.items():
        student = by_name[f"{teacher}-spectral"]
        assert student.ratio == by_name[teacher].cost.macs / student.cost.macs
        assert student.ratio == pytest.approx(published, rel=0.05), teacher
        assert by_name[teacher].ratio == 1


def test_a_plain_unet_would_not_pass_for_a_student(by_name: dict[str, SpectralRow]) -> None:
    for teacher in ("ldm-ffhq", "ldm-imagenet"):
        plain, student = by_name[f"{teacher}-lite"], by_name[f"{teacher}-spectral"]
        assert plain.cost.macs > 1.05 * student.published_macs


def test_attention_of_a_student_is_the_plain_unets(by_name: dict[str, SpectralRow]) -> None:
    for teacher, matmuls in (("ldm-ffhq", 5.18e9), ("ldm-church", 2.28e9), ("ldm-imagenet", 4.46e9)):
        assert by_name[teacher].cost.macs_attention == pytest.approx(matmuls, rel=0.005)
        costs = [by_name[teacher + suffix].cost.macs_attention for suffix in ("-lite", "-spectral")]
        assert 0 < costs[0] == costs[1] < matmuls


@pytest.mark.parametrize("teacher", RATIOS)
def test_cards_are_what_slim_and_spectralize_make_of_the_teacher(teacher: str) -> None:
    unet = load_model(teacher).unet
    with torch.device("meta"):
        made = {f"{teacher}-lite": slim(unet, 64), f"{teacher}-spectral": spectralize(unet, 64)}
    for name, want in made.items():
        model = load_model(name)
        assert type(model.unet) is type(want)
        assert {k: _plain(v) for k, v in plain_config(model.unet).items()} == {
            k: _plain(v) for k, v in plain_config(want).items()
        }
        shapes = [{key: p.shape for key, p in one.named_parameters()} for one in (model.unet, want)]
        assert shapes[0] == shapes[1]
        assert model.scheduler.config == load_model(teacher).scheduler.config
        assert f"[{teacher}](../{teacher}/README.md)" in model.card.text
        assert "Rebuilt: " in model.card.text


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_cards_say_what_was_published(by_name: dict[str, SpectralRow]) -> None:
    for name, row in by_name.items():
        text = (FOLDER / name / "README.md").read_text()
        if row.role == "student":
            figures = f"{row.published_parameters / 1e6:g} M parameters, {row.published_macs / 1e9:g} G multiply-adds"
            assert f"Published (arXiv 2211.17106): {figures}" in text
            assert "Second-hand: " in text
        else:
            assert "Published: no count that we could read" in text
        assert f"{row.cost.macs / 1e9:.2f} G multiply-adds" in text
        assert f"and {row.cost.macs_attention / 1e9:.2f} G in attention matmuls" in text


# What is shown


def test_rows_as_data(rows: tuple[SpectralRow, ...]) -> None:
    student = rows[2].to_dict()
    assert student == {
        "task": "FFHQ/CelebA-HQ/Bedroom", "role": "student", "model": "ldm-ffhq-spectral", "parameters": 20_989_427,
        "macs": 6_687_408_128, "macs_attention": 1_480_589_312, "published_parameters": 21_100_000,
        "published_macs": 6_700_000_000, "source": "published", "ratio": rows[0].cost.macs / 6_687_408_128,
    }  # fmt: skip
    assert len(ROLES) * len(SPECTRAL) == len(rows)


def test_inspect_compares(command: Command, rows: tuple[SpectralRow, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("edgediff.inspect.comparison.compare", lambda name: (asked.append(name), rows)[1])
    printed = json.loads(command("inspect", "--compare", "spectral", "--json").out)
    assert printed == {"rows": [row.to_dict() for row in rows]}
    said = command("inspect", "--compare", "spectral")
    assert (said.code, said.errors, asked) == (0, [], ["spectral", "spectral"])
    for figure in ("274.06", "(274.06)", "96.02", "5.18", "20.99", "21.1", "6.69", "6.7", "14.4x", "8.9x", "10.1x"):
        assert f" {figure} " in said.out, figure


def test_the_table_fits_a_terminal(rows: tuple[SpectralRow, ...]) -> None:
    console = Console(width=80, file=StringIO(), record=True)
    console.print(spectral_table(rows))
    lines = console.export_text().splitlines()
    (header,) = [line for line in lines if "params" in line]
    assert header.split() == [
        "task", "UNet", "params,", "M", "published", "MACs,", "G", "published", "+", "attn.", "ratio",
    ]  # fmt: skip
    cells = [line.split() for line in lines]
    assert [row[0] for row in cells if row[1:2] == ["teacher"]] == ["FFHQ", "Church", "ImageNet"]
    assert sum("student" in row for row in cells) == 3
