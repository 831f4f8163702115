# SPDX-License-Identifier: Apache-2.0
"""The operator's interface: a page, and what it is made of: status and events, manual sleep, wake
and stop, logs, metrics."""

from collections.abc import Awaitable, Callable
from functools import partial

from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.proxy.http import page
from vllm_sleep_ascend.proxy.http.events import Events
from vllm_sleep_ascend.proxy.http.guard import Guard
from vllm_sleep_ascend.proxy.http.naming import server_of
from vllm_sleep_ascend.proxy.http.public import health
from vllm_sleep_ascend.proxy.http.responses import Refused
from vllm_sleep_ascend.proxy.http.status import Status
from vllm_sleep_ascend.proxy.launch.launched import Launched
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import QueueFull, Turns

_LINES, _MOST_LINES = 200, 5000
_OWN_PATHS = frozenset({"/log", "/stop"})  # without a key, for the proxy's own user alone


class Admin:
    """The ASGI application ``app``. ``close`` ends the streams of events.

    Args:
        key: what all but the page's files and /health ask for.
    """

    def __init__(self, turns: Turns, key: str | None = None) -> None:
        self.turns = turns
        self._said = Status(turns)
        self._events = Events(turns, self._said)
        self.close = self._events.close
        files = page.files()
        digest = None if key is None else admin_key.digest(key)
        open_paths = frozenset({*files, "/health"})
        self.app = Starlette(
            routes=[
                Route("/status", self._status),
                Route("/events", self._stream),
                Route("/sleep", partial(self._operate, turns.put_to_sleep), methods=["POST"]),
                Route("/wake", partial(self._operate, self._wake), methods=["POST"]),
                Route("/stop", partial(self._operate, self._stop), methods=["POST"]),
                Route("/log", self._log),
                Route("/metrics", self._metrics),
                Route("/health", health),
                *(Route(path, partial(_file, *file)) for path, file in files.items()),
            ],
            middleware=[Middleware(Guard, digest=digest, anybody=open_paths, own=_OWN_PATHS)],
        )

    async def _status(self, request: Request) -> Response:
        """With ``memory=1`` after asking the servers for theirs."""
        if request.query_params.get("memory") == "1":
            await self._said.ask()
        return JSONResponse(self._said.describe())

    async def _stream(self, _: Request) -> Response:
        try:
            return self._events.stream()
        except Refused as refused:
            return refused.response()

    async def _wake(self, server: Server) -> None:
        async with self.turns.turn(server):
            pass

    async def _stop(self, server: Server) -> None:
        _launched(server)
        await self.turns.stop(server)

    async def _operate(
        self, operation: Callable[[Server], Awaitable[None]], request: Request
    ) -> Response:
        try:
            server = await self._server(request)
            await operation(server)
        except Refused as refused:
            return refused.response()
        except (CallFailed, QueueFull) as error:
            return Refused(503, str(error)).response()
        return JSONResponse({"url": server.url, "state": server.state})

    async def _server(self, request: Request, among: list[Server] | None = None) -> Server:
        """By the name of a model, or that in /status.

        Args:
            among: those that may be meant; by default those that get new requests.

        Raises:
            Refused: there is none.
        """
        name = request.query_params.get("model")
        among = self.turns.current if among is None else among
        named = (server for server in among if server.name == name)
        return next(named, None) or await server_of(self.turns, name)

    async def _log(self, request: Request) -> Response:
        """The last ``lines`` of what a server has written, also of one that retires."""
        try:
            server = await self._server(request, among=[*self.turns.current, *self.turns.servers])
            text = _launched(server).log_end(_count(request.query_params.get("lines")))
        except Refused as refused:
            return refused.response()
        return PlainTextResponse(text)

    async def _metrics(self, _: Request) -> Response:
        text = generate_latest(self.turns.metrics.registry).decode()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _file(content: bytes, media_type: str, _: Request) -> Response:
    return Response(content, media_type=media_type)


def _launched(server: Server) -> Launched:
    """
    Raises:
        Refused: the proxy has not started it.
    """
    if server.launched is None:
        raise Refused(409, f"{server.name} is not the proxy's: ask whoever has started it")
    return server.launched


def _count(lines: str | None) -> int:
    """
    Raises:
        Refused: it is no number of lines.
    """
    if lines is None:
        return _LINES
    if not (lines.isascii() and lines.isdigit() and 0 < int(lines[:9]) <= _MOST_LINES):
        raise Refused(400, f"lines is {lines[:20]!r}; write a number from 1 to {_MOST_LINES}")
    return int(lines)
