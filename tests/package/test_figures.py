# SPDX-License-Identifier: Apache-2.0
"""What the proxy makes of the bytes that ranks report, and the view that it chooses by."""

import asyncio
import math
import time
from typing import Any

import pytest
from helpers.tells import Tells

from vllm_sleep_ascend.client.calls import CallFailed, NoServer, TooLate
from vllm_sleep_ascend.client.sleep_client import SleepClient
from vllm_sleep_ascend.proxy.figures import Copy, Figures, Memory, Use, figures
from vllm_sleep_ascend.proxy.servers import Server, State
from vllm_sleep_ascend.proxy.turns import Settings
from vllm_sleep_ascend.proxy.view import ANY, room_for_a_start, view

FIT = Settings(max_awake=None)


def rank(device: int = 0, held: int = 70, free: int = 30, **more: Any) -> Any:
    tags = tags_of(weights=20, kv_cache=40, sleep_persistent=5)
    device_bytes = {"device": device, "free": free, "total": 100, "held": held, "share": 80}
    return {**device_bytes, "enabled": True, "tags": tags, **more}


def tags_of(**device: int) -> Any:
    return {tag: {"device": size, "host": 3, "disk": 1} for tag, size in device.items()}


def asleep_rank() -> Any:
    return rank(held=12, free=88, tags=tags_of(weights=0, kv_cache=0, sleep_persistent=5))


def server(state: State = "asleep", devices: tuple[int, ...] | None = (0,), **more: Any) -> Server:
    server = Server(SleepClient("http://127.0.0.1:9"), devices=devices, **more)
    server.state = state
    return server


def use(free: int = 30, held: int = 10, asleep: int = 10, share: int = 80) -> Use:
    return Use(free, 100, held, asleep, share)


def told(at: float = 1.0, **uses: Use) -> Figures:
    return Figures(at, {int(device[1:]): each for device, each in uses.items()}, 7, 9)


def test_before_its_first_sleep_a_server_gives_back_its_tags():
    found = figures([rank(resident={"context": 4})], {}, sleeps=False, now=0)
    held_for = {"weights": 20, "kv_cache": 40, "sleep_persistent": 5, "context": 4}
    (awake,) = found.devices.values()
    assert awake == Use(30, 100, 70, 10, 80, held_for)
    assert found.places == {"device": 65, "host": 9, "disk": 3}
    assert (awake.takes, awake.may_take) == (70, 10)


def test_what_it_holds_asleep_is_remembered():
    asleep = figures([asleep_rank()], {}, sleeps=True, now=0).devices
    held_for = {"weights": 0, "kv_cache": 0, "sleep_persistent": 5}
    assert asleep == {0: Use(88, 100, 12, 12, 80, held_for)}
    assert figures([rank()], asleep, sleeps=False, now=0).devices[0].takes == 80 - 12


def test_one_that_something_else_has_woken_does_not_hold_that_asleep():
    asleep = figures([asleep_rank()], {}, sleeps=True, now=0).devices
    assert figures([rank()], asleep, sleeps=True, now=0).devices[0].takes == 80 - 12
    assert figures([rank()], {}, sleeps=True, now=0).devices[0].takes == 80 - 10


def test_one_that_holds_more_than_its_share_takes_that():
    (awake,) = figures([rank(held=95)], {}, sleeps=False, now=0).devices.values()
    assert (awake.takes, awake.may_take) == (95 - (95 - 60), 0)


def test_ranks_on_a_device_are_added_and_devices_are_not():
    found = figures([rank(0), rank(0, free=29), rank(1)], {}, sleeps=False, now=0).devices
    one = {"weights": 20, "kv_cache": 40, "sleep_persistent": 5}
    two = {tag: 2 * size for tag, size in one.items()}
    assert found == {0: Use(29, 100, 140, 20, 160, two), 1: Use(30, 100, 70, 10, 80, one)}


LAST = {"operation": "wake", "copied_bytes": 1, "seconds": 0.5}


@pytest.mark.parametrize(
    "ranks",
    [
        None,
        [],
        [rank(enabled=False)],
        [{"device": 0, "free": 1}],
        7,  # from here on of another form than a status has
        {"a": 1},
        "ranks",
        [7],
        [None],
        [[]],
        [{"share": 1}],
        [rank(free=None), rank()],
        [rank(free=1.5)],
        [{**rank(), "device": None}],
        [rank(host_memory={})],
        [rank(tags=[])],
        [rank(tags={"weights": 5})],
        [rank(tags={"weights": {}})],
        [rank(tags=tags_of(weights=-1))],
        [rank(tags={"weights": {"device": "much", "host": 0, "disk": 0}})],
    ],
)
def test_a_server_that_does_not_tell(ranks):
    assert figures(ranks, {}, sleeps=False, now=0).devices == {}


@pytest.mark.parametrize(
    "odd",
    [
        {"resident": [1]},
        {"resident": {"context": "much"}},
        {"last_operation": 7},
        {"last_operation": {"operation": "wake"}},
        {"last_operation": {**LAST, "seconds": float("nan")}},
    ],
)
def test_what_only_the_page_shows_does_not_hide_the_bytes(odd):
    plain, found = (figures([rank(**more)], {}, sleeps=False, now=0) for more in ({}, odd))
    assert found == plain


def test_a_place_that_is_not_told_has_no_bytes():
    ranks = [rank(tags={"weights": {"device": 20}})]
    found = figures(ranks, {}, sleeps=False, now=0)
    assert found.places == {"device": 20, "host": 0, "disk": 0} and found.devices


def test_the_last_copy_is_that_of_all_ranks():
    slower = {**LAST, "seconds": 0.75}
    ranks = [rank(last_operation=last) for last in (LAST, slower)]
    assert figures(ranks, {}, sleeps=False, now=0).copy == Copy("wake", 2, 0.75)
    for other in (None, {**LAST, "operation": "sleep level 1"}):
        ranks = [rank(last_operation=last) for last in (LAST, other)]
        assert figures(ranks, {}, sleeps=False, now=0).copy is None


def test_servers_are_not_asked_more_often_than_needed():
    clients = Tells([rank()]), Tells(None), Tells(TooLate("it sleeps just now"))
    servers = [Server(client) for client in clients]
    tells, other, late = servers
    for each in servers:
        each.state = "awake"
    memory = Memory(servers)

    async def scenario() -> None:
        async def asked(fresh_s: float = 60.0) -> list[int]:
            await memory.refresh(servers, fresh_s)
            return [client.asked for client in clients]

        assert await asked() == [1, 1, 1]
        assert await asked() == [1, 1, 1]
        assert await asked(0.0) == [2, 1, 1]  # the figures of one that tells grow old
        other.state = "asleep"  # which may give back what others are to take
        assert await asked() == [3, 2, 1]
        late.state = "asleep"  # it may answer again
        assert await asked() == [4, 2, 2]
        tells.state = "stopped"
        assert await asked(0.0) == [4, 2, 2]

    asyncio.run(scenario())


def test_what_a_question_finds():
    client = Tells([rank()])
    one = Server(client)
    one.state = "awake"
    memory = Memory([one])

    async def found(said: Any) -> Figures | None:
        client.said = said
        await memory.refresh([one], 0.0)
        return one.figures

    async def scenario() -> None:
        first = await found([rank()])
        assert first is not None and first.devices
        assert await found(CallFailed("an error")) is first
        gone = await found(NoServer("gone"))
        assert gone is not None  # asleep and share are known yet
        assert (gone.devices, gone.at) == (first.devices, -math.inf)
        assert await found(TooLate("hangs")) is gone

    asyncio.run(scenario())


def test_only_the_page_asks_one_that_was_late():
    client = Tells(TooLate("it sleeps just now"))
    late = Server(client)
    late.state = "awake"
    memory = Memory([late])

    async def scenario() -> None:
        await memory.refresh([late], 0.0)
        assert client.asked == 1
        await memory.refresh([late], 0.0)
        assert client.asked == 1
        client.said = [rank()]
        await memory.refresh([late], 0.0, silent_too=True)
        assert client.asked == 2 and late.figures is not None and late.figures.devices
        await memory.refresh([late], 0.0)  # it answers again
        assert client.asked == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("odd", [[], 7])
def test_one_odd_answer_does_not_stand_for_ever(odd, monkeypatch):
    client = Tells(odd)
    one = Server(client)
    one.state = "awake"
    memory = Memory([one])

    async def scenario() -> None:
        await memory.refresh([one], 0.0)
        await memory.refresh([one], 0.0)
        assert client.asked == 1
        now = time.monotonic() + 61
        monkeypatch.setattr(time, "monotonic", lambda: now)
        client.said = [rank()]
        await asyncio.gather(*memory.ask([one], 0.0))
        assert client.asked == 2 and one.figures is not None and one.figures.devices

    asyncio.run(scenario())


def test_what_was_said_before_a_change_does_not_count():
    one = Server(client := Tells([rank()]))
    one.state = "awake"
    memory = Memory([one])

    async def scenario() -> None:
        (before,) = memory.ask([one], 60.0)
        one.state = "asleep"
        client.said = [asleep_rank()]
        await asyncio.gather(before, memory.refresh([one], 60.0))
        assert one.figures is not None and one.figures.devices[0].asleep == 12
        assert client.asked == 2

    asyncio.run(scenario())


def test_host_memory_is_that_of_all_ranks():
    hosts = [{"host_memory": {"needed": 3, "available": left}} for left in (9, 8)]
    found = figures([rank(**host) for host in hosts], {}, sleeps=False, now=0)
    assert (found.host_needed, found.host_free) == (6, 8)


def test_a_view_has_bytes_by_the_devices_of_the_file():
    two = server(devices=(4, 2), figures=told(_0=use(30), _1=use(50, share=60)))
    seen = view([two], FIT)
    assert seen.servers[0].takes == {4: 70, 2: 50}
    assert dict(seen.free) == {4: 30, 2: 50}
    assert (seen.servers[0].host, seen.host_free, seen.max_awake) == (7, 9, None)
    two.level = 2  # which keeps no backup of the weights
    assert view([two], FIT).servers[0].host == 0


def test_free_bytes_are_the_newest_minus_what_those_awake_may_take():
    old = server("awake", figures=told(1.0, _0=use(90, held=50)))
    new = server(figures=told(2.0, _0=use(40)))
    assert dict(view([new, old], FIT).free) == {0: 40 - 30}
    assert dict(view([old], FIT).free) == {0: 90 - 30}


def test_the_newest_host_memory_that_is_told_counts_and_only_by_bytes():
    tells = server(figures=told(1.0, _0=use()))
    stock = server(figures=Figures(2.0, {}))
    assert view([tells, stock], FIT).host_free == 9
    assert view([tells, stock], Settings()).host_free is None


def test_one_in_an_unknown_state_takes_what_it_does_not_hold():
    """It may be awake; and one that ends gives back what it holds."""
    woken = use(held=75)
    assert view([server("unknown", figures=told(_0=woken))], FIT).servers[0].takes == {0: 5}
    assert view([server("stopping", figures=told(_0=use()))], FIT).servers[0].takes == {0: 10}


def test_servers_without_devices_share_all():
    anywhere = server(devices=None, figures=told(_0=use(30), _1=use(20, share=90)))
    named = server(devices=(3,), figures=told(_0=use(50)))
    seen = view([anywhere, named], FIT)
    assert seen.servers[0].takes == {ANY: 80, 3: 80}
    assert dict(seen.free) == {ANY: 20, 3: 50}


@pytest.mark.parametrize(
    "unknown",
    [
        {"figures": None},
        {"figures": told()},
        {"figures": told(_0=use(), _1=use())},  # of one device
        {"figures": told(_0=use()), "does_not_fit": True},
        {"figures": told(_0=use()), "state": "stopped"},
        {"figures": told(_0=use()), "state": "starting"},
    ],
)
def test_one_with_unknown_bytes(unknown):
    assert view([server(**unknown)], FIT).servers[0].takes is None


def test_a_start_takes_what_its_command_says():
    other = server(figures=told(_0=use(60)))
    starts = server("stopped", start_share=0.305)
    seen = view([other, starts], FIT)
    assert (seen.servers[1].takes, dict(seen.free)) == ({0: 31}, {0: 60})
    starts.state = "starting"
    assert dict(view([other, starts], FIT).free) == {0: 60 - 31}
    assert view([starts], FIT).servers[0].takes is None  # of how much is not known


def test_what_one_that_starts_holds_already_is_not_counted_twice():
    other, starts = server(figures=told(1.0, _0=use(60))), server("stopped", start_share=0.3)
    starts.start_room = room_for_a_start([other, starts])
    starts.state = "starting"
    for free in (60, 45, 30):  # The start goes on.
        other.figures = told(2.0, _0=use(free))
        assert dict(view([other, starts], FIT).free) == {0: 30}
    second = server("stopped", start_share=0.1)
    second.start_room = room_for_a_start([other, starts, second])
    second.state = "starting"
    assert dict(view([other, starts, second], FIT).free) == {0: 20}
    # Another one has woken meanwhile, and holds 30 more; then the first has come up.
    other.figures = told(3.0, _0=use(0, held=40))
    assert dict(view([other, starts, second], FIT).free) == {0: -10}
    starts.state, starts.figures = "awake", told(4.0, _0=use(0, held=30, share=30))
    assert dict(view([other, starts, second], FIT).free) == {0: -10}


def test_what_a_view_says_of_a_server():
    one = server("unknown", priority=3, due="preload", sleep_s=2.0, wake_s=3.0)
    other = server("stopped", due="preload")
    seen = view([one, other], FIT, resting=[other]).servers
    assert (seen[0].state, seen[0].priority, seen[0].due) == ("off", 3, None)
    assert (seen[0].switch_s, seen[0].ready) == (5.0, True)
    assert (seen[1].due, seen[1].ready) == ("preload", False)
