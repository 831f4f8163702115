# SPDX-License-Identifier: Apache-2.0
"""The live servers, as the choice sees them."""

import math
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from vllm_sleep_ascend.proxy.choice import Seen, State, View
from vllm_sleep_ascend.proxy.figures import Use
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
    return View(
        now=time.monotonic(),
        servers=seen,
        free=_free(servers, seen),
        host_free=_host_free(servers) if settings.max_awake is None else None,
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
        of[place] = max(of[place], _of_a_wake(server, use))
    otherwise = of[ANY] if server.devices is None else 0
    return {place: of.get(place, otherwise) for place in there}


def _of_a_wake(server: Server, use: Use) -> int:
    """Bytes that its wake takes, or that its end gives back."""
    if server.state == "stopping":
        return use.held
    return use.may_take if server.state == "unknown" else use.takes


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
        deepens=time.monotonic() >= server.deepens_again_at,
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
        leaves=server.closing,
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


def _host_free(servers: Sequence[Server]) -> int | None:
    """The newest figure; servers that do not tell have none."""
    told = [s.figures for s in servers if s.figures is not None]
    newest = max((f for f in told if f.host_free is not None), key=lambda f: f.at, default=None)
    return None if newest is None else newest.host_free


def room_for_a_start(servers: Sequence[Server]) -> dict[int, int]:
    """Bytes of each device that are free or held by these servers. Those of one that starts are
    not known, and count as free."""
    held = _held(servers)
    return {place: free + held[place] for place, free in _measured(servers).items()}


def _held(servers: Sequence[Server]) -> dict[int, int]:
    total: dict[int, int] = defaultdict(int)
    for server in servers:
        of: dict[int, int] = defaultdict(int)
        for place, use in _uses(server):
            of[place] = max(of[place], use.held)
        for place, held in of.items():
            total[place] += held
    return total


def _measured(servers: Sequence[Server]) -> dict[int, int]:
    """Free bytes of each device by the newest figures. Those that start have taken nothing yet by
    these, because what they hold is not known, and their whole share is subtracted."""
    free: dict[int, int] = {}
    for server in sorted(servers, key=lambda s: s.figures.at if s.figures is not None else 0.0):
        for place, use in _uses(server):
            # Which device has no name is not known: it may be the fullest.
            free[place] = min(use.free, free.get(ANY, use.free)) if place == ANY else use.free
    held = _held(servers)
    for server in servers:
        if server.state == "starting":
            for place in free.keys() & server.start_room.keys():
                free[place] = max(free[place], server.start_room[place] - held[place])
    return free


def _free(servers: Sequence[Server], seen: Sequence[Seen]) -> dict[int, int]:
    """Bytes of each device that no server holds, or may still take while it is awake or starts."""
    free = _measured(servers)
    for server, as_seen in zip(servers, seen, strict=True):
        if server.state == "awake":
            for place, use in _uses(server):
                free[place] -= use.may_take
        elif server.state == "starting":
            for place, taken in (as_seen.takes or {}).items():
                free[place] -= taken
    return free
