# SPDX-License-Identifier: Apache-2.0
"""OpenAI's interface for users: each request goes to its model's server when it is its turn."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute

from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.proxy.http.background import Background
from vllm_sleep_ascend.proxy.http.naming import model_of, models, server_of
from vllm_sleep_ascend.proxy.http.realtime import PATH as REALTIME
from vllm_sleep_ascend.proxy.http.realtime import Realtime
from vllm_sleep_ascend.proxy.http.responses import (
    CLIENT_LEFT,
    NoAnswer,
    PassedOn,
    Refused,
    end_to_end,
    unless_client_leaves,
)
from vllm_sleep_ascend.proxy.operations import ASK_S
from vllm_sleep_ascend.proxy.schedule import Schedule
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import QueueFull, Turns
from vllm_sleep_ascend.routes import Needs, needs, posts


class Public:
    """The ASGI application ``app``; while it runs, ``turns`` do.

    Args:
        max_body: bytes of a request's body.
    """

    def __init__(self, turns: Turns, max_body: int) -> None:
        self.turns = turns
        self._max_body = max_body
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5.0),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
            trust_env=False,
        )
        passed_on = (*posts(Needs.STEPS), *posts(Needs.TEXT), "/v1/{path:path}")
        self._background = Background(turns, self._http)
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._one_model),
                Route("/health", health),
                Route("/v1/responses/{response}", self._serve),
                WebSocketRoute(REALTIME, Realtime(turns, self._enter).serve),
                *(Route(path, self._serve, methods=["POST"]) for path in passed_on),
            ],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _refused},
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._http)
            stack.push_async_callback(self._background.close)
            stack.push_async_callback(self._close_clients)
            task = asyncio.create_task(Schedule(self.turns).run())
            try:
                yield
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _close_clients(self) -> None:
        for server in self.turns.servers:
            await server.client.close()

    async def _models(self, _: Request) -> Response:
        """All servers' models, without waking a server."""
        data = [_card(name) for name in models(self.turns)]
        return JSONResponse({"object": "list", "data": data})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            await server_of(self.turns, name)
        except Refused as refused:
            return refused.response()
        return JSONResponse(_card(name))

    async def _serve(self, request: Request) -> Response:
        name = ""
        try:
            body = await self._body(request)
            if needs(request.method, _path(request)) is Needs.STORE:
                answer = self._find(request, body)
            else:
                server = await server_of(self.turns, await model_of(request, body))
                name = server.name
                answer = self._pass_on(request, server, body)
            response = await unless_client_leaves(request.receive, asyncio.create_task(answer))
        except Refused as refused:
            response = refused.response()
        except ClientDisconnect:
            response = Response(status_code=CLIENT_LEFT)
        self.turns.metrics.requests.labels(name, str(response.status_code)).inc()
        return response

    async def _body(self, request: Request) -> bytes:
        """
        Raises:
            Refused: it is too large, or its path is not one of the servers'.
        """
        if {"..", "."} & set(_path(request).split("/")):
            raise Refused(400, f"{_path(request)!r} is not a path here")
        body = bytearray()
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._max_body:
            raise Refused(413, f"more than {self._max_body} bytes")
        async for part in request.stream():
            body += part
            if len(body) > self._max_body:
                raise Refused(413, f"more than {self._max_body} bytes")
        return bytes(body)

    async def _pass_on(self, request: Request, server: Server, body: bytes) -> Response:
        """Send the server the request; one that needs its engine, or a server that is not up, waits
        for the server's turn.

        Raises:
            Refused: the queue is full, or the server does not wake or answer.
        """
        url, asked = server.url, self._to(server, request, body)
        if needs(request.method, _path(request)) is Needs.TEXT and server.runs:
            return await self._pass_by(server, asked)
        await self._enter(server)
        try:
            if server.url != url:  # it has started on another port
                asked = self._to(server, request, body)
            upstream = await self._answer(server, asked)
        except BaseException as error:
            self.turns.leave(server, broken=isinstance(error, NoAnswer))
            raise
        if _path(request) == "/v1/responses" and _is_json(upstream):
            return await self._background.begun(server, upstream)
        return PassedOn(upstream, lambda broken: self.turns.leave(server, broken))

    async def _enter(self, server: Server) -> None:
        """Wait for the server's turn.

        Raises:
            Refused: the queue is full, or the server does not wake.
        """
        try:
            await self.turns.enter(server)
        except QueueFull as full:
            raise Refused(503, str(full), full.retry_after_s) from None
        except CallFailed as error:
            rest_s = server.launched.rest_s() if server.launched is not None else 0
            message = f"the model cannot be woken: {error}"
            raise Refused(503, message, max(_RETRY_AFTER_S, math.ceil(rest_s))) from None

    async def _pass_by(self, server: Server, asked: httpx.Request) -> Response:
        """Send the server a request that does not need its turn.

        Raises:
            Refused: the server does not answer.
        """
        passed = self._passes(server)
        try:
            return PassedOn(await self._answer(server, asked), passed)
        except BaseException:
            passed(True)
            raise

    def _passes(self, server: Server) -> Callable[[bool], None]:
        """A request begins beside the turns. Returns what to call at its end."""
        server.passing += 1

        def passed(_: bool) -> None:
            server.passing -= 1
            self.turns.changed.set()

        return passed

    async def _find(self, request: Request, body: bytes) -> Response:
        """Ask all servers for a stored response, and pass on the answer of the one that has it. One
        that sleeps answers as well.

        Raises:
            Refused: no server has it.
        """

        async def ask(server: Server) -> httpx.Response:
            try:
                async with asyncio.timeout(ASK_S):
                    return await self._answer(server, self._to(server, request, body))
            except TimeoutError:
                raise NoAnswer(server.name, f"nothing came within {ASK_S:g} s") from None

        running = (server for server in self.turns.servers if server.runs)
        asked = {asyncio.create_task(ask(server)): self._passes(server) for server in running}
        if not asked:
            raise Refused(404, "no server has this response")
        chosen: asyncio.Task[httpx.Response] | None = None
        try:
            await asyncio.wait(asked)
            best = min(asked, key=_rank)
            if _rank(best) != _MISSING:
                response = PassedOn(best.result(), asked[best])
                chosen = best
                return response
        finally:
            left = [task for task in asked if task is not chosen]
            for task in left:
                task.cancel()
                asked[task](False)
            for task in left:
                if task.done() and not task.exception():
                    await task.result().aclose()
        raise Refused(404, "no server has this response")

    def _to(self, server: Server, request: Request, body: bytes) -> httpx.Request:
        """
        Raises:
            Refused: what it asks for is no URL.
        """
        try:
            url = httpx.URL(server.url).copy_with(
                path=_path(request), query=request.scope["query_string"] or None
            )
        except httpx.InvalidURL as error:
            raise Refused(400, str(error)) from None
        headers = end_to_end(request.headers.raw)
        return self._http.build_request(request.method, url, headers=headers, content=body)

    async def _answer(self, server: Server, asked: httpx.Request) -> httpx.Response:
        """The server's answer, of which only the head has been read.

        Raises:
            Refused: it cannot be asked this.
            NoAnswer: it does not answer.
        """
        try:
            return await self._http.send(asked, stream=True)
        except httpx.LocalProtocolError as error:
            raise Refused(400, str(error)) from None
        except httpx.HTTPError as error:
            raise NoAnswer(server.name, error) from None


def _path(request: Request) -> str:
    """As routed. Starlette's ``request.url`` depends on the Host header, which the client chose."""
    path: str = request.scope["path"]
    return path


def _is_json(answer: httpx.Response) -> bool:
    kind: str = answer.headers.get("content-type", "")
    return kind.startswith("application/json")


_MISSING = 3
_RETRY_AFTER_S = 5  # a failed wake


def _rank(asked: "asyncio.Task[httpx.Response]") -> int:
    """How much a server's answer says of a stored response; the least says most."""
    if isinstance(asked.exception(), Refused):
        return 2
    status = asked.result().status_code
    if status == HTTPStatus.NOT_FOUND:
        return _MISSING
    return 0 if status < HTTPStatus.BAD_REQUEST else 1


def _card(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "vllm"}


async def _refused(_: Request, error: Exception) -> Response:
    """An unknown path or method, in vLLM's form."""
    assert isinstance(error, HTTPException)
    response = Refused(error.status_code, error.detail).response()
    response.headers.update(error.headers or {})
    return response


async def health(_: Request) -> Response:
    """200 if the proxy is running. The admin port's /status has the state of its servers."""
    return Response(status_code=200)
