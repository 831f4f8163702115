# SPDX-License-Identifier: Apache-2.0
"""The proxy's two ASGI applications: OpenAI's interface for users, and one for the operator."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vllm_sleep_ascend.client import CallFailed
from vllm_sleep_ascend.proxy.turns import QueueFull, Server, Turns

# Of one connection, not of the message that is passed on.
_HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
    *("transfer-encoding", "upgrade", "host", "content-length"),
}
_PASSED_ON = ("/v1/{path:path}", "/tokenize", "/detokenize", "/pooling", "/classify", "/score")
_CLIENT_LEFT = 499


class Refused(Exception):
    """A request that no server gets to see."""

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s

    def response(self) -> Response:
        kind = "invalid_request_error" if self.status < 500 else "unavailable"
        error = {"message": str(self), "type": kind, "code": self.status}
        wait = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else None
        return JSONResponse({"error": error}, self.status, headers=wait)


class PassedOn(StreamingResponse):
    """An answer as it comes from a server. However it ends, ``finish`` is called once."""

    def __init__(self, upstream: httpx.Response, finish: Callable[[], None]) -> None:
        kept = [(k, v) for k, v in upstream.headers.raw if k.lower().decode() not in _HOP_BY_HOP]
        super().__init__(upstream.aiter_raw(), upstream.status_code)
        self.raw_headers = kept
        self._upstream, self._finish = upstream, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._finish()
            # Ends the request at the server, if its client left.
            await self._upstream.aclose()


class Proxy:
    """The applications ``public`` and ``admin`` over the turns of some servers."""

    def __init__(self, turns: Turns, max_body_bytes: int = 64 << 20) -> None:
        self.turns = turns
        self._max_body_bytes = max_body_bytes
        self._surveyed = 0.0
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5.0),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
            trust_env=False,
        )
        routes = [Route(path, self._pass_on, methods=["POST"]) for path in _PASSED_ON]
        self.public = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/health", self._health),
                *routes,
            ],
            lifespan=self._lifespan,
        )
        self.admin = Starlette(
            routes=[
                Route("/status", self._status),
                Route("/sleep", self._sleep, methods=["POST"]),
                Route("/wake", self._wake, methods=["POST"]),
                Route("/metrics", self._metrics),
                Route("/health", self._health),
            ]
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._http)
            for server in self.turns.servers:
                await stack.enter_async_context(server.client)
            task = asyncio.create_task(self.turns.run())
            try:
                yield
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    # --- For users -------------------------------------------------------------------------------

    async def _pass_on(self, request: Request) -> Response:
        try:
            body = await self._body(request)
            server = await self._server_of(_model(body))
        except Refused as refused:
            return refused.response()
        except ClientDisconnect:
            return Response(status_code=_CLIENT_LEFT)
        work = asyncio.create_task(self._ask(request, server, body))
        left = asyncio.create_task(_disconnect(request))
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
        left.cancel()
        try:
            response = await work
        except asyncio.CancelledError:
            response = Response(status_code=_CLIENT_LEFT)
        except Refused as refused:
            response = refused.response()
        self.turns.metrics.requests.labels(server.name, str(response.status_code)).inc()
        return response

    async def _ask(self, request: Request, server: Server, body: bytes) -> Response:
        """Wait for the server's turn, and ask it.

        Raises:
            Refused: the queue is full, or the server does not wake or answer.
        """
        headers = [(k, v) for k, v in request.headers.raw if k.decode() not in _HOP_BY_HOP]
        try:
            url = httpx.URL(server.name).copy_with(path=request.url.path, query=_query(request))
        except httpx.InvalidURL as error:
            raise Refused(400, str(error)) from None
        asked = self._http.build_request("POST", url, headers=headers, content=body)
        try:
            await self.turns.enter(server)
        except QueueFull as full:
            raise Refused(503, str(full), full.retry_after_s) from None
        except CallFailed as error:
            raise Refused(503, f"the model cannot be woken: {error}", 5) from None
        try:
            upstream = await self._http.send(asked, stream=True)
        except httpx.HTTPError as error:
            self.turns.leave(server)
            reason = str(error) or type(error).__name__
            raise Refused(502, f"{server.name} did not answer: {reason}") from None
        except BaseException:
            self.turns.leave(server)
            raise
        return PassedOn(upstream, lambda: self.turns.leave(server))

    async def _body(self, request: Request) -> bytes:
        if ".." in request.url.path.split("/"):
            raise Refused(400, f"{request.url.path!r} is not a path here")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body_bytes:
                raise Refused(413, f"more than {self._max_body_bytes} bytes")
        return bytes(body)

    async def _server_of(self, model: str | None) -> Server:
        servers = self.turns.servers
        if model is None and len(servers) == 1:
            return servers[0]
        for attempt in range(2):
            for server in servers:
                if model in server.models:
                    return server
            # A server that was not up before may be now.
            if attempt == 0 and time.monotonic() - self._surveyed > 1:
                self._surveyed = time.monotonic()
                await self.turns.learn_models()
        known = ", ".join(sorted(name for server in servers for name in server.models))
        if model is None:
            raise Refused(400, f'name a model in the JSON body ("model": ...), one of {known}')
        raise Refused(404, f"no model {model!r}; there are {known}")

    async def _models(self, _: Request) -> Response:
        """All servers' models. No server wakes for it."""
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "vllm"}
            for server in self.turns.servers
            for name in server.models
        ]
        return JSONResponse({"object": "list", "data": data})

    async def _health(self, _: Request) -> Response:
        return Response(status_code=200)

    # --- For the operator ------------------------------------------------------------------------

    async def _status(self, _: Request) -> Response:
        servers = [
            {
                "url": server.name,
                "models": server.models,
                "state": server.state,
                "queued": len(server.waiting),
                "in_flight": server.in_flight,
            }
            for server in self.turns.servers
        ]
        return JSONResponse({"servers": servers})

    async def _sleep(self, request: Request) -> Response:
        return await self._operate(request, self.turns.put_to_sleep)

    async def _wake(self, request: Request) -> Response:
        async def wake(server: Server) -> None:
            async with self.turns.turn(server):
                pass

        return await self._operate(request, wake)

    async def _operate(self, request: Request, operation: Callable[[Server], Any]) -> Response:
        try:
            server = await self._server_of(request.query_params.get("model"))
            await operation(server)
        except Refused as refused:
            return refused.response()
        except (CallFailed, QueueFull) as error:
            return Refused(503, str(error)).response()
        return JSONResponse({"url": server.name, "state": server.state})

    async def _metrics(self, _: Request) -> Response:
        text = generate_latest(self.turns.metrics.registry).decode()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _model(body: bytes) -> str | None:
    try:
        content = json.loads(body)
    except ValueError:
        raise Refused(400, "the body is not JSON") from None
    model = content.get("model") if isinstance(content, dict) else None
    if model is not None and not isinstance(model, str):
        raise Refused(400, f"model must be a string, not {model!r}")
    return model


def _query(request: Request) -> bytes | None:
    return request.scope["query_string"] or None


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
