"""The ledger's page: all of it in one file, nothing in it that could not be text, and its pictures."""

from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgediff.bench import page
from edgediff.bench.figures import PARTS, divided, figures
from edgediff.bench.ledger import Contender, Ledger, Machine, Settings, rows_of
from edgediff.bench.page import CAPTIONS, check_page, write_page
from edgediff.errors import MissingExtraError, TargetError

ODD = "<b>my & bundle</b>"
SPLIT = {"highres_in": [1.0, 1.2], "lowres": [3.0], "adaptor": [0.5], "highres_out": [2.0], "full": [6.5, 6.6],
         "cached": [3.9], "loop": [10.4], "loop_clock1": [13.1], "load": [80.0], "scheduler": [0.1]}  # fmt: skip


def ledger(*bundles: str, processor: str = "a chip", imported: tuple[Ledger, ...] = ()) -> Ledger:
    """Bundles in two backends each, and one that is not to be had."""
    machine = Machine(processor, ("avx2",), 2, 4096, "an OS 1", "3.11", {"edgediff": "0.1"})
    contenders, rows = [], []
    for bundle in bundles:
        for backend, saved, spread, undivided in (
            ("onnxruntime", 0.28, (0.27, 0.33), "undivided"),
            ("torch", 0.31, None, "own"),
        ):
            contenders.append(
                Contender(
                    bundle,
                    backend,
                    "00",
                    "measured",
                    psnr_db=130.0,
                    mask=(1, 0),
                    rows=2,
                    peak_mib=123.0,
                    undivided=undivided,
                    flops_saved=0.3,
                    time_saved=saved,
                    time_saved_spread=spread,
                    share_of_peak={"full": 0.6, "cached": 0.5},
                )
            )
            rows += rows_of(bundle, backend, SPLIT, 123.0)
        contenders.append(Contender(bundle, "coreml", "00", "absent", says="runs coreml graphs, the bundle has onnx"))
    settings = Settings(2, None, 1, None, 2, None)
    return Ledger(machine, settings, 300.0, tuple(contenders), tuple(rows), {}, imported)


class Seen(HTMLParser):
    """What a page has: text, tags, and what it takes from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.sources, self.open = "", [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href") and value is not None]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_beside_it_and_its_pictures_lie_there(tmp_path: Path) -> None:
    imported = ledger("phone's", processor="another chip")
    written = write_page(ledger(ODD, imported=(imported,)), tmp_path / "page.html")
    assert written == [tmp_path / name for name in ("page.html", *(f"page-{name}.png" for name in CAPTIONS))]
    seen = Seen(written[0].read_text(encoding="utf-8"))
    assert seen.open == []
    assert len(seen.sources) == 2 * len(CAPTIONS)
    assert all(source.startswith("data:image/png;base64,") for source in seen.sources)
    assert "b" not in seen.tags
    for words in (ODD, "a chip (avx2), 2 cores", "another chip", "absent: runs coreml graphs", "0.93", "[0.90, 1.10]",
                  "1.03", "28.0% of the time for 30.0% of the operations", "300 GFLOP/s", "[1.02, 1.18]",
                  "Fc"):  # fmt: skip
        assert words in seen.text, words
    for picture in written[1:]:
        pixels = np.asarray(Image.open(picture).convert("L"))
        assert pixels.shape[1] > 1000
        assert 0.01 < (pixels < 250).mean() < 0.5


def test_where_nothing_was_measured_the_page_says_why_and_has_no_pictures(tmp_path: Path) -> None:
    whole = ledger("one")
    bare = msgspec.structs.replace(whole, contenders=whole.contenders[2:], rows=())
    assert figures(bare) == {}
    assert write_page(bare, tmp_path / "page.html") == [tmp_path / "page.html"]
    seen = Seen((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "absent: runs coreml graphs" in seen.text
    assert seen.sources == []


def test_a_clock_that_saves_nothing_has_no_picture_of_savings() -> None:
    whole = ledger("one", "two")
    always = tuple(msgspec.structs.replace(known, flops_saved=0.0) for known in whole.contenders)
    assert list(figures(whole)) == ["latency", "saved", "quality"]
    assert list(figures(msgspec.structs.replace(whole, contenders=always))) == ["latency", "quality"]


def test_a_step_is_divided_into_what_it_ran() -> None:
    parts = {name: samples[0] for name, samples in SPLIT.items()}
    assert list(divided(parts, "full")) == ["highres_in", "lowres", "highres_out", "other"]
    assert divided(parts, "cached")["adaptor"] == 0.5
    for kind in ("full", "cached"):
        assert sum(divided(parts, kind).values()) == pytest.approx(parts[kind])
    pair = {"full": 6.0, "cached": 3.0, "scheduler": 0.1, "other": 0.2}
    assert divided(pair, "cached") == pytest.approx({"step": 2.7, "other": 0.3})
    assert set(PARTS) >= {*divided(parts, "full"), *divided(parts, "cached"), "step"}


def test_what_is_missing_or_in_the_way_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page-saved.png").mkdir()
    with pytest.raises(TargetError, match=r"page-saved\.png: it is a directory; expected a file"):
        check_page(tmp_path / "page.html")
    with pytest.raises(TargetError, match=r"cannot write .*page\.html"):
        check_page(tmp_path / "none" / "page.html")
    monkeypatch.setattr("edgediff.outputs.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"edgediff\[bench\]"):
        check_page(tmp_path / "other.html")
    assert page.EXTRA == "bench"
