"""The page and a bundle as a folder of plain files, which any web host serves."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgediff.bundle.files import strangers
from edgediff.bundle.staging import check_outside, check_place, clear_stale, staged
from edgediff.errors import SiteError
from edgediff.site.browser_bundle import TARGET
from edgediff.site.built_page import BUNDLE, INDEX, page_files
from edgediff.site.headers import HEADERS, TYPES
from edgediff_runtime import Bundle, open_bundle
from edgediff_runtime.bundle import AGAIN, MANIFEST, SUMS
from edgediff_runtime.errors import BundleError
from edgediff_runtime.manifest import File

# The site's own files, for ``sha256sum -c`` and to tell what is not the site's. Not SHA256SUMS: it is no bundle.
RECORD = "site.sha256"
RECORD_LINE = re.compile(r"[0-9a-f]{64}  (.+)")
# What goes into a site of a bundle, beside the model card, the licence, the manifest and its sums.
FOLDERS = (TARGET, "evidence")
# What a bundle's files end in. Others a host would run as part of the site (.html, .js, .php), or obey (.htaccess).
ENDINGS = {"", ".bin", ".json", ".md", ".onnx", ".safetensors", ".txt"}
CHUNK = 1 << 20


@dataclass(frozen=True)
class Site:
    """A site that was written.

    Attributes:
        files: How many.
        size: Their bytes, together.
        largest: The bytes of the largest, which hosts have limits for.
    """

    path: Path
    files: int
    size: int
    largest: int


def bundle_files(bundle: Bundle) -> list[str]:
    """The files of a bundle that a browser needs, and its evidence, card and licence, by their paths; sorted.

    Raises:
        BundleError: One is of a kind that a web host or a browser would run.
    """
    names = sorted(name for name in bundle.manifest.files if _is_for_browsers(name))
    for name in names:
        path = PurePosixPath(name)
        if path.suffix not in ENDINGS or any(part.startswith(".") for part in path.parts):
            raise BundleError(
                f"{name} is no file that export writes for browsers, and a web host might run it; "
                "export the bundle again"
            )
    return names


def _is_for_browsers(name: str) -> bool:
    folder, within, _ = name.partition("/")
    return not within or folder in FOLDERS


def site_strays(folder: Path) -> list[str] | None:
    """Files in a site that are not its own, as paths in it; None where `write_site` did not write the folder."""
    record = folder / RECORD
    if not record.is_file():
        return None
    lines = record.read_bytes().decode("utf-8", "replace").splitlines()
    listed = {found[1] for line in lines if (found := RECORD_LINE.fullmatch(line))}
    if not {INDEX, f"{BUNDLE}/{MANIFEST}"} <= listed:
        return None
    return strangers(folder, {*listed, RECORD})


def check_site(output: Path, bundle: Path, *, force: bool) -> None:
    """Refuses to write a site where something is that must not be lost.

    Raises:
        TargetError: It is in a bundle, or as in `check_place`.
    """
    check_outside(output, bundle)
    check_place(output, force, "site", site_strays)


def write_site(
    bundle: Bundle, page: Path, output: Path, *, force: bool = False, progress: Callable[..., None] = lambda *_: None
) -> Site:
    """Writes the page, the bundle beside it, and what hosts read headers from; all or nothing.

    The manifest and SHA256SUMS are the bundle's, byte for byte, though files of other targets are left out: a runtime
    checks those that it opens.

    Args:
        bundle: With an ONNX target.
        page: The folder of the built page.
        output: Where the site is to be.
        force: Replace a site that is there.
        progress: Told what is copied, and the share of the bytes that is done.

    Raises:
        BundleError: A file is damaged, missing, or nothing for a site.
        SiteError: The page has a file where the site has another.
        TargetError: Something is in the way, or the disk is full.
    """
    check_site(output, bundle.path, force=force)
    files, hosts = page_files(page), _host_files()
    if clash := sorted({*hosts, RECORD} & files.keys()):
        raise SiteError(f"the page has a file {clash[0]} of its own, which every site has; build the page without it")
    clear_stale(output)
    names = bundle_files(bundle)
    total = sum(bundle.manifest.files[name].size for name in names)
    written = dict[str, File]()
    with staged(output, "site") as folder:
        for name, path in files.items():
            written[name] = _copy(path, folder / name)
        for name, text in hosts.items():
            (folder / name).write_bytes(text)
            written[name] = File(len(text), hashlib.sha256(text).hexdigest())
        done = 0
        for name in names:
            where = f"{BUNDLE}/{name}"
            progress(f"copying {name}", done / max(total, 1))
            written[where] = _copy(bundle.listed(name), folder / where)
            if written[where] != bundle.manifest.files[name]:
                raise BundleError(f"{name} does not have the hash in {MANIFEST}: it is damaged; {AGAIN}")
            done += written[where].size
        for name in (MANIFEST, SUMS):
            written[f"{BUNDLE}/{name}"] = _copy(bundle.path / name, folder / BUNDLE / name)
        if open_bundle(folder / BUNDLE).manifest != bundle.manifest:
            raise BundleError(f"{bundle.path} changed while it was copied; write the site again")
        record = "".join(f"{written[name].sha256}  {name}\n" for name in sorted(written)).encode()
        (folder / RECORD).write_bytes(record)
    sizes = [len(record), *(file.size for file in written.values())]
    return Site(output, len(sizes), sum(sizes), max(sizes))


def _copy(source: Path, target: Path) -> File:
    """Copies a file, whatever it is a link to, and hashes what it copies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as read, target.open("xb") as write:
        while piece := read.read(CHUNK):
            digest.update(piece)
            size += write.write(piece)
    return File(size, digest.hexdigest())


def _host_files() -> dict[str, bytes]:
    """What hosts read: headers for Netlify and Cloudflare Pages, headers and types for Apache, a mark for GitHub Pages.

    Elsewhere the page's service worker sets the headers that make the page cross-origin isolated.
    """
    headers = "".join(f"  {name}: {value}\n" for name, value in HEADERS.items())
    set_them = "".join(f'  Header always set {name} "{value}"\n' for name, value in HEADERS.items())
    types = "".join(f"  AddType {TYPES[suffix]} {suffix}\n" for suffix in (".js", ".mjs", ".wasm", ".json"))
    apache = f"<IfModule mod_mime.c>\n{types}</IfModule>\n<IfModule mod_headers.c>\n{set_them}</IfModule>\n"
    return {"_headers": f"/*\n{headers}".encode(), ".htaccess": apache.encode(), ".nojekyll": b""}
