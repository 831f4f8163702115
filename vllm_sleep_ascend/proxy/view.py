# SPDX-License-Identifier: Apache-2.0
"""The live servers, as the choice sees them."""

import math
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from vllm_sleep_ascend.proxy.choice import Seen, State, View
from vllm_sleep_ascend.proxy.memory import Use
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Settings

ANY = -1
"""A device that no server names."""


def view(servers: Sequence[Server], settings: Settings, resting: Collection[Server] = ()) -> View:
    """
    Args:
        resting: those that cannot come up now.
    """
    totals = {place: use.total for server in servers for place, use in _uses(server)}
    seen = [
        _seen(server, key, places(server, servers), totals, server not in resting)
        for key, server in enumerate(servers)
    ]
    figures = [server.figures for server in servers if server.figures is not None]
    newest = max(figures, key=lambda f: f.at, default=None)
    return View(
        now=time.monotonic(),
        servers=seen,
        free=_free(servers, seen),
        host_free=None if newest is None else newest.host_free,
        max_awake=settings.max_awake,
        turn_s=settings.turn_s,
    )


def places(server: Server, servers: Sequence[Server]) -> frozenset[int]:
    """Devices; one that names none uses all that others name, and any further one."""
    if server.devices is not None:
        return frozenset(server.devices)
    return frozenset(d for s in servers for d in s.devices or ()) | {ANY}


def _takes(
    server: Server, there: Collection[int], totals: Mapping[int, int]
) -> dict[int, int] | None:
    """Bytes that its wake, or its start, takes of each device; None if it has to have them to
    itself."""
    if server.state in ("stopped", "starting"):
        if server.start_share is None or not totals.keys() >= set(there):
            return None
        return {place: math.ceil(server.start_share * totals[place]) for place in there}
    uses = _uses(server)
    if server.figures is None or server.does_not_fit or not uses:
        return None
    if len(uses) < len(server.figures.devices):
        return None  # These are not the devices that it was given.
    of: dict[int, int] = defaultdict(int)
    for place, use in uses:
        of[place] = max(of[place], use.takes)
    otherwise = of[ANY] if server.devices is None else 0
    return {place: of.get(place, otherwise) for place in there}


def _seen(
    server: Server, key: int, there: frozenset[int], totals: Mapping[int, int], ready: bool
) -> Seen:
    off = server.state in ("asleep", "unknown", "stopped")
    state: State = "off" if off else server.state  # type: ignore[assignment]
    return Seen(
        key=key,
        name=server.name,
        state=state,
        places=there,
        takes=_takes(server, there, totals),
        host=server.figures.host_needed if server.figures and server.level == 1 else 0,
        priority=server.priority,
        group=server.group,
        running=server.in_flight,
        waits_since=server.waits_since(),
        served=server.served,
        awake_since=server.awake_since,
        last_used=server.last_used,
        switch_s=server.sleep_s + server.wake_s,
        due=None if server.retiring or server.state != "stopped" else server.due,
        ready=ready,
        leaves=server.sleep_asked is not None,
        error=server.launched.error if server.launched is not None else "",
    )


def _uses(server: Server) -> list[tuple[int, Use]]:
    """What it holds of which device."""
    if server.figures is None:
        return []
    known, named = server.figures.devices.items(), server.devices
    if named is None:
        return [(ANY, use) for _, use in known]
    return [(named[device], use) for device, use in known if device < len(named)]


def _free(servers: Sequence[Server], seen: Sequence[Seen]) -> dict[int, int]:
    """Bytes of each device that no server holds, or may still take while it is awake or starts."""
    free: dict[int, int] = {}
    for server in sorted(servers, key=lambda s: s.figures.at if s.figures is not None else 0.0):
        for place, use in _uses(server):
            # Which device has no name is not known: it may be the fullest.
            free[place] = min(use.free, free.get(ANY, use.free)) if place == ANY else use.free
    for server, as_seen in zip(servers, seen, strict=True):
        if server.state == "awake":
            for place, use in _uses(server):
                free[place] -= use.may_take
        elif server.state == "starting":
            for place, taken in (as_seen.takes or {}).items():
                free[place] -= taken
    return free
