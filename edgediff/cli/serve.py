"""``edgediff serve``."""

import io
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgediff.cli.app import BundleArgument, app, out, print_json, say_warning
from edgediff.extras import needing

if TYPE_CHECKING:
    from uvicorn import Server

WHY_HTTPS = (
    "https, since a phone's browser has no crypto.subtle, Cache API, SharedArrayBuffer or WebGPU on plain http. With "
    "each run it warns once that it does not know the certificate: compare the fingerprint, then go on."
)


@app.command(
    epilog="Examples:  edgediff serve bundle   |   edgediff serve bundle --lan   |   "
    "edgediff serve bundle --port 0 --json"
)
def serve(
    bundle: BundleArgument,
    port: Annotated[int, typer.Option(help="Where it listens; 0 takes a free one.", min=0, max=65535)] = 8000,
    lan: Annotated[
        bool,
        typer.Option("--lan", help="Serve to phones in this network too, over https with a certificate of its own."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the address and the fingerprint as one line of JSON, then serve.")
    ] = False,
) -> None:
    """Serve the browser page and a bundle, to this machine alone or to its network, until Ctrl-C."""
    with needing("web", "edgediff serve"):
        from edgediff.site import server
        from edgediff.site.certificate import lan_addresses, make_certificate
    from edgediff.site.browser_bundle import open_for_browser
    from edgediff.site.built_page import find_page

    page = find_page()
    open_for_browser(bundle)
    addresses = lan_addresses() if lan else [server.LOOPBACK]
    certificate = make_certificate(addresses) if lan else None
    with server.listen(server.EVERYWHERE if lan else server.LOOPBACK, port) as listening:
        answering = server.make_server(server.make_app(bundle, page, local=not lan), certificate)
        urls = [f"http{'s' * lan}://{each}:{listening.getsockname()[1]}/" for each in addresses]
        fingerprint = None if certificate is None else certificate.fingerprint
        with _stopped_by_signals(answering), _warnings_told(answering, server.LOGGERS):
            if as_json:
                print_json({"url": urls[0], "fingerprint": fingerprint}, indent=None)
            else:
                _show(bundle, urls, fingerprint)
            answering.run([listening])


def _show(bundle: Path, urls: list[str], fingerprint: str | None) -> None:
    """Says where the page is and, in a network, what a phone needs."""
    out.print(f"{urls[0]} serves {bundle}; Ctrl-C stops it")
    if fingerprint is None:
        return
    for url in urls[1:]:
        out.print(f"{url} does too")
    if out.encoding.startswith("utf"):
        out.print(_qr_code(urls[0]))
    out.print(f"SHA-256 fingerprint of the certificate: {fingerprint}")
    out.print(WHY_HTTPS)


def _qr_code(text: str) -> str:
    """A QR code in half blocks, light on dark."""
    with needing("web", "edgediff serve --lan"):
        import segno
    drawn = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(drawn, compact=True)
    return drawn.getvalue().rstrip()


class _Warnings(logging.Handler):
    """Tells what a server logs as one line each, without tracebacks, until it is stopped."""

    def __init__(self, server: "Server") -> None:
        super().__init__(logging.WARNING)
        self.server = server

    def emit(self, record: logging.LogRecord) -> None:
        if self.server.should_exit:  # downloads that are cut off then are no news
            return
        fault = record.exc_info[1] if record.exc_info else None
        say_warning(str(fault or record.getMessage()))


@contextmanager
def _warnings_told(server: "Server", loggers: tuple[str, ...]) -> Iterator[None]:
    """What these loggers warn of is told while the block runs, and nowhere else."""
    handler = _Warnings(server)
    for name in loggers:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in loggers:
            logging.getLogger(name).removeHandler(handler)


@contextmanager
def _stopped_by_signals(server: "Server") -> Iterator[None]:
    """Ctrl-C and SIGTERM end the server, which is fine, and not the program, from the first word that it says on."""

    def stop(number: int, frame: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
