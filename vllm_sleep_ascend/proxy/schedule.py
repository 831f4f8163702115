# SPDX-License-Identifier: Apache-2.0
"""Starts, wakes and puts servers to sleep as ``choice`` decides.

A single task, ``Schedule.run``, does this, so sleeps and wakes never overlap. A server goes to
sleep only after its requests have finished, and another one wakes only after that. Starts and ends
take long, so each runs in a task of its own, while the server counts as awake.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping

from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.proxy.choice import Step, choose, surplus
from vllm_sleep_ascend.proxy.idle import RETRY_S, Background, Idle
from vllm_sleep_ascend.proxy.launch.launched import Launched
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Turns
from vllm_sleep_ascend.proxy.view import places, room_for_a_start, view

logger = logging.getLogger(__name__)

_FRESH_S = 1.0  # The choice by bytes goes by figures that are no older.


class Schedule:
    """Serves the requests that wait in ``turns``, by its settings."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.servers = turns.servers
        self.operations = turns.operations
        self.background = Background(turns.changed)
        self.idle = Idle(turns, self.background)

    @property
    def fits_by_bytes(self) -> bool:
        return self.turns.settings.max_awake is None

    async def run(self) -> None:
        """Sleep and wake servers for as long as the proxy lives."""
        try:
            await self._run()
        finally:
            for server in self.servers:
                for asked in (server.sleep_asked, server.stop_asked):
                    if asked is not None and not asked.done():
                        asked.set_exception(CallFailed("the proxy ends"))
            await self.background.cancel()

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

    async def _survey(self) -> float:
        """Query the servers' models and states, and put those to sleep that have no room."""
        servers = [server for server in self.servers if server.runs]
        await self.operations.learn_models(servers)
        errors = await asyncio.gather(*(self.operations.ask(server) for server in servers))
        for server, error in zip(servers, errors, strict=True):
            if error is None:
                if server.state != "awake":
                    await self.operations.sleep(server)
            elif server.launched is not None and server.runs:
                self._start(server, server.launched)  # of an earlier proxy
        if self.fits_by_bytes:
            await self.turns.memory.refresh(self.servers, _FRESH_S)
        for key in surplus(view(self.servers, self.turns.settings)):
            await self.operations.sleep(self.servers[key])
        return 0

    async def _step(self) -> float | None:
        """Do what is possible now. Returns the seconds after which there may be more to do."""
        for server in self.servers:
            if server.launched is not None:
                server.launched.look()
                if server.state == "stuck":
                    server.fail(CallFailed(server.launched.error))
        pauses = [await self.idle.retire()]
        await self.idle.sleep_those_asked()
        self.idle.end_those_asked()
        pauses.append(await self.idle.go_down())
        wanted = [s for s in self.servers if (s.waiting or s.due) and not s.on_device]
        resting = [server for server in wanted if self._has_to_rest(server, pauses)]
        if self.fits_by_bytes:
            near = self._beside(s for s in wanted if s not in resting)
            await self.turns.memory.refresh(near, _FRESH_S)
        servers = dict(enumerate(self.servers))
        choice = choose(view(self.servers, self.turns.settings, resting))
        pauses.append(choice.later_s)
        for step in choice.steps:
            if await self._take(step, servers, pauses):
                return 0
        leaving = {servers[key] for step in choice.steps for key in step.leaving}
        for server in self.servers:
            if server.state != "awake" or server.closing or (server in leaving and not server.open):
                continue
            if server.waiting and server.unsure:
                await self.operations.ask(server)
                if server.state != "awake":
                    return 0
            server.open_up()
        return min((pause for pause in pauses if pause is not None), default=None)

    async def _take(
        self, step: Step, servers: Mapping[int, Server], pauses: list[float | None]
    ) -> bool:
        """Returns whether anything was done."""
        wanted, leaving = servers[step.wanted], {key: servers[key] for key in step.leaving}
        if step.never:
            wanted.fail(CallFailed(step.never))
            return True
        asked = bool(wanted.waiting)
        if wanted.on_device or not (asked or wanted.due):
            return True  # by now, so it is chosen again
        if not leaving:
            await self._bring_up(wanted)
            done = asked or wanted.on_device
        elif asked:
            return await self._make_way(wanted, step, leaving)
        elif any(each.busy for each in leaving.values()):
            return True
        else:
            key, first = next(iter(leaving.items()))
            done = await self.operations.sleep(first, key in step.deep)
        if not done:
            pauses.append(RETRY_S)
        return done

    def _beside(self, wanted: Iterable[Server]) -> list[Server]:
        """All servers on their devices."""
        there = [places(server, self.servers) for server in wanted]
        return [s for s in self.servers if any(each & places(s, self.servers) for each in there)]

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

    async def _bring_up(self, server: Server) -> None:
        if server.launched is None or server.state != "stopped":
            await self._wake(server)
        elif await self._others_sleep(server):
            server.start_room = room_for_a_start(self.servers)
            self._start(server, server.launched)

    def _start(self, server: Server, launched: Launched) -> None:
        server.state = "starting"
        self.background.begin(self.operations.start(server, launched))

    async def _make_way(self, wanted: Server, step: Step, leaving: Mapping[int, Server]) -> bool:
        """Close those that leave and on which requests run; others serve until these have ended.
        Then put one to sleep. Returns whether anything was decided."""
        # No server is put to sleep for an unreachable one.
        unsure = wanted.state == "unknown"
        if wanted.runs and (unsure or any(each.open for each in leaving.values())):
            error = await self.operations.ask(wanted)
            if error is not None:
                wanted.fail(error)
            if error is not None or wanted.on_device or not wanted.waiting:
                return True
        busy = [each for each in leaving.values() if each.in_flight]
        for each in busy or leaving.values():
            each.open = False
        if busy:
            return False
        key, first = next(iter(leaving.items()))
        await self._gives_way(first, wanted, key in step.deep)
        return True

    async def _gives_way(self, leaving: Server, wanted: Server, deep: bool = False) -> bool:
        """Put ``leaving`` to sleep; end it if it cannot, unless host memory alone is missing
        (``deep``), or its weights would be lost. Returns whether its memory is free. If not,
        ``wanted`` waits for its end, or its requests fail where no end is to come."""
        if await self.operations.sleep(leaving, deep):
            return True
        launched = leaving.launched
        if leaving.on_device:
            pass  # It ends already.
        elif why := await self.operations.keeps_running(leaving, lacks_host=deep):
            wanted.fail(CallFailed(f"{leaving.name} does not fall asleep, {why}"))
        elif launched is not None and launched.pid is not None:
            logger.warning("%s does not fall asleep, so it is ended", leaving.name)
            self.idle.end(leaving, launched)
        else:
            wanted.fail(CallFailed(f"{leaving.name} may be awake and does not fall asleep"))
        return False

    async def _wake(self, server: Server) -> None:
        if server.state == "unknown" and (error := await self.operations.ask(server)) is not None:
            await self.operations.clear_if_gone(server)
            if server.runs:
                server.fail(error)  # else they wait for its next start
        elif await self._others_sleep(server):
            there = places(server, self.servers)
            near = any(s.on_device and there & places(s, self.servers) for s in self.servers)
            await self.operations.wake(server, beside_others=near and self.fits_by_bytes)

    async def _others_sleep(self, server: Server) -> bool:
        """Put all others on its devices to sleep that may be awake because something else has woken
        or restarted them. Returns whether they sleep."""
        there = places(server, self.servers)
        others = [s for s in self.servers if s is not server and s.runs and s.state != "awake"]
        others = [other for other in others if there & places(other, self.servers)]
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
