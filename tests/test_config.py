from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from edgediff import Cut, ExportConfig, load_config
from edgediff.config.floors import VerifyConfig
from edgediff.config.recipes import find_recipe
from edgediff.errors import ConfigError
from edgediff.export.export_config import check_config, config_from, layout_of
from edgediff.targets.base import Layout
from edgediff.targets.onnx import OnnxConfig
from edgediff_runtime.schedulers import SCHEDULER_NAMES

RECIPES = sorted((Path(__file__).parents[1] / "export_configs").glob("*.yaml"))


def refused(data: object, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from(data)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def load_text(folder: Path, text: str) -> ExportConfig:
    (folder / "recipe.yaml").write_text(text)
    return load_config(folder / "recipe.yaml")


# Recipes


def test_there_are_recipes() -> None:
    assert {"grocery-32-onnx", "sd15-onnx"} <= {file.stem for file in RECIPES}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_each_recipe_loads_and_round_trips(file: Path) -> None:
    config = load_config(file)
    assert load_config(file.stem) == config
    plain = msgspec.to_builtins(config)
    assert config_from(plain) == config
    assert config_from(yaml.safe_load(yaml.safe_dump(msgspec.json.decode(msgspec.json.encode(config))))) == config
    given = yaml.safe_load(file.read_text())
    assert given.keys() <= plain.keys()
    assert all(_holds(plain[key], value) for key, value in given.items())


def _holds(value: Any, given: Any) -> bool:
    """Whether what was read holds everything that the file gives."""
    if isinstance(given, dict):
        return all(_holds(value[key], inner) for key, inner in given.items())
    return bool(list(value) == given) if isinstance(given, list) else bool(value == given)


def test_holds_itself_can_fail() -> None:
    assert _holds({"a": {"b": 1, "c": 2}, "d": (1,)}, {"a": {"b": 1}, "d": [1]})
    assert not _holds({"a": {"b": 1}}, {"a": {"b": 2}})
    assert not _holds((1, 2), [1])


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "{}"])
def test_an_empty_recipe_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_text(tmp_path, text) == ExportConfig()


def test_settings_reach_their_fields(tmp_path: Path) -> None:
    text = "model: sd15\ncut: {level: 2, point: after_upsample}\nsteps: 4\nverify: {mode: graphs, caching_db: 20}\n"
    assert load_text(tmp_path, text) == ExportConfig(
        model="sd15", cut=Cut(2, "after_upsample"), steps=4, verify=VerifyConfig(mode="graphs", caching_db=20.0)
    )


def test_a_missing_file_names_the_built_in_recipes(tmp_path: Path) -> None:
    built_in = ", ".join(file.stem for file in RECIPES)
    with pytest.raises(ConfigError, match=rf"no recipe .*nothing\.yaml: no such file.*\(choices: {built_in}\)"):
        load_config(tmp_path / "nothing.yaml")


def test_a_file_comes_before_a_built_in_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("sd15-onnx").name == "sd15-onnx.yaml"
    Path("sd15-onnx").write_text("steps: 3")
    assert load_config("sd15-onnx").steps == 3


@pytest.mark.parametrize(("text", "kind"), [("- steps", "list"), ("steps", "str"), ("8", "int"), ("true", "bool")])
def test_not_a_mapping(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.yaml: expected a mapping of settings, got {kind}"):
        load_text(tmp_path, text)


@pytest.mark.parametrize(
    "data", [b"steps: [", b"\tsteps: 8", b"\xff\xfe\x00", b"a: !!python/name:os.system", b"? [a]\n: b"]
)
def test_not_yaml(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "recipe.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=r"recipe\.yaml: not YAML \(") as caught:
        load_config(tmp_path / "recipe.yaml")
    assert "\n" not in str(caught.value)


def test_the_file_is_named_with_what_is_wrong_in_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml: 'steps' is 0; expected 1 or more"):
        load_text(tmp_path, "steps: 0")


# Keys and types


@pytest.mark.parametrize(
    ("data", "given", "nearest"),
    [
        ({"modle": "sd15"}, "modle", "model"),
        ({"guidance": 2.0}, "guidance", "guidance_scale"),
        ({"cut": {"levl": 1}}, "cut.levl", "cut.level"),
        ({"onnx": {"opsett": 21}}, "onnx.opsett", "onnx.opset"),
        ({"verify": {"graphs_db": 35}}, "verify.graphs_db", "verify.graph_db"),
    ],
)
def test_an_unknown_key_names_the_nearest(data: dict[str, Any], given: str, nearest: str) -> None:
    refused(data, f"unknown key '{given}', did you mean '{nearest}'?", "(valid: ", nearest.rpartition(".")[2])


def test_a_key_that_is_no_text() -> None:
    refused({1: 2}, "unknown key '1'", "(valid: model, targets, cut")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"steps": "eight"}, ["'steps'", "expected `int | null`, got `str`"]),
        ({"steps": 1.5}, ["'steps'", "expected `int | null`, got `float`"]),
        ({"steps": True}, ["'steps'", "expected `int | null`, got `bool`"]),
        ({"model": 3}, ["'model'", "expected `str | null`, got `int`"]),
        ({"cut": 1}, ["'cut'", "expected `object`, got `int`"]),
        ({"cut": None}, ["'cut'", "expected `object`, got `null`"]),
        ({"cut": {"level": "1"}}, ["'cut.level'", "expected `int`, got `str`"]),
        ({"targets": "onnx"}, ["'targets'", "expected `array`, got `str`"]),
        ({"guidance_scale": "2"}, ["'guidance_scale'", "expected `float | null`, got `str`"]),
        ({"clock": 2.0}, ["'clock'", "expected `int | str`, got `float`"]),
        ({"clock": True}, ["'clock'", "expected `int | str`, got `bool`"]),
        ({"clock": None}, ["'clock'", "expected `int | str`, got `null`"]),
    ],
)
def test_wrong_types(data: dict[str, Any], words: list[str]) -> None:
    refused(data, *words)


@pytest.mark.parametrize(
    ("data", "field", "value", "choices"),
    [
        ({"targets": ["onnx", "tflite"]}, "targets[1]", "tflite", "onnx, coreml"),
        ({"layout": "single"}, "layout", "single", "split, pair"),
        ({"onnx": {"layout": "heap"}}, "onnx.layout", "heap", "split, pair"),
        ({"coreml": {"dtype": "int8"}}, "coreml.dtype", "int8", "fp16, fp32"),
        ({"coreml": {"deployment_target": "iOS15"}}, "coreml.deployment_target", "iOS15", "iOS16, iOS17, iOS18"),
        ({"scheduler": "ddpm"}, "scheduler", "ddpm", ", ".join(SCHEDULER_NAMES)),
        ({"onnx": {"dtype": "int8"}}, "onnx.dtype", "int8", "fp16, fp32"),
        ({"verify": {"mode": "none"}}, "verify.mode", "none", "full, graphs"),
    ],
)
def test_a_choice_that_is_not_there_names_those_that_are(
    data: dict[str, Any], field: str, value: str, choices: str
) -> None:
    refused(data, f"'{field}'", f"'{value}'", f"expected one of: {choices}")


# Ranges


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cut: {level: 0}", ["'cut.level' is 0", "1 or more"]),
        ("cut: {level: -1}", ["'cut.level' is -1", "1 or more"]),
        ("cut: {point: middle}", ["'cut.point' is 'middle'", "one of: before_upsample, after_upsample"]),
        ("cut: {point: 'block:x'}", ["'cut.point' is 'block:x'", "block:N"]),
        ("cut: {point: 'block:1', level: 2}", ["block:1, which divides level 1", "'cut.level' is 2"]),
        ("steps: 0", ["'steps' is 0", "1 or more"]),
        ("steps: -8", ["'steps' is -8", "1 or more"]),
        ("guidance_scale: .nan", ["'guidance_scale' is nan", "a finite number above 0"]),
        ("guidance_scale: .inf", ["'guidance_scale' is inf", "a finite number above 0"]),
        ("guidance_scale: 0", ["'guidance_scale' is 0", "a finite number above 0"]),
        ("guidance_scale: -2", ["'guidance_scale' is -2", "a finite number above 0"]),
        ("verify: {graph_db: .nan}", ["'verify.graph_db' is nan", "a finite number of dB above 0"]),
        ("verify: {composed_db: -35}", ["'verify.composed_db' is -35", "dB above 0"]),
        ("verify: {trajectory_db: .inf}", ["'verify.trajectory_db' is inf", "dB above 0"]),
        ("verify: {caching_db: 0}", ["'verify.caching_db' is 0", "dB above 0"]),
        ("onnx: {opset: 17}", ["'onnx.opset' is 17", "18 to 23"]),
        ("onnx: {opset: 24}", ["'onnx.opset' is 24", "18 to 23"]),
        ("onnx: {opset: 23, portable: true}", ["'onnx.opset' is 23", "18 to 22", "attention"]),
        ("seed: -1", ["'seed' is -1", "0 to 2^63 - 1"]),
        ("seed: 9223372036854775808", ["'seed' is 9223372036854775808", "0 to 2^63 - 1"]),
        ("random_weights: -1", ["'random_weights' is -1", "0 to 2^63 - 1"]),
        ("targets: []", ["'targets' is empty", "at least one of: onnx"]),
        ("targets: [onnx, onnx]", ["'targets' has a duplicate: onnx, onnx"]),
    ],
)
def test_out_of_range(tmp_path: Path, text: str, words: list[str]) -> None:
    refused(yaml.safe_load(text), *words)
    with pytest.raises(ConfigError, match=r"recipe\.yaml: '"):
        load_text(tmp_path, text)


@pytest.mark.parametrize(
    "data",
    [
        {"onnx": {"opset": 18}},
        {"onnx": {"opset": 23}},
        {"seed": 2**63 - 1, "random_weights": 0},
        {"steps": 1, "clock": 1},
        {"guidance_scale": 1},
        {"cut": {"level": 9}},
    ],
)
def test_the_ends_of_the_ranges(data: dict[str, Any]) -> None:
    plain = msgspec.to_builtins(config_from(data))
    assert all(_holds(plain[key], value) for key, value in data.items())


# The clock


@pytest.mark.parametrize(
    ("text", "clock"),
    [
        ("clock: 3", 3),
        ("clock: '3'", "3"),
        ("clock: 1,0,0,1\nsteps: 4", "1,0,0,1"),
        ("clock: [1, 0, 0, 1]\nsteps: 4", "1,0,0,1"),
        ("clock: [true, false, no, yes]\nsteps: 4", "1,0,0,1"),
        ("clock: [1]\nsteps: 1", "1"),
    ],
)
def test_forms_of_the_clock(tmp_path: Path, text: str, clock: int | str) -> None:
    assert load_text(tmp_path, text).clock == clock


@pytest.mark.parametrize(
    ("clock", "words"),
    [
        (0, ["clock is 0", "period of 1 or more"]),
        (-2, ["clock is -2", "period of 1 or more"]),
        ("often", ["clock is 'often'", "a period such as 2 or a mask such as 1,0,1,0"]),
        ("", ["clock is ''", "a period such as 2"]),
        ("1,0", ["clock mask 1,0 has 2 entries for 8 steps"]),
        ("0,1,0,1,0,1,0,1", ["clock mask 0,1,0,1,0,1,0,1 begins with 0", "the first step is always full"]),
        ([1, 0], ["clock mask 1,0 has 2 entries for 8 steps"]),
        ([0] * 8, ["begins with 0", "the first step is always full"]),
        ([], ["'clock' is []", "a mask such as [1, 0, 1, 0]"]),
        ([2], ["'clock' is [2]", "a mask such as [1, 0, 1, 0]"]),
        ([1.5, *[0] * 7], ["'clock' is [1.5, 0", "a mask such as [1, 0, 1, 0]"]),
        ([1, float("inf"), *[0] * 6], ["'clock' is [1, inf", "a mask such as [1, 0, 1, 0]"]),
        (["a", "b"], ["'clock' is ['a', 'b']", "a mask such as [1, 0, 1, 0]"]),
        ([1, None], ["'clock' is [1, None]", "a mask such as [1, 0, 1, 0]"]),
        ([[1], 0], ["'clock' is [[1], 0]", "a mask such as [1, 0, 1, 0]"]),
    ],
)
def test_clocks_that_do_not_fit(clock: object, words: list[str]) -> None:
    refused({"clock": clock, "steps": 8, "scheduler": "ddim"}, *words)


# Built by hand in Python


def test_a_config_by_hand_comes_back_as_it_was() -> None:
    config = ExportConfig(clock=2, targets=("onnx",), cut=Cut(level=2), onnx=OnnxConfig(opset=20))
    assert check_config(config) == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 0}, ["'steps' is 0", "1 or more"]),
        ({"steps": "8"}, ["'steps'", "expected `int | null`, got `str`"]),
        ({"seed": True}, ["'seed'", "expected `int`, got `bool`"]),
        ({"cut": Cut(level=0)}, ["'cut.level' is 0", "1 or more"]),
        ({"cut": Cut(level=1.5)}, ["'cut.level'", "expected `int`, got `float`"]),
        ({"cut": None}, ["'cut'", "expected `object`, got `null`"]),
        ({"targets": "onnx"}, ["'targets'", "expected `array`, got `str`"]),
        ({"targets": ("tflite",)}, ["'targets[0]'", "'tflite'", "expected one of: onnx, coreml"]),
        ({"guidance_scale": float("nan")}, ["'guidance_scale' is nan", "finite"]),
        ({"clock": "0,1"}, ["clock mask 0,1 begins with 0"]),
        ({"model": Path("sd15")}, ["a type that no recipe can have", "PosixPath"]),
    ],
)
def test_a_config_by_hand_is_checked_too(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(ExportConfig(**given))
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_plain_values_by_hand_become_the_declared_types() -> None:
    config = check_config(ExportConfig(targets=["onnx"], cut={"level": 2}, guidance_scale=2))
    assert config == ExportConfig(targets=("onnx",), cut=Cut(2), guidance_scale=2.0)
    assert isinstance(config.guidance_scale, float)


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        ExportConfig().steps = 4


@pytest.mark.parametrize(
    ("clock", "own", "layouts"),
    [
        (2, None, ("pair", "split")),
        ("1,0,1,0", None, ("pair", "split")),
        (1, None, ("split", "split")),
        (2, "split", ("split", "split")),
        (2, "pair", ("pair", "pair")),
    ],
)
def test_graphs_go_in_a_pair_where_the_clock_leaves_a_choice(
    clock: int | str, own: Layout | None, layouts: tuple[Layout, Layout]
) -> None:
    config = check_config(ExportConfig(clock=clock, steps=4, scheduler="ddim", layout=own))
    assert (layout_of(config, "onnx"), layout_of(config, "coreml")) == layouts
    kept = msgspec.structs.replace(config, onnx=OnnxConfig(layout="split"))
    assert layout_of(kept, "onnx") == "split"
    portable = msgspec.structs.replace(config, onnx=OnnxConfig(portable=True))
    assert layout_of(portable, "onnx") == (own or "split")
