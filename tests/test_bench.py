import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime as ort
import pytest
import torch
from command_line import Command, assert_error
from rich.console import Console
from safetensors.numpy import load_file, save_file
from seals import REFERENCE, reseal

import edgediff
from edgediff.bench import contenders, turns
from edgediff.bench import run_bench as engine
from edgediff.bench.contenders import time_bundle
from edgediff.bench.ledger import (
    Contender,
    Ledger,
    Machine,
    Settings,
    compare_ledgers,
    read_ledger,
    rows_of,
    write_ledger,
)
from edgediff.bench.run_bench import run_bench
from edgediff.bench.turns import Call, Runner, Said, take_turns
from edgediff.cli.render.bench_tables import bench_tables, compare_table
from edgediff.errors import ConfigError, DataError, UnsupportedError
from edgediff.inspect.survey import survey_bundle
from edgediff.targets import base
from edgediff_runtime import RequestError
from edgediff_runtime.ort_bound_session import CUDA


@pytest.fixture(scope="module")
def ledger(class_bundle: Path) -> Ledger:
    return run_bench([class_bundle], ["onnxruntime", "torch", "coreml"], rounds=2, threads=1)


# What is measured


@pytest.mark.long
def test_every_part_of_every_backend_is_in_the_ledger(ledger: Ledger) -> None:
    graphs = {"highres_in", "lowres", "highres_out"}
    steps = {"full", "cached", "guidance", "scheduler", "other", "loop", "loop_clock1", "undivided", "undivided_loop"}
    for backend in ("onnxruntime", "torch"):
        found = {row.part: row for row in ledger.rows if row.backend == backend}
        assert set(found) == graphs | steps | {"load", "first_call"}
        for part, count in (("loop", 2), ("loop_clock1", 2), ("undivided_loop", 2), ("undivided", 8), ("cached", 4)):
            assert len(found[part].samples_ms) == count, part
        # The loop at the clock and the one at clock 1 both have full steps; lowres runs in those alone.
        assert len(found["full"].samples_ms) == len(found["lowres"].samples_ms) == 2 * (2 + 4)
        for row in found.values():
            assert 0 < row.p10_ms <= row.median_ms <= row.p90_ms
            assert row.peak_mib is not None
            assert row.peak_mib > 50


@pytest.mark.long
def test_a_step_is_the_sum_of_its_parts(ledger: Ledger) -> None:
    for backend in ("onnxruntime", "torch"):
        found = {row.part: sum(row.samples_ms) for row in ledger.rows if row.backend == backend}
        parts = sum(found[part] for part in ("highres_in", "lowres", "highres_out", "guidance", "scheduler", "other"))
        assert parts == pytest.approx(found["full"] + found["cached"], rel=1e-3)
        assert found["full"] + found["cached"] == pytest.approx(found["loop"] + found["loop_clock1"], rel=1e-3)


@pytest.mark.long
def test_the_leading_figures_follow_from_the_rows(ledger: Ledger, class_bundle: Path) -> None:
    known = next(contender for contender in ledger.contenders if contender.backend == "onnxruntime")
    assert (known.status, known.mask, known.rows, known.undivided) == ("measured", (1, 0, 1, 0), 2, "undivided")
    assert known.psnr_db is not None
    assert known.psnr_db > 90
    survey = survey_bundle(class_bundle, None, None, None)
    assert known.flops_saved == pytest.approx(survey.saved(attention=True), abs=1e-4)
    median = {row.part: row.median_ms for row in ledger.rows if row.backend == "onnxruntime"}
    samples = {row.part: row.samples_ms for row in ledger.rows if row.backend == "onnxruntime"}
    rounds = [1 - loop / whole for loop, whole in zip(samples["loop"], samples["undivided_loop"], strict=True)]
    assert known.time_saved is not None
    assert known.flops_saved is not None
    assert known.time_saved == pytest.approx(sum(rounds) / 2, abs=1e-3)
    assert known.ratio_spread is not None
    tenths = [(0.9 * min(rounds) + 0.1 * max(rounds)), (0.1 * min(rounds) + 0.9 * max(rounds))]
    assert known.ratio_spread == pytest.approx([saved / known.flops_saved for saved in tenths], abs=1e-3)
    ratio = known.time_saved / known.flops_saved
    assert ledger.time_saved_over_flops_saved["onnxruntime"] == pytest.approx(ratio, abs=1e-3)
    assert ledger.peak_gflops is not None
    cost = survey.cost["cached"]
    gflops = 2e-9 * known.rows * (cost.macs + cost.macs_attention) / (1e-3 * median["cached"])
    assert known.share_of_peak["cached"] == pytest.approx(gflops / ledger.peak_gflops, rel=0.01)


@pytest.mark.long
def test_a_ledger_is_read_as_it_was_written(ledger: Ledger, tmp_path: Path) -> None:
    write_ledger(ledger, tmp_path / "a.json")
    assert read_ledger(tmp_path / "a.json") == ledger
    data = json.loads((tmp_path / "a.json").read_bytes())
    assert {"machine", "peak_gflops", "rows", "time_saved_over_flops_saved"} <= data.keys()
    assert {"bundle", "backend", "part", "median_ms", "p10_ms", "p90_ms", "samples_ms", "peak_mib"} == data["rows"][
        0
    ].keys()


@pytest.mark.long
def test_openvino_gives_the_same_and_its_bf16_nearly(class_bundle: Path) -> None:
    openvino = pytest.importorskip("openvino")
    found = run_bench([class_bundle], ["openvino", "openvino-bf16"], rounds=1, threads=1, undivided=False)
    exact, half = found.contenders
    assert exact.status == "measured", exact.says
    assert exact.psnr_db is not None
    assert exact.psnr_db > 90
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert (half.status, half.says) == (
            "refused", "backend 'openvino-bf16' needs a processor with bf16; this one has none",
        )  # fmt: skip
        return
    assert half.status == "measured", half.says
    assert half.psnr_db is not None
    assert half.psnr_db > 35


# What cannot be measured


@pytest.mark.long
def test_a_backend_that_has_no_graphs_here_says_so(ledger: Ledger) -> None:
    known = ledger.contenders[-1]
    assert (known.backend, known.status) == ("coreml", "absent")
    assert known.says == "runs coreml graphs, the bundle has onnx"
    assert not [row for row in ledger.rows if row.backend == "coreml"]


@pytest.mark.long
def test_a_reason_is_shown_on_one_line(ledger: Ledger) -> None:
    screen = Console(file=io.StringIO(), width=100)
    for table in bench_tables(ledger):
        screen.print(table)
    assert isinstance(screen.file, io.StringIO)
    (line,) = [line for line in screen.file.getvalue().splitlines() if "runs coreml graphs" in line]
    assert line.rstrip().endswith("coreml   runs coreml graphs, the bundle has onnx")


def test_a_backend_that_is_not_installed_is_listed_with_its_command(
    class_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    ledger = run_bench([class_bundle], ["openvino"], rounds=1, undivided=False)
    (known,) = ledger.contenders
    assert (known.status, known.says) == ("absent", "not installed: pip install openvino")
    assert ledger.peak_gflops is None


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this ONNX Runtime has CUDA")
def test_an_onnxruntime_without_cuda_is_listed_with_the_command(class_bundle: Path) -> None:
    (known,) = run_bench([class_bundle], ["onnxruntime-cuda"], rounds=1, undivided=False).contenders
    assert (known.status, known.says) == (
        "absent",
        "not installed: pip uninstall onnxruntime && pip install onnxruntime-gpu",
    )


@pytest.mark.long
def test_what_does_not_compute_on_the_cpu_is_not_divided_by_its_peak(
    class_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = [replace(known, on_cpu=False) for known in contenders.BACKENDS if known.name == "onnxruntime"]
    monkeypatch.setattr(contenders, "BACKENDS", away)
    found = run_bench([class_bundle], ["onnxruntime"], rounds=1, undivided=False)
    assert found.peak_gflops is not None
    assert [(known.status, known.share_of_peak) for known in found.contenders] == [("measured", {})]


@pytest.mark.long
def test_an_output_that_is_not_the_references_is_not_timed(class_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(class_bundle, tmp_path / "bundle"))
    tensors = load_file(bundle / REFERENCE)
    tensors["steps/1/cached/out_sample"] = tensors["steps/1/cached/out_sample"] + 0.01
    save_file(tensors, bundle / REFERENCE)
    reseal(bundle)
    found = run_bench([bundle], ["onnxruntime"], rounds=1, undivided=False)
    (known,) = found.contenders
    assert known.status == "wrong"
    assert "dB of the reference; expected 90" in known.says
    assert found.rows == ()


@pytest.mark.long
def test_a_damaged_graph_is_refused_and_the_others_go_on(class_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(class_bundle, tmp_path / "bundle"))
    (bundle / "onnx/unet/lowres.onnx").write_bytes(b"nothing")
    found = run_bench([bundle], ["onnxruntime", "torch"], rounds=1, undivided=False)
    assert [known.status for known in found.contenders] == ["refused", "measured"]
    assert "onnx/unet/lowres.onnx" in found.contenders[0].says
    assert {row.backend for row in found.rows} == {"torch"}


def test_a_process_that_dies_is_said_and_keeps_what_it_measured(class_bundle: Path) -> None:
    runner = Runner("one", Call.of(time_bundle, bundle=str(class_bundle), backend="onnxruntime", threads=1))
    try:
        runner.start()
        runner.turn()
        assert runner.status == "measured"
        assert runner._process is not None
        os.kill(runner._process.pid, signal.SIGKILL)
        runner.turn()
        assert (runner.status, runner.says) == ("died", "its process ended with signal 9")
        assert "loop" in runner.parts
        runner.turn()  # it is not asked any more
    finally:
        runner.close()


@torch.no_grad()
def count(upto: int, exit_code: int | None = None) -> Iterator[Said]:
    """Ready, then one more each turn; an error after the last."""
    yield Said(psnr_db=50.0)
    for i in range(upto):
        yield Said(parts={"number": [float(i)]})
    if exit_code is not None:
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(exit_code)
    raise ValueError("no more")


FOREIGN = """
import json, sys
call = json.loads(sys.stdin.readline())
while True:
    print(json.dumps({"parts": {"number": [call["given"]["number"]]}}), flush=True)
    if not sys.stdin.readline():
        break
"""


@pytest.mark.long
def test_any_function_and_any_program_take_turns() -> None:
    whole, short, dead = (Runner("f", Call.of(count, **given)) for given in (
        {"upto": 3}, {"upto": 1}, {"upto": 1, "exit_code": 3}))  # fmt: skip
    missing = Runner("g", Call("edgediff.bench.contenders:nothing", {}))
    foreign = Runner("h", Call("", {"number": 7.0}), command=(sys.executable, "-c", FOREIGN))
    told: list[str] = []
    take_turns([whole, short, dead, missing, foreign], 2, told.append)
    assert whole.parts == {"number": [0.0, 1.0]}
    assert (whole.status, whole.psnr_db) == ("measured", 50.0)
    assert whole.heard[-1].peak_mib is not None
    assert (short.status, short.says, short.parts) == ("refused", "ValueError: no more", {"number": [0.0]})
    assert (dead.status, dead.says) == ("died", "its process ended with exit code 3: out of luck")
    assert (missing.status, "AttributeError" in missing.says) == ("refused", True)
    assert foreign.parts == {"number": [7.0, 7.0, 7.0]}
    assert told[:2] == ["opening f", "opening f"]
    assert told[-1] == "round 2 of 2: h"


@pytest.mark.long
def test_too_little_memory_is_said_before_it_starts(class_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "free_memory", lambda: 2**20)
    (known,) = run_bench([class_bundle], ["onnxruntime"], rounds=1, undivided=False).contenders
    assert known.status == "refused"
    assert known.says.startswith("needs about 0.3 GiB of memory, 0.0 are free")


@pytest.mark.long
def test_where_the_source_is_gone_the_bundle_stands_for_itself(folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    edgediff.export_bundle(edgediff.load_model(folder), bundle, edgediff.ExportConfig(steps=4, layout="split"))
    folder.rename(tmp_path / "elsewhere")
    found = run_bench([bundle], ["onnxruntime", "torch"], rounds=1)
    ort, eager = found.contenders
    assert (ort.status, ort.undivided, ort.says) == ("measured", "undivided", "")
    assert (eager.status, "source is not available" in eager.says) == ("refused", True)


@pytest.mark.long
def test_threads_reach_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import torch; print(torch.get_num_threads())"
    for threads in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", code], env=turns._environment(threads), capture_output=True, text=True
        )
        assert done.stdout.strip() == str(threads)
    assert turns._environment(None) == dict(os.environ)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"clock": "0"}, "clock"), ({"clock": "1,0,1"}, "4"), ({"clock": "banana"}, "banana"), ({"steps": 0}, "steps")],
)
def test_clocks_and_steps_are_refused_before_anything_starts(
    class_bundle: Path, wrong: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "take_turns", None)
    with pytest.raises(RequestError, match=words):
        run_bench([class_bundle], ["onnxruntime"], **wrong)


@pytest.mark.parametrize("numbers", [{"rounds": 0}, {"num_images": 0}, {"threads": 0}])
def test_numbers_out_of_range_are_named(class_bundle: Path, numbers: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(numbers))):
        run_bench([class_bundle], ["onnxruntime"], **numbers)
    with pytest.raises(UnsupportedError, match="choices: torch, torch-compile, onnxruntime"):
        run_bench([class_bundle], ["tensorrt"])


# Ledgers against each other

MACHINE = Machine("a chip", ("avx2",), 2, 1000, "Linux 6", "3.11", {"numpy": "2"})
SETTINGS = Settings(4, "2", 1, None, 3, None)


def made(samples: tuple[float, ...], sha256: str = "a" * 64, bundle: str = "b") -> Ledger:
    contender = Contender(bundle, "onnxruntime", sha256, "measured")
    rows = rows_of(bundle, "onnxruntime", {"full": samples, "load": samples[:1]}, None)
    return Ledger(MACHINE, SETTINGS, 100.0, (contender,), rows, {})


@pytest.mark.parametrize(
    ("now", "beyond"),
    [((1.0, 1.1, 1.2), False), ((1.15, 1.3, 1.4), False), ((1.5, 1.6, 1.7), True), ((0.5, 0.6, 0.7), True)],
)
def test_a_change_counts_beyond_the_noise_of_both(now: tuple[float, ...], beyond: bool) -> None:
    (change,) = compare_ledgers(made((1.0, 1.1, 1.2)), made(now))
    assert change.is_beyond_noise is beyond
    assert change.ratio == pytest.approx(now[1] / 1.1)


def test_ledgers_that_cannot_be_compared_are_refused_by_name() -> None:
    old = made((1.0, 1.1))
    other = msgspec.structs.replace(old, machine=msgspec.structs.replace(MACHINE, processor="another chip"))
    with pytest.raises(DataError, match="different machines: processor 'another chip' there, 'a chip' here"):
        compare_ledgers(other, old)
    with pytest.raises(DataError, match="different models: b was of sha256 aaaaaaaaaaaa, is of cccccccccccc"):
        compare_ledgers(old, made((1.0, 1.1), sha256="c" * 64))
    fewer = msgspec.structs.replace(old, settings=msgspec.structs.replace(SETTINGS, steps=8))
    with pytest.raises(DataError, match="different settings: steps 8 there, 4 here"):
        compare_ledgers(fewer, old)

    def ran(mask: tuple[int, ...]) -> Ledger:
        return msgspec.structs.replace(old, contenders=(msgspec.structs.replace(old.contenders[0], mask=mask, rows=2),))

    with pytest.raises(DataError, match=r"different settings: b in onnxruntime ran Fc of 2 row\(s\) there, FF of"):
        compare_ledgers(ran((1, 0)), ran((1, 1)))
    with pytest.raises(DataError, match="no bundle, backend and part in common"):
        compare_ledgers(made((1.0, 1.1), bundle="c"), old)


# The command


def test_the_command_measures_writes_and_compares(command: Command, class_bundle: Path, place: Path) -> None:
    asked = ("bench", class_bundle, "--backend", "onnxruntime", "--rounds", 1, "--threads", 1, "--no-undivided")
    said = command(*asked, "--json", place / "a.json")
    assert said.code == 0, said.errors
    assert "time saved by the clock" in said.out
    again = command(*asked, "--compare", place / "a.json", "--import", place / "a.json", "--html", place / "a.html")
    assert again.code == 0, again.errors
    assert "against the earlier run" in again.out
    assert again.out.count("time saved by the clock") == 2
    pictures = [f"a-{name}.png" for name in ("latency", "saved", "quality")]
    assert all((place / name).is_file() for name in ("a.html", *pictures))


def test_a_folder_may_be_named_like_markup() -> None:
    shown = made((1.0, 1.1), bundle="out[/b]")
    console = Console(file=io.StringIO(), width=200)
    for table in (*bench_tables(shown), compare_table(compare_ledgers(shown, shown))):
        console.print(table)
    assert console.file.getvalue().count("out[/b]") == 3


def test_bad_input_is_one_line(command: Command, class_bundle: Path, place: Path) -> None:
    (place / "text").write_text("no ledger")
    for said, parts in (
        (command("bench", class_bundle, "--backend", "tensorrt"), ("'tensorrt'", "choices: torch")),
        (command("bench", place / "nowhere"), ("no such directory",)),
        (command("bench", class_bundle, "--rounds", 0), ("rounds is 0",)),
        (command("bench", class_bundle, "--json", place / "none" / "a.json"), ("not a folder",)),
        (command("bench", class_bundle, "--json", place), ("is a directory",)),
        (command("bench", class_bundle, "--html", place), ("is a directory",)),
        (command("bench", class_bundle, "--compare", place / "text"), ("is not a ledger of edgediff bench",)),
        (command("bench", class_bundle, "--import", place / "nothing"), ("cannot be read",)),
    ):
        assert_error(said, *parts)
    none = command("bench", class_bundle, "--backend", "coreml", "--rounds", 1)
    assert (none.code, none.errors[-1]) == (1, "error: no backend could be measured")
