# SPDX-License-Identifier: Apache-2.0
"""The schedule with servers that are objects of this process: what it asks of them, in order."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.patience import patience

from vllm_sleep_ascend.client.calls import CallFailed, OutOfMemory
from vllm_sleep_ascend.proxy import schedule
from vllm_sleep_ascend.proxy.metrics import Metrics
from vllm_sleep_ascend.proxy.schedule import Schedule
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Settings, Turns

FIT = Settings(turn_s=0.0, max_awake=None)


class Host:
    """Devices of 100 bytes, bytes of host memory that are free, and what has happened."""

    def __init__(self) -> None:
        self.clients: list[Client] = []
        self.hidden = 0
        """Bytes that are in use although the ranks report them as free."""
        self.memory = 1000
        self.events: list[str] = []

    def free(self, device: int) -> int:
        there = [client for client in self.clients if client.device == device]
        return 100 - sum(client.share for client in there if client.awake)

    def server(
        self, name: str, share: int = 40, device: int = 0, awake: bool = False, **more: Any
    ) -> Server:
        client = Client(self, name, share, device, awake)
        self.clients.append(client)
        return Server(client, name, devices=(device,), **more)  # type: ignore[arg-type]


class Client:
    """In place of a ``SleepClient``."""

    def __init__(self, host: Host, name: str, share: int, device: int, awake: bool) -> None:
        self.host, self.name, self.url = host, name, f"http://{name}"
        self.share, self.device, self.awake = share, device, awake
        self.lost: str | None = None
        self.refuses: tuple[tuple[int, str | None], ...] = ()
        self.asked_for_bytes = 0
        self.when_asked: Callable[[], object] = lambda: None

    async def models(self, timeout_s: float | None = None) -> list[str]:
        return [self.name]

    async def is_sleeping(self, timeout_s: float | None = None) -> bool:
        self.when_asked()
        await asyncio.sleep(0.001)  # Others run meanwhile.
        return not self.awake

    async def is_gone(self, timeout_s: float) -> bool:
        return False

    async def would_lose(self, level: int) -> str | None:
        return self.lost if level == 2 else None

    async def ranks(self, timeout_s: float | None = None) -> list[dict[str, Any]]:
        self.asked_for_bytes += 1
        held = self.share if self.awake else 0
        rank = {
            "device": 0,
            "free": self.host.free(self.device),
            "total": 100,
            "held": held,
            "share": self.share,
            "enabled": True,
            "tags": {"weights": {"device": held, "host": 0, "disk": 0}},
            "host_memory": {"needed": held, "available": self.host.memory},
        }
        return [rank]

    async def sleep(self, level: int, place: str | None, **_: object) -> None:
        to = f" to {place}" if place else ""
        if (level, place) in self.refuses:
            self.host.events.append(f"{self.name} refuses level {level}{to}")
            raise CallFailed("no")
        self.awake = False
        self.host.events.append(f"{self.name} sleeps at level {level}{to}")

    async def wake_to_serve(self, slept_at: int) -> None:
        if not self.awake and self.share > self.host.free(self.device) - self.host.hidden:
            self.host.events.append(f"{self.name} lacks memory")
            raise OutOfMemory("no")
        self.awake = True
        self.host.events.append(f"{self.name} wakes")


class Users:
    """Requests in ``turns``. Each runs until it is let go."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def begin(self, server: Server) -> "asyncio.Task[None]":
        return asyncio.create_task(self.turns.enter(server))

    async def ask(self, server: Server) -> None:
        """A request that is served at once."""
        await asyncio.wait_for(self.begin(server), 20 * patience())
        self.turns.leave(server)


@asynccontextmanager
async def serving(servers: list[Server], settings: Settings = FIT) -> AsyncIterator[Users]:
    turns = Turns(servers, Metrics(), settings)
    task = asyncio.create_task(Schedule(turns).run())
    try:
        await until(lambda: all(server.state != "unknown" for server in servers))
        yield Users(turns)
    finally:
        task.cancel()
        await asyncio.wait({task})


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20 * patience()):
        while not condition():
            await asyncio.sleep(0.001)


def run(scenario: Awaitable[None]) -> None:
    async def main() -> None:
        await scenario

    asyncio.run(main())


def process() -> Any:
    """In place of a ``Launched`` that runs."""
    ends: list[str] = []

    async def end() -> None:
        ends.append("ends")

    return SimpleNamespace(
        pid=7, slept_at=0, error="", look=lambda: None, end=end, ends=ends, moved=None
    )


# --- Deep sleeps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deep_sleep", "event"), [("disk", "level 1 to disk"), ("level-2", "level 2")]
)
def test_one_without_host_memory_for_its_backup_sleeps_deeply(deep_sleep, event):
    async def scenario() -> None:
        host = Host()
        host.memory = 39
        a = host.server("a", awake=True, deep_sleep=deep_sleep)
        b = host.server("b", 80)
        async with serving([a, b]) as users:
            host.events.clear()
            await users.ask(b)
            assert host.events == [f"a sleeps at {event}", "b wakes"]
            assert a.deepest

    run(scenario())


def test_a_deep_sleep_that_is_refused_becomes_a_normal_one():
    async def scenario() -> None:
        host = Host()
        host.memory = 39
        a = host.server("a", awake=True, deep_sleep="disk", launched=process())
        b = host.server("b", 80)
        async with serving([a, b]) as users:
            a.client.refuses = ((1, "disk"),)  # type: ignore[attr-defined]
            host.events.clear()
            for server in (b, a, b):
                await users.ask(server)
            assert host.events == [
                *("a refuses level 1 to disk", "a sleeps at level 1", "b wakes"),
                *("b sleeps at level 2", "a wakes"),
                *("a sleeps at level 1", "b wakes"),  # It is not tried again so soon.
            ]
            assert a.launched is not None
            assert a.launched.ends == []  # type: ignore[attr-defined]

    run(scenario())


def one_that_loses(weights: str | None, host: Host) -> Server:
    """Awake, in a process whose end would lose these."""
    server = host.server("a", awake=True, launched=process())
    server.client.lost = weights  # type: ignore[attr-defined]
    return server


@pytest.mark.parametrize("lost", [None, "the weights"])
def test_one_that_cannot_sleep_for_want_of_host_memory_serves_on(lost):
    """Its end would lose weights that are in no checkpoint, or a start for nothing."""

    async def scenario() -> None:
        host = Host()
        host.memory = 39
        a, b = one_that_loses(lost, host), host.server("b", 80)
        async with serving([a, b]) as users:
            a.client.refuses = ((1, None), (2, None))  # type: ignore[attr-defined]
            with pytest.raises(CallFailed, match=f"a does not fall asleep, .*{lost or 'host'}"):
                await users.ask(b)
            assert a.launched is not None
            assert (a.state, a.launched.ends) == ("awake", [])  # type: ignore[attr-defined]
            await users.ask(a)

    run(scenario())


@pytest.mark.parametrize(("lost", "ends"), [(None, ["ends"]), ("the weights", [])])
def test_one_that_falls_asleep_no_more_is_ended_unless_that_loses_weights(lost, ends):
    async def scenario() -> None:
        host = Host()
        a, b = one_that_loses(lost, host), host.server("b", 80)
        async with serving([a, b]) as users:
            a.client.refuses = ((1, None),)  # type: ignore[attr-defined]
            request = users.begin(b)
            await until(lambda: request.done() or a.state == "stopping")
            assert a.launched is not None
            await until(lambda: a.launched.ends == ends)  # type: ignore[union-attr]
            request.cancel()
            await asyncio.wait({request})

    run(scenario())


# --- Bytes ---------------------------------------------------------------------------------------


def test_one_that_lacked_memory_beside_others_wakes_alone_and_then_beside_them_again():
    async def scenario() -> None:
        host = Host()
        a, b = host.server("a", awake=True), host.server("b")
        async with serving([a, b]) as users:
            host.hidden = 30
            host.events.clear()
            await users.ask(b)
            assert host.events == ["b lacks memory", "a sleeps at level 1", "b wakes"]
            host.hidden = 0
            await users.ask(a)
            await users.turns.put_to_sleep(b)
            await users.ask(b)
            assert (a.state, b.state) == ("awake", "awake")

    run(scenario())


@pytest.mark.parametrize("state", ["unknown", "asleep"])
def test_one_that_was_awake_all_the_time_has_nobody_go(state):
    async def scenario() -> None:
        host = Host()
        a, b = host.server("a", awake=True), host.server("b", 60, awake=True)
        settings = Settings(turn_s=0.0, max_awake=2)
        async with serving([a, b], settings) as users:
            await users.ask(b)
            users.turns.settings = FIT
            b.state, b.open = state, False
            host.events.clear()
            await users.ask(b)
            assert a.state == b.state == "awake"
            assert "a sleeps at level 1" not in host.events

    run(scenario())


def test_only_servers_on_the_devices_in_question_are_asked_for_their_bytes(monkeypatch):
    monkeypatch.setattr(schedule, "_FRESH_S", 0.0)

    async def scenario() -> None:
        host = Host()
        a, b = host.server("a"), host.server("b")
        far = host.server("far", device=1)
        async with serving([a, b, far]) as users:
            asked = [client.asked_for_bytes for client in host.clients]
            await users.ask(b)
            after = [client.asked_for_bytes for client in host.clients]
            assert after[0] > asked[0] and after[1] > asked[1] and after[2] == asked[2]

    run(scenario())


# --- Who goes when -------------------------------------------------------------------------------


def test_idle_ones_serve_until_all_that_go_with_them_have_ended_their_requests():
    async def scenario() -> None:
        host = Host()
        a, b = host.server("a"), host.server("b")
        c = host.server("c", 100)
        async with serving([a, b, c]) as users:
            await users.ask(a)
            await users.begin(b)
            host.events.clear()
            waits = users.begin(c)
            await until(lambda: not b.open)
            await users.ask(a)
            a.awake_since = a.last_used = 0.0  # so long ago that it is asked first
            await users.ask(a)
            assert host.events == []
            users.turns.leave(b)
            await waits
            assert sorted(host.events[:2]) == ["a sleeps at level 1", "b sleeps at level 1"]
            assert host.events[2:] == ["c wakes"]

    run(scenario())


def test_nobody_goes_for_a_request_whose_client_went_away():
    async def scenario() -> None:
        host = Host()
        a, b = host.server("a", 60, awake=True), host.server("b", 60)
        async with serving([a, b]) as users:
            host.events.clear()
            request = users.begin(b)
            b.client.when_asked = request.cancel  # type: ignore[attr-defined]
            await asyncio.wait({request})
            await users.turns.put_to_sleep(b)  # so the schedule is over with that
            assert (host.events, a.state) == ([], "awake")

    run(scenario())
