"""A bundle in a browser: the worker of the page that `edgediff serve` serves, in Chromium, as one more contender."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgediff.bench.turns import Said, parts_of
from edgediff.bundle.psnr import psnr_db
from edgediff.bundle.reference import REFERENCE, load_reference, prompt_request, reference_request
from edgediff.errors import UnsupportedError
from edgediff.extras import needing
from edgediff.targets.base import Backend
from edgediff_runtime import EdgePipeline, open_bundle

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WEB = Backend(
    "onnxruntime-web",
    ("onnx",),
    ("playwright", "starlette", "uvicorn"),
    'pip install "edgediff[bench,web]", make web, and Chromium',
    verifies=False,
    by_default=False,
    in_browser=True,
)
# Chromium has no sandbox for root, as whom containers run; the page is our own.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
# The worker's messages as promises; of a generation without pictures it gives the latents.
ENGINE = """() => new Promise((ready) => {
  const worker = new Worker("/worker.js", { type: "module" });
  let told = null;
  worker.onerror = (event) => told({ type: "error", message: event.message || "the worker does not start" });
  worker.onmessage = ({ data }) => ["opened", "result", "error"].includes(data.type) && told(data);
  window.ask = (message) => new Promise((done) => { told = done; worker.postMessage(message); });
  ready();
})"""


def time_in_browser(
    bundle: str, backend: str, *, threads: int | None = None, num_images: int = 1, **request: Any
) -> Iterator[Said]:
    """Opens a bundle in a browser and compares its latents with ONNX Runtime's; then turns as of `time_bundle`.

    Args:
        threads: Of WebAssembly; None takes the page's choice.
        request: ``num_inference_steps``, ``clock``, ``guidance_scale``; where None, the bundle's.

    Raises:
        UnsupportedError: There is no browser, or the page has nothing to tell the model.
        SiteError: The page is not built.
    """
    opened = open_bundle(Path(bundle))
    manifest = opened.manifest
    python = EdgePipeline.from_pretrained(bundle, backend="onnxruntime")
    reference = load_reference(opened.file(REFERENCE))
    asked = reference_request(manifest, reference.conditioning) | {"num_images": num_images, "seed": 0}
    asked |= prompt_request(python, reference.conditioning)
    del asked["clock"]
    asked.pop("lora", None)  # the page has none; it costs the same
    asked |= {name: value for name, value in request.items() if value is not None}
    asked = {name: value for name, value in asked.items() if value is not None}
    arrays = [name for name, value in asked.items() if isinstance(value, np.ndarray | dict | list)]
    if arrays:
        raise UnsupportedError(f"{bundle}: the page is given prompts and classes, and it takes {arrays[0]}")
    given = {_camel(name): value for name, value in asked.items()}
    with _page(Path(bundle)) as page:
        load = _ask(page, {"type": "open", "url": "/bundle/", "backend": "wasm", "threads": threads, "warms": False})
        always = _draw(page, given | {"clock": 1, "outputType": "latent"})
        clocked = _draw(page, given | {"outputType": "latent"})
        want = python(**asked, output_type="latent").latents
        made = np.array(clocked["latents"], np.float32).reshape(want.shape)
        worst = psnr_db(want, made)
        floor = manifest.target("onnx").unet.floors.composed
        if worst < floor:
            says = f"its latents are {worst:.1f} dB of ONNX Runtime's; expected {floor:g} dB"
            yield Said(says=says, wrong=True, psnr_db=worst)
            return
        once = {"load": [load["ms"]], "first_call": [sum(always["ledger"][0]["ms"].values())]}
        yield Said(psnr_db=worst, parts=once)
        whole = given if python.can_decode else given | {"outputType": "latent"}
        while True:
            parts = _parts(_draw(page, given | {"clock": 1, "outputType": "latent"}), "loop_clock1")
            clocked = _draw(page, whole)
            for name, samples in _parts(clocked, "loop").items():
                parts[name] = [*samples, *parts.get(name, [])]
            rows = num_images * (2 if clocked["ledger"][-1]["guided"] else 1)
            yield Said(parts=parts, mask=tuple(clocked["mask"]), rows=rows)


@contextmanager
def _page(bundle: Path) -> Iterator[Any]:
    """A tab on a server of its own, with `window.ask` in it."""
    with needing("bench", "the backend onnxruntime-web"):
        from playwright.sync_api import sync_playwright
    with needing("web", "the backend onnxruntime-web"):
        from edgediff.site import server
    from edgediff.site.built_page import find_page

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UnsupportedError(f"the backend onnxruntime-web needs a browser; install one of: {', '.join(BROWSERS)}")
    with server.serving(find_page(), bundle) as port, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=FLAGS)
        try:
            page = chromium.new_page()
            page.set_default_timeout(0)
            # A page of the same origin that computes nothing itself.
            page.goto(f"http://127.0.0.1:{port}/bundle/SHA256SUMS")
            page.evaluate(ENGINE)
            yield page
        finally:
            chromium.close()


def _ask(page: Any, message: dict[str, Any]) -> dict[str, Any]:
    """What the worker answers, and the milliseconds until then."""
    timed = """async (message) => {
      const before = performance.now();
      const made = await window.ask(message);
      return { ...made, latents: made.latents && [...made.latents], image: null, ms_until: performance.now() - before };
    }"""
    answer: dict[str, Any] = page.evaluate(timed, {key: value for key, value in message.items() if value is not None})
    if answer["type"] == "error":
        raise UnsupportedError(f"in the browser: {answer['message']}")
    return answer | {"ms": answer["ms_until"]}


def _draw(page: Any, request: dict[str, Any]) -> dict[str, Any]:
    return _ask(page, {"type": "draw", "id": 1, "request": request, "shows": False})


def _parts(result: dict[str, Any], loop: str) -> dict[str, list[float]]:
    return parts_of(((step["full"], step["ms"]) for step in result["ledger"]), result["stages"], loop)


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))
