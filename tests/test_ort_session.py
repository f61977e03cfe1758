"""ONNX Runtime's session where each thread has its own rows, and where all share a graph."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgediff_runtime import Bundle, EdgePipeline, RequestError, open_bundle, ort_options, ort_session
from edgediff_runtime.ort_session import OrtSession

# Rows in another grouping go through other kernels: what is left is the order of additions.
REGROUPED = 1e-4


def rows_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize(("threads", "count", "parts"), [(2, 2, [1, 1]), (2, 6, [3, 3]), (3, 6, [2, 2, 2])])
def test_rows_are_shared_out_where_there_are_as_many_for_every_thread(
    class_bundle: Path, threads: int, count: int, parts: list[int]
) -> None:
    session, rows = OrtSession(open_bundle(class_bundle), threads), rows_of(count)
    value = session.put(rows)
    assert [part.shape()[0] for part in value] == parts
    assert np.array_equal(session.get(value), rows)


@pytest.mark.parametrize(("threads", "count"), [(1, 1), (1, 4), (2, 1), (3, 2), (2, 5)])
def test_rows_that_do_not_come_out_even_stay_together(class_bundle: Path, threads: int, count: int) -> None:
    session, rows = OrtSession(open_bundle(class_bundle), threads), rows_of(count)
    value = session.put(rows)
    assert value.shape()[0] == count
    assert np.array_equal(session.get(value), rows)


def test_graphs_are_opened_twice_where_rows_divide_and_weights_are_small(
    class_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []
    load = ort_session.load_graphs
    monkeypatch.setattr(ort_session, "load_graphs", lambda *args: (loads.append(args), load(*args))[1])
    pipe = EdgePipeline.from_pretrained(class_bundle, threads=2)
    pipe(num_images=3, guidance_scale=1.0)
    assert len(loads) == 1
    pipe(num_images=4, guidance_scale=1.0)
    pipe(num_images=2)
    assert len(loads) == 2
    for name, value in (("APART_BYTES", 1), ("weight_bytes", lambda *_: 2**40)):
        with monkeypatch.context() as patch:
            patch.setattr(ort_session, name, value)
            assert OrtSession(open_bundle(class_bundle), 2).put(rows_of(4)).shape()[0] == 4


def test_with_low_memory_tensors_are_given_back(class_bundle: Path) -> None:
    for low in (False, True):
        session = OrtSession(open_bundle(class_bundle), 1, low_memory=low)
        assert all(each.get_session_options().enable_cpu_mem_arena != low for each in session._shared.values())


def test_a_bundle_that_is_gone_while_it_is_open_goes_on_as_it_was_opened(class_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(class_bundle, tmp_path / "bundle"))
    pipe = EdgePipeline.from_pretrained(bundle, threads=2)
    shutil.rmtree(bundle)
    whole = EdgePipeline.from_pretrained(class_bundle, threads=2)
    request: dict[str, Any] = {"num_images": 4, "seed": 3, "guidance_scale": 1.0}
    assert np.abs(whole(**request).latents - pipe(**request).latents).max() < REGROUPED


def test_threads_are_the_callers(class_bundle: Path) -> None:
    pipe = EdgePipeline.from_pretrained(class_bundle, threads=3)
    assert isinstance(pipe.session, OrtSession)
    assert pipe.session.threads == 3
    for each in pipe.session._shared.values():
        assert each.get_session_options().intra_op_num_threads == 3
    for bad in (0, -1, True, 1.5, "2"):
        with pytest.raises(RequestError, match=r"^threads is .*; expected a whole number above 0$"):
            EdgePipeline.from_pretrained(class_bundle, threads=bad)  # type: ignore[arg-type]


def test_exact_int8_kernels_are_for_int8_graphs(class_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_options, "bytes_overflow", lambda: True)
    bundle = open_bundle(class_bundle)
    for dtype, entry in (("fp32", "0"), ("int8", "1")):
        targets = (bundle.manifest.target("onnx").with_unet(dtype=dtype),)
        session = OrtSession(Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, targets=targets)), 2)
        for each in session._shared.values():
            options = each.get_session_options()
            assert options.get_session_config_entry("session.force_spinning_stop") == "1"
            assert options.get_session_config_entry("session.x64quantprecision") == entry


def test_a_threads_rows_come_out_as_if_they_were_alone(class_bundle: Path) -> None:
    bundle = open_bundle(class_bundle)
    both, alone = OrtSession(bundle, 2), OrtSession(bundle, 1)
    graph = both.graphs[0]
    rows, labels, t = rows_of(2), np.array([1, 4], np.int64), np.array([500], np.float32)

    def outputs(session: OrtSession, rows: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
        tensors = {name: session.put(array) for name, array in
                   (("sample", rows), ("class_labels", labels), ("timestep", t))}  # fmt: skip
        session.run(graph, tensors)
        return [session.get(tensors[tensor.name]) for tensor in graph.outputs]

    got = outputs(both, rows, labels)
    for i in range(2):
        want = outputs(alone, rows[i : i + 1], labels[i : i + 1])
        assert all(np.array_equal(a[i : i + 1], b) for a, b in zip(got, want, strict=True))


def test_rows_may_join_and_leave_on_the_way(class_bundle: Path) -> None:
    bundle = open_bundle(class_bundle)
    latents = []
    for threads in (1, 2):
        session = OrtSession(bundle, threads)
        pipe = EdgePipeline(bundle.manifest, session, warn=False)
        scales = [2.0, 2.0, 1.0, 1.0, 2.0]
        steps = list(pipe.stream(num_images=1, num_inference_steps=5, clock=2, guidance_scale=scales, seed=3))
        assert [step.guided for step in steps] == [scale > 1 for scale in scales]
        latents.append(steps[-1].latents)
    assert np.abs(latents[0] - latents[1]).max() < REGROUPED * np.abs(latents[0]).max()


def test_what_goes_wrong_in_one_thread_is_raised(class_bundle: Path) -> None:
    session = OrtSession(open_bundle(class_bundle), 2)
    rows = session.put(rows_of(2))
    narrow = session.put(np.ascontiguousarray(rows_of(2)[:, :, :8]))
    tensors = {
        "sample": (rows[0], narrow[1]),
        "class_labels": session.put(np.zeros(2, np.int64)),
        "timestep": session.put(np.zeros(1, np.float32)),
    }
    with pytest.raises(RequestError, match=r"^highres_in cannot run: .*sample.*Got: 8 Expected: 16.*; ask for fewer"):
        session.run(session.graphs[0], tensors)
    assert "out_sample" not in tensors
