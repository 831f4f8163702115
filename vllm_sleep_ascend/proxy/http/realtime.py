# SPDX-License-Identifier: Apache-2.0
"""Sessions of vLLM's websocket, ``/v1/realtime?model=NAME``.

vLLM learns the model by a message in the session, but the proxy has to know it before, so it is in
the query, as in OpenAI's interface. A session keeps its server's turn as a request does.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial

import httpx
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode

from vllm_sleep_ascend.proxy.http.naming import server_of
from vllm_sleep_ascend.proxy.http.responses import (
    CLIENT_LEFT,
    NoAnswer,
    Refused,
    end_to_end,
    unless_client_leaves,
)
from vllm_sleep_ascend.proxy.operations import ASK_S
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Turns
from vllm_sleep_ascend.proxy.view import places

PATH = "/v1/realtime"

QUIET_S = 60.0
"""Seconds without a message after which a session ends, if something waits for that."""

_LOOK_S = 0.5  # seconds between two looks at that
_OF_THE_HANDSHAKE = b"sec-websocket-"
_QUERY = re.compile(r'[!"$-~]*')


class Realtime:
    """Serves sessions.

    Args:
        enter: waits for a server's turn; it raises ``Refused``.
    """

    def __init__(
        self, turns: Turns, enter: Callable[[Server], Coroutine[None, None, None]]
    ) -> None:
        self._turns, self._enter = turns, enter

    async def serve(self, client: WebSocket) -> None:
        await client.receive()  # that it connects
        name, status = "", 101
        try:
            target = _target(client)
            server = await server_of(self._turns, client.query_params.get("model"))
            name = server.name
            entering = asyncio.create_task(self._enter(server))
            await unless_client_leaves(client.receive, entering)
            broken = False
            try:
                async with await _connect(server, target, client) as upstream:
                    await _accept(client, upstream.subprotocol)
                    awaited = partial(is_awaited, server, self._turns.servers)
                    broken = await _Session(client, upstream, awaited).run()
            except NoAnswer:
                broken = True
                raise
            finally:
                self._turns.leave(server, broken)
        except Refused as refused:
            status = refused.status
            await _deny(client, refused.response())
        except InvalidStatus as refused:
            status = refused.response.status_code
            await _deny(client, _denial(refused))
        except ClientDisconnect:
            status = CLIENT_LEFT
        self._turns.metrics.requests.labels(name, str(status)).inc()


def is_awaited(server: Server, servers: Sequence[Server]) -> bool:
    """Whether the end of its sessions is waited for: by the operator, or by requests for another
    server on its devices."""
    if server.closing or server.retiring:
        return True
    there = places(server, servers)
    others = (each for each in servers if each is not server and each.waiting)
    return any(places(each, servers) & there for each in others)


def _target(client: WebSocket) -> str:
    """
    Raises:
        Refused: it is no URL's path and query.
    """
    path, query = client.scope["path"], client.scope["query_string"].decode("latin-1")
    if path != PATH:  # such as with a line's end
        raise Refused(400, f"{path!r} is not a path here; write {PATH}")
    if not _QUERY.fullmatch(query):
        raise Refused(400, f"{query!r} is no query of a URL; encode its other characters")
    return f"{path}?{query}"


async def _connect(server: Server, target: str, client: WebSocket) -> ClientConnection:
    """
    Raises:
        InvalidStatus: the server refuses it.
        NoAnswer: it does not answer.
    """
    base = str(httpx.URL(server.url).join("/")).rstrip("/")
    headers = [
        (key.decode("latin-1"), value.decode("latin-1"))
        for key, value in end_to_end(client.headers.raw)
        if not key.startswith(_OF_THE_HANDSHAKE)
    ]
    try:
        return await connect(
            base.replace("http", "ws", 1) + target,
            additional_headers=headers,
            subprotocols=client.scope["subprotocols"] or None,
            user_agent_header=None,
            compression=None,
            proxy=None,
            open_timeout=ASK_S,
            close_timeout=1.0,
            ping_interval=None,  # The client's side has its own.
            max_size=None,
        )
    except InvalidStatus:
        raise
    except (OSError, TimeoutError, WebSocketException) as error:
        raise NoAnswer(server.name, error) from None


async def _accept(client: WebSocket, subprotocol: str | None) -> None:
    """
    Raises:
        ClientDisconnect: it has left meanwhile.
    """
    try:
        await client.accept(subprotocol)
    except OSError:
        raise ClientDisconnect from None


async def _deny(client: WebSocket, response: Response) -> None:
    with contextlib.suppress(OSError):  # of a client that has left
        await client.send_denial_response(response)


def _denial(refused: InvalidStatus) -> Response:
    answer = Response(bytes(refused.response.body), refused.response.status_code)
    pairs = (
        (k.encode("latin-1"), v.encode("latin-1")) for k, v in refused.response.headers.items()
    )
    answer.raw_headers += end_to_end(list(pairs))
    return answer


class _Session:
    """Passes on messages of both sides until one of them ends."""

    def __init__(
        self, client: WebSocket, upstream: ClientConnection, awaited: Callable[[], bool]
    ) -> None:
        self._client, self._upstream, self._awaited = client, upstream, awaited
        self._last = time.monotonic()
        self._left = False

    async def run(self) -> bool:
        """Returns whether the server has broken it off."""
        working = [
            asyncio.create_task(work)
            for work in (self._to_server(), self._to_client(), self._quiet())
        ]
        try:
            await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in working:
                task.cancel()
            await asyncio.wait(working)
        code, reason = self._upstream.close_code, self._upstream.close_reason or ""
        broken = code == CloseCode.ABNORMAL_CLOSURE and not self._left
        if code is None:
            code, reason = CloseCode.GOING_AWAY, f"nothing was said for {QUIET_S:g} s"
        elif broken:
            code, reason = CloseCode.INTERNAL_ERROR, "the server broke it off"
        elif code == CloseCode.NO_STATUS_RCVD:  # which nobody may send
            code = CloseCode.NORMAL_CLOSURE
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # of a client that has left
            await self._client.close(code, reason)
        return broken

    async def _to_server(self) -> None:
        while (message := await self._client.receive())["type"] == "websocket.receive":
            self._last = time.monotonic()
            text = message.get("text")
            # Once the server has closed, _to_client passes on what it has said, and ends.
            with contextlib.suppress(ConnectionClosed):
                await self._upstream.send(message["bytes"] if text is None else text)
        self._left = True
        await self._upstream.close()

    async def _to_client(self) -> None:
        with contextlib.suppress(ConnectionClosed, WebSocketDisconnect, RuntimeError):
            async for message in self._upstream:
                self._last = time.monotonic()
                if isinstance(message, str):
                    await self._client.send_text(message)
                else:
                    await self._client.send_bytes(message)

    async def _quiet(self) -> None:
        while time.monotonic() - self._last < QUIET_S or not self._awaited():
            await asyncio.sleep(_LOOK_S)
