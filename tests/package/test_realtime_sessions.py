# SPDX-License-Identifier: Apache-2.0
"""What realtime sessions leave behind when a client leaves at an unlucky moment. The server is a
websocket of this process, the client an object. About 3 seconds."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.websockets import WebSocket
from websockets.asyncio.server import Server as Websockets
from websockets.asyncio.server import ServerConnection, serve

from vllm_sleep_ascend.client.sleep_client import SleepClient
from vllm_sleep_ascend.proxy.http.realtime import PATH, Realtime, is_awaited
from vllm_sleep_ascend.proxy.metrics import Metrics
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Settings, Turns

Handler = Callable[[ServerConnection], Awaitable[None]]


class Client:
    """
    refuses: kinds of messages at which it has left.
    texts: what it says once it is accepted.
    """

    def __init__(self, *refuses: str, texts: str = "") -> None:
        self.says: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.heard: list[dict[str, Any]] = []
        self.texts = texts
        self._refuses = refuses
        self.says.put_nowait({"type": "websocket.connect"})

    async def send(self, message: Any) -> None:
        if message["type"] in self._refuses:
            raise OSError  # as uvicorn's ClientDisconnected
        self.heard.append(message)
        if message["type"] == "websocket.accept":
            for text in self.texts:
                self.says.put_nowait({"type": "websocket.receive", "text": text})

    def leave(self) -> None:
        self.says.put_nowait({"type": "websocket.disconnect", "code": 1001})

    def websocket(self, path: str, query: bytes) -> WebSocket:
        scope = {"type": "websocket", "path": path, "query_string": query, "headers": []}
        more = {"subprotocols": [], "extensions": {"websocket.http.response": {}}}
        return WebSocket({**scope, **more}, self.says.get, self.send)


class Scene:
    """A server that is awake, and the sessions through a proxy."""

    def __init__(self, port: int) -> None:
        self.server = Server(SleepClient(f"http://127.0.0.1:{port}"), "a", names=("a",))
        self.server.state, self.server.open = "awake", True
        self.entered = 0
        self.turns = Turns([self.server], Metrics(), Settings())

    async def enter(self, server: Server) -> None:
        self.entered += 1
        server.enter()

    async def serve(self, client: Client, path: str = PATH, query: bytes = b"model=a") -> None:
        await Realtime(self.turns, self.enter).serve(client.websocket(path, query))

    def count(self, name: str, status: str) -> float:
        return self.turns.metrics.requests.labels(name, status)._value.get()


def play(handler: Handler, scenario: Callable[[Scene], Awaitable[None]]) -> None:
    async def run() -> None:
        upstream: Websockets = await serve(handler, "127.0.0.1", 0, close_timeout=0.1)
        try:
            scene = Scene(upstream.sockets[0].getsockname()[1])
            await scenario(scene)
            assert (scene.server.state, scene.server.in_flight) == ("awake", 0)
        finally:
            upstream.close()
            await upstream.wait_closed()

    asyncio.run(run())


async def listen(connection: ServerConnection) -> None:
    async for _ in connection:
        pass


def test_a_client_that_leaves_while_the_server_accepts():
    async def scenario(scene: Scene) -> None:
        await scene.serve(Client("websocket.accept"))
        assert scene.count("a", "499") == 1

    play(listen, scenario)


def test_a_client_that_leaves_a_server_that_does_not_close_in_time():
    gone = asyncio.Event()

    async def deaf(connection: ServerConnection) -> None:
        connection.transport.pause_reading()
        await connection.send("hears nothing")
        await gone.wait()
        connection.transport.abort()

    async def scenario(scene: Scene) -> None:
        client = Client()
        session = asyncio.create_task(scene.serve(client))
        while len(client.heard) < 2:
            await asyncio.sleep(0.01)
        client.leave()
        await session
        gone.set()
        assert scene.count("a", "101") == 1

    play(deaf, scenario)


@pytest.mark.parametrize(
    ("path", "query", "said"),
    [
        (PATH, b"model=a&x=#y", "'model=a&x=#y' is no query"),
        (PATH, b"model=a&x=\xe9", "'model=a&x=\xe9' is no query"),
        (PATH, b"model=a b", "'model=a b' is no query"),
        (f"{PATH}\n", b"model=a", r"'/v1/realtime\n' is not a path"),
    ],
)
def test_what_is_no_url_is_refused_before_the_turn(path, query, said):
    async def scenario(scene: Scene) -> None:
        client = Client()
        await scene.serve(client, path, query)
        begun, body = client.heard
        assert begun["status"] == 400
        assert json.loads(body["body"])["error"]["message"].startswith(said)
        assert (scene.entered, scene.count("", "400")) == (0, 1)

    play(listen, scenario)


def test_what_a_server_says_at_last_comes_through():
    """Also to a client that still speaks."""

    async def ends(connection: ServerConnection) -> None:
        await connection.recv()
        for number in range(8):
            await connection.send(str(number))
        await connection.close(1000, "done")

    async def scenario(scene: Scene) -> None:
        client = Client(texts=99 * "x")
        await scene.serve(client)
        _, *said, closed = client.heard
        assert [message["text"] for message in said] == list("01234567")
        assert (closed["code"], closed["reason"]) == (1000, "done")

    play(ends, scenario)


def test_a_session_makes_way_on_its_own_devices_only():
    def server(*devices: int) -> Server:
        return Server(SleepClient("http://127.0.0.1:9"), devices=devices or None)

    async def scenario() -> None:
        one, beside, elsewhere, anywhere = server(0), server(0, 1), server(1), server()
        servers = [one, beside, elsewhere, anywhere]
        future = asyncio.get_running_loop().create_future
        one.waiting[future()] = elsewhere.waiting[future()] = 0.0
        assert not is_awaited(one, servers)
        for other in (beside, anywhere):
            other.waiting[future()] = 0.0
            assert is_awaited(one, servers)
            other.waiting.clear()
        one.retiring = True
        assert is_awaited(one, servers)

    asyncio.run(scenario())
