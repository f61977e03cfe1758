"""What does a bundle do in a browser? Needs Chromium, and the page (`make web`).

Pictures against the Python runtime's, in WebAssembly and on WebGPU (a software adapter unless there is a GPU); the time
from a page's load to its first picture, with an empty cache and a warm one; what is downloaded before it; the time that
clock 2 saves, of the operations that it saves; the loop's own time; against the undivided UNet in ONNX Runtime Web, in
turns in one page; memory over many pictures. Everything goes through the page that `edgediff serve` serves.
"""

import argparse
import base64
import io
import json
import shutil
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from measure import exported, machine, ratios, spread, verdict
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from edgediff.bundle.psnr import psnr_db
from edgediff.site.built_page import find_page
from edgediff.site.server import serving
from edgediff.targets.onnx import OnnxConfig
from edgediff_runtime import EdgePipeline

STUDENT, TEACHER = "drawings-64-student", "drawings-64"
PROMPTS = (
    "a red apple, 3d", "cactus", "octopus, flat", "a yellow taxi", "house with garden", "snail", "guitar", "pizza",
    "a green frog, 3d", "umbrella", "rocket", "tulip, flat", "teapot", "a black cat", "lemon", "mushroom",
)  # fmt: skip
FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-precise-memory-info",
]
WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
WHAT = ("pictures", "loading", "speed", "memory")
BARS = {"wasm": 60, "webgpu": 50}


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="*", choices=WHAT, default=WHAT)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--pictures", type=int, default=100, help="over which memory is to stay flat")
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        student = Path(exported(STUDENT, Path(scratch) / "student", adaptor=None, onnx=OnnxConfig(weights="fp16")))
        chromium = shutil.which("chromium")
        with serving(find_page(), student) as port:
            url = f"http://127.0.0.1:{port}/"
            for what in given.what:
                flags = FLAGS + (WEBGPU if what == "pictures" else ["--disable-gpu"])
                browser = playwright.chromium.launch(executable_path=chromium, args=flags)
                if what == "pictures":
                    for backend in BARS:
                        pictures(browser, url, student, backend)
                elif what == "loading":
                    loading(browser, url, given.rounds)
                elif what == "memory":
                    memory(browser, url, given.pictures)
                browser.close()
        if "speed" in given.what:
            for name in (TEACHER, STUDENT):
                bundle = Path(exported(name, Path(scratch) / f"{name}-fp32", adaptor=None))
                with serving(find_page(), bundle) as port:
                    url = f"http://127.0.0.1:{port}/"
                    browser = playwright.chromium.launch(executable_path=chromium, args=[*FLAGS, "--disable-gpu"])
                    speed(browser, url, name, given.rounds)
                    browser.close()


def opened(browser: Browser, url: str, query: str = "") -> Page:
    """A tab in a profile of its own, with a bundle open."""
    page = browser.new_context().new_page()
    page.set_default_timeout(600_000)
    page.goto(url + query)
    page.wait_for_selector("html[data-ready=yes]")
    return page


def draw(page: Page, seed: int, prompt: str | None = None, compare: bool = False) -> np.ndarray:
    """Draws, without the pictures of single steps; the pixels [H, W, 3]."""
    if prompt is not None:
        page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.set_checked("#compare", compare)
    page.set_checked("#forming", False)
    page.click("#draw")
    page.wait_for_selector('#status:text-matches("^Drawn in")')
    data = page.evaluate("document.querySelector('#picture').toDataURL()")
    return np.array(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB"))


def pictures(browser: Browser, url: str, bundle: Path, backend: str) -> None:
    """Each prompt's picture against the Python runtime's."""
    pipe = EdgePipeline.from_pretrained(bundle)
    page = opened(browser, url, f"?backend={backend}")
    assert ("WebGPU" in str(page.text_content("#about"))) == (backend == "webgpu"), page.text_content("#about")
    found, differs = [], 0
    for seed, prompt in enumerate(PROMPTS):
        want, got = pipe(prompt=prompt, seed=seed).images[0], draw(page, seed, prompt)
        differs += int(np.abs(want.astype(int) - got).max() > 0)
        found.append(psnr_db(want.astype(np.float32), got.astype(np.float32)))
    least, bar = min(found), BARS[backend]
    holds = verdict(least >= bar)
    print(f"{backend}: {len(PROMPTS)} pictures, {differs} differ at all, the worst {least:.1f} dB: {holds}, {bar}")


def loading(browser: Browser, url: str, rounds: int) -> None:
    """Seconds from a page's load to the first picture, cold and warm, and what was downloaded."""
    cold, warm, bytes_ = [], [], {}
    for _ in range(rounds):
        context = browser.new_context()
        for times in (cold, warm):
            page = context.new_page()
            sizes: dict[str, int] = {}
            page.on("response", lambda r, sizes=sizes: sizes.update({r.url: int(r.headers.get("content-length", 0))}))
            page.goto(url)
            page.wait_for_selector("html[data-ready=yes]")
            page.set_checked("#compare", False)
            page.click("#draw")
            page.wait_for_selector('#status:text-matches("^Drawn in")')
            times.append(page.evaluate("performance.now()") / 1e3)
            if times is cold:
                bytes_ = sizes
                page.wait_for_selector("html[data-kept=yes]")
            page.close()
        context.close()
    print(f"first picture, cold: {spread(cold)} s (bar 5); warm: {spread(warm)} s (bar 3)")
    engine = sum(size for name, size in bytes_.items() if "/ort/" in name)
    print(
        f"downloaded before it: {sum(bytes_.values()) / 1e6:.2f} MB (bar 15), of it ONNX Runtime Web {engine / 1e6:.2f}"
    )


UNDIVIDED = """async ([rows, tokens, width, size, channels]) => {
  const ort = await import(new URL("ort/ort.wasm.min.mjs", location.href).href);
  ort.env.wasm.numThreads = Math.min(4, navigator.hardwareConcurrency);
  const get = async (name) => new Uint8Array(await (await fetch(`bundle/onnx/unet/${name}`)).arrayBuffer());
  const session = await ort.InferenceSession.create(await get("model.onnx"), {
    externalData: [{ path: "weights.bin", data: await get("weights.bin") }], executionProviders: ["wasm"] });
  const random = (n) => Float32Array.from({ length: n }, () => Math.random() - 0.5);
  const shape = [rows, channels, size, size];
  const feeds = { sample: new ort.Tensor("float32", random(rows * channels * size * size), shape),
    timestep: new ort.Tensor("float32", [500], []),
    encoder_hidden_states: new ort.Tensor("float32", random(rows * tokens * width), [rows, tokens, width]) };
  window.undivided = async (steps) => {
    const before = performance.now();
    for (let k = 0; k < steps; k++) await session.run(feeds);
    return performance.now() - before;
  };
  await window.undivided(2);
}"""


def speed(browser: Browser, url: str, name: str, rounds: int) -> None:
    """Clock 2 against clock 1 and against the undivided UNet, in turns in one page."""
    page = opened(browser, url)
    manifest = page.evaluate("fetch('bundle/manifest.json').then((r) => r.json())")
    shape = next(t["shape"] for t in manifest["conditioning"]["tensors"] if t["name"] == "encoder_hidden_states")
    sample, steps = manifest["sample"], len(manifest["operating_point"]["mask"])
    tokens = shape[1] if isinstance(shape[1], int) else 77
    page.evaluate(UNDIVIDED, [2, tokens, shape[2], sample["height"], sample["channels"]])
    loop, always, alone, own, cached = [], [], [], [], []
    page.click("#measure-section summary")
    page.fill("#rounds", "2")
    for _ in range(rounds):
        alone.append(page.evaluate(f"window.undivided({2 * steps})") / 2)
        with page.expect_download() as given:
            page.click("#measure")
        ledger = json.loads(Path(given.value.path()).read_bytes())
        parts = {row["part"]: row["samples_ms"] for row in ledger["rows"]}
        loop.append(sum(parts["loop"]) / 2)
        always.append(sum(parts["loop_clock1"]) / 2)
        cached += parts["cached"]
        own += [sum(each) for each in zip(*(parts[name] for name in ("guidance", "scheduler", "other")), strict=True)]
    (known,) = ledger["contenders"]
    flops = known["flops_saved"]
    ratio = [(1 - one / other) / flops for one, other in zip(loop, always, strict=True)]
    print(f"{name}: loop at clock 2 {spread(loop)} ms, at clock 1 {spread(always)}, undivided {spread(alone)}")
    print(f"  time saved / FLOPs saved: {spread(ratio)}: {verdict(median(ratio) >= 0.9)}, 0.9; of {flops:.1%}")
    faster = ratios(alone, loop)
    print(f"  against the undivided UNet: {spread(faster)} x: {verdict(median(faster) >= 1.3)}, 1.3")
    share = median(own) / median(cached)
    print(f"  the loop's own time: {spread(own)} ms of {spread(cached)}, {share:.1%}: {verdict(share <= 0.05)}, 5 %")


def memory(browser: Browser, url: str, pictures: int) -> None:
    """The tab's memory after some pictures and after many."""
    page = opened(browser, url)
    seen = []
    for seed in range(pictures):
        draw(page, seed)
        if seed in (9, pictures - 1):
            seen.append(page.evaluate("performance.measureUserAgentSpecificMemory().then((m) => m.bytes)") / 1e6)
    print(
        f"memory after 10 pictures {seen[0]:.1f} MB, after {pictures} {seen[1]:.1f}: {seen[1] / seen[0]:.3f} (bar 1.05)"
    )


if __name__ == "__main__":
    main()
