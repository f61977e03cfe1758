"""Serves the page and a bundle over HTTP, to this machine or, with a certificate, to its network.

Only the page's files and those that the bundle's manifest lists are answered with; every other path is 404. Nothing is
taken from a request but a name that is looked up.
"""

import contextlib
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.staticfiles import NotModifiedResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgediff.errors import SiteError
from edgediff.site.browser_bundle import BundleFiles
from edgediff.site.built_page import BUNDLE, INDEX, PACKED, page_file
from edgediff.site.certificate import Certificate
from edgediff.site.headers import HEADERS, type_of

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
# What a browser on this machine calls it. A page from elsewhere whose name was made to lead here has another name, and
# may not read the bundle (DNS rebinding). In a network the certificate sees to that: it has no such name.
LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?", re.ASCII | re.IGNORECASE)
# Seconds that a download may go on after the server was stopped.
GRACE = 1
# Seconds in which a server that was told to stop has ended.
STOPS = 20
# Loggers that have something to say while the server runs.
LOGGERS = ("uvicorn.error", "edgediff.site")


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections, before anything answers them; port 0 is a free one.

    Raises:
        SiteError: Another program has the port, or it may not be used.
    """
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as e:
        why = str(e) if e.errno is None else os.strerror(e.errno)  # Python's own words add the address
        raise SiteError(
            f"port {port} cannot be used: {why}; choose another with --port, or a free one with --port 0"
        ) from e


def make_server(app: ASGIApp, certificate: Certificate | None = None) -> uvicorn.Server:
    """A server without a socket, for ``server.run([listen(...)])``; it ends when its ``should_exit`` is set."""
    context = None if certificate is None else certificate.context
    config = uvicorn.Config(
        app,
        loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, log_level=logging.WARNING,
        access_log=False, proxy_headers=False, server_header=False, timeout_graceful_shutdown=GRACE, workers=1,
        ssl_context_factory=None if context is None else lambda config, usual: context,
    )  # fmt: skip
    return uvicorn.Server(config)


@contextlib.contextmanager
def serving(page: Path, bundle: Path, *, local: bool = True, shown: Certificate | None = None) -> Iterator[int]:
    """Serves a page and a bundle on loopback, in a thread, while the block lasts; gives the port.

    Raises:
        SiteError: It did not stop.
    """
    with listen(LOOPBACK, 0) as listening:
        running = make_server(make_app(bundle, page, local=local), shown)
        beside = threading.Thread(target=running.run, args=([listening],))
        beside.start()
        try:
            yield listening.getsockname()[1]
        finally:
            running.should_exit = True
            beside.join(timeout=STOPS)
            if beside.is_alive():
                raise SiteError(f"the server did not stop in {STOPS} seconds")


def make_app(bundle: Path, page: Path, *, local: bool) -> ASGIApp:
    """The application; `local` answers only requests that call this machine by a name of its own."""
    files = BundleFiles(bundle)

    async def answer(request: Request) -> Response:
        name = request.scope["path"].removeprefix("/") or INDEX  # what the route matched may lack a newline at the end
        of_bundle = name.removeprefix(f"{BUNDLE}/")
        in_bundle = of_bundle != name
        path = files.find(of_bundle) if in_bundle else page_file(page, name)
        if path is None:
            raise HTTPException(404)
        headers = {}
        if not in_bundle and (packed := _packed(page, name, request)) is not None:
            path, headers = packed, {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
        try:
            status = os.stat(path)
        except OSError as e:
            raise HTTPException(404) from e
        found = _File(path, media_type=type_of(name, in_bundle=in_bundle), stat_result=status, headers=headers)
        asked = request.headers.get("if-none-match", "")
        if found.headers["etag"] in (tag.strip().removeprefix("W/") for tag in asked.split(",")):
            return NotModifiedResponse(found.headers)
        return found

    app = Starlette(routes=[Route("/{_:path}", answer, methods=["GET"])])

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if local and not (len(hosts) == 1 and LOCAL_HOST.fullmatch(hosts[0])):
            refused = PlainTextResponse("This server answers to localhost and 127.0.0.1 only.\n", 400)
            await refused(scope, receive, with_headers)
        else:
            await app(scope, receive, with_headers)

    return guarded


def _packed(page: Path, name: str, request: Request) -> Path | None:
    """The file as the build compressed it, where the browser takes it so and wants all of it."""
    takes = (each.strip() for each in request.headers.get("accept-encoding", "").split(","))
    return page_file(page, name + PACKED) if "gzip" in takes and "range" not in request.headers else None


class _File(FileResponse):
    """A file that may be gone, or another one, by the time that it is sent."""

    chunk_size = 1 << 20  # each piece is a hop to a thread and back: 840 MB/s on two cores, 200 in pieces of 64 KiB

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: Message | None = None
        began = False

        async def after_opening(message: Message) -> None:
            """Keeps the status back until the first bytes, which come when the file is open."""
            nonlocal held, began
            if message["type"] == "http.response.start":
                held = message
                return
            if held is not None:
                began = True
                await send(held)
                held = None
            await send(message)

        try:
            await super().__call__(scope, receive, after_opening)
        except Exception as e:
            if began:  # too late for another status: the server closes the connection
                raise SiteError(f"{self.path} changed while it was sent; load the page again") from e
            if not isinstance(e, OSError):
                raise
            await PlainTextResponse("Not Found", 404)(scope, receive, send)
