# SPDX-License-Identifier: Apache-2.0
"""OpenAI's interface for users: each request goes to its model's server when it is its turn."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.proxy.responses import CLIENT_LEFT, PassedOn, Refused, end_to_end
from vllm_sleep_ascend.proxy.schedule import Schedule
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import QueueFull, Turns

_PASSED_ON = ("/v1/{path:path}", "/tokenize", "/detokenize", "/pooling", "/classify", "/score")
_SHOWN = 200  # Characters of a name that is refused.


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
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/health", health),
                *(Route(path, self._serve, methods=["POST"]) for path in _PASSED_ON),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._http)
            for server in self.turns.servers:
                await stack.enter_async_context(server.client)
            task = asyncio.create_task(Schedule(self.turns).run())
            try:
                yield
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _models(self, _: Request) -> Response:
        """All servers' models, without waking a server."""
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "vllm"}
            for server in self.turns.servers
            for name in server.models
        ]
        return JSONResponse({"object": "list", "data": data})

    async def _serve(self, request: Request) -> Response:
        name, response = "", None
        try:
            body = await self._body(request)
            server = await server_of(self.turns, _model(body))
            name = server.name
            working = asyncio.create_task(self._pass_on(request, server, body))
            response = await _unless_client_leaves(request, working)
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
        if {"..", "."} & set(request.url.path.split("/")):
            raise Refused(400, f"{request.url.path!r} is not a path here")
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
        """Wait for the server's turn, and send it the request.

        Raises:
            Refused: the queue is full, or the server does not wake or answer.
        """
        try:
            url = httpx.URL(server.name).copy_with(
                path=request.url.path, query=request.scope["query_string"] or None
            )
        except httpx.InvalidURL as error:
            raise Refused(400, str(error)) from None
        headers = end_to_end(request.headers.raw)
        asked = self._http.build_request("POST", url, headers=headers, content=body)
        try:
            await self.turns.enter(server)
        except QueueFull as full:
            raise Refused(503, str(full), full.retry_after_s) from None
        except CallFailed as error:
            raise Refused(503, f"the model cannot be woken: {error}", 5) from None
        try:
            upstream = await self._http.send(asked, stream=True)
        except httpx.LocalProtocolError as error:
            self.turns.leave(server)
            raise Refused(400, str(error)) from None
        except httpx.HTTPError as error:
            self.turns.leave(server, broken=True)
            reason = str(error) or type(error).__name__
            raise Refused(502, f"{server.name} did not answer: {reason}") from None
        except BaseException:
            self.turns.leave(server)
            raise
        return PassedOn(upstream, lambda broken: self.turns.leave(server, broken))


async def health(_: Request) -> Response:
    """200 if the proxy is running. The admin port's /status has the state of its servers."""
    return Response(status_code=200)


async def server_of(turns: Turns, model: str | None) -> Server:
    """
    Raises:
        Refused: no server has the model.
    """
    if model is None and len(turns.servers) == 1:
        return turns.servers[0]
    server = await turns.server_of(model) if model is not None else None
    if server is not None:
        return server
    known = ", ".join(sorted(name for server in turns.servers for name in server.models))
    if model is None:
        raise Refused(400, f"name a model, one of {known}")
    raise Refused(404, f"no model {model[:_SHOWN]!r}; there are {known}")


def _model(body: bytes) -> str | None:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    model = content.get("model") if isinstance(content, dict) else None
    if model is not None and not isinstance(model, str):
        raise Refused(400, f"model must be a string, not {type(model).__name__}")
    return model


async def _unless_client_leaves(request: Request, working: asyncio.Task[Response]) -> Response:
    """The result of the task, which is cancelled if the client disconnects.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
