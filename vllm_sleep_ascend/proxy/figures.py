# SPDX-License-Identifier: Apache-2.0
"""What servers hold and take of devices and of the host, as their ranks report it."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from vllm_sleep_ascend.client.calls import CallFailed, TooLate
from vllm_sleep_ascend.policy import DEFERRABLE_TAGS, POLICY
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.states import State
from vllm_sleep_ascend.status import RankStatus

logger = logging.getLogger(__name__)

_FRESH_S = 1.0
_ASK_S = 2.0  # Nothing else is decided meanwhile.
_SILENT_S = 60.0  # until one is asked again that did not answer, which takes long to find out


@dataclass(frozen=True)
class Use:
    """A server's bytes of one of its devices.

    free, total: of the device, whoever holds the rest.
    held: by the server, when it was asked.
    asleep: what it holds asleep.
    share: what it may hold awake.
    """

    free: int
    total: int
    held: int
    asleep: int
    share: int

    @property
    def takes(self) -> int:
        """What a wake takes, and a sleep gives back."""
        return max(0, max(self.share, self.held) - self.asleep)

    @property
    def may_take(self) -> int:
        """What it may still take while it is awake."""
        return max(0, self.share - self.held)


@dataclass(frozen=True)
class Figures:
    """What a server has reported at the time ``at``.

    devices: by their number among those that it sees; empty if it does not tell.
    host_needed: bytes of host memory that its next sleep takes; host_free: those there are.
    """

    at: float
    devices: Mapping[int, Use]
    host_needed: int = 0
    host_free: int | None = None


class Memory:
    """Keeps the figures of servers up to date."""

    def __init__(self) -> None:
        self._at = 0.0
        self._silent: WeakKeyDictionary[Server, float] = WeakKeyDictionary()  # until when
        self._states: list[tuple[Server, State]] = []

    async def refresh(self, servers: Collection[Server]) -> None:
        """Ask those that run, if a state has changed since the last time, or it was long ago."""
        states = [(server, server.state) for server in servers]
        if states == self._states and time.monotonic() - self._at < _FRESH_S:
            return
        await asyncio.gather(*(self._learn(server) for server in servers if server.runs))
        self._states, self._at = states, time.monotonic()

    async def _learn(self, server: Server) -> None:
        """One that does not answer keeps its figures, also if its state changes meanwhile."""
        state = server.state
        if time.monotonic() < self._silent.get(server, 0.0):
            return
        try:
            ranks = await server.client.ranks(_ASK_S)
        except CallFailed as error:
            if isinstance(error, TooLate):
                self._silent[server] = time.monotonic() + _SILENT_S
            return
        if server.state == state:
            before = server.figures.devices if server.figures is not None else {}
            server.figures = figures(ranks or [], before, state == "asleep", time.monotonic())


def figures(
    ranks: Sequence[RankStatus], before: Mapping[int, Use], sleeps: bool, now: float
) -> Figures:
    """Those of a server with these ranks; none of one that answers in another form.

    Args:
        before: what was known of its devices.
        sleeps: whether it was put to sleep. Something else may have woken it since.
    """
    try:
        return _figures(ranks, before, sleeps, now)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        logger.warning("/sleep_status has an unknown form (%r), so its bytes are not known", error)
        return Figures(now, {})


def _figures(
    ranks: Sequence[RankStatus], before: Mapping[int, Use], sleeps: bool, now: float
) -> Figures:
    on: dict[int, list[RankStatus]] = defaultdict(list)
    for rank in ranks:
        if "share" not in rank or not rank["enabled"]:
            return Figures(now, {})
        on[rank["device"]].append(rank)
    devices = {}
    for device, there in on.items():
        held = sum(rank["held"] for rank in there)
        if sleeps and not any(map(_is_awake, there)):
            asleep = held
        elif device in before:
            asleep = before[device].asleep
        else:
            asleep = max(0, held - sum(map(_gives_back, there)))
        share = sum(rank["share"] for rank in there)
        free = min(rank["free"] for rank in there)
        devices[device] = Use(free, there[0]["total"], held, asleep, share)
    hosts = [rank["host_memory"] for rank in ranks if "host_memory" in rank]
    needed = sum(host["needed"] for host in hosts)
    return Figures(now, devices, needed, min((host["available"] for host in hosts), default=None))


def _is_awake(rank: RankStatus) -> bool:
    """Whether memory that each sleep frees holds device memory."""
    tags = rank.get("tags", {})
    return any(tags[tag]["device"] > 0 for tag in DEFERRABLE_TAGS if tag in tags)


def _gives_back(rank: RankStatus) -> int:
    """Bytes of its tags that a sleep frees: an estimate, before the first one."""
    return sum(
        usage["device"]
        for tag, usage in rank.get("tags", {}).items()
        if POLICY[1].get(tag) != "keep"
    )
