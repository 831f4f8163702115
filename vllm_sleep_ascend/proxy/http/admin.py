# SPDX-License-Identifier: Apache-2.0
"""The operator's interface: status, manual sleep and wake, metrics."""

from collections.abc import Awaitable, Callable

from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.proxy.http.naming import server_of
from vllm_sleep_ascend.proxy.http.public import health
from vllm_sleep_ascend.proxy.http.responses import Refused
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import QueueFull, Turns


class Admin:
    """The ASGI application ``app``."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.app = Starlette(
            routes=[
                Route("/status", self._status),
                Route("/sleep", self._sleep, methods=["POST"]),
                Route("/wake", self._wake, methods=["POST"]),
                Route("/metrics", self._metrics),
                Route("/health", health),
            ]
        )

    async def _status(self, _: Request) -> Response:
        return JSONResponse({"servers": [_describe(server) for server in self.turns.servers]})

    async def _sleep(self, request: Request) -> Response:
        return await self._operate(request, self.turns.put_to_sleep)

    async def _wake(self, request: Request) -> Response:
        async def wake(server: Server) -> None:
            async with self.turns.turn(server):
                pass

        return await self._operate(request, wake)

    async def _operate(
        self, request: Request, operation: Callable[[Server], Awaitable[None]]
    ) -> Response:
        try:
            server = await server_of(self.turns, request.query_params.get("model"))
            await operation(server)
        except Refused as refused:
            return refused.response()
        except (CallFailed, QueueFull) as error:
            return Refused(503, str(error)).response()
        return JSONResponse({"url": server.url, "state": server.state})

    async def _metrics(self, _: Request) -> Response:
        text = generate_latest(self.turns.metrics.registry).decode()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _describe(server: Server) -> dict[str, object]:
    figures = server.figures
    described: dict[str, object] = {
        "name": server.name,
        "url": server.url,
        "models": server.models,
        "state": server.state,
        "level": server.slept_at if server.state == "asleep" else None,
        "priority": server.priority,
        "group": server.group.name if server.group is not None else None,
        "device_bytes": [use.takes for use in figures.devices.values()] if figures else None,
        "queued": len(server.waiting),
        "in_flight": server.in_flight,
        "retiring": server.retiring,
    }
    if (launched := server.launched) is not None:
        described |= {
            "admin": launched.door,
            "pid": launched.pid,
            "log": launched.log,
            "starts": launched.starts,
            "deaths": launched.deaths,
            "error": launched.error,
        }
    return described
