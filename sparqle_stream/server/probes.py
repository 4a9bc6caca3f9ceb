"""What operators and clients ask over HTTP: alive, ready, figures, models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sparqle_stream import __version__
from sparqle_stream.server import metrics, request

if TYPE_CHECKING:
    from starlette.requests import Request

    from sparqle_stream.server.hub import Hub


def routes() -> list[Route]:
    """The probes as routes of the server."""
    return [
        Route("/healthz", health),
        Route("/readyz", ready),
        Route("/metrics", figures),
        Route("/v1/models", models),
    ]


async def health(http: Request) -> JSONResponse:
    """200 while the process can answer, whatever its load; 503 when no step succeeds any more."""
    hub: Hub = http.app.state.hub
    status = "failing" if hub.is_failing else "ok"
    return JSONResponse({"status": status, "version": __version__}, 503 if hub.is_failing else 200)


async def ready(http: Request) -> JSONResponse:
    """200 while a new stream would be served; 503 while draining, full or failing."""
    hub: Hub = http.app.state.hub
    n_slots = hub.engine.cfg.n_slots
    is_ready = not (hub.is_draining or hub.is_full or hub.is_failing)
    state = {
        "ready": is_ready,
        "model": hub.model,
        "slots": n_slots,
        "slots_free": n_slots - len(hub.connections),
    }
    return JSONResponse(state, 200 if is_ready else 503)


async def figures(http: Request) -> Response:
    """Prometheus' text format; with a key where the server asks for one."""
    hub: Hub = http.app.state.hub
    try:
        request.check(http, hub.cfg)
    except request.RefusedError as err:
        return request.refused(err)
    return Response(hub.metrics.text(), media_type=metrics.CONTENT_TYPE)


async def models(http: Request) -> JSONResponse:
    """The one model that this server runs, in OpenAI's shape."""
    hub: Hub = http.app.state.hub
    try:
        request.check(http, hub.cfg)
    except request.RefusedError as err:
        return request.refused(err)
    model = {"id": hub.model, "object": "model", "created": 0, "owned_by": "sparqle-stream"}
    return JSONResponse({"object": "list", "data": [model]})
