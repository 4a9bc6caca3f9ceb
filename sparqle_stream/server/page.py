"""The page at /: a few files of the package, served as they are.

No build step, no request to anybody else: the policy below forbids it, and a test looks.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

FILES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "stream.js": "text/javascript",
    "srt.js": "text/javascript",
    "worklet.js": "text/javascript",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """The page and what it loads. No key is needed: it asks for one itself."""
    return [Route("/", show), *(Route(f"/{name}", show) for name in FILES)]


async def show(http: Request) -> Response:
    """One file of the page."""
    name = http.url.path.rpartition("/")[2] or "index.html"
    data = files("sparqle_stream").joinpath("web", name).read_bytes()
    return Response(data, media_type=f"{FILES[name]}; charset=utf-8", headers=HEADERS)
