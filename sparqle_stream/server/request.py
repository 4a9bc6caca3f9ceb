"""What a client asks for before the first frame: key, origin, query.

In: a websocket handshake or another request. Out: who asks, or the HTTP answer that refuses it;
and the query as a checked dict. A field that is not known is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

from sparqle_stream.errors import BusyError, ConfigError, SparqleError
from sparqle_stream.server.settings import TooManyStreamsError, is_loopback

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from starlette.requests import HTTPConnection

    from sparqle_stream.server.settings import ServerConfig

KEY_FIELDS = ("api_key", "token")  # query fields that may carry the key
KEY_PROTOCOL = "openai-insecure-api-key."  # how a browser sends it: as a subprotocol
KEY_SCHEMES = ("bearer", "token")  # of the header, and Deepgram's pair of subprotocols
RETRY_AFTER_S = 5


class RefusedError(SparqleError):
    """Not with this key, not from this page; `status` is HTTP's."""

    def __init__(self, status: int, code: str, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.status = status
        self.code = code


def check(request: HTTPConnection, cfg: ServerConfig) -> str:
    """Who asks: a name that stands for the key, or the address where there are no keys.

    Raises RefusedError: 401 for a missing or wrong key, 403 for a page of another host.
    """
    key = _find_key(request, cfg.keys)
    if cfg.keys and not key:
        hint = "send Authorization: Bearer KEY"
        raise RefusedError(401, "unauthorized", "missing or wrong API key", hint)
    origin = request.headers.get("origin", "")
    if origin and not _is_allowed(origin, request.headers.get("host", ""), cfg):
        hint = "serve --allow-origin ORIGIN"
        raise RefusedError(403, "forbidden_origin", f"pages of {origin} may not connect", hint)
    if key:
        return f"key {hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return request.client.host if request.client else "nobody"


def refused(err: SparqleError) -> JSONResponse:
    """The HTTP answer for an error that comes before the upgrade."""
    if isinstance(err, RefusedError):
        return error_response(err.status, err)
    return error_response(429 if isinstance(err, TooManyStreamsError) else 503, err)


def error_response(status: int, err: SparqleError, code: str = "") -> JSONResponse:
    """A refusal in the shape of an error event; 503 and 429 say when to come back."""
    is_later = isinstance(err, BusyError | TooManyStreamsError)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if is_later else None
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


def _find_key(request: HTTPConnection, keys: Collection[str]) -> str:
    """The first of `keys` that the request carries in any of the usual places, or ''."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = [bearer.strip()] if scheme.lower() in KEY_SCHEMES else []
    given += [request.query_params.get(name, "") for name in KEY_FIELDS]
    offered = subprotocols(request)
    given += [x.removeprefix(KEY_PROTOCOL) for x in offered if x.startswith(KEY_PROTOCOL)]
    if len(offered) == 2 and offered[0] in KEY_SCHEMES:
        given.append(offered[1])
    # Every pair is compared in full: the time taken tells nothing about the keys.
    found = [k for k in keys for g in given if hmac.compare_digest(g.encode(), k.encode())]
    return found[0] if found else ""


def _is_allowed(origin: str, host: str, cfg: ServerConfig) -> bool:
    """Browsers ask no permission before a websocket, so the server has to check `Origin`.

    A page of our own host is welcome. But a name that leads to this machine may be anybody's (DNS
    rebinding): a server for this machine alone, without a key, knows only this machine's names.
    """
    if "*" in cfg.allow_origins or origin in cfg.allow_origins:
        return True
    try:
        page = urlsplit(origin)
        is_local = is_loopback(page.hostname or "")
    except ValueError:
        return False
    is_open = bool(cfg.keys) or not is_loopback(cfg.host)
    return page.netloc == host and (is_open or is_local)
