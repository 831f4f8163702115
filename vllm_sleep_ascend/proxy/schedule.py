# SPDX-License-Identifier: Apache-2.0
"""Decides whose turn it is on each device, and starts, wakes and puts servers to sleep accordingly.

A single task, ``Schedule.run``, does this, so sleeps and wakes never overlap. A server goes to
sleep only after its requests have finished, and another one wakes only after that. Starts and ends
take long, so each runs in a task of its own, while the server counts as awake.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator

from vllm_sleep_ascend.client.calls import CallFailed, NobodyListens
from vllm_sleep_ascend.proxy.launch.launched import Launched
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Turns

logger = logging.getLogger(__name__)

_ANY = -1  # a device that no server names
_RETRY_S = 5.0  # between two attempts to put an idle server to sleep
_NO_ANSWER_S = 60.0  # the same for one that did not answer, which takes long to find out


class Schedule:
    """Serves the requests that wait in ``turns``, by its settings."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.servers = turns.servers
        self.settings = turns.settings
        self.operations = turns.operations
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Sleep and wake servers for as long as the proxy lives."""
        try:
            await self._run()
        finally:
            for server in self.servers:
                for asked in (server.sleep_asked, server.stop_asked):
                    if asked is not None and not asked.done():
                        asked.set_exception(CallFailed("the proxy ends"))
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def _run(self) -> None:
        step: Callable[[], Awaitable[float | None]] = self._survey
        while True:
            self.turns.changed.clear()
            try:
                pause = await step()
                step = self._step
            except Exception as error:  # After any error, so that requests do not wait for ever.
                logger.exception("a switch failed")
                for server in self.servers:
                    server.fail(CallFailed(f"the switch failed: {error!r}"))
                pause = 1.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.turns.changed.wait(), pause)

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        async def done() -> None:
            try:
                await work
            except Exception:
                logger.exception("a start or an end failed")
            finally:
                self.turns.changed.set()

        task = asyncio.create_task(done())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _survey(self) -> float:
        """Query the servers' models and states, and put those to sleep that have no room."""
        servers = [server for server in self.servers if server.runs]
        await self.operations.learn_models(servers)
        errors = await asyncio.gather(*(self.operations.ask(server) for server in servers))
        awake: list[Server] = []
        for server, error in zip(servers, errors, strict=True):
            if error is not None:
                if server.launched is not None and server.runs:
                    self._start(server, server.launched)  # of an earlier proxy
            elif server.state == "awake" and not self._in_the_way(server, awake):
                awake.append(server)
            else:
                await self.operations.sleep(server)
        return 0

    async def _step(self) -> float | None:
        """Do what is possible now. Returns the seconds after which there may be more to do."""
        for server in self.servers:
            if server.launched is not None:
                server.launched.look()
                if server.state == "stuck":
                    server.fail(CallFailed(server.launched.error))
        pauses = [await self._retire()]
        await self._sleep_those_asked()
        self._end_those_asked()
        pauses.append(await self._go_down())
        leaving: set[Server] = set()
        claimed: list[Server] = []  # wanted before others, and not served yet
        for wanted in self._wanted():
            if self._has_to_rest(wanted, pauses) or self._in_the_way(wanted, claimed, 1):
                continue
            claimed.append(wanted)
            in_the_way = self._in_the_way(wanted)
            if not in_the_way:
                await self._bring_up(wanted)
                return 0
            awake = [server for server in in_the_way if server.state == "awake"]
            if not awake:
                for other in in_the_way:
                    if other.launched is not None and other.state == "stuck":
                        wanted.fail(CallFailed(other.launched.error))
                continue  # Another one starts or ends.
            leaves = min(awake, key=_leaves_first)
            rest = leaves.awake_since + self.settings.turn_s - time.monotonic()
            if leaves.busy and (rest > 0 or not leaves.served):
                pauses.append(rest if rest > 0 else None)  # Its turn continues.
                continue
            leaving.add(leaves)
            if await self._makes_way(leaves, wanted):
                return 0
        for server in self.servers:
            if server.state != "awake" or server in leaving or server.closing:
                continue
            if server.waiting and server.unsure:
                await self.operations.ask(server)
                if server.state != "awake":
                    return 0
            server.open_up()
        if await self._start_those_due(claimed, pauses):
            return 0
        return min((pause for pause in pauses if pause is not None), default=None)

    def _wanted(self) -> list[Server]:
        """Servers that have to be brought up, in their order."""
        return sorted(
            (s for s in self.servers if s.waiting and not s.on_device), key=Server.waits_since
        )

    def _has_to_rest(self, server: Server, pauses: list[float | None]) -> bool:
        """Whether it cannot start yet. If its last start has failed, its requests fail at once."""
        launched = server.launched
        if server.stop_asked is not None:
            return True  # It starts again once that is answered.
        if launched is None or server.state != "stopped":
            return False
        older = self.servers[: self.servers.index(server)]  # of before a reload
        for each in [s for s in older if s.name == server.name]:
            # It serves what has come, and ends first: both would have one record.
            if each.launched is not None and (each.launched.pid is not None or each.waiting):
                if each.state == "stuck":
                    server.fail(CallFailed(each.launched.error))
                return True
        rest = launched.rest_s()
        if rest > 0:
            pauses.append(rest)
            if launched.failed:
                server.fail(CallFailed(f"{launched.reason}; it starts again in {rest:.0f} s"))
        return rest > 0

    def _in_the_way(
        self, wanted: Server, among: list[Server] | None = None, room: int | None = None
    ) -> list[Server]:
        """Those on a device of ``wanted`` on which no other one fits."""
        room = self.settings.max_awake if room is None else room
        others = among if among is not None else [s for s in self.servers if s.on_device]
        found: dict[Server, None] = {}
        for place in self._places(wanted):
            there = [s for s in others if s is not wanted and place in self._places(s)]
            if len(there) >= room:
                found |= dict.fromkeys(there)
        return list(found)

    def _places(self, server: Server) -> frozenset[int]:
        """Devices; one that names none uses all that others name, and any further one."""
        if server.devices is not None:
            return frozenset(server.devices)
        return frozenset(d for s in self.servers for d in s.devices or ()) | {_ANY}

    async def _start_those_due(self, claimed: list[Server], pauses: list[float | None]) -> bool:
        """Start a server without a request, where none waits. One ahead of its first request puts
        idle ones to sleep, one that has died does not. Returns whether anything was done."""
        for server in self.servers:
            if server.due is None or server.state != "stopped" or server.retiring:
                continue
            if self._in_the_way(server, claimed, 1) or self._has_to_rest(server, pauses):
                continue
            in_the_way = self._in_the_way(server)
            if not in_the_way:
                await self._bring_up(server)
                if server.on_device:
                    return True
                pauses.append(_RETRY_S)
                continue
            idle = all(other.state == "awake" and not other.busy for other in in_the_way)
            if server.due == "preload" and idle:
                if await self.operations.sleep(min(in_the_way, key=_leaves_first)):
                    return True
                pauses.append(_RETRY_S)
        return False

    async def _retire(self) -> float | None:
        """End servers that models.yaml no longer has, once their requests have ended. One that the
        proxy has not started sleeps before it is forgotten. Returns the seconds until there is more
        to do."""
        pauses = []
        for server in [s for s in self.servers if s.retiring and not (s.busy or s.passing)]:
            launched = server.launched
            if launched is not None and launched.pid is not None:
                if server.state not in ("stopping", "stuck"):
                    self._end(server, launched)
                continue
            others = [other.url for other in self.servers if other is not server]
            if server.runs and server.state != "asleep" and server.url not in others:
                rest = server.rests_until - time.monotonic()
                if rest <= 0:
                    rest = await self._sleeps_or_is_gone(server)
                    server.rests_until = time.monotonic() + rest
                if rest > 0:
                    pauses.append(rest)
                    continue
            self.turns.remove(server)
            await server.client.close()
        return min(pauses, default=None)

    async def _sleeps_or_is_gone(self, server: Server) -> float:
        """Put a server to sleep if it answers. Returns the seconds until the next attempt; 0 if it
        sleeps, or is gone."""
        error = await self.operations.ask(server)
        if error is None:
            return 0 if await self.operations.sleep(server) else _RETRY_S
        return 0 if isinstance(error, NobodyListens) else _NO_ANSWER_S

    async def _bring_up(self, server: Server) -> None:
        if server.launched is None or server.state != "stopped":
            await self._wake(server)
        elif await self._others_sleep(server):
            self._start(server, server.launched)

    def _start(self, server: Server, launched: Launched) -> None:
        server.state = "starting"
        self._in_background(self.operations.start(server, launched))

    async def _makes_way(self, leaving: Server, wanted: Server) -> bool:
        """Close ``leaving``, and put it to sleep unless requests still run on it. Returns whether
        anything was decided."""
        # No server is put to sleep for an unreachable one.
        if leaving.open and wanted.runs:
            error = await self.operations.ask(wanted)
            if error is not None:
                wanted.fail(error)
                return True
        leaving.open = False
        if leaving.in_flight:
            return False
        await self._gives_way(leaving, wanted)
        return True

    async def _gives_way(self, leaving: Server, wanted: Server) -> bool:
        """Put ``leaving`` to sleep; end it if it cannot. Returns whether its memory is free. If
        not, ``wanted`` waits for its end, or its requests fail where no end is to come."""
        if await self.operations.sleep(leaving):
            return True
        launched = leaving.launched
        if leaving.on_device:
            pass  # It ends already.
        elif launched is not None and launched.pid is not None:
            logger.warning("%s does not fall asleep, so it is ended", leaving.name)
            self._end(leaving, launched)
        else:
            wanted.fail(CallFailed(f"{leaving.name} may be awake and does not fall asleep"))
        return False

    async def _wake(self, server: Server) -> None:
        if server.state == "unknown" and (error := await self.operations.ask(server)) is not None:
            await self.operations.clear_if_gone(server)
            if server.runs:
                server.fail(error)  # else they wait for its next start
        elif await self._others_sleep(server):
            await self.operations.wake(server)

    async def _others_sleep(self, server: Server) -> bool:
        """Put all others on its devices to sleep that may be awake because something else has woken
        or restarted them. Returns whether they sleep."""
        places = self._places(server)
        others = [s for s in self.servers if s is not server and s.runs and s.state != "awake"]
        others = [other for other in others if places & self._places(other)]
        sleeping = [other for other in others if other.state == "asleep"]
        await asyncio.gather(*(self.operations.ask(other) for other in sleeping))
        # A server that has never listed its models does not count: it is not up yet, or not vLLM.
        await self.operations.learn_models([other for other in others if not other.models])
        for other in others:
            known = other.models and other.runs and other.state != "asleep"
            ends = other.state in ("stopping", "stuck")
            if ends or (known and not await self._gives_way(other, server)):
                return False
        return True

    async def _sleep_those_asked(self) -> None:
        for server in self.servers:
            asked = server.sleep_asked
            if asked is None or server.in_flight or server.state in ("starting", "stopping"):
                continue
            slept = server.state in ("asleep", "stopped")
            if not slept and server.state != "stuck":
                slept = await self.operations.sleep(server)
            server.sleep_asked = None
            if slept:
                asked.set_result(None)
            else:
                asked.set_exception(CallFailed(f"{server.name} did not fall asleep; see the log"))

    def _end_those_asked(self) -> None:
        for server in self.servers:
            asked, launched = server.stop_asked, server.launched
            if asked is None or launched is None or server.in_flight or server.passing:
                continue
            server.due = None
            if server.state == "stopped":
                server.stop_asked = None
                asked.set_result(None)
            elif server.state == "stuck":
                server.stop_asked = None
                asked.set_exception(CallFailed(launched.error))
            elif server.state == "starting":
                launched.cancel()
            elif server.state != "stopping":
                self._end(server, launched)

    async def _go_down(self) -> float | None:
        """Have idle servers sleep, sleep deeper, or end. Returns the seconds until there is more to
        do."""
        pauses = []
        for server in self.servers:
            if server.busy or server.passing or not server.runs:
                continue
            for after, step in self._steps_down(server):
                rest = after - server.idle_s
                if rest > 0:
                    pauses.append(rest)
                else:
                    pauses.append(0 if await step(server) else after)
        return min(pauses, default=None)

    def _steps_down(
        self, server: Server
    ) -> Iterator[tuple[float, Callable[[Server], Awaitable[bool]]]]:
        """What is left to do with it, and after how many seconds; the furthest comes first."""
        if server.stop_after is not None and server.launched is not None:
            yield server.stop_after, self._stop
        if server.deep_sleep_after is not None and server.state == "asleep" and not server.deepest:
            yield server.deep_sleep_after, self.operations.deepen
        sleep_after = server.sleep_after or self.settings.idle_s
        if sleep_after and server.state == "awake":
            yield sleep_after, self.operations.sleep

    async def _stop(self, server: Server) -> bool:
        if server.launched is not None and server.runs:
            self._end(server, server.launched)
        return True

    def _end(self, server: Server, launched: Launched) -> None:
        server.state, server.open = "stopping", False
        self._in_background(self._ends(server, launched))

    async def _ends(self, server: Server, launched: Launched) -> None:
        if server.outlasted:
            try:
                await self.operations.sleep(server)  # which waits for background responses
            except Exception:
                logger.exception("%s does not sleep before its end", server.name)
            server.outlasted = False
        await launched.end()


def _leaves_first(server: Server) -> tuple[bool, float]:
    """The least recently used idle server, otherwise the busy one with the longest turn."""
    return (server.busy, server.awake_since if server.busy else server.last_used)
