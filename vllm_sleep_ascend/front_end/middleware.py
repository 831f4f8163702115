# SPDX-License-Identifier: Apache-2.0
"""The server's middleware: refuses requests or has them wake the engine, if an option says so, and
refreshes gauges."""

from typing import TYPE_CHECKING

from vllm_sleep_ascend.front_end import metrics
from vllm_sleep_ascend.routes import Needs, needs

if TYPE_CHECKING:
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from starlette.types import ASGIApp, Receive, Scope, Send
    from vllm.v1.engine.async_llm import AsyncLLM

_RETRY_AFTER_S = 1


class SleepModeMiddleware:
    """Answers 503 with ``Retry-After`` to generation requests that an option refuses
    (``while_asleep``, ``after_level2``) or whose wake fails (``wake_on_request``), and refreshes
    the gauges before ``/metrics``."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app
        self._gauges = metrics.Refresher()

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        client: AsyncLLM | None = None
        if scope["type"] == "http":
            client = getattr(scope["app"].state, "engine_client", None)
        if client is not None and client.model_config.enable_sleep_mode:
            if _path(scope) == "/metrics":
                await self._gauges.refresh(client)
            elif _generates(scope):
                refused = await _refused(client)
                if refused is not None:
                    await refused(scope, receive, send)
                    return
        await self._app(scope, receive, send)


def _path(scope: "Scope") -> str:
    """The path without ``--root-path``, as in vLLM's own middleware."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _generates(scope: "Scope") -> bool:
    return needs(scope["method"], _path(scope)) is Needs.STEPS and _has_route(scope)


def _has_route(scope: "Scope") -> bool:
    """Whether this server does not just answer 404 or 405."""
    from starlette.routing import Match

    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes)


async def answer_not_serving(_: "Request", error: Exception) -> "JSONResponse":
    """For a NotServingError that came after the request had passed the middleware."""
    return _unavailable(str(error))


def _unavailable(reason: str) -> "JSONResponse":
    from fastapi.responses import JSONResponse

    error = {"message": reason, "type": "ServiceUnavailableError", "param": None, "code": 503}
    return JSONResponse({"error": error}, 503, {"Retry-After": str(_RETRY_AFTER_S)})


async def _refused(client: "AsyncLLM") -> "ASGIApp | None":
    from vllm.v1.engine.exceptions import EngineDeadError

    from vllm_sleep_ascend.front_end.admission import Admission

    try:
        reason = await Admission.of(client).refusal(client)
    except EngineDeadError:
        return None  # vLLM answers
    return None if reason is None else _unavailable(reason)
