# SPDX-License-Identifier: Apache-2.0
"""What becomes of servers that nobody needs: they sleep, sleep deeper, end, and are forgotten."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator

from vllm_sleep_ascend.client.calls import CallFailed, NoServer
from vllm_sleep_ascend.proxy.launch.launched import Launched
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Turns

logger = logging.getLogger(__name__)

RETRY_S = 5.0
"""Seconds between two attempts to put an idle server to sleep."""

_NO_ANSWER_S = 60.0  # the same for one that did not answer, which takes long to find out


class Background:
    """Starts and ends, which take long. Each sets ``changed`` when it is over."""

    def __init__(self, changed: asyncio.Event) -> None:
        self._changed = changed
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[None, None, None]) -> None:
        async def done() -> None:
            try:
                await work
            except Exception:
                logger.exception("a start or an end failed")
            finally:
                self._changed.set()

        task = asyncio.create_task(done())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


class Idle:
    """Puts servers of ``turns`` to sleep, or ends them, without regard to others."""

    def __init__(self, turns: Turns, background: Background) -> None:
        self._turns, self._servers = turns, turns.servers
        self._operations, self._background = turns.operations, background

    async def sleep_those_asked(self) -> None:
        for server in self._servers:
            asked = server.sleep_asked
            if asked is None or server.in_flight or server.state in ("starting", "stopping"):
                continue
            slept = server.state in ("asleep", "stopped")
            if not slept and server.state != "stuck":
                slept = await self._operations.sleep(server)
            server.sleep_asked = None
            if slept:
                asked.set_result(None)
            else:
                asked.set_exception(CallFailed(f"{server.name} did not fall asleep; see the log"))

    def end_those_asked(self) -> None:
        for server in self._servers:
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
                self.end(server, launched)

    async def retire(self) -> float | None:
        """End servers that models.yaml no longer has, once their requests have ended. One that the
        proxy has not started sleeps before it is forgotten. Returns the seconds until there is more
        to do."""
        pauses = []
        for server in [s for s in self._servers if s.retiring and not (s.busy or s.passing)]:
            launched = server.launched
            if launched is not None and launched.pid is not None:
                if server.state not in ("stopping", "stuck"):
                    self.end(server, launched)
                continue
            others = [other.url for other in self._servers if other is not server]
            if server.runs and server.state != "asleep" and server.url not in others:
                rest = server.rests_until - time.monotonic()
                if rest <= 0:
                    rest = await self._sleeps_or_is_gone(server)
                    server.rests_until = time.monotonic() + rest
                if rest > 0:
                    pauses.append(rest)
                    continue
            self._turns.remove(server)
            await server.client.close()
        return min(pauses, default=None)

    async def _sleeps_or_is_gone(self, server: Server) -> float:
        """Put a server to sleep if it answers. Returns the seconds until the next attempt; 0 if it
        sleeps, or is gone."""
        error = await self._operations.ask(server)
        if error is None:
            return 0 if await self._operations.sleep(server) else RETRY_S
        return 0 if isinstance(error, NoServer) else _NO_ANSWER_S

    async def go_down(self) -> float | None:
        """Have idle servers sleep, sleep deeper, or end. Returns the seconds until there is more to
        do."""
        pauses = []
        for server in self._servers:
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
            yield server.deep_sleep_after, self._operations.deepen
        sleep_after = server.sleep_after or self._turns.settings.idle_s
        if sleep_after and server.state == "awake":
            yield sleep_after, self._operations.sleep

    async def _stop(self, server: Server) -> bool:
        if server.launched is not None and server.runs:
            self.end(server, server.launched)
        return True

    def end(self, server: Server, launched: Launched) -> None:
        server.state, server.open = "stopping", False
        self._background.begin(self._ends(server, launched))

    async def _ends(self, server: Server, launched: Launched) -> None:
        if server.outlasted:
            try:
                await self._operations.sleep(server)  # which waits for background responses
            except Exception:
                logger.exception("%s does not sleep before its end", server.name)
            server.outlasted = False
        await launched.end()
