"""The golden corpus (runtime/golden/): what every runtime must compute; its files are what its makers write."""

import base64
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import loop_cases
import make
import manifest_cases
import msgspec
import numpy as np
import pytest

from edgediff.bundle.feed import undivided_step
from edgediff_runtime import BundleError, EdgePipeline, RequestError, noise, open_bundle
from edgediff_runtime.image import to_uint8
from edgediff_runtime.inversion import inverse_scheduler
from edgediff_runtime.loop import Kept, Request, Source, denoise
from edgediff_runtime.low_rank import spread_over_inputs
from edgediff_runtime.manifest import Encoder, Graph, LoraInputs, Tensor
from edgediff_runtime.manifest_json import parse_manifest
from edgediff_runtime.prompt import tokenized
from edgediff_runtime.schedulers import SchedulerConfig, make_scheduler
from edgediff_runtime.sessions import open_session
from edgediff_runtime.text_encoding import Tokenizer

GOLDEN = Path(__file__).parents[1] / "runtime" / "golden"
# float32 in another order of additions, over five steps.
CLOSE = 1e-5


def read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


class FakeSession:
    """Computes the corpus' graphs, any number of rows at once; tensors are numpy arrays."""

    def __init__(self, graphs: list[dict[str, Any]], batch: int | None) -> None:
        self._bodies = {graph["name"]: graph for graph in graphs}
        self.graphs = tuple(
            Graph(
                graph["name"],
                file=graph["name"],
                frequency=graph["frequency"],
                inputs=tuple(
                    Tensor(name, "int64" if name in loop_cases.ROWS else "float32", ("batch",))
                    for name in graph["inputs"]
                ),
                outputs=tuple(Tensor(name, "float32", ("batch",)) for name in graph["outputs"]),
            )
            for graph in graphs
        )
        self.batch = batch

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def get(self, value: np.ndarray) -> np.ndarray:
        return value

    def run(self, graph: Graph, tensors: dict[str, Any]) -> None:
        rows = len(tensors["sample"])
        assert self.batch in (None, rows)
        made = [
            {t.name: tensors[t.name] if t.name == "timestep" else tensors[t.name][i] for t in graph.inputs}
            for i in range(rows)
        ]
        loop_cases.run_graph(self._bodies[graph.name], made)
        tensors.update((t.name, np.stack([row[t.name] for row in made]).astype("float32")) for t in graph.outputs)


@pytest.mark.parametrize("name", sorted(loop_cases.CASES))
def test_the_loop_comes_to_what_each_row_alone_comes_to(name: str) -> None:
    case = read(f"loop/{name}.json")
    images, shape = case["num_images"], case["shape"]

    def array(key: str, *inner: int) -> np.ndarray:
        return np.array(case[key], dtype=np.float32).reshape(images, *inner)

    steering = {"control_image": array("control_image", *shape)} if "control_image" in case else {}
    kept = None
    if "kept" in case:
        shapes = {"mask": (images, 1, *shape[1:]), "latents": (images, *shape), "noise": (images, *shape)}
        kept = Kept(**{key: np.array(case["kept"][key], np.float32).reshape(size) for key, size in shapes.items()})
    source = None
    if "source" in case:
        given = case["source"]
        cond = np.array(given["cond"], np.float32).reshape(images, *loop_cases.EMBEDDING)
        levels = np.array(given["latents"], np.float32).reshape(-1, images, *shape)
        source = Source(levels, {"encoder_hidden_states": cond}, given["calls"])
    config = msgspec.convert(case["scheduler"], SchedulerConfig)
    session = FakeSession(case["graphs"], case["batch"])
    scheduler = make_scheduler(config, case["num_inference_steps"])
    request = Request(
        graphs=session.graphs,
        scheduler=scheduler,
        clock=tuple(map(bool, case["clock"])),
        guidance=tuple(case["guidance"]),
        latents=array("latents", *shape),
        cond={"encoder_hidden_states": array("cond", *loop_cases.EMBEDDING), **steering},
        uncond={"encoder_hidden_states": array("uncond", *loop_cases.EMBEDDING), **steering},
        seed=int(case["seed"]),
        concat=array("concat", -1, *shape[1:]) if "concat" in case else None,
        start=case["start"],
        image_guidance=case.get("image_guidance"),
        kept=kept,
        source=source,
    )
    steps = list(denoise(request, session))
    assert [int(step.full) for step in steps] == case["mask"]
    assert [step.index for step in steps] == list(range(case["start"], len(scheduler.timesteps)))
    for step, want in zip(steps, case["steps"], strict=True):
        expected = np.array(want["latents"], dtype=np.float32).reshape(step.latents.shape)
        assert np.abs(step.latents - expected).max() <= CLOSE * np.abs(expected).max()


def test_cases_tell_clocks_guidance_and_starts_apart() -> None:
    finals = [json.dumps(read(f"loop/{name}.json")["steps"][-1]) for name in loop_cases.CASES]
    same = (
        {"one_image", "pair"},
        {"guided", "guided_pair"},
        {"batch_2_guided", "batch_4_padded"},
        {"guided_by_an_image", "guided_by_an_image_pair"},
    )
    assert len(set(finals)) == len(finals) - len(same)


@pytest.mark.parametrize(("name", "kind"), [("class", "class"), ("text", "text"), ("pipeline", "text")])
def test_good_manifests_are_read(name: str, kind: str) -> None:
    manifest = parse_manifest((GOLDEN / f"manifests/{name}.json").read_bytes())
    assert manifest.conditioning.kind == kind
    assert (manifest.prompt is not None) == (manifest.vae is not None) == (name == "pipeline")
    # The class manifest has a target of a format that nobody knows: it is left out.
    assert "tensorflow-9" not in [target.target for target in manifest.targets]


def test_a_manifest_is_written_the_same_again(tmp_path: Path) -> None:
    for name in ("once.json", "again.json"):
        make.write_text_manifest(tmp_path / name)
    assert (tmp_path / "once.json").read_bytes() == (tmp_path / "again.json").read_bytes()


@pytest.mark.parametrize("case", read("manifests/bad.json")["bad"], ids=lambda case: case["why"])
def test_bad_manifests_are_refused(case: Mapping[str, Any]) -> None:
    good = read(f"manifests/{case['manifest']}.json")
    bad = manifest_cases.changed(good, case["at"], case["value"])
    assert bad != good
    with pytest.raises(BundleError):
        parse_manifest(json.dumps(bad).encode())


@pytest.mark.parametrize("name", ["class", "text", "pipeline"])
def test_a_shape_of_any_length_is_read_or_refused(name: str) -> None:
    good = read(f"manifests/{name}.json")
    places = list(shapes(good))
    refused = 0
    for *at, last in places:
        for shape in ([], ["x"], [1] * 7):
            bad = copy.deepcopy(good)
            holder = bad
            for key in at:
                holder = holder[key]
            holder[last] = shape
            try:
                parse_manifest(json.dumps(bad).encode())
            except BundleError:
                refused += 1
    assert refused > 2 * len(places)


def shapes(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in plain data a shape lies."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        if key == "shape":
            yield (*path, key)
        else:
            yield from shapes(value, (*path, key))


@pytest.mark.parametrize("change", [{"mean": [0.5] * 4, "std": [1.0] * 4}, {"scaling_factor": 1}])
def test_other_scales_of_latents_are_read(change: Mapping[str, Any]) -> None:
    good = read("manifests/pipeline.json")
    assert parse_manifest(json.dumps({**good, "vae": {**good["vae"], **change}}).encode()).vae is not None


def test_prompts_become_tokens() -> None:
    document = read("tokens/prompts.json")
    encoder = msgspec.convert(document["encoder"], Encoder)
    tokenizer = Tokenizer.from_file(GOLDEN / "tokens/tokenizer.json")
    for case in document["cases"]:
        chunks = tokenized(case["prompt"], tokenizer, encoder, case["emphasis"])
        assert [list(chunk.ids) for chunk in chunks] == [chunk["ids"] for chunk in case["chunks"]], case["prompt"]
        for chunk, want in zip(chunks, case["chunks"], strict=True):
            assert chunk.weights == pytest.approx(want["weights"]), case["prompt"]


def test_pixels_become_bytes() -> None:
    case = read("uint8.json")
    values = np.array(case["values"], dtype=np.float32).reshape(1, 1, 1, -1)
    assert to_uint8(values).reshape(-1).tolist() == case["bytes"]


@pytest.mark.parametrize("case", read("inversion.json")["cases"], ids=lambda case: case["name"])
def test_ddim_is_taken_backwards(case: Mapping[str, Any]) -> None:
    config = msgspec.convert(case["config"], SchedulerConfig)
    inverse = inverse_scheduler(config, case["num_inference_steps"], case["refinements"])
    assert inverse.timesteps.tolist() == [call["timestep"] for call in case["calls"]]
    state: Any = None
    for i, call in enumerate(case["calls"]):
        x, output, want = (
            np.array(call[key], np.float32).reshape(case["shape"]) for key in ("x", "model_output", "next")
        )
        made, state = inverse.step(i, x, output, state, first=i == 0)
        np.testing.assert_allclose(made, want, rtol=0, atol=CLOSE * np.abs(x).max())


def files_of_factors(case: Mapping[str, Any], folder: Path) -> list[Path]:
    for name in case["files"]:
        (folder / name).write_bytes(base64.b64decode(read("low_rank.json")["files"][name]))
    return [folder / name for name in case["files"]]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", read("low_rank.json")["cases"], ids=lambda case: "-".join(case["files"]) or "none")
def test_factors_are_spread_over_inputs(case: Mapping[str, Any], dtype: Any, tmp_path: Path) -> None:
    inputs = msgspec.convert(read("low_rank.json")["lora"], LoraInputs)
    taken = {name: Tensor(name, dtype, shape) for name, shape in inputs.shapes.items()}
    files = files_of_factors(case, tmp_path)
    made = spread_over_inputs(inputs, files or None, case["scale"], taken)
    assert made.keys() == case[dtype].keys()
    for name, want in case[dtype].items():
        values = np.array(want, np.uint16).view(np.float16) if dtype == "float16" else np.array(want, np.float32)
        assert made[name].dtype == dtype
        np.testing.assert_array_equal(made[name], values[None])


@pytest.mark.parametrize("case", read("low_rank.json")["refused"], ids=lambda case: case["why"])
def test_factors_that_do_not_fit_are_refused(case: Mapping[str, Any], tmp_path: Path) -> None:
    inputs = msgspec.convert(read("low_rank.json")["lora"], LoraInputs)
    taken = {name: Tensor(name, "float32", shape) for name, shape in inputs.shapes.items()}
    with pytest.raises(RequestError):
        spread_over_inputs(inputs, files_of_factors(case, tmp_path) or None, case["scale"], taken)


def test_the_whole_bundle_makes_its_pictures() -> None:
    assert sum(file.stat().st_size for file in (GOLDEN / "bundle").rglob("*")) < 300_000
    assert open_bundle(GOLDEN / "bundle").manifest.format_version == 2
    want = read("bundle.json")
    result = EdgePipeline.from_pretrained(GOLDEN / "bundle")(**want["request"])
    assert list(result.mask) == want["mask"]
    pictures = np.array(want["images"], dtype=np.uint8).reshape(result.images.shape)
    # Kernels differ from machine to machine: a byte on the edge between two may go either way.
    assert np.abs(result.images.astype(int) - pictures.astype(int)).max() <= 1


@pytest.mark.parametrize(("name", "calls"), [("heun", 7), ("pndm", 5), ("lcm", 4)])
def test_a_clock_goes_over_the_calls_of_the_unet(name: str, calls: int) -> None:
    bundle = open_bundle(GOLDEN / "bundle")
    manifest = msgspec.structs.replace(bundle.manifest, scheduler=SchedulerConfig(name=name))
    pipe = EdgePipeline(manifest, open_session(bundle, "onnxruntime"))
    request = {"label": "round", "num_inference_steps": 4}
    assert pipe(**request, clock=3).mask == tuple(int(i % 3 == 0) for i in range(calls))
    chosen = (1, 0, 0, 1, 0, 1, 0)[:calls]
    changing = [2.0] * (calls - 1) + [1.0]
    result = pipe(**request, clock=chosen, guidance_scale=changing)
    assert result.mask == chosen
    assert [step.guided for step in result.ledger] == [scale > 1 for scale in changing]
    for wrong in ({"clock": (1, 0)}, {"guidance_scale": [2.0, 1.0]}):
        with pytest.raises(RequestError, match=r"has 2 entries for .*; expected one each") as raised:
            pipe(**request, **wrong)
        if calls != 4:
            assert f"for {calls} model calls (4 steps: {name} calls the model twice in " in str(raised.value)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_undivided_step_that_other_tools_open_is_a_full_step(backend: str) -> None:
    bundle = open_bundle(GOLDEN / "bundle")
    whole = undivided_step(bundle, "onnx")
    assert whole is not None
    model = whole.manifest.target("onnx").unet.graphs[0]
    assert [(t.name, t.shape) for t in model.inputs if t.name == "timestep"] == [("timestep", ())]
    assert [t.name for t in model.outputs] == ["out_sample"]
    given = {"sample": noise(1, (2, 3, 8, 8)), "class_labels": np.array([0, 2])}
    made = []
    for opened, timestep in ((whole, np.array(500, np.float32)), (bundle, np.array([500], np.float32))):
        session = open_session(opened, backend)
        tensors = {name: session.put(value) for name, value in {**given, "timestep": timestep}.items()}
        session.run(session.graphs[0], tensors)
        made.append(session.get(tensors["out_sample"]))
    assert np.abs(made[0] - made[1]).max() <= CLOSE * np.abs(made[1]).max()
