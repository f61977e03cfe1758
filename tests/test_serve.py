"""``edgediff serve`` by real requests over real sockets, sent as they are: what it answers, and what it never does."""

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import pytest
from command_line import Command, assert_error
from cryptography import x509
from seals import reseal, seal_plain
from web_pages import GOLDEN, SECRET, TYPES, copy_bundle, make_page

import edgediff.site
from edgediff.errors import SiteError
from edgediff.site import built_page, certificate, server
from edgediff.site.certificate import Certificate, make_certificate

HEADERS = {
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; style-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
}
LISTED = sorted(json.loads((GOLDEN / "manifest.json").read_bytes())["files"])


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Served:
    """A server that runs, and the folders that it serves."""

    port: int
    page: Path
    bundle: Path
    secure: bool = False

    @contextlib.contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain:
            if not self.secure:
                yield plain
                return
            trusting = ssl.create_default_context()
            trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
            with trusting.wrap_socket(plain) as wrapped:
                yield wrapped

    def ask(self, target: str, method: str = "GET", host: str | None = "localhost", **headers: str) -> Answer:
        """Sends a target byte for byte, which clients that are libraries would put right first."""
        lines = [f"{method} {target} HTTP/1.{int(host is not None)}", *([] if host is None else [f"Host: {host}"])]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        with self.connected() as there:
            there.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1"))
            answer = http.client.HTTPResponse(there, method=method)
            answer.begin()
            with answer:
                found = {name.lower(): value for name, value in answer.getheaders()}
                return Answer(answer.status, found, answer.read())


@contextlib.contextmanager
def serving(page: Path, bundle: Path, *, local: bool = True, shown: Certificate | None = None) -> Iterator[Served]:
    with server.serving(page, bundle, local=local, shown=shown) as port:
        yield Served(port, page, bundle, shown is not None)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page and the golden bundle; nothing in them is changed."""
    folder = tmp_path_factory.mktemp("served")
    bundle = copy_bundle(folder / "bundle")
    (bundle / "notes.txt").write_text(SECRET)
    with serving(make_page(folder / "page"), bundle) as running:
        yield running


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[Served]:
    """The same, for a test to change."""
    with serving(make_page(tmp_path / "page"), copy_bundle(tmp_path / "bundle")) as running:
        yield running


# What is answered.


@pytest.mark.parametrize(
    ("status", "target", "asked"),
    [
        (200, "/", {}),
        (200, "/bundle/manifest.json", {}),
        (206, "/ort/ort.wasm", {"range": "bytes=0-3"}),
        (304, "/sw.js", {"if_none_match": "ETAG"}),
        (400, "/", {"host": "evil.example"}),
        (400, "/sw.js", {"range": "lines=1-2"}),
        (404, "/nothing", {}),
        (404, "/bundle/nothing", {}),
        (405, "/", {"method": "POST"}),
        (416, "/sw.js", {"range": "bytes=100000-"}),
    ],
)
def test_every_answer_has_the_headers(served: Served, status: int, target: str, asked: dict[str, str]) -> None:
    etag = served.ask("/sw.js").headers["etag"]
    answer = served.ask(target, **{name: etag if value == "ETAG" else value for name, value in asked.items()})
    assert answer.status == status
    assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    assert "server" not in answer.headers


def test_what_the_build_compressed_is_sent_so_to_who_takes_it(served: Served) -> None:
    plain = served.ask("/ort/ort.wasm")
    assert "content-encoding" not in plain.headers
    packed = served.ask("/ort/ort.wasm", accept_encoding="br, gzip")
    assert (packed.headers["content-encoding"], packed.headers["vary"]) == ("gzip", "Accept-Encoding")
    assert packed.headers["content-type"] == plain.headers["content-type"]
    assert gzip.decompress(packed.body) == plain.body
    assert packed.headers["etag"] != plain.headers["etag"]
    for asked in ({"accept_encoding": "br"}, {"accept_encoding": "gzip", "range": "bytes=0-3"}):
        assert "content-encoding" not in served.ask("/ort/ort.wasm", **asked).headers
    assert "content-encoding" not in served.ask("/app.css", accept_encoding="gzip").headers


@pytest.mark.parametrize("name", TYPES)
def test_the_pages_files_have_their_types(served: Served, name: str) -> None:
    answer = served.ask(f"/{name}")
    assert (answer.status, answer.headers["content-type"]) == (200, TYPES[name])
    assert answer.body == (served.page / name).read_bytes()


def test_the_page_is_at_the_root(served: Served) -> None:
    assert served.ask("/").body == served.ask("/index.html?x=1").body == (served.page / "index.html").read_bytes()
    assert served.ask("/").headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize("name", [*LISTED, "manifest.json", "SHA256SUMS"])
def test_every_listed_file_of_the_bundle_is_served(served: Served, name: str) -> None:
    answer = served.ask(f"/bundle/{name}")
    assert (answer.status, answer.body) == (200, (GOLDEN / name).read_bytes())
    kinds = {"json": "application/json", "md": "text/plain; charset=utf-8", "SHA256SUMS": "text/plain; charset=utf-8"}
    assert answer.headers["content-type"] == kinds.get(name.rpartition(".")[2], "application/octet-stream")


def test_nothing_in_a_bundle_is_a_document_or_a_script(changing: Served) -> None:
    names = ("evil.html", "evil.js", "evil.mjs", "evil.svg", "evil.css", "evil.wasm", "evil.xml", "EVIL.HTML")
    for name in names:
        (changing.bundle / "onnx" / name).write_text("<script>alert(1)</script>")
    reseal(changing.bundle)
    for name in names:
        answer = changing.ask(f"/bundle/onnx/{name}")
        assert (answer.status, answer.headers["content-type"]) == (200, "application/octet-stream"), name


def test_head_is_get_without_the_body(served: Served) -> None:
    for target in ("/", "/bundle/onnx/unet/weights.bin", "/nothing"):
        whole, head = served.ask(target), served.ask(target, "HEAD")
        assert (head.status, head.body) == (whole.status, b"")
        assert head.headers | {"date": ""} == whole.headers | {"date": ""}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "get", "BREW"])
@pytest.mark.parametrize("target", ["/", "/bundle/manifest.json"])
def test_other_methods_are_refused(served: Served, method: str, target: str) -> None:
    answer = served.ask(target, method)
    if method == "get":  # h11 and uvicorn take it as it is meant
        assert answer.status in (200, 405)
        return
    assert answer.status == 405
    assert {*answer.headers["allow"].split(", ")} == {"GET", "HEAD"}
    assert SECRET.encode() not in answer.body


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=0-0", 0, 0), ("bytes=10-19", 10, 19), ("bytes=31000-", 31000, 31551), ("bytes=-16", 31536, 31551)],
)
def test_a_range_is_answered_with_just_that(served: Served, asked: str, first: int, last: int) -> None:
    data = (GOLDEN / "onnx/unet/weights.bin").read_bytes()
    answer = served.ask("/bundle/onnx/unet/weights.bin", range=asked)
    assert (answer.status, answer.body) == (206, data[first : last + 1])
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(data)}"
    assert answer.headers["accept-ranges"] == "bytes"


def test_several_ranges_ranges_out_of_reach_and_of_another_file(served: Served) -> None:
    target, data = "/bundle/onnx/unet/weights.bin", (GOLDEN / "onnx/unet/weights.bin").read_bytes()
    both = served.ask(target, range="bytes=0-3,100-103")
    assert both.status == 206
    assert both.headers["content-type"].startswith("multipart/byteranges")
    assert data[:4] in both.body
    assert data[100:104] in both.body
    beyond = served.ask(target, range=f"bytes={len(data)}-")
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{len(data)}")
    assert served.ask(target, range="bytes=0-3", if_range='"another"').body == data


def test_what_a_browser_has_is_not_sent_again(changing: Served) -> None:
    for target, path in (("/sw.js", changing.page / "sw.js"), ("/bundle/README.md", changing.bundle / "README.md")):
        etag = changing.ask(target).headers["etag"]
        for tags in (etag, f"W/{etag}", f'"other", {etag}'):
            answer = changing.ask(target, if_none_match=tags)
            assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", etag)
        assert changing.ask(target, if_none_match='"other"').status == 200
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)  # of the same size
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))
        answer = changing.ask(target, if_none_match=etag)
        assert (answer.status, answer.body) == (200, bytes(data))


# What is never answered.

CLIMBS = (
    "..", "%2e%2e", ".%2e", "%252e%252e", "..%2f..", "..%5c..", "..\\..", "....//", "..;", "%c0%ae%c0%ae",
    "%uff0e%uff0e", ".", "./..",
)  # fmt: skip
ATTACKS = [
    *(f"/{climb}/secret.txt" for climb in CLIMBS), *(f"/bundle/{climb}/secret.txt" for climb in CLIMBS),
    *(f"/bundle/{climb}/{climb}/secret.txt" for climb in CLIMBS),
    *(f"/ort/{climb}/{climb}/secret.txt" for climb in CLIMBS), "/../../../../../../etc/passwd", "//etc/passwd",
    "/%2fetc/passwd", "/bundle//etc/passwd", "/bundle/%2fetc%2fpasswd", "/file:///etc/passwd", "file:///etc/passwd",
    "http://localhost/secret.txt", "/C:/secret.txt", "/bundle/C:%5csecret.txt", "/index.html%00",
    "/index.html%00.png", "/bundle/manifest.json%00", "/%00", "/bundle/manifest.json%0a", "/sw.js%0d%0aX:1",
    "/sw.js/", "/bundle", "/bundle/", "/bundle//manifest.json", "//bundle/manifest.json", "/bundle/./manifest.json",
    "/bundle/onnx/../manifest.json", "/ort", "/ort/", "/ort/../index.html", "/./index.html", "/bundle/onnx",
    "/Bundle/manifest.json", "/bundle/notes.txt", "/bundle/MANIFEST.JSON", "/bundle/manifest.json.",
    "/bundle/manifest.json%20", "/bundle/evidence/parity.json", "/.env", "/%2eenv", "/.git/config", "/link.txt",
    "/up/secret.txt", "/up/page/index.html", "/%ff%fe", "/" + "x" * 5000, "/" + "x/" * 2000,
    "/bundle/" + "%2e%2e%2f" * 50 + "etc/passwd", "/~root/.profile", "/page/index.html", "*", "/con", "/aux.js",
]  # fmt: skip


@pytest.mark.parametrize("target", ATTACKS, ids=lambda target: target[:60])
def test_other_paths_are_not_found(served: Served, target: str) -> None:
    answer = served.ask(target)
    assert answer.status == 404
    assert answer.body == b"Not Found"


def test_paths_that_are_no_paths_are_refused(served: Served) -> None:
    for target in ("/index.html\0", "/a b", "/\x01", "", "/\xc0\xae\xc0\xae/secret.txt", "/\u00e9"):
        assert served.ask(target).status in (400, 404), target
    # What lies there is what those above were after.
    assert (served.page.parent / "secret.txt").read_text() == (served.page / ".env").read_text() == SECRET
    assert (served.page / "up" / "secret.txt").read_text() == (served.bundle / "notes.txt").read_text() == SECRET


@pytest.mark.parametrize(
    "linked", ["README.md", "onnx/unet", "onnx", "evidence/reference.safetensors", "manifest.json"]
)
def test_a_link_out_of_a_bundle_is_not_followed(changing: Served, linked: str) -> None:
    within = next(name for name in (*LISTED, "manifest.json") if name == linked or name.startswith(f"{linked}/"))
    assert changing.ask(f"/bundle/{within}").status == 200
    (changing.bundle / linked).rename(changing.bundle.parent / "moved")
    (changing.bundle / linked).symlink_to("../" * linked.count("/") + "../moved")
    assert (changing.bundle / within).read_bytes() == (GOLDEN / within).read_bytes()
    assert changing.ask(f"/bundle/{within}").status == 404


# Host, against pages elsewhere whose name is made to lead here.

OURS = ("localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:65535", "[::1]", "[::1]:80")
OTHERS = (
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example#localhost",
    "localhost@evil", "localhost:80@evil", "localhost:x", "localhost.", "0.0.0.0", "192.168.0.1", "::1", "[::2]", "",
    "localhost, evil.example", "127.1",
)  # fmt: skip


@pytest.mark.parametrize("host", OURS)
def test_this_machines_names_are_answered(served: Served, host: str) -> None:
    assert served.ask("/bundle/manifest.json", host=host).status == 200


@pytest.mark.parametrize("host", [*OTHERS, None])
def test_other_names_are_refused(served: Served, host: str | None) -> None:
    answer = served.ask("/bundle/manifest.json", host=host)
    assert answer.status == 400
    assert answer.body == b"This server answers to localhost and 127.0.0.1 only.\n"


def test_in_a_network_any_name_is_answered(tmp_path: Path) -> None:
    with serving(make_page(tmp_path / "page"), GOLDEN, local=False) as running:
        assert running.ask("/", host="192.168.0.7:8000").status == 200


# What changes while it is served.


def test_a_new_bundle_is_served_at_once(changing: Served) -> None:
    assert changing.ask("/bundle/more.txt").status == 404
    (changing.bundle / "more.txt").write_text("more")
    assert changing.ask("/bundle/more.txt").status == 404  # not listed
    reseal(changing.bundle)
    assert changing.ask("/bundle/more.txt").body == b"more"
    assert changing.ask("/bundle/manifest.json").body == (changing.bundle / "manifest.json").read_bytes()


def test_a_bundle_that_is_not_whole_is_not_found_and_said_once(
    changing: Served, caplog: pytest.LogCaptureFixture
) -> None:
    def append(file: Path) -> None:
        file.write_bytes(file.read_bytes() + b"\n")

    aside = changing.bundle.with_name("aside")
    for breaks, says in (
        (lambda: changing.bundle.rename(aside), "no bundle at"),
        (lambda: append(changing.bundle / "manifest.json"), "manifest.json does not have the hash"),
        (lambda: (changing.bundle / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
    ):
        assert changing.ask("/bundle/manifest.json").status == 200
        caplog.clear()
        breaks()
        if says.startswith("SHA"):  # nothing else tells of it
            os.utime(changing.bundle / "manifest.json")
        for _ in range(3):
            assert changing.ask("/bundle/manifest.json").status == 404
            assert changing.ask("/").status == 200
        (record,) = caplog.records
        assert says in record.getMessage()
        assert record.exc_info is None
        shutil.rmtree(changing.bundle, ignore_errors=True)
        copy_bundle(changing.bundle)
        shutil.rmtree(aside, ignore_errors=True)


def test_files_that_go_are_not_found(changing: Served, caplog: pytest.LogCaptureFixture) -> None:
    for target, path in (("/bundle/README.md", changing.bundle / "README.md"), ("/sw.js", changing.page / "sw.js")):
        assert changing.ask(target).status == 200
        path.unlink()
        assert changing.ask(target).status == 404
        path.mkdir()
        assert changing.ask(target).status == 404
    assert caplog.records == []


def test_a_file_that_goes_before_it_is_opened_is_not_found(
    changing: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.stat

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        status = real(path, *args, **options)
        if str(path).endswith("sw.js") and not options:
            os.unlink(path)
        return status

    monkeypatch.setattr(server.os, "stat", stat)
    monkeypatch.setattr(server, "page_file", lambda page, name: page / name)
    assert changing.ask("/sw.js").status == 404
    assert not (changing.page / "sw.js").exists()
    assert caplog.records == []


def test_a_file_that_shrinks_while_it_is_sent_ends_the_connection(
    changing: Served, caplog: pytest.LogCaptureFixture
) -> None:
    large = changing.page / "large.bin"
    with large.open("wb") as file:
        file.truncate(100 << 20)
    with changing.connected() as there:
        there.sendall(b"GET /large.bin HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = http.client.HTTPResponse(there)
        answer.begin()
        with answer:
            answer.read(1000)
            os.truncate(large, 0)
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                answer.read()
    (record,) = caplog.records
    assert isinstance(record.exc_info and record.exc_info[1], SiteError)
    assert str(record.exc_info[1]) == f"{large} changed while it was sent; load the page again"


# In a network.


def test_the_certificate_is_for_the_addresses_and_its_fingerprint_is_right(tmp_path: Path) -> None:
    shown = make_certificate(["192.0.2.7", "10.1.2.3"])
    with serving(make_page(tmp_path / "page"), GOLDEN, local=False, shown=shown) as running:
        assert running.ask("/", host="192.0.2.7").status == 200
        with running.connected() as there:
            assert isinstance(there, ssl.SSLSocket)
            data = there.getpeercert(binary_form=True)
    assert data is not None
    assert hashlib.sha256(data).hexdigest().upper() == shown.fingerprint.replace(":", "")
    assert re.fullmatch(r"([0-9A-F]{2}:){31}[0-9A-F]{2}", shown.fingerprint)
    read = x509.load_der_x509_certificate(data)
    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["192.0.2.7", "10.1.2.3", "127.0.0.1", "localhost"]
    assert read.not_valid_after_utc - read.not_valid_before_utc < timedelta(days=398)
    assert make_certificate(["192.0.2.7"]).fingerprint != shown.fingerprint


def test_the_private_key_is_on_the_disk_for_nobody_else_and_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    load = ssl.SSLContext.load_cert_chain

    def spy(self: ssl.SSLContext, certfile: str, *args: Any) -> None:
        file = Path(certfile)
        seen.append((file.parent, file.parent.stat().st_mode & 0o777, file.stat().st_mode & 0o777, file.read_text()))
        load(self, certfile, *args)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    make_certificate(["192.0.2.7"])
    ((folder, mode_of_folder, mode_of_file, text),) = seen
    assert (mode_of_folder, mode_of_file) == (0o700, 0o600)
    assert "PRIVATE KEY" in text
    assert not folder.exists()


def test_addresses_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    towards = {"203.0.113.1": "192.0.2.9", "10.0.0.1": "10.8.0.2", "192.168.0.1": "192.0.2.9"}
    monkeypatch.setattr(certificate, "_address_towards", towards.get)
    assert certificate.lan_addresses() == ["192.0.2.9", "10.8.0.2"]
    towards.clear()
    with pytest.raises(SiteError, match=r"no address in a network; connect it to one, or leave --lan out"):
        certificate.lan_addresses()


def test_loopback_is_no_address_in_a_network_and_no_way_is_none() -> None:
    assert certificate._address_towards("127.0.0.1") is None
    assert certificate._address_towards("255.255.255.255") is None


# The command.


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command's page."""
    monkeypatch.setattr(built_page, "PAGE", make_page(tmp_path / "page"))
    return tmp_path / "page"


def test_without_a_page_it_says_how_to_build_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(built_page, "PAGE", tmp_path / "page")
    assert_error(command("serve", GOLDEN), "the browser page is not built", "run `make web`")


@pytest.mark.usefixtures("page")
def test_a_port_in_use_is_one_line(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = command("serve", GOLDEN, "--port", port)
    assert_error(said, f"port {port} cannot be used: Address already in use; choose another with --port")


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize("port", [-1, 65536, "x"])
def test_a_port_that_is_none_is_one_line(command: Command, port: object) -> None:
    assert_error(command("serve", GOLDEN, f"--port={port}"), "'--port'")


def _not_onnx(data: dict[str, Any]) -> None:
    (target,) = data["targets"]
    del target["opset"], target["ir_version"]
    target["target"] = "openvino"


REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (lambda bundle: seal_plain(bundle, _not_onnx), "has no 'onnx' target, the one that browsers run; it has: openvino; "
                                                   "export it with --target onnx"),
    (lambda bundle: seal_plain(bundle, lambda data: data.update(format_version=3)), "format"),
    (lambda bundle: shutil.rmtree(bundle), "no such directory"),
    (lambda bundle: (bundle / "manifest.json").unlink(), "is not a bundle: manifest.json is missing"),
    (lambda bundle: (bundle / "manifest.json").write_text("{}"), "manifest.json"),
    (lambda bundle: (bundle / "onnx/unet/weights.bin").unlink(), "onnx/unet/weights.bin is missing"),
    (lambda bundle: (bundle / "onnx/unet/full.onnx").write_bytes(b""), "onnx/unet/full.onnx has 0 bytes"),
]  # fmt: skip


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize("name", ["serve", "site"])
@pytest.mark.parametrize(("breaks", "says"), REFUSED, ids=[says[:30] for _, says in REFUSED])
def test_what_browsers_cannot_run_is_refused(
    command: Command,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    breaks: Callable[[Path], object],
    says: str,
) -> None:
    # It would serve until the end of time.
    monkeypatch.setattr(server, "listen", lambda *_: pytest.fail("it is served"))
    bundle = copy_bundle(place / "bundle")
    breaks(bundle)
    output = ["-o", place / "site"] if name == "site" else []
    assert_error(command(name, bundle, *output), says)
    assert not (place / "site").exists()


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize("package", ["uvicorn", "starlette", "trustme"])
def test_a_missing_package_is_named_by_its_extra(
    command: Command, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("server", "certificate"):
        monkeypatch.delitem(sys.modules, f"edgediff.site.{name}")
        monkeypatch.delattr(edgediff.site, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert_error(command("serve", GOLDEN), "edgediff serve needs the 'web' extra: pip install \"edgediff[web]\"")


# The command as a process.

PROGRAM = """
import sys
from pathlib import Path
from edgediff.site import built_page, certificate
built_page.PAGE = Path(sys.argv.pop(1))
certificate.lan_addresses = lambda: ["127.0.0.1", "192.0.2.7"]
from edgediff.cli import main
main()
"""


@dataclass(frozen=True)
class Run:
    """The command, which runs; standard error goes to a file."""

    process: subprocess.Popen[str]
    err: Path

    @property
    def out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def stop(self, number: int) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=20)
        return self.process.returncode, out, self.err.read_text()


@contextlib.contextmanager
def started(tmp_path: Path, *args: object) -> Iterator[Run]:
    (tmp_path / "temporary").mkdir()
    err = tmp_path / "err"
    command = [sys.executable, "-c", PROGRAM, tmp_path / "page", "serve", *args, "--port", 0]
    with (
        err.open("w") as file,
        subprocess.Popen(
            [*map(str, command)], stdout=subprocess.PIPE, stderr=file, text=True,
            env=os.environ | {"TMPDIR": str(tmp_path / "temporary"), "PYTHONIOENCODING": "utf-8"},
            # Where the tests run in a shell's background, SIGINT is ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):  # fmt: skip
        try:
            yield Run(process, err)
        finally:
            process.kill()


def _port(line: str) -> int:
    found = re.match(r"https?://[0-9.]+:([0-9]+)/ ", line)
    assert found is not None, line
    return int(found[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_serves_and_ends_well(page: Path, tmp_path: Path, number: int) -> None:
    with (page / "large.bin").open("wb") as file:
        file.truncate(100 << 20)
    with started(tmp_path, GOLDEN) as run:
        line = run.out.readline()
        assert line.endswith(f"/ serves {GOLDEN}; Ctrl-C stops it\n")
        running = Served(_port(line), page, GOLDEN)
        assert running.ask("/bundle/manifest.json").body == (GOLDEN / "manifest.json").read_bytes()
        with running.connected() as there:  # and one that waits in the middle of a download does not hold it
            there.sendall(b"GET /large.bin HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert there.recv(1000)
            assert run.stop(number) == (0, "", "")


def test_a_signal_as_soon_as_it_has_said_so_ends_it_well(page: Path, tmp_path: Path) -> None:
    with started(tmp_path, GOLDEN, "--json") as run:
        said = json.loads(run.out.readline())
        assert said.keys() == {"url", "fingerprint"}
        assert said["url"].startswith("http://127.0.0.1:")
        assert said["fingerprint"] is None
        assert run.stop(signal.SIGINT) == (0, "", "")


def test_what_a_client_gets_wrong_is_one_line_and_no_traceback(page: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    with started(tmp_path, bundle) as run:
        running = Served(_port(run.out.readline()), page, bundle)
        with running.connected() as there:
            there.sendall(b"\0\0\r\n\r\n")
            assert there.recv(1000).startswith(b"HTTP/1.1 400")
        shutil.rmtree(bundle)
        assert running.ask("/bundle/manifest.json").status == 404
        _, _, err = run.stop(signal.SIGTERM)
    first, second = err.splitlines()
    assert first == "warning: Invalid HTTP request received."
    assert second.startswith(f"warning: the bundle is not served until it is whole again: no bundle at {bundle}: ")


def test_lan_serves_over_https_and_shows_what_a_phone_needs(page: Path, tmp_path: Path) -> None:
    with started(tmp_path, GOLDEN, "--lan") as run:
        first = run.out.readline()
        port = _port(first)
        assert first == f"https://127.0.0.1:{port}/ serves {GOLDEN}; Ctrl-C stops it\n"
        assert run.out.readline() == f"https://192.0.2.7:{port}/ does too\n"
        drawn = [run.out.readline().rstrip("\n") for _ in range(17)]
        says, why = run.out.readline(), run.out.readline()
        running = Served(port, page, GOLDEN, secure=True)
        answer = running.ask("/", host=f"192.0.2.7:{port}")
        assert (answer.status, answer.headers["cross-origin-opener-policy"]) == (200, "same-origin")
        with running.connected() as there:
            assert isinstance(there, ssl.SSLSocket)
            data = there.getpeercert(binary_form=True)
        assert list((tmp_path / "temporary").iterdir()) == []
        # A client that does not trust the certificate, and one that speaks plain HTTP: no news.
        with pytest.raises(ssl.SSLCertVerificationError):
            ssl.create_default_context().wrap_socket(
                socket.create_connection(("127.0.0.1", port), timeout=10), server_hostname="localhost"
            )
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" not in plain.recv(100)
        time.sleep(0.2)
        assert run.stop(signal.SIGINT) == (0, "", "")
    assert data is not None
    fingerprint = hashlib.sha256(data).digest().hex(":").upper()
    assert says == f"SHA-256 fingerprint of the certificate: {fingerprint}\n"
    for word in ("https", "crypto.subtle", "Cache API", "SharedArrayBuffer", "WebGPU", "warns once", "compare"):
        assert word in why
    import segno

    wanted = io.StringIO()
    segno.make(f"https://127.0.0.1:{port}/", error="l", micro=False).terminal(wanted, compact=True)
    assert drawn == wanted.getvalue().splitlines()


def test_loopback_is_all_that_is_bound_without_lan(page: Path, tmp_path: Path) -> None:
    with started(tmp_path, GOLDEN) as run:
        port = _port(run.out.readline())
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", port), timeout=10):
            pass
    assert (server.LOOPBACK, server.EVERYWHERE) == ("127.0.0.1", "0.0.0.0")
