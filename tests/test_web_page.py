"""The browser's page in a real browser: Debian's Chromium, headless, against the Python runtime."""

import base64
import contextlib
import functools
import http.server
import io
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artefacts import saved_once
from command_line import Command
from conftest import Export
from PIL import Image
from pipelines import exported_pipeline
from seals import reseal, seal_plain
from tiny_pipelines import SAVE
from web_pages import GOLDEN, copy_bundle

import edgediff
from edgediff.bench.ledger import read_ledger
from edgediff.site.built_page import INDEX, PAGE
from edgediff.site.certificate import make_certificate
from edgediff.site.folder import write_site
from edgediff.site.server import serving
from edgediff_runtime import EdgePipeline, open_bundle

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
ROOT = Path(__file__).parents[1]
AXE = ROOT / "runtime/web/node_modules/axe-core/axe.min.js"
# In CI neither may be missing: there nothing is skipped.
MUST = os.environ.get("EDGEDIFF_BROWSER") == "1"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not MUST and CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(not MUST and not (PAGE / INDEX).is_file(), reason="needs the page: make web"),
]
READY = "html[data-ready=yes]"
SECONDS = 60_000


FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def browser(driver: Any) -> Iterator[Any]:
    """Chromium, without what calls home."""
    chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield chromium
    chromium.close()


class Visit:
    """A tab, and everything that went wrong in it."""

    def __init__(self, context: Any, url: str) -> None:
        self.context, self.url = context, url
        self.page = context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.heard: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.heard.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.heard.append(str(e)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, after: str = "") -> "Visit":
        """Loads the page until a bundle is open."""
        self.page.goto(self.url + after)
        self.page.wait_for_selector(f"{READY}, #error:not([hidden])")
        assert self.page.query_selector(READY), self.text("error")
        return self

    def fail(self, after: str = "") -> str:
        """Loads the page until it says why it cannot draw."""
        self.page.goto(self.url + after)
        return self.error()

    def error(self) -> str:
        """The sentence that the page shows."""
        self.page.wait_for_selector("#error:not([hidden])")
        return self.text("error")

    def text(self, name: str) -> str:
        """What a part of the page says."""
        return str(self.page.text_content(f"#{name}"))

    def says(self, beginning: str, where: str = "status") -> None:
        """Waits until the status begins so; the page's policy forbids waiting for an expression."""
        self.page.wait_for_selector(f'#{where}:text-matches("^{beginning}")')

    def draw(self, **fields: object) -> np.ndarray:
        """Fills fields, draws, and gives the picture's pixels [H, W, 3]."""
        for name, value in fields.items():
            place = self.page.locator(f"#{name}")
            if name == "label":
                place.select_option(str(value))
            else:
                place.fill(str(value))
                place.dispatch_event("change")
        self.page.click("#draw")
        self.says("Drawn in")
        return self.pixels("picture")

    def pixels(self, name: str) -> np.ndarray:
        """A canvas's pixels [H, W, 3]."""
        data = self.page.evaluate(f"document.querySelector('#{name}').toDataURL()")
        return np.array(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB"))

    def forget(self, complaint: str) -> None:
        """Takes complaints with these words off what was heard."""
        self.heard[:] = [each for each in self.heard if complaint not in each]

    def boxes(self) -> list[bool]:
        """Which steps are full."""
        return [b.get_attribute("aria-pressed") == "true" for b in self.page.locator("#boxes button").all()]


Visiting = Callable[..., Visit]


@pytest.fixture
def visit(browser: Any) -> Iterator[Visiting]:
    """Opens tabs, each in a profile of its own; what a tab complained of fails the test unless it is expected."""
    with contextlib.ExitStack() as stack:
        visits: list[Visit] = []

        def made(port: int, init: str = "", **options: Any) -> Visit:
            context = stack.enter_context(browser.new_context(accept_downloads=True, **options))
            if init:
                context.add_init_script(init)
            visits.append(Visit(context, f"http://127.0.0.1:{port}/"))
            return visits[-1]

        yield made
        for each in visits:
            assert each.heard == []
            assert all(url.startswith((each.url, "blob:", "data:")) for url in each.asked), each.asked


@pytest.fixture(scope="module")
def golden() -> Iterator[int]:
    """The golden bundle, served; nothing in it is changed."""
    with serving(PAGE, GOLDEN) as port:
        yield port


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A copy of it, served, for a test to change."""
    with serving(PAGE, copy_bundle(tmp_path / "bundle")) as port:
        yield port, tmp_path / "bundle"


def python_picture(**request: Any) -> np.ndarray:
    return EdgePipeline.from_pretrained(GOLDEN)(**request).images[0]


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether bytes differ by 1 at most: each engine adds in its own order."""
    return one.shape == other.shape and np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_pictures_are_those_of_the_python_runtime_with_the_clock_as_clicked(visit: Visiting, golden: int) -> None:
    tab = visit(golden).open()
    assert tab.page.evaluate("crossOriginIsolated")
    assert "WebAssembly" in tab.text("about")
    assert tab.boxes() == [True, False, True, False]
    request = {"label": "square", "seed": 2**64 - 1, "num_inference_steps": 4, "guidance_scale": 2.0}
    assert near(tab.draw(label="square", seed=2**64 - 1, guidance=2), python_picture(**request, clock=2))
    tab.page.click("#boxes button:nth-child(2)")
    assert tab.boxes() == [True, True, True, False]
    assert tab.page.input_value("#period") == "own"
    tab.page.click("#boxes button:nth-child(1)", force=True)  # the first step is always full
    assert near(tab.draw(), python_picture(**request, clock=[1, 1, 1, 0]))
    assert near(tab.pixels("uncached"), python_picture(**request, clock=1))
    tab.page.keyboard.press("Tab")
    tab.page.focus("#boxes button:nth-child(3)")
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("Space")
    assert tab.boxes() == [True, True, True, True]
    assert tab.page.input_value("#period") == "1"
    tab.page.select_option("#period", "3")
    assert tab.boxes() == [True, False, False, True]
    assert near(tab.draw(steps=7), python_picture(**request | {"num_inference_steps": 7}, clock=3))
    assert near(
        tab.draw(guidance=".5"), python_picture(**request | {"num_inference_steps": 7, "guidance_scale": 0.5}, clock=3)
    )
    assert "Multiply-adds saved" in tab.text("totals")
    assert tab.page.locator("#chart rect").count() == 7
    assert tab.page.locator("#gallery li").count() == 4
    tab.page.click("#gallery li:last-child button")
    assert tab.boxes() == [True, False, True, False]
    assert near(tab.pixels("picture"), python_picture(**request, clock=2))


def test_a_prompt_becomes_the_same_picture(visit: Visiting, export_once: Export) -> None:
    bundle = export_once(saved_once("sd1", SAVE["sd1"]), edgediff.ExportConfig(steps=2))
    want = EdgePipeline.from_pretrained(bundle)(prompt="a red apple", seed=3, negative_prompt="blurred").images[0]
    with serving(PAGE, bundle) as port:
        tab = visit(port).open()
        got = tab.draw(prompt="a red apple", negative="blurred", seed=3)
        assert near(got, want)
        tab.page.fill("#prompt", "word " * 10_000)
        tab.page.click("#draw")
        assert "Prompt: 16000 tokens; expected 4800 at most" in tab.error()
        assert near(tab.draw(prompt="a red apple"), want)  # the page lives
        assert tab.page.is_hidden("#error")


def photo(side: int) -> Image.Image:
    """A picture of a bundle's size, no two pixels of it alike."""
    y, x = np.mgrid[:side, :side]
    return Image.fromarray(np.stack([x * 255 // side, y * 255 // side, (x + y) % 7 * 30], axis=-1).astype(np.uint8))


def upload(picture: Image.Image, name: str = "photo.png") -> dict[str, Any]:
    """A picture as a field for files takes it."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": data.getvalue()}


def choose(tab: Visit, file: dict[str, Any] | Path, name: str = "image") -> None:
    tab.page.set_input_files(f"#{name}", file)
    tab.page.wait_for_selector("#chosen:not([hidden])")


def rectangle(tab: Visit, left: int, top: int, width: int, height: int) -> np.ndarray:
    """Fills a rectangle of the mask by its fields; the mask of a picture of 32 x 32."""
    for name, value in {"left": left, "top": top, "width": width, "height": height}.items():
        tab.page.fill(f"#mask-{name}", str(value))
    tab.page.click("#rectangle")
    mask = np.zeros((32, 32), np.uint8)
    mask[top : top + height, left : left + width] = 255
    return mask


def test_an_edit_becomes_the_same_picture(visit: Visiting, export_once: Export) -> None:
    bundle = export_once(saved_once("sd1", SAVE["sd1"]), edgediff.ExportConfig(steps=2))
    pipe = EdgePipeline.from_pretrained(bundle)
    source = photo(32)
    asked: dict[str, Any] = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 8, "clock": 2}
    with serving(PAGE, bundle) as port:
        tab = visit(port).open()
        choose(tab, upload(source))
        assert "photo.png: 32\u00a0x\u00a032" in tab.text("source-caption")
        tab.page.fill("#steps", "8")
        tab.page.dispatch_event("#steps", "change")
        tab.page.select_option("#period", "2")
        tab.page.focus("#strength")
        for _ in range(4):
            tab.page.keyboard.press("ArrowLeft")
        assert tab.text("strength-says") == "0.6: 4 of 8 steps run"
        assert tab.boxes() == [True, False, True, False]
        want = pipe(**asked, image=source, strength=0.6).images[0]
        assert near(tab.draw(prompt="a red apple", seed=3), want)
        assert "from photo.png, strength 0.6, FcFc, seed 3" in tab.text("picture-caption")
        # A part of it, by the keyboard alone.
        tab.page.focus("#mask-section summary")
        tab.page.keyboard.press("Enter")
        mask = rectangle(tab, 8, 6, 18, 14)
        assert "25 % of the picture" in tab.text("mask-says")
        tab.page.fill("#feather", "2")
        assert tab.text("strength-says") == "0.6: 4 of 8 steps run"  # as it was chosen
        got = tab.draw()
        same = {"image": source, "mask_image": Image.fromarray(mask), "strength": 0.6, "paste": True}
        assert near(got, pipe(**asked, **same, feather=2).images[0])
        assert np.array_equal(got[mask == 0], np.array(source)[mask == 0])
        assert not np.array_equal(got, np.array(source))
        tab.page.uncheck("#paste")
        assert near(tab.draw(), pipe(**asked, **same | {"paste": False}).images[0])
        # What is measured is a whole generation.
        tab.page.click("#measure-section summary")
        tab.page.click("#measure")
        assert "set its strength to 1" in tab.error()
        # A link has all but the picture.
        link = tab.page.evaluate("location.hash")
        tab.page.click("#share")
        tab.says("The (link is copied. It has all but|browser copies nothing)")
        other = visit(port).open(link)
        assert "choose that one" in other.text("notes")
        choose(other, upload(source))
        assert other.boxes() == [True, False, True, False]
        assert near(other.draw(), want)
        # Back to the first of this session, its picture included; then away with it.
        tab.page.click("#no-image")
        assert len(tab.boxes()) == 9
        tab.page.click("#gallery li:last-child button")
        assert near(tab.draw(), want)
        tab.page.click("#no-image")
        assert near(tab.draw(), pipe(**asked).images[0])
        # A finished picture begins another one.
        finished = tab.pixels("picture")
        tab.page.click("#edit-this")
        tab.says("a red apple, seed 3: 32", "source-caption")
        tab.page.focus("#strength")
        tab.page.keyboard.press("Home")
        assert tab.text("strength-says") == "0.15: 1 of 8 steps run"
        assert near(tab.draw(), pipe(**asked, image=finished, strength=0.15).images[0])


def test_a_mask_is_painted_erased_and_read_from_a_file(visit: Visiting, golden: int) -> None:
    tab = visit(golden).open()
    choose(tab, upload(photo(16)))
    assert "photo.png: 16\u00a0x\u00a016, cut to 8\u00a0x\u00a08" in tab.text("source-caption")
    assert tab.text("strength-says") == "0.8: 3 of 4 steps run"
    tab.page.click("#mask-section summary")
    tab.page.locator("#mask").scroll_into_view_if_needed()
    box = tab.page.locator("#mask").bounding_box()
    assert box is not None

    def stroke(*places: tuple[float, float]) -> None:
        for k, (x, y) in enumerate(places):
            tab.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            if not k:
                tab.page.mouse.down()
        tab.page.mouse.up()

    tab.page.fill("#brush", "2")
    stroke((0.1, 0.5), (0.9, 0.5))
    painted = tab.text("mask-says")
    assert painted == "25 % of the picture is drawn anew."
    assert tab.text("strength-says") == "1: 4 of 4 steps run"
    tab.page.click("#erase")
    stroke((0.5, 0.5))
    assert tab.text("mask-says") == "19 % of the picture is drawn anew."
    tab.page.click("#clear-mask")
    assert "Nothing is painted" in tab.text("mask-says")
    assert tab.text("strength-says") == "0.8: 3 of 4 steps run"
    white = np.zeros((16, 16), np.uint8)
    white[:8] = 255
    tab.page.set_input_files("#mask-file", upload(Image.fromarray(white)))
    tab.page.wait_for_selector('#mask-says:text-matches("^50 %")')
    tab.page.set_input_files("#mask-file", upload(Image.fromarray(white[:4])))
    assert tab.error() == "The mask has 16 x 4 pixels, the picture 16 x 16; expected the same."
    tab.page.set_input_files("#mask-file", upload(Image.fromarray(0 * white)))
    tab.page.wait_for_selector('#error:text-matches("covers nothing")')
    tab.page.fill("#mask-width", "")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector('#error:text-matches("^The rectangle.s width")')
    tab.page.fill("#feather", "999")
    tab.page.click("#mask-section summary")
    tab.page.click("#draw")
    tab.page.wait_for_selector('#error:text-matches("^Feather is")')


@pytest.mark.parametrize("name", ["inpaint", "pix2pix"])
def test_a_model_that_needs_a_picture_says_so(visit: Visiting, name: str) -> None:
    bundle = exported_pipeline(name)
    source = photo(32)
    asked: dict[str, Any] = {"prompt": "make it red", "seed": 1, "num_inference_steps": 8, "clock": 2}
    with serving(PAGE, bundle) as port:
        tab = visit(port).open()
        assert "this model needs" in tab.text("edit-title")
        tab.page.fill("#prompt", "make it red")
        tab.page.click("#draw")
        assert tab.error() == "This model changes a picture; choose one first."
        choose(tab, upload(source))
        if name == "inpaint":
            tab.page.click("#draw")
            tab.page.wait_for_selector('#error:text-matches("paint over it")')
            asked |= {"mask_image": Image.fromarray(rectangle(tab, 4, 4, 20, 12)), "paste": True, "feather": 1}
        else:
            tab.page.fill("#image-guidance", "1.2")
            asked |= {"image_guidance_scale": 1.2}
        tab.page.select_option("#period", "2")
        got = tab.draw(seed=1)
        assert near(got, EdgePipeline.from_pretrained(bundle)(**asked, image=source).images[0])


def edges(picture: Image.Image) -> np.ndarray:
    """What the page's button takes: Sobel's filter, white on black, uint8 [H, W, 3]."""
    grey = np.pad(np.array(picture) @ np.array([0.299, 0.587, 0.114]), 1, mode="edge")
    smooth_down, smooth_across = (a[:-2] + 2 * a[1:-1] + a[2:] for a in (grey, grey.T))
    slopes = np.hypot(smooth_down[:, 2:] - smooth_down[:, :-2], (smooth_across[:, 2:] - smooth_across[:, :-2]).T)
    return np.repeat(np.rint(255 * slopes / slopes.max()).astype(np.uint8)[..., None], 3, axis=2)


def choose_control(tab: Visit, file: dict[str, Any]) -> None:
    tab.page.set_input_files("#control-file", file)
    tab.page.wait_for_selector(f'#control-caption:text-matches("^{file["name"]}")')


def test_a_control_picture_steers(visit: Visiting) -> None:
    bundle = exported_pipeline("sd1", control=True)
    pipe = EdgePipeline.from_pretrained(bundle)
    source, other = photo(32), photo(32).rotate(90)
    asked: dict[str, Any] = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 8, "clock": 2}
    plain = pipe(**asked).images[0]
    with serving(PAGE, bundle) as port:
        tab = visit(port).open()
        assert near(tab.draw(prompt="a red apple", seed=3), plain)
        choose_control(tab, upload(source, "lines.png"))
        steered = pipe(**asked, control_image=source).images[0]
        assert not near(steered, plain)
        assert near(tab.draw(), steered)
        assert "by lines.png, FcFcFcFc, seed 3" in tab.text("picture-caption")
        tab.page.fill("#control-scale", "-1")
        tab.page.click("#draw")
        assert tab.error() == 'Control scale is "-1"; expected a number from 0 to 99.'
        tab.page.fill("#control-scale", "0.5")
        half = pipe(**asked, control_image=source, controlnet_conditioning_scale=0.5).images[0]
        assert near(tab.draw(), half)
        # What is measured has none.
        tab.page.click("#measure-section summary")
        tab.page.click("#measure")
        assert "without a control picture" in tab.error()
        # A link has all but the picture.
        link = tab.page.evaluate("location.hash")
        assert "control=0.5" in link
        again = visit(port).open(link)
        assert "draws by a control picture, which no link holds" in again.text("notes")
        choose_control(again, upload(source, "lines.png"))
        assert near(again.draw(), half)
        # One that is dropped on its field is not what the picture begins with.
        tab.page.evaluate(DROP, ["control", "dropped.png", list(upload(other)["buffer"])])
        tab.page.wait_for_selector('#control-caption:text-matches("^dropped.png")')
        assert tab.page.is_hidden("#chosen")
        assert tab.page.is_hidden("#edges-of-start")
        tab.page.click("#edges")
        tab.says("edges of dropped.png", "control-caption")
        assert near(tab.pixels("control-picture"), edges(other))
        # Edges of what it begins with, beside that.
        choose(tab, upload(source))
        tab.page.click("#edges-of-start")
        tab.says("edges of photo.png", "control-caption")
        assert near(tab.pixels("control-picture"), edges(source))
        drawn = Image.fromarray(tab.pixels("control-picture"))
        tab.page.fill("#control-scale", "1")
        got = tab.draw()
        assert near(got, pipe(**asked, image=source, strength=0.8, control_image=drawn).images[0])
        # Back to another one of this session, with its picture, and away with it.
        tab.page.click("#gallery li:nth-child(2) button")
        assert tab.page.input_value("#control-scale") == "0.5"
        assert tab.text("control-caption").startswith("lines.png")
        assert near(tab.draw(), half)
        tab.page.click("#no-control")
        assert tab.page.evaluate("document.activeElement.id") == "control-file"
        assert near(tab.draw(), plain)
        choose(tab, upload(Image.new("RGB", (32, 32), "red")))
        tab.page.click("#edges-of-start")
        assert tab.error() == "The picture is the same everywhere, so it has no edges; choose another."
        tab.page.set_input_files("#control-file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no"})
        tab.page.wait_for_selector('#error:text-matches("^Control picture .a.png. is damaged")')
        assert tab.page.is_hidden("#control-chosen")


def test_a_link_by_a_control_picture_for_a_bundle_without_a_controlnet(visit: Visiting, golden: int) -> None:
    tab = visit(golden).open("#seed=2&control=1")
    assert "this bundle takes none; that was left out" in tab.text("notes")
    assert tab.page.is_hidden("#control")
    assert near(tab.draw(label="round"), python_picture(label="round", seed=2))
    assert "control" not in tab.page.evaluate("location.hash")


def test_another_sampler(visit: Visiting, golden: int) -> None:
    tab = visit(golden).open()
    assert not tab.page.is_visible("#sampler")
    tab.page.click("#more summary")
    assert tab.page.input_value("#sampler") == "dpmpp_2m"
    assert tab.page.text_content("#sampler option") == "dpmpp_2m, the bundle's"
    asked = {"label": "square", "seed": 5}
    for name, boxes in (("heun", 7), ("euler_ancestral", 4), ("unipc_karras", 4)):
        tab.page.select_option("#sampler", name)
        assert tab.boxes() == [k % 2 == 0 for k in range(boxes)]
        got = tab.draw(label="square", seed=5)
        assert near(got, python_picture(**asked, scheduler=name, clock=2))
        assert f"{name}, " in tab.text("picture-caption")
    tab.page.click("#measure-section summary")
    tab.page.click("#measure")
    assert "what is measured is the bundle's own sampler" in tab.error().lower()
    link = tab.page.evaluate("location.hash")
    other = visit(golden).open(link)
    assert other.page.is_visible("#sampler")
    assert np.array_equal(other.draw(), got)
    # Half of the steps of heun, which calls the model twice in each.
    choose(other, upload(photo(8)))
    other.page.select_option("#sampler", "heun")
    other.page.focus("#strength")
    for _ in range(6):
        other.page.keyboard.press("ArrowLeft")
    assert other.text("strength-says") == "0.5: 2 of 4 steps run"
    assert len(other.boxes()) == 3
    want = python_picture(**asked, scheduler="heun", clock=2, image=photo(8), strength=0.5)
    assert near(other.draw(), want)
    other.page.select_option("#sampler", "dpmpp_2m")
    other.page.click("#no-image")
    assert near(other.draw(), python_picture(**asked, clock=2))
    assert "sampler" not in other.page.evaluate("location.hash")
    assert 'The link\'s sampler is "ddpm"; expected one of ddim, ' in visit(golden).open("#sampler=ddpm").text("notes")


def moving(kind: str) -> bytes:
    """An animated picture."""
    data = io.BytesIO()
    frames = [photo(8), photo(8).rotate(90)]
    frames[0].save(data, kind, save_all=True, append_images=frames[1:], lossless=True)
    return data.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG that says that it has so many pixels, and ends there."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big")


# Drops a file on an element.
DROP = """([on, name, bytes]) => {
  const given = new DataTransfer();
  given.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  for (const kind of ["dragover", "drop"])
    document.getElementById(on).dispatchEvent(
      new DragEvent(kind, { dataTransfer: given, bubbles: true, cancelable: true }));
}"""


def test_a_file_that_cannot_be_a_picture_is_said(visit: Visiting, golden: int, tmp_path: Path) -> None:
    tab = visit(golden).open()
    whole = upload(photo(8))["buffer"]
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(70_000_000)
    for name, content, said in (
        ("cut.png", whole[: len(whole) // 2], "is damaged, or no picture that this browser reads"),
        ("empty.png", b"", "is damaged"),
        ("notes.png", b"shopping", "is damaged"),
        ("two.gif", moving("GIF"), "is animated"),
        ("two.png", moving("PNG"), "is animated"),
        ("two.webp", moving("WEBP"), "is animated"),
        ("wide.png", png(60000, 60000), "has 3600 million pixels; expected 100 at most"),
        ("huge.png", None, "has 70 MB; expected 64 MiB at most"),
    ):
        file = huge if content is None else {"name": name, "mimeType": "image/png", "buffer": content}
        tab.page.set_input_files("#image", file)
        tab.page.wait_for_selector(f'#error:text-matches("^Picture .{name}. {said}")')
        assert tab.page.is_hidden("#chosen")
        assert tab.page.input_value("#image") == ""
    still = io.BytesIO()
    photo(8).save(still, "GIF")
    choose(tab, {"name": "one.gif", "mimeType": "image/gif", "buffer": still.getvalue()})
    assert tab.page.is_hidden("#error")
    # Dropped, and pasted.
    for name, event in (("dropped.png", "DragEvent"), ("pasted.png", "ClipboardEvent")):
        field = "dataTransfer" if event == "DragEvent" else "clipboardData"
        kind = "drop" if event == "DragEvent" else "paste"
        code = """([name, bytes, event, kind, field]) => {
          const given = new DataTransfer();
          given.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
          document.body.dispatchEvent(new globalThis[event](kind, { [field]: given, bubbles: true, cancelable: true }));
        }"""
        tab.page.evaluate(code, [name, list(whole), event, kind, field])
        tab.page.wait_for_selector(f'#source-caption:text-matches("^{name}")')
    assert near(
        tab.draw(seed=2, label="round"),
        python_picture(label="round", seed=2, image=photo(8)),
    )


def test_a_link_draws_the_same_picture_again(visit: Visiting, golden: int) -> None:
    tab = visit(golden).open()
    want = tab.draw(label="square", seed=11, steps=5)
    link = tab.page.evaluate("location.hash")
    assert np.array_equal(visit(golden).open(link).draw(), want)
    # A link that is followed in an open page leaves nothing of what was there.
    tab.draw(label="round", seed=3, guidance=5)
    tab.page.evaluate(f"location.hash = {json.dumps(link)}")
    tab.page.wait_for_selector("#draw")
    assert np.array_equal(tab.draw(), want)
    tab.page.evaluate("location.hash = '#steps=5&clock=11101'")
    assert tab.page.input_value("#seed") == "0"
    assert tab.boxes() == [True, True, True, False, True]
    # Clicked boxes stay where the number of steps changes, a period goes on.
    tab.draw(steps=7)
    assert tab.boxes() == [True, True, True, False, True, True, True]
    tab.page.select_option("#period", "2")
    tab.draw(steps=3)
    tab.draw(steps=6)
    assert tab.boxes() == [True, False] * 3


def test_a_link_that_is_followed_before_the_bundle_is_open_is_followed_once(visit: Visiting, golden: int) -> None:
    early = "addEventListener('DOMContentLoaded', () => { location.hash = '#seed=5&evil=1'; })"
    tab = visit(golden, early).open()
    assert tab.page.input_value("#seed") == "5"
    assert "evil" in tab.text("notes")
    assert near(tab.draw(seed=7), python_picture(label="round", seed=7))
    assert tab.page.input_value("#seed") == "7"


def test_a_links_prompt_names_no_picture_of_a_class(visit: Visiting, golden: int) -> None:
    tab = visit(golden).open("#prompt=cat&negative=dog&seed=2")
    tab.draw()
    assert tab.page.get_attribute("#picture", "aria-label") == "round"
    assert "cat" not in tab.page.evaluate("location.hash")


def test_a_bundle_of_more_steps_than_the_page_has_boxes_for(visit: Visiting, changing: tuple[int, Path]) -> None:
    port, bundle = changing
    mask = [1, 0] * 125
    seal_plain(bundle, lambda manifest: manifest["operating_point"].update(num_inference_steps=250, mask=mask))
    tab = visit(port).open()
    assert tab.page.input_value("#steps") == "200"
    assert tab.boxes() == [True, False] * 100
    assert tab.text("notes") == ""
    assert near(tab.draw(steps=4), python_picture(label="round", seed=0))


def test_nonsense_in_a_link_is_said_and_left_out(visit: Visiting, golden: int) -> None:
    tab = visit(golden).open("#seed=-1&steps=9999&clock=0101&label=hexagon&guidance=lots&evil=<b>1</b>")
    notes = tab.text("notes")
    for name in ("seed", "steps", "clock", "guidance", "evil", "hexagon"):
        assert name in notes
    assert tab.page.locator("#notes b").count() == 0
    assert near(tab.draw(label="round", seed=0), python_picture(label="round", seed=0))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("seed", "one", 'Seed is "one"; expected a whole number below 2^64.'),
        ("seed", 2**64, f'Seed is "{2**64}"; expected a whole number below 2^64.'),
        ("guidance", "-1", 'Guidance is "-1"; expected a number from 0 to 99.'),
        ("guidance", "", 'Guidance is ""; expected a number from 0 to 99.'),
        ("steps", "0", 'Steps is "0"; expected 1 to 200.'),
    ],
)
def test_a_wrong_field_is_refused_before_anything_runs(
    visit: Visiting, golden: int, field: str, value: object, said: str
) -> None:
    tab = visit(golden).open()
    tab.page.evaluate("document.querySelector('#form').noValidate = true")
    tab.page.fill(f"#{field}", str(value))
    tab.page.click("#draw")
    assert tab.error() == said
    assert tab.page.is_hidden("#pictures")
    assert tab.page.evaluate("location.hash") == ""
    assert tab.page.is_visible("#draw")


def test_a_generation_can_be_cancelled(visit: Visiting, golden: int) -> None:
    tab = visit(golden).open()
    tab.page.fill("#steps", "200")
    tab.page.dispatch_event("#steps", "change")
    tab.page.click("#draw")
    tab.says("Step ", "now")
    tab.page.click("#cancel")
    tab.says("Cancelled.")
    assert tab.page.locator("#gallery li").count() == 0
    assert tab.page.is_hidden("#pictures")
    want = tab.draw(steps=4, label="round", seed=1)
    assert near(want, python_picture(label="round", seed=1))
    # Cancelled later, the picture that is shown, its file and its link are the last finished one's again.
    tab.page.fill("#steps", "200")
    tab.page.dispatch_event("#steps", "change")
    tab.page.fill("#seed", "2")
    tab.page.click("#draw")
    tab.page.wait_for_selector('#picture-caption:text-matches("^after step")')
    tab.page.click("#gallery li button", force=True)  # nothing may change while it draws
    assert tab.page.input_value("#seed") == "2"
    tab.page.click("#cancel")
    tab.says("Cancelled.")
    assert np.array_equal(tab.pixels("picture"), want)
    assert "seed 1" in tab.text("picture-caption")
    assert tab.page.evaluate("document.activeElement.id") in ("draw", "cancel", "")
    # At once after the page is open, too, while it warms up.
    tab.open()
    tab.page.evaluate("document.querySelector('#draw').click(); document.querySelector('#cancel').click()")
    tab.says("Cancelled.")
    assert tab.page.locator("#gallery li").count() == 0


def test_it_works_offline_after_a_visit(visit: Visiting, tmp_path: Path) -> None:
    with serving(PAGE, copy_bundle(tmp_path / "bundle")) as port:
        tab = visit(port).open()
        want = tab.draw(seed=4)
        tab.page.wait_for_selector("html[data-kept=yes]")
    # The server is gone.
    tab.open()
    assert tab.page.evaluate("crossOriginIsolated")
    assert np.array_equal(tab.draw(seed=4), want)
    # What no visit has used is there too.
    choose(tab, upload(photo(8)))
    tab.page.click("#no-image")
    tab.page.click("#measure-section summary")
    tab.page.fill("#rounds", "2")
    tab.page.click("#measure")
    tab.says("Measured")
    tab.forget("net::ERR_CONNECTION_REFUSED")  # of manifest.json


def test_what_is_not_used_is_not_loaded(visit: Visiting, golden: int) -> None:
    tab = visit(golden, ALONE).open()

    def used() -> set[str]:
        return {url.rpartition("/")[2] for url in tab.asked} & {"pictures.js", "measure.js", "control.js"}

    tab.draw()
    assert used() == set()
    tab.page.click("#measure-section summary")
    tab.page.fill("#rounds", "2")
    tab.page.click("#measure")
    tab.says("Measured")
    assert used() == {"measure.js"}
    tab.page.route("**/pictures.js", lambda route: route.abort())
    tab.page.click("#edit-this")
    assert tab.error().startswith("This part of the page cannot be loaded; connect to the network")
    tab.forget("net::ERR_FAILED")
    assert tab.page.is_hidden("#chosen")


def test_two_tabs_draw_at_once(visit: Visiting, golden: int) -> None:
    tab = visit(golden).open()
    other = Visit(tab.context, tab.url).open()
    for each in (tab, other):
        each.page.fill("#seed", "9")
        each.page.fill("#steps", "40")
        each.page.dispatch_event("#steps", "change")
        each.page.click("#draw")
    for each in (tab, other):
        each.says("Drawn in")
    assert np.array_equal(tab.pixels("picture"), other.pixels("picture"))
    assert other.heard == []


def test_a_damaged_file_is_said_and_not_kept(visit: Visiting, changing: tuple[int, Path]) -> None:
    port, bundle = changing
    weights = bundle / "onnx/unet/weights.bin"
    good = weights.read_bytes()
    weights.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    tab = visit(port)
    assert "Onnx/unet/weights.bin does not have the hash" in tab.fail()
    weights.write_bytes(good)
    assert near(tab.open().draw(seed=1), python_picture(label="round", seed=1))


def test_what_is_no_bundle_or_a_newer_one_is_said(visit: Visiting, tmp_path: Path) -> None:
    write_site(open_bundle(GOLDEN), PAGE, tmp_path / "site")
    bundle = tmp_path / "site/bundle"
    with plain_host(tmp_path / "site") as port:
        tab = visit(port)
        seal_plain(bundle, lambda manifest: manifest.update(format_version=3))
        assert "Manifest.json is of format version 3, this runtime reads version 2" in tab.fail()
        (bundle / "manifest.json").unlink()
        assert "is not a bundle: manifest.json is missing" in tab.fail()
        tab.forget("404")


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("delete globalThis.WebAssembly", "no WebAssembly"),
        ("WebAssembly.validate = () => false", "no SIMD"),
        ("delete globalThis.Worker", "no workers"),
    ],
)
def test_what_a_browser_lacks_is_said(visit: Visiting, golden: int, init: str, said: str) -> None:
    assert said in visit(golden, init).fail()


def test_without_memory_the_page_says_so_and_lives(driver: Any, golden: int) -> None:
    # 8 MiB: less than ONNX Runtime Web begins with, in every tab of this browser.
    small = driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--js-flags=--wasm-max-mem-pages=128"])
    tab = Visit(small.new_context(), f"http://127.0.0.1:{golden}/").open()
    assert "one component in memory at a time" in tab.text("status")
    tab.page.select_option("#label", "square")
    for _ in range(2):
        tab.page.click("#draw")
        assert "no memory left" in tab.error()
        tab.says("Ready")
        assert tab.page.is_enabled("#draw")
        assert tab.page.input_value("#label") == "square"
    small.close()


def test_another_bundle_and_another_page_appear_at_once(visit: Visiting, tmp_path: Path) -> None:
    """One address, kept in a browser: a bundle that was exported anew, and a page that was built anew."""
    bundle, site = copy_bundle(tmp_path / "bundle"), tmp_path / "site"
    write_site(open_bundle(bundle), PAGE, site)
    with plain_host(site, "max-age=600") as port:
        tab = visit(port).open()
        tab.page.wait_for_selector("html[data-kept=yes]")
        kept = "caches.open('edgediff /bundle/').then((cache) => cache.keys()).then((keys) => keys.length)"
        count = tab.page.evaluate(kept)
        rename(site / "bundle", "renamed")
        rebuild(site)
        tab.open()
        assert "renamed" in tab.text("about")
        assert tab.page.evaluate(kept) == count
        weights = bytearray((site / "bundle/onnx/unet/weights.bin").read_bytes())
        weights[0] ^= 1
        (site / "bundle/onnx/unet/weights.bin").write_bytes(weights)
        reseal(site / "bundle")
        tab.open()
        for _ in range(20):  # until the new service worker has taken over
            tab.page.wait_for_timeout(500)
            tab.open()
            if tab.page.text_content("h1") == "another":
                break
        assert tab.page.text_content("h1") == "another"
        # Without room for more, what is kept is not shown in place of what is there.
        client = tab.context.new_cdp_session(tab.page)
        client.send("Storage.overrideQuotaForOrigin", {"origin": tab.url.rstrip("/"), "quotaSize": 1000})
        rename(site / "bundle", "newest")
        tab.open()
        assert "newest" in tab.text("about")
        assert near(tab.draw(seed=1), python_picture(label="round", seed=1))


def test_an_open_page_keeps_its_version(visit: Visiting, tmp_path: Path) -> None:
    """A page that was built anew under open ones: those go on, offline too, until the last of them makes way."""
    site = tmp_path / "site"
    write_site(open_bundle(GOLDEN), PAGE, site)
    worker = "fetch('worker.js').then((answer) => answer.text())"
    webgpu = "fetch('ort/ort.webgpu.min.mjs').then((answer) => answer.ok)"
    with plain_host(site) as port:
        tab = visit(port).open()
        tab.page.wait_for_selector("html[data-kept=yes]")
        assert tab.page.evaluate(webgpu)  # kept because it was used
        want, before = tab.draw(seed=4), tab.page.evaluate(worker)
        rebuild(site)
        tab.page.evaluate(INSTALLED)
        other = Visit(tab.context, tab.url).open()
    # The server is gone.
    for each in (tab, other):
        assert each.page.evaluate(worker) == before
        each.open()
        assert each.page.text_content("h1") == "edgediff"
        assert np.array_equal(each.draw(seed=4), want)
    other.page.close()
    tab.open()
    assert tab.page.text_content("h1") == "another"
    assert tab.page.evaluate(worker) == before + ANOTHER
    assert tab.page.evaluate("crossOriginIsolated")
    assert tab.page.evaluate(webgpu)
    assert np.array_equal(tab.draw(seed=4), want)
    assert len(tab.page.evaluate("caches.keys()")) == 3  # of the page, of the bundle's names and of its files
    tab.forget("net::ERR_CONNECTION_REFUSED")  # of manifest.json


# Until the next version of the service worker is installed.
INSTALLED = """async () => {
  const registration = await navigator.serviceWorker.getRegistration();
  await registration.update();
  while (registration.installing) await new Promise((done) => setTimeout(done, 50));
}"""
ANOTHER = "// another\n"


def rebuild(site: Path) -> None:
    """Makes a site's page another version."""
    worker = site / "sw.js"
    worker.write_text(worker.read_text().replace('const BUILD = "', 'const BUILD = "x'))
    (site / INDEX).write_text((site / INDEX).read_text().replace("<h1>edgediff</h1>", "<h1>another</h1>"))
    with (site / "worker.js").open("a") as file:
        file.write(ANOTHER)


def rename(bundle: Path, name: str) -> None:
    """Gives a bundle's source another name."""
    seal_plain(bundle, lambda manifest: manifest["source"].update(name=name))


DENIED = "Object.defineProperty(globalThis, 'caches', { get() { throw new DOMException('', 'SecurityError'); } });"


def test_where_nothing_may_be_kept_it_draws(visit: Visiting, golden: int) -> None:
    tab = visit(golden, ALONE)
    altered_worker(tab, DENIED)
    assert near(tab.open().draw(seed=1), python_picture(label="round", seed=1))


def altered_worker(tab: Visit, before: str) -> None:
    """Puts a script before the worker's own, where no service worker answers for it."""
    headers = {"Content-Type": "text/javascript", "Cross-Origin-Embedder-Policy": "require-corp"}
    body = before + (PAGE / "worker.js").read_text("utf-8")
    tab.page.route("**/worker.js", lambda route: route.fulfill(body=body, headers=headers))


ALONE = "delete Navigator.prototype.serviceWorker"


# A service worker that is refused, as under some certificates, and only after the page's own worker was started.
REFUSED_LATE = """Object.defineProperty(Navigator.prototype, "serviceWorker", {
  value: { register: () => new Promise((_, refuse) => setTimeout(refuse, 1000)) },
})"""


@pytest.mark.parametrize("init", [ALONE, REFUSED_LATE])
def test_a_worker_that_does_not_start_is_said(visit: Visiting, golden: int, init: str) -> None:
    tab = visit(golden, init)
    tab.page.route("**/worker.js", lambda route: route.abort())
    assert tab.fail() == "Something went wrong: The worker cannot be started; load the page again."
    tab.forget("net::ERR_FAILED")


def test_a_worker_that_ends_while_a_drawing_is_cancelled_is_replaced(visit: Visiting, golden: int) -> None:
    tab = visit(golden, ALONE)
    altered_worker(tab, "addEventListener('message', ({ data }) => { if (data.type === 'cancel') throw data; });")
    tab.open()
    tab.page.fill("#steps", "200")
    tab.page.dispatch_event("#steps", "change")
    tab.page.click("#draw")
    tab.says("Step ", "now")
    tab.page.click("#cancel")
    tab.says("Ready")
    assert tab.page.is_hidden("#error")
    assert near(tab.draw(steps=4, seed=1), python_picture(label="round", seed=1))


@pytest.mark.parametrize(
    ("query", "said"),
    [("?threads=1000", "1 to 64"), ("?threads=abc", "1 to 64"), ("?backend=cpu", "wasm or webgpu")],
)
def test_nonsense_in_the_address_is_said(visit: Visiting, golden: int, query: str, said: str) -> None:
    assert said in visit(golden).fail(query)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A web host that sets no headers."""

    lasts = ""

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def end_headers(self) -> None:
        if self.lasts:
            self.send_header("Cache-Control", self.lasts)
        super().end_headers()


@contextlib.contextmanager
def plain_host(folder: Path, lasts: str = "") -> Iterator[int]:
    handler = functools.partial(type("Host", (Quiet,), {"lasts": lasts}), directory=str(folder))
    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    beside = threading.Thread(target=host.serve_forever)
    beside.start()
    try:
        yield host.server_address[1]
    finally:
        host.shutdown()
        beside.join()
        host.server_close()


def test_a_site_on_a_host_without_headers_has_threads_all_the_same(visit: Visiting, tmp_path: Path) -> None:
    write_site(open_bundle(GOLDEN), PAGE, tmp_path / "site")
    with plain_host(tmp_path / "site") as port:
        tab = visit(port).open()
        assert tab.page.evaluate("crossOriginIsolated")
        assert near(tab.draw(seed=1), python_picture(label="round", seed=1))
        # Where there is no service worker either, one thread computes, and the page says so.
        alone = visit(port, "delete Navigator.prototype.serviceWorker").open()
        assert not alone.page.evaluate("crossOriginIsolated")
        assert "1 thread," in alone.open("?threads=2").text("about")
        alone.open()
        assert "1 thread" in alone.text("about")
        assert "one thread" in alone.text("notes")
        assert near(alone.draw(seed=1), python_picture(label="round", seed=1))


def test_past_the_warning_of_a_certificate_it_has_threads_and_says_what_it_lacks(visit: Visiting) -> None:
    with serving(PAGE, GOLDEN, local=False, shown=make_certificate(["127.0.0.1"])) as port:
        tab = visit(port, ignore_https_errors=True)
        tab.url = tab.url.replace("http:", "https:")
        tab.open()
        assert tab.page.evaluate("isSecureContext && crossOriginIsolated")
        assert f"{min(4, tab.page.evaluate('navigator.hardwareConcurrency'))} thread" in tab.text("about")
        assert near(tab.draw(seed=1), python_picture(label="round", seed=1))
        assert tab.page.evaluate("caches.keys()") == ["edgediff /bundle/"]
        # Chromium runs no service worker under a certificate that it does not know.
        assert tab.open().text("notes") == "The browser keeps no page for offline use here."
        tab.context.close()  # its connections too, before the server stops
        tab.forget("error occurred when fetching the script.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_and_fits_a_narrow_screen(visit: Visiting, golden: int, scheme: str) -> None:
    tab = visit(golden, viewport={"width": 360, "height": 640}, color_scheme=scheme, bypass_csp=True).open()
    tab.draw(seed=2)
    tab.page.click("#measure-section summary")
    choose(tab, upload(photo(8), "a_photograph_with_quite_a_long_name_that_has_no_spaces_in_it.png"))
    tab.page.click("#mask-section summary")
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 360
    tab.draw(steps=120)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 360
    assert_accessible(tab)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_control_picture_and_further_settings_are_accessible_too(visit: Visiting, scheme: str) -> None:
    narrow: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "color_scheme": scheme, "bypass_csp": True}
    with serving(PAGE, exported_pipeline("sd1", control=True)) as port:
        tab = visit(port, **narrow).open()
        tab.page.click("#more summary")
        choose(tab, upload(photo(32)))
        tab.page.click("#edges-of-start")
        choose_control(tab, upload(photo(8), "a_photograph_with_quite_a_long_name_that_has_no_spaces_in_it.png"))
        assert tab.page.evaluate("document.documentElement.scrollWidth") == 360
        assert_accessible(tab)


def assert_accessible(tab: Visit) -> None:
    tab.page.add_script_tag(content=AXE.read_text("utf-8"))
    found = tab.page.evaluate("axe.run()")["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []


def test_downloads_are_the_picture_and_its_ledger(visit: Visiting, golden: int) -> None:
    tab = visit(golden).open()
    picture = tab.draw(label="square", seed=6)
    with tab.page.expect_download() as given:
        tab.page.click("#download")
    assert given.value.suggested_filename == "square-6.png"
    assert np.array_equal(np.array(Image.open(given.value.path()).convert("RGB")), picture)
    with tab.page.expect_download() as given:
        tab.page.click("#export")
    ledger = json.loads(Path(given.value.path()).read_bytes())
    assert ledger["result"]["mask"] == [1, 0, 1, 0]
    assert ledger["always"]["mask"] == [1, 1, 1, 1]
    assert [step["full"] for step in ledger["result"]["ledger"]] == [True, False, True, False]
    assert 0 < 1 - ledger["result"]["macs"]["done"] / ledger["result"]["macs"]["uncached"] < 1


def test_what_it_measures_stands_in_benchs_table(
    visit: Visiting, golden: int, command: Command, tmp_path: Path
) -> None:
    tab = visit(golden).open()
    tab.page.click("#measure-section summary")
    tab.page.fill("#rounds", "2.6")
    with tab.page.expect_download() as given:
        tab.page.click("#measure")
    assert tab.page.input_value("#rounds") == "3"
    phone = tmp_path / "phone.json"
    given.value.save_as(phone)
    ledger = read_ledger(phone)
    (known,) = ledger.contenders
    assert (known.backend, known.status, known.mask, known.rows) == ("onnxruntime-web", "measured", (1, 0, 1, 0), 2)
    rows = {row.part: len(row.samples_ms) for row in ledger.rows}
    assert (rows["loop"], rows["loop_clock1"], rows["cached"], rows["full"]) == (3, 3, 6, 6 + 12)
    said = command("bench", GOLDEN, "--backend", "onnxruntime", "--rounds", 2, "--import", phone, "--no-undivided")
    assert said.code == 0, said.errors
    assert "onnxruntime-web" in said.out


def test_bench_times_it_as_one_more_backend(command: Command, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.json"
    backends = ("--backend", "onnxruntime", "--backend", "onnxruntime-web")
    said = command("bench", GOLDEN, *backends, "--rounds", 2, "--num-images", 2, "--json", ledger)
    assert said.code == 0, said.errors
    known = {each.backend: each for each in read_ledger(ledger).contenders}
    web = known["onnxruntime-web"]
    assert (web.status, web.says, web.mask, web.rows) == ("measured", "", (1, 0, 1, 0), 4)
    assert web.psnr_db is not None
    assert web.psnr_db > 90
    assert web.flops_saved == known["onnxruntime"].flops_saved
    assert (web.undivided, known["onnxruntime"].undivided) == ("own", "undivided")
    assert {row.part for row in read_ledger(ledger).rows if row.backend == "onnxruntime-web"} >= {
        "loop", "loop_clock1", "full", "cached", "guidance", "scheduler", "other", "load",
    }  # fmt: skip
