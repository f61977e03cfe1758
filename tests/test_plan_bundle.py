import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest
from command_line import Command, Said, assert_error, unchanged
from pipelines import exported_pipeline

import edgediff
from edgediff import outputs
from edgediff.data.arrays import prompt_arguments
from edgediff.errors import ConfigError, MissingExtraError, TargetError
from edgediff.export.export_config import config_from
from edgediff.plan import plan_files
from edgediff.plan.budget import count_cost, time_cost
from edgediff.plan.plan_files import plan_recipe, render_recipe
from edgediff.plan.planner import Plan, caveats, make_plan, search_of
from edgediff.plan.trajectory import Trajectories, psnr_db
from edgediff.targets.backends import open_session
from edgediff_runtime import EdgePipeline, Manifest, open_bundle
from edgediff_runtime.clock import format_mask
from edgediff_runtime.errors import RequestError
from edgediff_runtime.manifest import TrainedFor


@pytest.fixture(scope="module")
def manifest(class_bundle: Path) -> Manifest:
    return open_bundle(class_bundle).manifest


@pytest.fixture(scope="module")
def images(class_bundle: Path, manifest: Manifest) -> Trajectories:
    return Trajectories(manifest, open_session(open_bundle(class_bundle), "onnxruntime"), 4, 2.0, 5, 3)


@pytest.fixture(scope="module")
def plan(class_bundle: Path) -> Plan:
    return make_plan(class_bundle, 0.85, num_images=2, seed=3)


# What a step costs


def test_costs_are_the_manifests_with_attention(class_bundle: Path, manifest: Manifest) -> None:
    found = count_cost(class_bundle)
    full = manifest.cost["full"]
    assert full.macs_attention > 0
    assert found.full == pytest.approx(2e-9 * (full.macs + full.macs_attention))
    assert found.share((True, False)) == pytest.approx((found.full + found.cached) / (2 * found.full))


def test_time_is_measured_of_both_kinds_of_step(images: Trajectories) -> None:
    found = time_cost(images)
    assert found.unit == "latency"
    assert found.cached > 0
    assert 0 < found.full < 1e3


# Trajectories


def test_shared_beginnings_change_no_error_and_save_runs(images: Trajectories, manifest: Manifest) -> None:
    tried = [(True, *rest) for rest in product((True, False), repeat=3)]
    before = images._replay.runs
    found = images.errors(tried)
    # 15 different beginnings of masks: highres_out runs in each, lowres in the full ones, and highres_in does not know
    # yet which of the two a step will be.
    assert images._replay.runs - before == 3 * (15 + 8 + 8)
    pipe = EdgePipeline(manifest, images.session)
    for image in range(3):
        request = {"label": image, "seed": 5 + image, "num_inference_steps": 4, "guidance_scale": 2.0}
        pictures = {mask: pipe(**request, clock=mask).images / 255 for mask in tried}
        for mask in tried:
            want = np.mean((pictures[mask] - pictures[tried[0]]) ** 2)
            assert found[mask][image] == pytest.approx(want, abs=1e-12)
    assert images.errors(tried[:2])[tried[1]] is found[tried[1]]


def test_a_latent_error_is_over_the_references_variance(text_bundle: Path) -> None:
    opened = open_bundle(text_bundle)
    rng = np.random.default_rng(0)
    text = prompt_arguments({f"{k}encoder_hidden_states": rng.standard_normal((2, 7, 12)) for k in ("", "negative_")})
    images = Trajectories(opened.manifest, open_session(opened, "onnxruntime"), 4, 7.5, 0, 2, text)
    found = images.errors([(True, False, True, False)])[True, False, True, False]
    rows = {name: value[1:] for name, value in text.items() if isinstance(value, np.ndarray)}
    pipe = EdgePipeline(opened.manifest, images.session)
    one, two = (pipe(**rows, seed=1, clock=clock, guidance_scale=7.5).latents for clock in (1, 2))
    assert found[1] == pytest.approx(np.mean((two - one) ** 2) / np.var(one), rel=1e-4)
    assert psnr_db(0.01) == pytest.approx(20)


@pytest.mark.parametrize(
    ("given", "says"),
    [({"num_images": 0}, "num_images is 0; expected a whole number above 0"),
     ({"seed": -1}, r"seed -1: expected an integer in \[0, 2\*\*64\)"),
     ({"seed": 2**64 - 1, "num_images": 2}, r"seed 18446744073709551616: expected an integer in "),
     ({"guidance_scale": float("nan")}, ".* 'guidance_scale' is nan; expected a finite number above 0"),
     ({"steps": 0}, "steps is 0; a plan is made for 1 to 100"),
     ({"steps": 101}, "steps is 101; a plan is made for 1 to 100"),
     ({"backend": "tensorrt"}, "no backend 'tensorrt'; choices: ")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_runs(class_bundle: Path, given: dict, says: str) -> None:
    said: list[str] = []
    with pytest.raises((ConfigError, RequestError), match=f"^{says}"):
        make_plan(class_bundle, 0.9, progress=said.append, **given)
    assert said == [f"opening {class_bundle}"]


def test_clock_1_of_a_pair_is_a_recipe_of_parts(manifest: Manifest) -> None:
    config = manifest.config | {"layout": "pair", "onnx": {"layout": "pair"}}
    pair = msgspec.structs.replace(manifest, config=config)
    assert plan_recipe(pair, (True, False), None).onnx.layout == "pair"
    found = plan_recipe(pair, (True, True), None)
    assert (found.layout, found.onnx.layout, found.clock) == ("split", None, "1,1")


# The recipe


@pytest.mark.long
def test_the_recipe_loads_and_exports(plan: Plan, tmp_path: Path) -> None:
    written = plan_files.write_plan(plan, tmp_path)
    config = edgediff.load_config(written["recipe"])
    assert (config.clock, config.steps, config.adaptor) == (format_mask(plan.chosen.mask), 4, "identity")
    quick = config_from(msgspec.to_builtins(config) | {"verify": {"mode": "graphs"}, "onnx": {"simplify": False}})
    edgediff.export_bundle(edgediff.load_model(str(config.model)), tmp_path / "bundle", quick)
    again = open_bundle(tmp_path / "bundle").manifest
    assert tuple(map(bool, again.operating_point.mask)) == plan.chosen.mask
    assert again.source.sha256 == plan.manifest.source.sha256


def test_a_recipe_keeps_every_setting(manifest: Manifest, tmp_path: Path) -> None:
    config = plan_recipe(manifest, (True, False, True), 1e-05)
    strange = msgspec.structs.replace(config, license='MIT: "x" # y', model="a, b: c", random_weights=0)
    (tmp_path / "r.yaml").write_text(render_recipe(strange, "one: two"))
    assert edgediff.load_config(tmp_path / "r.yaml") == strange


def test_a_bundles_recipe_of_another_version_is_refused(manifest: Manifest) -> None:
    old = msgspec.structs.replace(manifest, config={**manifest.config, "colour": "red"})
    with pytest.raises(
        ConfigError, match="the recipe in the bundle's manifest cannot be used again: unknown key 'colour'"
    ):
        plan_recipe(old, (True,), None)


# Warnings


def test_what_the_paper_saw_fail_is_a_warning(manifest: Manifest) -> None:
    turns, row = (True, False) * 4, (True, True, True, True, False, False, False, False)
    ddim = msgspec.structs.replace(manifest, scheduler=msgspec.structs.replace(manifest.scheduler, name="ddim"))
    assert caveats(manifest, turns, 2.0) == ()
    (few,) = caveats(ddim, turns, 2.0)
    assert few.startswith("DDIM at 8 steps: the one sampler that the paper saw get worse with a clock (FID 34.72 to")
    assert caveats(ddim, (True, False) * 10, 2.0) == ()
    (consecutive,) = caveats(manifest, row, 2.0)
    assert consecutive.startswith("cached steps in a row: of 8 steps with 4 cached, the paper saw FID 28.07")
    assert caveats(ddim, (True,) * 8, 2.0) == ()


def test_what_else_speaks_against_a_plan_is_a_warning(manifest: Manifest) -> None:
    trained = TrainedFor(8, "dpmpp_2m", 2, (1, 0) * 4, 2.0)
    learnt = msgspec.structs.replace(manifest.adaptor, kind="resnet", name="resnet-8", trained_for=trained)
    (line,) = caveats(msgspec.structs.replace(manifest, adaptor=learnt), (True, False, True), 2.0)
    assert line.startswith("adaptor resnet-8 was trained for 8 steps")
    noise = msgspec.structs.replace(manifest, source=msgspec.structs.replace(manifest.source, random_weights=0))
    assert "weights are random" in caveats(noise, (True, False), 2.0)[0]


# Files, the picture, the command


def own(said: Said) -> list[str]:
    return [line for line in said.errors if not line.startswith("planning: ")]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' sampler
def test_a_pipeline_is_planned_along_prompts(tmp_path: Path, command: Command) -> None:
    bundle = exported_pipeline("sd1")
    (tmp_path / "prompts.txt").write_text("a red apple\n\na dog\n")
    args = ("plan", bundle, "--budget", 0.9, "--steps", 2, "--num-images", 3)
    said = command(*args, "--conditioning", tmp_path / "prompts.txt", "-o", tmp_path / "plan", "--json")
    given = make_plan(bundle, 0.9, steps=2, num_images=3, conditioning=["a red apple", "a dog", "a red apple"])
    assert json.loads(said.out)["uniform"] == given.to_dict()["uniform"]
    one = make_plan(bundle, 0.9, steps=2, num_images=3, conditioning=["a red apple"])
    assert one.to_dict()["uniform"] != given.to_dict()["uniform"]
    for wrong in ("a red apple", []):
        with pytest.raises(ConfigError, match="expected a list of prompts, or embeddings"):
            make_plan(bundle, 0.9, conditioning=wrong)
    (tmp_path / "empty.txt").write_text("\n")
    assert_error(command(*args, "--conditioning", tmp_path / "empty.txt"), "is empty; expected prompts, one a line")


def test_a_model_of_classes_takes_no_prompts(class_bundle: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    said = command("plan", class_bundle, "--conditioning", tmp_path / "prompts.txt", "-o", tmp_path / "plan")
    assert_error(said, "a prompt was given, but the model is conditioned on")


def test_the_command_writes_a_plan(class_bundle: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "mine.txt").write_text("mine")
    args = ("plan", class_bundle, "--budget", "0.6", "--num-images", 2, "-o", tmp_path / "plan")
    said = command(*args, "--json")
    assert (said.code, own(said)) == (0, [])
    shown = json.loads(said.out)
    names = {"figure": "frontier.png", "plan": "plan.json", "recipe": "recipe.yaml"}
    assert shown.pop("files") == {what: str(tmp_path / "plan" / name) for what, name in names.items()}
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert written == shown
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {*names.values(), "mine.txt"}
    assert (tmp_path / "plan" / "frontier.png").read_bytes()[1:4] == b"PNG"
    assert written["chosen"]["cost"] <= 0.6
    assert [point["cached_steps"] for point in written["frontier"]] == [0, 1, 2, 3]
    assert written["frontier"][0]["psnr_db"] is None
    said = command(*args)
    assert said.code == 0
    assert written["chosen"]["clock"] in said.out
    assert all(word in said.out for word in ("uniform clocks", "recipe.yaml", "GFLOPs"))


def test_a_plan_of_other_settings_is_replaced_only_by_force(
    class_bundle: Path, tmp_path: Path, command: Command
) -> None:
    def plan(budget: float, *more: object) -> Said:
        return command("plan", class_bundle, "--budget", budget, "--steps", 2, "--num-images", 1, "-o", tmp_path, *more)

    (tmp_path / "recipe.yaml").write_text("mine")
    with unchanged(tmp_path):
        assert_error(plan(1), f"{tmp_path} contains recipe.yaml of other settings; pass --force to replace it, or cho")
    assert plan(1, "--force").code == 0
    for change in (["--budget", 0.9], ["--seed", 1], ["--guidance-scale", 3], ["--num-images", 2], ["--steps", 3]):
        with unchanged(tmp_path):
            assert_error(plan(1, *change), f"{tmp_path} contains frontier.png of other settings; pass --force to rep")
    assert plan(1).code == 0
    assert plan(0.9, "--force").code == 0
    assert json.loads((tmp_path / "plan.json").read_text())["budget"] == 0.9
    for damaged in ("{", "[]"):
        (tmp_path / "plan.json").write_text(damaged)
        assert_error(plan(0.9), "pass --force")


def test_a_plan_knows_its_bundle_and_its_embeddings(text_bundle: Path) -> None:
    opened = open_bundle(text_bundle)
    session = open_session(opened, "onnxruntime")

    def inputs(manifest: Manifest, value: float) -> str:
        text = prompt_arguments({f"{k}encoder_hidden_states": np.full((1, 7, 12), value) for k in ("", "negative_")})
        found = search_of(Trajectories(manifest, session, 4, 7.5, 0, 2, text), "onnxruntime", 0.9, "flops")
        return str(found["inputs_sha256"])

    other = msgspec.structs.replace(opened.manifest, license="MIT")
    assert inputs(opened.manifest, 1) == inputs(open_bundle(text_bundle).manifest, 1)
    assert len({inputs(opened.manifest, 1), inputs(opened.manifest, 2), inputs(other, 1)}) == 3


@pytest.mark.parametrize(
    ("args", "parts"),
    [(("--budget", "0.01"), ("the cheapest, 1,0,0,0, costs", "nearest budget is 0.")),
     (("--in", "joules"), ("budget unit is 'joules'; choices: flops, latency",)),
     (("--steps", "1"), ("the cheapest, 1, costs 100.0%",))],
)  # fmt: skip
def test_the_command_refuses_in_one_line(
    class_bundle: Path, place: Path, command: Command, args: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    said = command("plan", class_bundle, *args, "-o", place / "plan")
    assert (said.code, said.out, len(own(said))) == (2, "", 1)
    assert all(part in own(said)[0] for part in parts), said
    assert not (place / "plan").exists()


def test_a_plan_in_latent_space_takes_the_evidences_embeddings(text_bundle: Path, tmp_path: Path) -> None:
    found = make_plan(text_bundle, 0.9, num_images=2, steps=3)
    assert "random embeddings" in " ".join(found.warnings)
    plan_files.write_plan(found, tmp_path)


def test_without_matplotlib_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"^the plan's picture needs the 'train' extra"):
        plan_files.check_place(tmp_path / "plan", tmp_path / "bundle")


@pytest.mark.parametrize("where", ["", "plan", "onnx/plan"])
def test_nothing_is_written_into_a_bundle(class_bundle: Path, where: str) -> None:
    says = f"{class_bundle / where} is in the bundle {class_bundle}, which contains only its own files; choose another"
    with pytest.raises(TargetError, match=f"^{re.escape(says)} output$"):
        plan_files.check_place(class_bundle / where, class_bundle)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for where, says in (
        (file, f"{file} is not a directory; choose another output"),
        (file / "plan", f"cannot write {file / 'plan'}: {file} is not a folder that can be written; choose another"),
    ):
        with pytest.raises(TargetError, match=f"^{re.escape(says)}"):
            plan_files.check_place(where, tmp_path / "bundle")


def test_a_write_that_fails_leaves_what_was_there(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.json").write_text("old")
    fail: Callable[..., None] = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    monkeypatch.setattr(plan_files, "draw_frontier", fail)
    with pytest.raises(OSError, match="No space left on device"):
        plan_files.write_plan(plan, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_needs_no_torch(class_bundle: Path) -> None:
    program = (
        "import sys\nfrom edgediff.plan.planner import make_plan\n"
        "print(make_plan(sys.argv[1], 0.9, num_images=1, steps=2).chosen.mask)\n"
        "assert not {'torch', 'diffusers', 'onnx', 'matplotlib', 'yaml'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", program, class_bundle], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "(True, False)\n"), done.stderr


# Edits


def test_a_plan_for_edits_is_of_the_steps_that_run(class_bundle: Path, manifest: Manifest, tmp_path: Path) -> None:
    found = make_plan(class_bundle, 0.85, steps=6, strength=0.7, num_images=2, seed=3)
    assert found.images.start == 2
    assert {len(point.mask) for point in found.frontier} == {4}
    assert found.to_dict()["strength"] == 0.7
    recipe = plan_files.write_plan(found, tmp_path)["recipe"].read_text()
    clock = format_mask((True, True, *found.chosen.mask))
    assert f'clock: "{clock}"' in recipe
    assert "For edits at strength 0.7" in recipe
    # What is edited was drawn with the next image's class; its error is of the picture, as anywhere.
    edits = found.images.edits
    assert edits is not None
    pipe = EdgePipeline(manifest, open_session(open_bundle(class_bundle), "onnxruntime"), warn=False)
    asked = {"num_images": 1, "num_inference_steps": 6, "clock": 1, "guidance_scale": found.images.guidance_scale}
    labels = len(manifest.conditioning.labels)
    for i in range(2):
        drawn = pipe(**asked, label=(i + 1) % labels, seed=3 + 2 + i)
        np.testing.assert_array_equal(drawn.images[0], edits.pictures[i])
    full = pipe(**asked, label=0, seed=3, image=edits.pictures[0], strength=0.7)
    mask = found.chosen.mask
    cached = pipe(**{**asked, "clock": mask}, label=0, seed=3, image=edits.pictures[0], strength=0.7)
    error = np.mean((full.images.astype(float) - cached.images) ** 2) / 255**2
    assert found.chosen.errors[0] == pytest.approx(error)


def test_given_pictures_are_edited_in_turn(class_bundle: Path) -> None:
    pictures = [np.full((16, 16, 3), level, np.uint8) for level in (0, 200)]
    found = make_plan(class_bundle, 1.0, strength=0.5, pictures=np.stack(pictures), num_images=3)
    assert found.images.edits is not None
    request = found.images.request(2)
    np.testing.assert_array_equal(request["image"], pictures[0])
    assert request["strength"] == 0.5
    other = make_plan(class_bundle, 1.0, strength=0.5, num_images=3)
    assert search_of(found.images, "onnxruntime", 1.0, "flops") != search_of(other.images, "onnxruntime", 1.0, "flops")


def test_a_bundles_mask_goes_on_where_an_edit_begins(class_bundle: Path, manifest: Manifest) -> None:
    point = msgspec.structs.replace(manifest.operating_point, clock="1,0,0,1", mask=(1, 0, 0, 1))
    masked = msgspec.structs.replace(manifest, operating_point=point)
    pipe = EdgePipeline(masked, open_session(open_bundle(class_bundle), "onnxruntime"), warn=False)
    picture = np.zeros((16, 16, 3), np.uint8)
    assert pipe(label=0, image=picture, strength=0.75).mask == (1, 0, 1)
    assert pipe(label=0, image=picture, strength=1.0).mask == (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--strength", "0"), "strength is 0: of 4 steps it leaves none"),
        (("--strength", "2"), "strength is 2.0; expected 0"),
        (("--image", "none.png", "--strength", "0.5"), "--image none.png: there is no such file"),
    ],
)
def test_edits_that_cannot_be_planned_are_refused(
    class_bundle: Path, command: Command, asked: tuple[str, ...], message: str
) -> None:
    assert_error(command("plan", str(class_bundle), *asked), message)


def test_pictures_without_a_strength_are_refused(class_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="pictures were given without a strength; give one"):
        make_plan(class_bundle, 1.0, pictures=np.zeros((1, 16, 16, 3), np.uint8))
