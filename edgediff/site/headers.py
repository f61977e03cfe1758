"""What the page is answered with, whoever serves it: headers, and types of files."""

from pathlib import PurePosixPath
from types import MappingProxyType

# onnxruntime-web compiles WebAssembly, which needs 'wasm-unsafe-eval'. Its threads are workers of its own .mjs file,
# from the same origin; it would need `worker-src blob:` only where that file came from another one.
POLICY = (
    "default-src 'none'",
    "script-src 'self' 'wasm-unsafe-eval'",
    "worker-src 'self'",
    "connect-src 'self'",
    "img-src 'self' blob: data:",
    "style-src 'self'",
    "manifest-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
HEADERS = MappingProxyType(
    {
        # These two make the page cross-origin isolated: only then browsers give it SharedArrayBuffer, and so threads.
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Embedder-Policy": "require-corp",
        "Cross-Origin-Resource-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Content-Security-Policy": "; ".join(POLICY),
        # Kept, but asked for again each time: a new bundle or page is seen at once.
        "Cache-Control": "no-cache",
    }
)
BINARY = "application/octet-stream"
# Systems disagree about some of these, and browsers run a module or compile WebAssembly only under its own type.
TYPES = MappingProxyType(
    {
        ".html": "text/html",
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".css": "text/css",
        ".wasm": "application/wasm",
        ".json": "application/json",
        ".webmanifest": "application/manifest+json",
        ".svg": "image/svg+xml",
        ".png": "image/png",
        ".ico": "image/vnd.microsoft.icon",
        ".txt": "text/plain",
        ".md": "text/plain",
    }
)
# A bundle may come from anybody: nothing in it is a document or a script of the page's origin.
BUNDLE_TYPES = MappingProxyType({"": "text/plain"} | {each: TYPES[each] for each in (".json", ".txt", ".md")})


def type_of(name: str, *, in_bundle: bool = False) -> str:
    """The type that a file is served as.

    >>> type_of("ort/ort.mjs"), type_of("evil.html", in_bundle=True)
    ('text/javascript', 'application/octet-stream')
    """
    return (BUNDLE_TYPES if in_bundle else TYPES).get(PurePosixPath(name).suffix, BINARY)
