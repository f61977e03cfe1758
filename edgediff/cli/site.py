"""``edgediff site``."""

from pathlib import Path
from typing import Annotated

import typer

from edgediff.cli.app import BundleArgument, JsonOption, app, out, print_json, progress


@app.command(epilog="Examples:  edgediff site bundle -o site   |   edgediff site bundle -o site --force")
def site(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the site is to be.")] = Path("site"),
    force: Annotated[bool, typer.Option("--force", help="Replace a site that is already there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the browser page and a bundle's ONNX target as a folder for any web host.

    Headers are in _headers, which Netlify and Cloudflare Pages read, and in .htaccess for Apache. GitHub Pages and
    other hosts need nothing: the page's service worker sets those that it cannot do without.
    """
    from edgediff.site.browser_bundle import open_for_browser
    from edgediff.site.built_page import find_page
    from edgediff.site.folder import check_site, write_site

    page = find_page()
    opened = open_for_browser(bundle)
    check_site(output, bundle, force=force)
    with progress() as say:
        done = write_site(opened, page, output, force=force, progress=say)
    if as_json:
        print_json({"site": str(done.path), "files": done.files, "bytes": done.size, "largest_bytes": done.largest})
    else:
        size, largest = done.size / 1e6, done.largest / 1e6
        out.print(
            f"site: {done.path} ({done.files} files, {size:.1f} MB, the largest {largest:.1f}); to try it: "
            f"python -m http.server 8000 --bind 127.0.0.1 --directory {done.path}"
        )
