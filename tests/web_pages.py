"""A page in place of the one that ``make web`` builds, and the golden bundle to serve with it."""

import gzip
import shutil
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "runtime" / "golden" / "bundle"
# Each a file of the page, with its type as a browser must get it.
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "sw.js": "text/javascript; charset=utf-8",
    "app.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "icon.png": "image/png",
    "words.json": "application/json",
    "ort/ort.mjs": "text/javascript; charset=utf-8",
    "ort/ort.wasm": "application/wasm",
    "app.webmanifest": "application/manifest+json",
}
# As the build compresses it.
PACKED = "ort/ort.wasm.gz"
SECRET = "not for browsers"


def make_page(folder: Path) -> Path:
    """Writes a page, with things in its folder that are not to be served."""
    for name in TYPES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"this is {name}\n".encode() * 9)
    (folder / PACKED).write_bytes(gzip.compress((folder / PACKED.removesuffix(".gz")).read_bytes()))
    (folder.parent / "secret.txt").write_text(SECRET)
    (folder / ".env").write_text(SECRET)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text(SECRET)
    (folder / "link.txt").symlink_to("../secret.txt")
    (folder / "up").symlink_to("..")
    (folder / "bundle").mkdir()
    (folder / "bundle" / "README.md").write_text(SECRET)
    return folder


def copy_bundle(folder: Path) -> Path:
    """Copies the golden bundle for a test to change."""
    return shutil.copytree(GOLDEN, folder)
