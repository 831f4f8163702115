# SPDX-License-Identifier: Apache-2.0
"""What the proxy knows of its servers and their memory, for /status and the page."""

import time
from collections import Counter
from urllib.parse import urlsplit

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.proxy.figures import Figures
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Turns

FRESH_S = 2.0
"""Seconds after which a server on which requests run is asked for its memory again."""

IDLE_FRESH_S = 10.0
"""The same for the others, as long as they do not change their state."""

RECENT_S = 20.0
"""Seconds for which figures count as those of now."""


class Status:
    """Describes the servers of ``turns``. They are asked for their memory only by ``look`` and
    ``ask``: while somebody wants to see it."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def describe(self) -> dict[str, object]:
        servers = self._turns.servers
        return {
            "servers": [self._server(server) for server in servers],
            "devices": self._devices(servers),
        }

    def look(self) -> None:
        """Ask those servers whose figures are older, or of another state."""
        for server in self._turns.servers:
            fresh_s = FRESH_S if server.busy else IDLE_FRESH_S
            self._turns.memory.ask([server], fresh_s, silent_too=True)

    async def ask(self) -> None:
        """Ask all servers; returns once they have answered, or are late."""
        await self._turns.memory.refresh(self._turns.servers, fresh_s=0.0, silent_too=True)

    def _server(self, server: Server) -> dict[str, object]:
        recent, figures = _recent(server), server.figures
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
            "memory": recent.places if recent is not None else None,
            "last_operation": _last_operation(server, recent, self._turns.settings.link_gb_s),
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
            if (figures := _recent(server)) is None:
                continue
            for index, use in figures.devices.items():
                device = _device(server, index)
                if device not in newest or newest[device][0] < figures.at:
                    newest[device] = (figures.at, use.total, use.free)
                here = held.setdefault(device, Counter())
                for cause, size in use.held_for.items():
                    here[server.history.id, cause] += size
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


def _recent(server: Server) -> Figures | None:
    """What it has said of its memory as it is now; None if it has not, or does not tell."""
    figures = server.figures
    if figures is None or not figures.devices or not server.runs:
        return None
    return figures if time.monotonic() - figures.at <= RECENT_S else None


def _last_operation(
    server: Server, figures: Figures | None, link_gb_s: float | None
) -> dict[str, object] | None:
    """What the proxy has done last with it, and what that copied, if the server tells; with the
    share of its devices' links, if their speed is known."""
    last = server.last_operation
    if last is None:
        return None
    described = {"operation": last.name, "seconds": round(last.seconds, 3), "ended": last.at}
    copy = figures.copy if figures is not None else None
    if figures is not None and copy is not None and copy.operation.startswith(last.name):
        described |= {"copied_bytes": copy.size, "copy_seconds": copy.seconds}
        if link_gb_s is not None and copy.seconds > 0:
            most = link_gb_s * 1e9 * len(figures.devices) * copy.seconds
            described["link_share"] = round(copy.size / most, 3)
    return described


def _device(server: Server, index: int) -> tuple[str, int]:
    """The host's name, "" for this machine, and the number there."""
    seen = server.devices or ()
    host = urlsplit(server.url).hostname or ""
    number = seen[index] if index < len(seen) else index
    return "" if admin_key.is_loopback(host) else host, number
