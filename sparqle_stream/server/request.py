"""What a client asks for before the first frame: key, origin, query.

In: a websocket handshake. Out: nothing if it may go on, or the HTTP answer that refuses it; and
the query as a checked dict. A field that is not known is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
import hmac
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

from sparqle_stream.errors import BusyError, ConfigError, SparqleError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from starlette.requests import HTTPConnection

    from sparqle_stream.server.settings import ServerConfig

KEY_FIELDS = ("api_key", "token")  # query fields that may carry the key
KEY_PROTOCOL = "openai-insecure-api-key."  # how a browser sends it: as a subprotocol
RETRY_AFTER_S = 5


def refusal(request: HTTPConnection, cfg: ServerConfig) -> JSONResponse | None:
    """401 for a missing or wrong key, 403 for a page of another host, None to go on."""
    if cfg.api_key and not _has_key(request, cfg.api_key):
        return error_response(
            401,
            SparqleError("missing or wrong API key", hint="send Authorization: Bearer KEY"),
            "unauthorized",
        )
    origin = request.headers.get("origin", "")
    if origin and not _is_allowed(origin, request.headers.get("host", ""), cfg.allow_origins):
        return error_response(
            403,
            SparqleError(f"pages of {origin} may not connect", hint="serve --allow-origin ORIGIN"),
            "forbidden_origin",
        )
    return None


def error_response(status: int, err: SparqleError, code: str = "") -> JSONResponse:
    """A refusal in the shape of an error event; 503 and 429 say when to come back."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if isinstance(err, BusyError) else None
    if status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    body = {"type": "error", "code": code or err.code, "message": err.message, "hint": err.hint}
    return JSONResponse(body, status, headers)


def query(request: HTTPConnection, known: Collection[str]) -> dict[str, str]:
    """The query fields without the key. Raises ConfigError for unknown or repeated ones."""
    fields: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in KEY_FIELDS:
            continue
        if name not in known:
            raise ConfigError(
                f"unknown query field {name!r}",
                hint=did_you_mean(name, known) or f"known: {', '.join(sorted(known))}",
            )
        if name in fields:
            raise ConfigError(f"query field {name!r} is given twice", hint="give it once")
        fields[name] = value
    return fields


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'did you mean chunk_ms?', or '' when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else ""


def subprotocols(request: HTTPConnection) -> list[str]:
    """The subprotocols that the client offers, in its order."""
    offered = request.headers.getlist("sec-websocket-protocol")
    return [name.strip() for line in offered for name in line.split(",")]


def _has_key(request: HTTPConnection, key: str) -> bool:
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = [bearer.strip()] if scheme.lower() == "bearer" else []
    given += [request.query_params.get(name, "") for name in KEY_FIELDS]
    given += [
        name.removeprefix(KEY_PROTOCOL)
        for name in subprotocols(request)
        if name.startswith(KEY_PROTOCOL)
    ]
    # Every candidate is compared in full: the time taken tells nothing about the key.
    matches = [hmac.compare_digest(text.encode(), key.encode()) for text in given]
    return any(matches)


def _is_allowed(origin: str, host: str, allowed: Collection[str]) -> bool:
    """Browsers ask no permission before a websocket, so the server has to check `Origin`."""
    return "*" in allowed or origin in allowed or urlsplit(origin).netloc == host
