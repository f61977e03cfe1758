"""``edgediff site``: what the folder holds, that plain hosts serve it, and what is never written or replaced."""

import hashlib
import http.client
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from command_line import FULL, Command, assert_error, snapshot, unchanged
from seals import flip_bit, reseal, seal_plain
from web_pages import GOLDEN, SECRET, TYPES, copy_bundle, make_page

from edgediff.bundle.staging import check_place
from edgediff.errors import TargetError
from edgediff.site import built_page, folder
from edgediff.site.folder import site_strays
from edgediff.site.headers import HEADERS

OF_BUNDLE = [*json.loads((GOLDEN / "manifest.json").read_bytes())["files"], "manifest.json", "SHA256SUMS"]
OF_HOSTS = ["_headers", ".htaccess", ".nojekyll", "site.sha256"]


@pytest.fixture(autouse=True)
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command's page."""
    (tmp_path / "built").mkdir()
    monkeypatch.setattr(built_page, "PAGE", make_page(tmp_path / "built" / "page"))
    return tmp_path / "built" / "page"


@pytest.fixture
def site(command: Command, place: Path) -> Path:
    """A site that was written."""
    assert command("site", GOLDEN, "-o", place / "site").code == 0
    return place / "site"


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


# What is in it.


def test_it_holds_the_page_the_bundle_and_what_hosts_read(site: Path, page: Path) -> None:
    assert _files(site) == sorted([*TYPES, *(f"bundle/{name}" for name in OF_BUNDLE), *OF_HOSTS])
    for name in TYPES:
        assert (site / name).read_bytes() == (page / name).read_bytes()
    for name in OF_BUNDLE:
        assert (site / "bundle" / name).read_bytes() == (GOLDEN / name).read_bytes()
    assert SECRET not in "".join(path.read_text(errors="replace") for path in site.rglob("*") if path.is_file())


def test_files_are_copies_of_their_own(site: Path, page: Path) -> None:
    for path in site.rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or path.stat().st_nlink == 1


def test_the_sums_are_those_of_the_files(site: Path) -> None:
    lines = (site / "site.sha256").read_text().splitlines()
    sums = {line[66:]: line[:64] for line in lines}
    assert sorted(sums) == [name for name in _files(site) if name != "site.sha256"]
    for name, wanted in sums.items():
        assert hashlib.sha256((site / name).read_bytes()).hexdigest() == wanted
    if shutil.which("sha256sum") is not None:
        assert subprocess.run(["sha256sum", "--check", "--quiet", "site.sha256"], cwd=site).returncode == 0


def test_other_targets_are_left_out_and_the_manifest_is_as_it_was(command: Command, place: Path) -> None:
    bundle = copy_bundle(place / "bundle")
    for name in ("coreml/Unet.mlpackage/Manifest.json", "openvino/unet/full.xml", "litert/unet.tflite", "LICENSE"):
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text(name)
    reseal(bundle)
    (bundle / "evidence" / "parity.json").write_text("{}")  # of export, listed nowhere
    (bundle / ".DS_Store").write_text("")
    assert command("site", bundle, "-o", place / "site").code == 0
    assert _files(place / "site" / "bundle") == sorted([*OF_BUNDLE, "LICENSE"])
    for name in ("manifest.json", "SHA256SUMS"):
        assert (place / "site" / "bundle" / name).read_bytes() == (bundle / name).read_bytes()


def test_hosts_read_the_same_headers(site: Path) -> None:
    first, *lines = (site / "_headers").read_text().splitlines()
    assert first == "/*"
    assert dict(line.strip().split(": ", 1) for line in lines) == dict(HEADERS)
    assert all(line.startswith("  ") and len(line) < 2000 for line in lines)
    apache = (site / ".htaccess").read_text()
    assert dict(re.findall(r'^  Header always set (\S+) "([^"]*)"$', apache, re.MULTILINE)) == dict(HEADERS)
    types = {suffix: kind for kind, suffix in re.findall(r"^  AddType (\S+) (\S+)$", apache, re.MULTILINE)}
    assert (types[".mjs"], types[".wasm"]) == ("text/javascript", "application/wasm")
    assert apache.count("<IfModule ") == apache.count("</IfModule>") == 2
    assert (site / ".nojekyll").read_bytes() == b""


def test_pythons_own_server_serves_it(site: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as running:
        beside = Thread(target=running.serve_forever, args=(0.05,))
        beside.start()
        try:
            for target, name in (("/", "index.html"), ("/bundle/manifest.json", "bundle/manifest.json")):
                asking = http.client.HTTPConnection(*running.server_address[:2], timeout=10)
                asking.request("GET", target)
                with asking.getresponse() as answer:
                    assert answer.read() == (site / name).read_bytes()
                asking.close()
        finally:
            running.shutdown()
            beside.join()


def test_it_says_what_it_wrote_and_how_to_try_it(command: Command, place: Path) -> None:
    said = command("site", GOLDEN, "-o", place / "a")
    size = sum(path.stat().st_size for path in (place / "a").rglob("*") if path.is_file())
    count = len(_files(place / "a"))
    (line,) = said.out.splitlines()
    assert line.startswith(f"site: {place / 'a'} ({count} files, 0.3 MB, the largest 0.1); to try it: ")
    assert line.endswith(f"python -m http.server 8000 --bind 127.0.0.1 --directory {place / 'a'}")
    found = json.loads(command("site", GOLDEN, "-o", place / "b", "--json").out)
    largest = (GOLDEN / "onnx/unet/model.onnx").stat().st_size
    assert found == {"site": str(place / "b"), "files": count, "bytes": size, "largest_bytes": largest}
    assert snapshot(place / "a") == snapshot(place / "b")


# Where it goes.


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_other_things_are_never_replaced(command: Command, place: Path, force: list[str]) -> None:
    copy_bundle(place / "bundle")
    (place / "web").mkdir()
    (place / "web" / "index.html").touch()
    (place / "web" / "site.sha256").write_text("mine\n")
    (place / "link").symlink_to("web")
    for output, part in (
        (place, "a folder that is not a site, never replaced"),
        (place / "web", "a folder that is not a site, never replaced"),
        (place / "mine.txt", "mine.txt is not a directory"),
        (place / "mine.txt" / "site", "mine.txt is not a folder that can be written"),
        (place / "link", "link"),
        (place / ("x" * 300), "File name too long"),
        (place / "bundle", "is in the bundle"),
        (place / "bundle" / "onnx" / "site", "is in the bundle"),
    ):
        with unchanged(place):
            assert_error(command("site", place / "bundle", "-o", output, *force), part)


def test_another_site_needs_force_and_strangers_in_it_stay(command: Command, site: Path, place: Path) -> None:
    (site / "index.html").write_text("changed by hand")
    with unchanged(place):
        assert_error(command("site", GOLDEN, "-o", site), "holds another site; pass --force to replace it")
    (site / "CNAME").write_text("mine")
    with unchanged(place):
        assert_error(command("site", GOLDEN, "-o", site, "--force"), "holds CNAME, which is not the site's")
    (site / "CNAME").unlink()
    (site / ".DS_Store").touch()
    said = command("site", GOLDEN, "-o", site, "--force")
    assert (said.code, said.errors) == (0, [])
    assert (site / "index.html").read_text() != "changed by hand"
    assert sorted(path.name for path in place.iterdir()) == ["mine.txt", "site"]


def test_an_export_takes_no_site_for_a_bundle(site: Path) -> None:
    assert site_strays(site) == []
    with pytest.raises(TargetError, match="a folder that is not a bundle, never replaced"):
        check_place(site, force=True)


def test_a_web_pages_manifest_is_no_bundle_around_the_site(command: Command, place: Path) -> None:
    (place / "manifest.json").write_text('{"name": "a web page", "icons": []}')
    assert command("site", GOLDEN, "-o", place / "public" / "demo").code == 0


def test_what_a_killed_run_left_is_removed(command: Command, place: Path) -> None:
    (place / ".site.edgediff-999999").mkdir()
    assert command("site", GOLDEN, "-o", place / "site").code == 0
    assert sorted(path.name for path in place.iterdir()) == ["mine.txt", "site"]


@pytest.mark.parametrize(("fault", "code"), [(FULL, 2), (KeyboardInterrupt(), 130)])
def test_what_ends_it_leaves_what_was_there(
    command: Command, site: Path, place: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, code: int
) -> None:
    real = folder._copy

    def copy(source: Path, target: Path) -> object:
        if source.name == "weights.bin":
            raise fault
        return real(source, target)

    monkeypatch.setattr(folder, "_copy", copy)
    for output in (site, place / "new"):
        with unchanged(place):
            said = command("site", GOLDEN, "-o", output, "--force")
        assert_error(said, "what was there is as it was", code=code)


# What is not copied.

DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda bundle: flip_bit(bundle / "onnx/unet/weights.bin"), "onnx/unet/weights.bin does not have the hash"),
    (lambda bundle: flip_bit(bundle / "README.md"), "README.md does not have the hash"),
    (lambda bundle: (bundle / "README.md").unlink(), "README.md is missing"),
    (lambda bundle: (bundle / "evidence/reference.safetensors").write_bytes(b""), "reference.safetensors has 0 bytes"),
]


@pytest.mark.parametrize(("damages", "says"), DAMAGE, ids=[says for _, says in DAMAGE])
def test_a_damaged_bundle_makes_no_site(
    command: Command, place: Path, damages: Callable[[Path], object], says: str
) -> None:
    damages(copy_bundle(place / "bundle"))
    with unchanged(place):
        assert_error(command("site", place / "bundle", "-o", place / "site"), says)


@pytest.mark.parametrize(
    "name", ["onnx/evil.html", "onnx/evil.JS", "x.php", "onnx/.htaccess", "evidence/x.svg", ".env", "onnx/.x/a.json"]
)
def test_what_a_host_would_run_makes_no_site(command: Command, place: Path, name: str) -> None:
    bundle = copy_bundle(place / "bundle")
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("evil")
    reseal(bundle)
    with unchanged(place):
        assert_error(
            command("site", bundle, "-o", place / "site"), f"{name} is no file that export writes for browsers"
        )


def test_a_link_out_of_the_bundle_makes_no_site(command: Command, place: Path) -> None:
    bundle = copy_bundle(place / "bundle")
    (bundle / "README.md").rename(place / "moved")
    (bundle / "README.md").symlink_to("../moved")
    with unchanged(place):
        assert_error(command("site", bundle, "-o", place / "site"), "README.md is a symlink out of the bundle")


def test_a_listed_path_out_of_the_bundle_makes_no_site(command: Command, place: Path) -> None:
    bundle = copy_bundle(place / "bundle")
    listed = {"size": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    seal_plain(bundle, lambda data: data["files"].update({"../mine.txt": listed}))
    with unchanged(place):
        assert_error(command("site", bundle, "-o", place / "site"), "'../mine.txt' leaves the bundle")


def test_a_bundle_that_changes_on_the_way_makes_no_site(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, real = copy_bundle(place / "bundle"), folder._copy

    def copy(source: Path, target: Path) -> object:
        if source.name == "manifest.json":
            seal_plain(bundle, lambda data: data.update(license="another"))
            (bundle / "more.txt").write_text("more")
            reseal(bundle)
        return real(source, target)

    monkeypatch.setattr(folder, "_copy", copy)
    said = command("site", bundle, "-o", place / "site")
    assert_error(said, f"{bundle} changed while it was copied; write the site again")
    assert not (place / "site").exists()


# The page.


def test_without_a_page_it_says_how_to_build_it(command: Command, page: Path, place: Path) -> None:
    (page / "index.html").unlink()
    with unchanged(place):
        assert_error(command("site", GOLDEN, "-o", place / "site"), "the browser page is not built", "run `make web`")


@pytest.mark.parametrize("name", ["_headers", "site.sha256"])
def test_a_page_with_a_file_of_the_sites_is_refused(command: Command, page: Path, place: Path, name: str) -> None:
    (page / name).touch()
    with unchanged(place):
        assert_error(command("site", GOLDEN, "-o", place / "site"), f"the page has a file {name} of its own")


def test_it_needs_no_package_of_an_extra(place: Path, page: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('starlette', 'uvicorn', 'trustme', 'segno', 'torch', 'onnx'): sys.modules[name] = None\n"
        "from pathlib import Path\nfrom edgediff.site import built_page\nbuilt_page.PAGE = Path(sys.argv.pop(1))\n"
        "from edgediff.cli import main\nmain()"
    )
    command = [sys.executable, "-c", program, page, "site", GOLDEN, "-o", place / "site"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert site_strays(place / "site") == []
