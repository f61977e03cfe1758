"""The page that ``make web`` builds: where it lies, and which of its files there are to serve."""

from pathlib import Path, PurePosixPath

from edgediff.errors import SiteError
from edgediff_runtime.bundle import inside
from edgediff_runtime.errors import BundleError

# What ``make web`` writes and a wheel contains; git does not have it.
PAGE = Path(__file__).parent / "page"
INDEX = "index.html"
# Beside the page, where it looks for the bundle.
BUNDLE = "bundle"
# A file's name with it: the same file, compressed.
PACKED = ".gz"


def is_built() -> bool:
    """Whether there is a page to serve."""
    return (PAGE / INDEX).is_file()


def find_page(folder: Path | None = None) -> Path:
    """The folder of the built page; `folder` is in its place in tests.

    Raises:
        SiteError: The page is not built.
    """
    page = PAGE if folder is None else folder
    if not (page / INDEX).is_file():
        raise SiteError(f"the browser page is not built: {page / INDEX} is missing; run `make web` in the checkout")
    return page


def page_file(page: Path, name: str) -> Path | None:
    """A file of the page by its path in it; None where there is none to serve.

    Hidden files, links and what lies where the bundle is to be are not the page's.
    """
    parts = PurePosixPath(name).parts
    if parts[:1] == (BUNDLE,) or any(part.startswith(".") for part in parts):
        return None
    try:
        path = inside(page, name)
        return path if path.is_file() else None
    except (BundleError, OSError):  # no plain path, or one that is too long to be there
        return None


def page_files(page: Path) -> dict[str, Path]:
    """All files of the page by their paths in it, sorted, without compressed ones: web hosts compress by themselves."""
    names = sorted(path.relative_to(page).as_posix() for path in page.rglob("*") if path.suffix != PACKED)
    found = {name: page_file(page, name) for name in names}
    return {name: path for name, path in found.items() if path is not None}
