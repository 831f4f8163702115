# SPDX-License-Identifier: Apache-2.0
"""What the proxy knows of its servers and their memory, for /status and the page."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.proxy.operations import ASK_S
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Turns
from vllm_sleep_ascend.status import RankStatus

FRESH_S = 2.0
"""Seconds after which a server that has not changed its state is asked for its memory again."""


@dataclass
class _Report:
    """``number``: of the server's state when it was asked."""

    ranks: list[RankStatus] | None = None
    at: float = 0.0
    number: int = 0
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

    def look(self, fresh_s: float = FRESH_S) -> "list[asyncio.Task[None]]":
        """Ask those servers whose report is older, or of another state. Returns what runs."""
        now, asking = time.monotonic(), []
        for server in self._turns.servers:
            if not server.runs:
                self._reports.pop(server, None)
                continue
            report = self._reports.setdefault(server, _Report())
            is_old = now - report.at >= fresh_s or report.number != server.history.number
            if report.asking is None and is_old:
                report.asking = asyncio.create_task(self._ask(server, report))
            if report.asking is not None:
                asking.append(report.asking)
        return asking

    async def ask(self) -> None:
        """Ask all servers; returns once they have answered, or are late."""
        if asking := self.look(fresh_s=0):
            await asyncio.wait(asking)

    async def _ask(self, server: Server, report: _Report) -> None:
        report.number = server.history.number
        try:
            report.ranks = await server.client.ranks(timeout_s=ASK_S)
        except CallFailed:
            pass  # a sleep may be under way; what it said before stays
        finally:
            report.at, report.asking = time.monotonic(), None

    def _ranks(self, server: Server) -> list[RankStatus] | None:
        """What it has said since it runs; None if it has not, or does not tell."""
        report = self._reports.get(server)
        return report.ranks if report is not None and server.runs else None

    def _server(self, server: Server) -> dict[str, object]:
        described: dict[str, object] = {
            "id": server.history.id,
            "name": server.name,
            "url": server.url,
            "models": server.models,
            "on": server.devices,
            "state": server.state,
            "level": server.slept_at if server.state == "asleep" else None,
            "queued": len(server.waiting),
            "in_flight": server.in_flight,
            "retiring": server.retiring,
            "memory": self._memory(server),
            "last_operation": self._last_operation(server),
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

    def _memory(self, server: Server) -> dict[str, int] | None:
        """Bytes by place, of all its ranks."""
        ranks = self._ranks(server)
        if ranks is None:
            return None
        usages = [usage for rank in ranks for usage in rank.get("tags", {}).values()]
        return {
            "device": sum(usage["device"] for usage in usages),
            "host": sum(usage["host"] for usage in usages),
            "disk": sum(usage.get("disk", 0) for usage in usages),
        }

    def _last_operation(self, server: Server) -> dict[str, object] | None:
        """What the proxy has done last with it, and what that copied, if the server tells."""
        last = server.last_operation
        if last is None:
            return None
        described = {"operation": last.name, "seconds": round(last.seconds, 3), "ended": last.at}
        told = [rank.get("last_operation") for rank in self._ranks(server) or ()]
        same = [each for each in told if each and each["operation"].startswith(last.name)]
        if told and len(same) == len(told):
            described["copied_bytes"] = sum(each["copied_bytes"] for each in same)
            described["copy_seconds"] = max(each["seconds"] for each in same)
        return described

    def _devices(self, servers: list[Server]) -> list[dict[str, object]]:
        """Those that servers have told of, each with what is held there by whom."""
        newest: dict[str, tuple[float, RankStatus]] = {}
        held: dict[str, Counter[tuple[int, str]]] = {}
        for server in servers:
            for rank in self._ranks(server) or ():
                if "total" not in rank:
                    continue
                device, at = _device(server, rank["device"]), self._reports[server].at
                if device not in newest or newest[device][0] < at:
                    newest[device] = (at, rank)
                here = held.setdefault(device, Counter())
                for tag, usage in rank.get("tags", {}).items():
                    here[server.history.id, tag] += usage["device"]
                for cause, size in rank.get("resident", {}).items():
                    if cause not in rank.get("tags", {}):
                        here[server.history.id, cause] += size
        return [
            {
                "device": device,
                "total": rank["total"],
                "free": rank["free"],
                "held": [
                    {"server": server, "tag": tag, "bytes": size}
                    for (server, tag), size in held[device].items()
                    if size
                ],
            }
            for device, (_, rank) in sorted(newest.items())
        ]


def _device(server: Server, index: int) -> str:
    """Its name: the number on this machine, or with the host's name on another one."""
    seen = server.devices or ()
    number = str(seen[index] if index < len(seen) else index)
    host = urlsplit(server.url).hostname or ""
    return number if admin_key.is_loopback(host) else f"{host} {number}"
