# SPDX-License-Identifier: Apache-2.0
"""The application behind the admin door: the sleep endpoints, what a wake from level 2 needs, the
server's health, and the metrics of sleep."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_sleep_ascend.front_end.calls import typed
from vllm_sleep_ascend.front_end.endpoints import attach_router, client_of, error_body
from vllm_sleep_ascend.front_end.guard import Guard
from vllm_sleep_ascend.front_end.metrics import Refresher

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
    from starlette.types import ASGIApp

_METRICS = ("vllm:sleep_mode_", "vllm:engine_sleep_state")


def application(served: "FastAPI", digest: bytes | None, address: str) -> "ASGIApp":
    """The door's application, in front of the engine of ``served``.

    ``digest`` and ``address``: see ``Guard``.
    """
    from fastapi import FastAPI
    from vllm.v1.engine.exceptions import EngineDeadError

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.engine_client = served.state.engine_client
    app.state.openai_serving_models = served.state.openai_serving_models
    attach_router(app)
    _attach_others(app)
    for failure in (EngineDeadError, TimeoutError):
        app.add_exception_handler(failure, _unavailable)
    return Guard(app, digest, address)


async def _unavailable(_: "Request", error: Exception) -> "JSONResponse":
    from fastapi.responses import JSONResponse

    return JSONResponse(error_body(error, 503), 503)


def _attach_others(app: "FastAPI") -> None:
    from fastapi import APIRouter, Request
    from fastapi.responses import JSONResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from vllm.v1.engine.exceptions import EngineDeadError
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    router = APIRouter()
    gauges = Refresher()

    @router.post("/reload_weights")
    async def reload_weights(request: Request) -> JSONResponse:
        """Of vLLM's /collective_rpc this method alone, without arguments."""
        try:
            with typed():
                await client_of(request).collective_rpc("reload_weights")
        except Exception as error:  # of whatever type the load raised
            return JSONResponse(error_body(error, 503), 503)
        return JSONResponse({"status": "loaded"})

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache(
        request: Request, reset_running_requests: bool = False
    ) -> JSONResponse:
        success = await client_of(request).reset_prefix_cache(reset_running_requests)
        return JSONResponse({"success": bool(success)})

    @router.get("/health")
    async def health(request: Request) -> Response:
        try:
            await client_of(request).check_health()
        except EngineDeadError:
            return Response(status_code=503)
        return Response(status_code=200)

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        await gauges.refresh(client_of(request))
        text = generate_latest(_OfSleep(get_prometheus_registry()))
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    app.include_router(router)


class _OfSleep:
    """The metrics of sleep among all."""

    def __init__(self, source: "Collector") -> None:
        self._source = source

    def collect(self) -> "Iterable[Metric]":
        return (metric for metric in self._source.collect() if metric.name.startswith(_METRICS))
