# SPDX-License-Identifier: Apache-2.0
"""Sessions of vLLM's websocket, ``/v1/realtime?model=NAME``.

vLLM learns the model by a message in the session, but the proxy has to know it before, so it is in
the query, as in OpenAI's interface. A session keeps its server's turn as a request does.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine

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

QUIET_S = 60.0
"""Seconds without a message after which a session ends, if something waits for that."""

_LOOK_S = 0.5  # seconds between two looks at that
_OF_THE_HANDSHAKE = b"sec-websocket-"


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
            server = await server_of(self._turns, client.query_params.get("model"))
            name = server.name
            entering = asyncio.create_task(self._enter(server))
            await unless_client_leaves(client.receive, entering)
            broken = True
            try:
                async with await _connect(server, client) as upstream:
                    await client.accept(upstream.subprotocol)
                    broken = await _Session(client, upstream, self._awaited(server)).run()
            except (InvalidStatus, WebSocketDisconnect):
                broken = False
                raise
            finally:
                self._turns.leave(server, broken)
        except Refused as refused:
            status = refused.status
            await client.send_denial_response(refused.response())
        except InvalidStatus as refused:
            status = refused.response.status_code
            await client.send_denial_response(_denial(refused))
        except (ClientDisconnect, WebSocketDisconnect):
            status = CLIENT_LEFT
        self._turns.metrics.requests.labels(name, str(status)).inc()

    def _awaited(self, server: Server) -> Callable[[], bool]:
        """Whether the end of its sessions is waited for: by the operator, or by other requests."""
        servers = self._turns.servers
        return lambda: (
            server.closing
            or server.retiring
            or any(each.waiting for each in servers if each is not server)
        )


async def _connect(server: Server, client: WebSocket) -> ClientConnection:
    """
    Raises:
        InvalidStatus: the server refuses it.
        NoAnswer: it does not answer.
    """
    url = httpx.URL(server.url).copy_with(path=client.scope["path"])
    headers = [
        (key.decode("latin-1"), value.decode("latin-1"))
        for key, value in end_to_end(client.headers.raw)
        if not key.startswith(_OF_THE_HANDSHAKE)
    ]
    try:
        return await connect(
            f"{str(url).replace('http', 'ws', 1)}?{client.scope['query_string'].decode('ascii')}",
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
        broken = code == CloseCode.ABNORMAL_CLOSURE
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
        with contextlib.suppress(ConnectionClosed):
            while (message := await self._client.receive())["type"] == "websocket.receive":
                self._last = time.monotonic()
                text = message.get("text")
                await self._upstream.send(message["bytes"] if text is None else text)
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
