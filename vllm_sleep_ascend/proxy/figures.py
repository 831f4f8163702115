# SPDX-License-Identifier: Apache-2.0
"""What servers hold and take of devices and of the host, as their ranks report it. All that reads
``/sleep_status`` for the choice by bytes and for the page is here."""

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from vllm_sleep_ascend.client.calls import CallFailed, NoServer, TooLate
from vllm_sleep_ascend.policy import DEFERRABLE_TAGS, POLICY
from vllm_sleep_ascend.proxy.servers import Server

logger = logging.getLogger(__name__)

_ASK_S = 2.0  # The schedule decides nothing else meanwhile.
# Until one is asked again that did not answer, or in another form, unless its state changes.
_SILENT_S = 60.0
_WRONG = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Use:
    """A server's bytes of one of its devices.

    free, total: of the device, whoever holds the rest.
    held: by the server, when it was asked.
    asleep: what it holds asleep.
    share: what it may hold awake.
    held_for: what it holds, for each tag or cause that is known.
    """

    free: int
    total: int
    held: int
    asleep: int
    share: int
    held_for: Mapping[str, int] = field(default_factory=dict)

    @property
    def takes(self) -> int:
        """What a wake takes, and a sleep gives back."""
        return max(0, max(self.share, self.held) - self.asleep)

    @property
    def may_take(self) -> int:
        """What it may still take while it is awake."""
        return max(0, self.share - self.held)


@dataclass(frozen=True)
class Copy:
    """The last sleep or wake of all ranks, which run at the same time."""

    operation: str
    size: int
    seconds: float


@dataclass(frozen=True)
class Figures:
    """What a server has reported at the time ``at``.

    devices: by their number among those that it sees; empty if it does not tell.
    host_needed: bytes of host memory that its next sleep takes; host_free: those there are.
    places: bytes of its tags on the device, on the host and on disk.
    copy: None if a rank has not copied.
    """

    at: float
    devices: Mapping[int, Use]
    host_needed: int = 0
    host_free: int | None = None
    places: Mapping[str, int] = field(default_factory=dict)
    copy: Copy | None = None


@dataclass
class _Asked:
    """What was asked of a server in one of its states.

    own: the number of that state; newest: the highest of all servers when it was asked.
    silent_until: when the schedule asks it again; rests_until: when it is asked again at all.
    """

    own: int
    newest: int = -1
    at: float = -math.inf
    silent_until: float = -math.inf
    rests_until: float = -math.inf

    def is_due(self, newest: int, fresh_s: float) -> bool:
        now = time.monotonic()
        if now < self.rests_until:  # it may log each question
            return False
        return self.newest < newest or now - self.at >= fresh_s


class Memory:
    """Asks ``servers``, and keeps what they say in their ``figures``."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers
        self._asked: WeakKeyDictionary[Server, _Asked] = WeakKeyDictionary()
        self._asking: dict[Server, asyncio.Task[None]] = {}

    async def refresh(
        self, servers: Collection[Server], fresh_s: float, silent_too: bool = False
    ) -> None:
        """``ask``, and wait for the answers."""
        for limit in (fresh_s, math.inf):  # What was under way may be from before a change.
            if asking := self.ask(servers, limit, silent_too):
                await asyncio.wait(asking)

    def ask(
        self, servers: Iterable[Server], fresh_s: float, silent_too: bool = False
    ) -> "list[asyncio.Task[None]]":
        """Ask those whose figures are older, or from before a change of any server's state. Returns
        the questions that are under way.

        Args:
            silent_too: also those that have not answered in time a while ago.
        """
        newest = max((server.history.number for server in self._servers), default=0)
        asking = []
        for server in servers:
            asked = self._asked.get(server)
            if asked is None or asked.own != server.history.number:
                asked = self._asked[server] = _Asked(server.history.number)
            if not silent_too and time.monotonic() < asked.silent_until:
                continue
            if server not in self._asking and server.runs and asked.is_due(newest, fresh_s):
                asked.newest = newest
                self._asking[server] = asyncio.create_task(self._learn(server, asked))
            if server in self._asking:
                asking.append(self._asking[server])
        return asking

    async def _learn(self, server: Server, asked: _Asked) -> None:
        """One that does not answer in time keeps its figures."""
        try:
            ranks = await server.client.ranks(_ASK_S)
            asked.silent_until = -math.inf
            if server.history.number == asked.own:
                before = server.figures.devices if server.figures is not None else {}
                sleeps = server.state == "asleep"
                server.figures = figures(ranks, before, sleeps, time.monotonic())
            if ranks is None:
                asked.rests_until = math.inf
            elif server.figures is None or not server.figures.devices:
                asked.rests_until = time.monotonic() + _SILENT_S
        except NoServer:
            if server.figures is not None:  # whose bytes asleep and share stay as they are
                server.figures = replace(server.figures, at=-math.inf)
        except TooLate:
            asked.silent_until = time.monotonic() + _SILENT_S
        except CallFailed:
            pass
        finally:
            asked.at = time.monotonic()
            del self._asking[server]


def figures(ranks: object, before: Mapping[int, Use], sleeps: bool, now: float) -> Figures:
    """Those of a server with these ranks. None of one that does not tell, or in another form: it
    may be of another version, or something else.

    Args:
        before: what was known of its devices.
        sleeps: whether it was put to sleep. Something else may have woken it since.
    """
    if ranks is None:  # stock vLLM
        return Figures(now, {})
    try:
        return _figures(ranks, before, sleeps, now)
    except _WRONG as error:
        logger.warning("/sleep_status has an unknown form (%r), so its bytes are not known", error)
        return Figures(now, {})


def _figures(ranks: Any, before: Mapping[int, Use], sleeps: bool, now: float) -> Figures:
    on: dict[int, list[Any]] = defaultdict(list)
    for rank in ranks:
        if not rank["enabled"]:
            return Figures(now, {})
        on[_bytes(rank["device"])].append(rank)
    devices = {device: _use(there, before.get(device), sleeps) for device, there in on.items()}
    usages = [usage for rank in ranks for usage in rank["tags"].values()]
    places = {
        place: sum(_bytes(usage.get(place, 0)) for usage in usages)
        for place in ("device", "host", "disk")
    }
    hosts = [rank["host_memory"] for rank in ranks if "host_memory" in rank]
    free = min((_bytes(host["available"]) for host in hosts), default=None)
    return Figures(now, devices, _sum(hosts, "needed"), free, places, _copy(ranks))


def _use(ranks: Sequence[Any], before: Use | None, sleeps: bool) -> Use:
    held = _sum(ranks, "held")
    if sleeps and not any(map(_is_awake, ranks)):
        asleep = held
    elif before is not None:
        asleep = before.asleep
    else:
        asleep = max(0, held - sum(map(_gives_back, ranks)))
    held_for: Counter[str] = Counter()
    for rank in ranks:
        held_for.update(_resident(rank))
        for tag, usage in rank["tags"].items():
            held_for[tag] += _bytes(usage["device"])
    free = min(_bytes(rank["free"]) for rank in ranks)
    return Use(free, _bytes(ranks[0]["total"]), held, asleep, _sum(ranks, "share"), held_for)


def _is_awake(rank: Any) -> bool:
    """Whether memory that each sleep frees holds device memory."""
    return any(rank["tags"][tag]["device"] > 0 for tag in DEFERRABLE_TAGS if tag in rank["tags"])


def _gives_back(rank: Any) -> int:
    """Bytes of its tags that a sleep frees: an estimate, before the first one."""
    freed = (usage for tag, usage in rank["tags"].items() if POLICY[1].get(tag) != "keep")
    return _sum(freed, "device")


def _resident(rank: Any) -> dict[str, int]:
    """None of another form: only the page shows it."""
    try:
        return {cause: _bytes(size) for cause, size in rank.get("resident", {}).items()}
    except _WRONG:
        return {}


def _copy(ranks: Sequence[Any]) -> Copy | None:
    """None also of another form: only the page shows it."""
    try:
        return _last_copy(ranks)
    except _WRONG:
        return None


def _last_copy(ranks: Sequence[Any]) -> Copy | None:
    last = [rank.get("last_operation") for rank in ranks]
    if not all(last):
        return None
    names = {str(each["operation"]).partition(" ")[0] for each in last}
    if len(names) != 1:
        return None
    seconds = max(float(each["seconds"]) for each in last)
    if not math.isfinite(seconds):
        raise ValueError("seconds")
    return Copy(names.pop(), _sum(last, "copied_bytes"), seconds)


def _sum(counts: Iterable[Any], name: str) -> int:
    return sum(_bytes(each[name]) for each in counts)


def _bytes(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value
