# SPDX-License-Identifier: Apache-2.0
"""The servers of models.yaml: found again after a restart, changed by a reload, ended in order."""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.client.sleep_client import SleepClient
from vllm_sleep_ascend.proxy.config.lines import Invalid
from vllm_sleep_ascend.proxy.config.model import API_KEY
from vllm_sleep_ascend.proxy.config.models import FIT, Entry, Models, load
from vllm_sleep_ascend.proxy.launch.ending import end_stray
from vllm_sleep_ascend.proxy.launch.launched import Launched
from vllm_sleep_ascend.proxy.launch.state import Record, State
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Turns

logger = logging.getLogger(__name__)

_LOOK_S = 0.1  # seconds between two looks at the processes


@dataclass(frozen=True)
class Defaults:
    """What the command line says for all models."""

    level: int
    timeout_s: float
    door_key: str | None


class Fleet:
    """Keeps the servers of ``turns`` as the file has them; an asynchronous context manager.

    Args:
        leave: whether they go on when the proxy ends; the next one finds them.

    Raises:
        Invalid: the file has problems.
    """

    def __init__(
        self, file: str, defaults: Defaults, turns: Turns, state: State, leave: bool
    ) -> None:
        self._file, self._defaults = file, defaults
        self._turns, self._state, self._leave = turns, state, leave
        self._ports: set[int] = set()
        self._otherwise = turns.settings
        self._entries = self._take(load(file, defaults.door_key, defaults.level))
        self._replaced: list[SleepClient] = []
        self._watching: asyncio.Task[None] | None = None
        self._at_once = self._closed = False

    async def __aenter__(self) -> Self:
        records = {record.name: record for record in self._state.records()}
        self._ports |= {port for r in records.values() for port in (r.port, r.admin_port)}
        for entry in self._entries.values():
            server = self._make(entry)
            record = records.get(entry.name)
            if server.launched is not None and record is not None:
                adopted = record.identity == entry.identity and server.launched.adopt(record)
                if adopted:
                    del records[entry.name]
                    server.state, server.slept_at = "unknown", record.slept_at or None
                    logger.info("%s still runs, as process %d", entry.name, record.pid)
            self._turns.add(server)
        await asyncio.gather(*map(self._end_stray, records.values()))
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self._closed = True  # the schedule may still run
        launched = [server.launched for server in self._turns.servers if server.launched]
        for each in launched:
            each.close()
        if not self._leave:
            await asyncio.gather(*(each.end(0 if self._at_once else None) for each in launched))
        for client in self._replaced:
            await client.close()
        self._state.close()

    def hurry(self) -> None:
        """Give servers no more time to end."""
        self._at_once = True
        for server in self._turns.servers:
            if server.launched is not None:
                server.launched.hurry()

    def reload(self) -> None:
        """Read the file again. One with problems changes nothing."""
        if self._closed:
            return
        try:
            models = load(self._file, self._defaults.door_key, self._defaults.level)
        except Invalid as error:
            for problem in error.problems:
                logger.error("%s", problem)
            logger.error("%s has problems, and nothing was changed", self._file)
            return
        max_before = self._turns.settings.max_awake
        entries = self._take(models)
        if (max_awake := self._turns.settings.max_awake) != max_before:
            logger.info("%s: max_awake is %s", self._file, max_awake or FIT)
        changes = {"added": 0, "changed": 0, "removed": 0}
        for server in self._turns.current:
            entry, before = entries.get(server.name), self._entries[server.name]
            if entry is None:
                server.retiring = True
                changes["removed"] += 1
            elif entry.identity != before.identity:
                server.retiring = True
                after = self._make(entry)
                if server.launched is not None and server.launched.pid is not None:
                    after.due = after.due or ("restart" if entry.model.command else None)
                self._turns.add(after)
                changes["changed"] += 1
            elif entry != before:
                self._adjust(server, entry, before)
                changes["changed"] += 1
        for name in entries.keys() - self._entries.keys():
            self._turns.add(self._make(entries[name]))
            changes["added"] += 1
        self._entries = entries
        self._turns.changed.set()
        logger.info("%s: %s", self._file, ", ".join(f"{n} {how}" for how, n in changes.items()))

    def _take(self, models: Models) -> dict[str, Entry]:
        """Its entries by their names, and what holds for all of them."""
        settings, said = self._otherwise, models.max_awake
        if said is not None:
            settings = replace(settings, max_awake=None if said == FIT else said)
        self._turns.settings = settings
        return {entry.name: entry for entry in models.entries}

    def _make(self, entry: Entry) -> Server:
        model = entry.model
        launched = Launched(entry, self._state, self._ports) if model.command else None
        server = Server(self._client(entry, launched), entry.name, launched=launched)
        self._describe(server, entry)
        if launched is not None:
            server.state = "stopped"
            server.due = "preload" if model.preload else None
            launched.moved = self._calls(server, self._moved)
            launched.died = self._calls(server, self._died)
            launched.stuck = self._calls(server, self._stuck)
            launched.gone = self._calls(server, self._gone)
        return server

    def _describe(self, server: Server, entry: Entry) -> None:
        server.names = (entry.name, *entry.model.aliases)
        server.level = entry.model.level or self._defaults.level
        server.devices = entry.model.devices
        server.priority, server.group = entry.model.priority, entry.group
        server.sleep_after = entry.model.sleep_after
        server.deep_sleep_after = entry.model.deep_sleep_after
        server.deep_sleep = entry.model.deep_sleep
        server.start_share = entry.model.memory_share
        server.stop_after = entry.model.stop_after

    def _adjust(self, server: Server, entry: Entry, before: Entry) -> None:
        """What changes without another process."""
        self._describe(server, entry)
        if server.launched is not None:
            server.launched.entry = entry
            if entry.model.preload and not before.model.preload and server.state == "stopped":
                server.due = "preload"
        if entry.model.wake_timeout_s != before.model.wake_timeout_s:
            self._replaced.append(server.client)  # a call may still run
            server.client = self._client(entry, server.launched)

    def _client(self, entry: Entry, launched: Launched | None) -> SleepClient:
        model = entry.model
        url = launched.url if launched is not None else model.url
        assert url is not None  # by the validation
        return SleepClient(
            url,
            model.wake_timeout_s or self._defaults.timeout_s,
            api_key=model.env.get(API_KEY) or os.environ.get(API_KEY),
            door=launched.door if launched is not None else model.admin,
            door_key=entry.door_key,
        )

    def _calls(self, server: Server, what: Callable[[Server], None]) -> Callable[[], None]:
        def call() -> None:
            what(server)
            self._turns.changed.set()

        return call

    def _moved(self, server: Server) -> None:
        self._replaced.append(server.client)
        if server.launched is not None:
            server.client = self._client(server.launched.entry, server.launched)

    def _died(self, server: Server) -> None:
        server.state, server.open = "stopping", False
        server.due = server.due or "restart"
        self._turns.metrics.deaths.labels(server.name).inc()

    def _stuck(self, server: Server) -> None:
        server.state = "stuck"

    def _gone(self, server: Server) -> None:
        server.models, server.slept_at = [], None
        server.figures, server.does_not_fit, server.deepens_again_at = None, False, 0.0
        if server.state != "starting":
            server.state = "stopped"

    async def _end_stray(self, record: Record) -> None:
        """End a server of an earlier proxy that is not one of these."""
        entry = self._entries.get(record.name)
        try:
            if await end_stray(record, entry, self._state):
                logger.info("%s of an earlier proxy has ended", record.name)
        except CallFailed as error:
            logger.error("%s", error)
            for server in self._turns.servers:
                if server.name == record.name and server.launched is not None:
                    server.launched.wait_out(record)
            return
        self._state.forget(record.name)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            for server in self._turns.servers:
                if server.launched is not None:
                    server.launched.look()
