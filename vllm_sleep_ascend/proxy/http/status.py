# SPDX-License-Identifier: Apache-2.0
"""What the proxy knows of its servers and their memory, for /status and the page."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.client.calls import CallFailed, NobodyListens
from vllm_sleep_ascend.proxy.http.told import Told, read
from vllm_sleep_ascend.proxy.operations import ASK_S
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Turns

FRESH_S = 2.0
"""Seconds after which a server on which requests run is asked for its memory again."""

IDLE_FRESH_S = 10.0
"""The same for the others, as long as they do not change their state."""

RECENT_S = 20.0
"""Seconds for which figures count as those of now."""


@dataclass
class _Report:
    """``number``: of the server's state when it was asked; ``told_number``: when it told."""

    told: Told | None = None
    told_at: float = 0.0
    told_number: int = 0
    at: float = float("-inf")
    number: int = 0
    tells: bool = True
    asking: "asyncio.Task[None] | None" = None


class Status:
    """Describes the servers of ``turns``. They are asked for their memory only by ``look`` and
    ``ask``: while somebody wants to see it."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._reports: WeakKeyDictionary[Server, _Report] = WeakKeyDictionary()

    def describe(self) -> dict[str, object]:
        servers = self._turns.servers
        return {
            "servers": [self._server(server) for server in servers],
            "devices": self._devices(servers),
        }

    def look(self, at_once: bool = False) -> "list[asyncio.Task[None]]":
        """Ask those servers whose report is older, or of another state. Returns what runs."""
        now, asking = time.monotonic(), []
        for server in self._turns.servers:
            if not server.runs:
                self._reports.pop(server, None)
                continue
            report = self._reports.setdefault(server, _Report())
            # One that does not tell would log each question.
            is_old = report.tells and now - report.at >= (FRESH_S if server.busy else IDLE_FRESH_S)
            changed = report.number != server.history.number
            if report.asking is None and (at_once or is_old or changed):
                report.asking = asyncio.create_task(self._ask(server, report))
            if report.asking is not None:
                asking.append(report.asking)
        return asking

    async def ask(self) -> None:
        """Ask all servers; returns once they have answered, or are late."""
        if asking := self.look(at_once=True):
            await asyncio.wait(asking)

    async def _ask(self, server: Server, report: _Report) -> None:
        report.number = number = server.history.number
        try:
            report.told = read(await server.client.ranks(timeout_s=ASK_S))
            report.told_at, report.told_number = time.monotonic(), number
            report.tells = report.told is not None
        except NobodyListens:
            report.told = None
        except CallFailed:
            pass  # a sleep may be under way; what it said before stays
        finally:
            report.at, report.asking = time.monotonic(), None

    def _told(self, server: Server) -> Told | None:
        """What it has said of its memory as it is now; None if it has not, or does not tell."""
        report, now = self._reports.get(server), time.monotonic()
        if report is None or not server.runs or now - report.at > RECENT_S:
            return None
        is_same = report.told_number == server.history.number
        return report.told if is_same or now - report.told_at <= RECENT_S else None

    def _server(self, server: Server) -> dict[str, object]:
        told, figures = self._told(server), server.figures
        described: dict[str, object] = {
            "id": server.history.id,
            "name": server.name,
            "url": server.url,
            "models": server.models,
            "on": server.devices,
            "state": server.state,
            "level": server.slept_at if server.state == "asleep" else None,
            "priority": server.priority,
            "group": server.group.name if server.group is not None else None,
            "device_bytes": [use.takes for use in figures.devices.values()] if figures else None,
            "queued": len(server.waiting),
            "in_flight": server.in_flight,
            "closing": server.closing,
            "retiring": server.retiring,
            "memory": told.memory if told is not None else None,
            "last_operation": _last_operation(server, told),
        }
        if (launched := server.launched) is not None:
            described |= {
                "admin": launched.door,
                "pid": launched.pid,
                "log": launched.log,
                "starts": launched.starts,
                "deaths": launched.deaths,
                "error": launched.error,
            }
        return described

    def _devices(self, servers: list[Server]) -> list[dict[str, object]]:
        """Those that servers have told of, each with what is held there by whom."""
        newest: dict[tuple[str, int], tuple[float, int, int]] = {}
        held: dict[tuple[str, int], Counter[tuple[int, str]]] = {}
        for server in servers:
            if (told := self._told(server)) is None:
                continue
            at = self._reports[server].told_at
            for each in told.devices:
                device = _device(server, each.index)
                if device not in newest or newest[device][0] < at:
                    newest[device] = (at, each.total, each.free)
                here = held.setdefault(device, Counter())
                for tag, size in each.held.items():
                    here[server.history.id, tag] += size
        return [
            {
                "device": f"{host} {number}" if host else str(number),
                "total": total,
                "free": free,
                "held": [
                    {"server": server, "tag": tag, "bytes": size}
                    for (server, tag), size in held[host, number].items()
                    if size
                ],
            }
            for (host, number), (_, total, free) in sorted(newest.items())
        ]


def _last_operation(server: Server, told: Told | None) -> dict[str, object] | None:
    """What the proxy has done last with it, and what that copied, if the server tells."""
    last = server.last_operation
    if last is None:
        return None
    described = {"operation": last.name, "seconds": round(last.seconds, 3), "ended": last.at}
    if told is not None and told.copy is not None and told.copy.operation.startswith(last.name):
        described |= {"copied_bytes": told.copy.size, "copy_seconds": told.copy.seconds}
    return described


def _device(server: Server, index: int) -> tuple[str, int]:
    """The host's name, "" for this machine, and the number there."""
    seen = server.devices or ()
    host = urlsplit(server.url).hostname or ""
    number = seen[index] if index < len(seen) else index
    return "" if admin_key.is_loopback(host) else host, number
