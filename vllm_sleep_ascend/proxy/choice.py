# SPDX-License-Identifier: Apache-2.0
"""Which server is brought up next, and which ones go to sleep for it: a decision without I/O.

A view of the servers at one moment goes in, what to do comes out. benchmarks/schedule.py drives the
same code in virtual time.

Servers are wanted in the order in which their requests came; a step of priority counts as if they
had come one turn and one switch earlier, so that nobody waits for ever. A wanted server comes up
once it fits beside those that stay. Those whose turn is over go for it, and no more of them than it
needs. What an earlier one is to get is kept for it; a later one may use only what remains.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vllm_sleep_ascend.proxy.config.groups import Group

State = Literal["awake", "starting", "stopping", "stuck", "off"]


@dataclass(frozen=True)
class Seen:
    """A server at one moment. Times are those of ``View.now``, in seconds.

    key: tells it from all others.
    state: "off" if it sleeps, or has no process.
    places: the devices that it uses.
    takes: bytes that a wake takes of each, and a sleep gives back. None: not known, so that it has
        its devices to itself.
    host: bytes of host memory that its next sleep takes; deepens: whether a deep one takes less.
    running: requests that it works on.
    waits_since: when the first request came that waits for it.
    served: whether it was given a request since it came up.
    switch_s: how long its last sleep and its last wake took together.
    due: it comes up without a request.
    ready: whether it can come up now, by itself.
    leaves: it is about to sleep anyway.
    error: why it is stuck.
    """

    key: int
    name: str = ""
    state: State = "off"
    places: frozenset[int] = frozenset()
    takes: Mapping[int, int] | None = None
    host: int = 0
    deepens: bool = True
    priority: int = 0
    group: Group | None = None
    running: int = 0
    waits_since: float = math.inf
    served: bool = False
    awake_since: float = -math.inf
    last_used: float = -math.inf
    switch_s: float = 0.0
    due: Literal["preload", "restart"] | None = None
    ready: bool = True
    leaves: bool = False
    error: str = ""

    @property
    def waits(self) -> bool:
        return self.waits_since < math.inf

    @property
    def busy(self) -> bool:
        return self.waits or self.running > 0


@dataclass(frozen=True)
class View:
    """All servers at one moment.

    free: bytes of each device that no awake server holds or may still take.
    host_free: bytes of host memory; None: not known.
    max_awake: how many may be awake on a device; None: as many as fit by bytes.
    turn_s: seconds that a server keeps its turn.
    """

    now: float
    servers: Sequence[Seen]
    free: Mapping[int, int] = field(default_factory=dict)
    host_free: int | None = None
    max_awake: int | None = 1
    turn_s: float = 2.0


@dataclass(frozen=True)
class Step:
    """Bring up the server ``wanted``, once ``leaving`` sleep. Those also in ``deep`` sleep as deep
    as they may, because the host has no memory for their backups. ``never``: why that cannot be."""

    wanted: int
    leaving: tuple[int, ...] = ()
    deep: frozenset[int] = frozenset()
    never: str = ""


@dataclass(frozen=True)
class Choice:
    """``steps`` in their order; ``later_s``: after which there may be others."""

    steps: tuple[Step, ...]
    later_s: float | None


def choose(view: View) -> Choice:
    """What to do now."""
    chooser, steps, pauses = _Chooser(view), [], []
    for wanted in _wanted(view):
        if chooser.has_room(wanted):
            steps.append(Step(wanted.key))
            if wanted.waits:
                break  # What comes after depends on how that goes.
            chooser.keep_room(wanted, ())
            continue
        going = chooser.going(wanted)
        if not wanted.waits and (going is None or not _may_go_unasked(wanted, going)):
            continue
        if going is None and (never := chooser.never(wanted)):
            steps.append(Step(wanted.key, never=never))
            continue
        chooser.keep_room(wanted, going or ())
        if going:
            rest = max(chooser.rest(wanted, each) for each in going)
            if rest > 0:
                pauses.append(rest)
            else:
                keys = tuple(each.key for each in going)
                steps.append(Step(wanted.key, keys, chooser.without_host_memory(going)))
    return Choice(tuple(steps), min((p for p in pauses if p < math.inf), default=None))


def surplus(view: View) -> list[int]:
    """Servers that are awake and do not fit beside those that start and those that have a better
    claim: by a persistent group, by priority, by their last use."""
    chooser, awake = _Chooser(view), [s for s in view.servers if s.state == "awake"]
    staying = [s for s in view.servers if s.state in ("starting", "stuck")]
    kept: list[Seen] = []
    for server in sorted(awake, key=lambda s: (not _persists(s), -s.priority, -s.last_used)):
        if chooser.fits(server, staying, gone=awake, claims=kept):
            kept.append(server)
    return [server.key for server in awake if server not in kept]


def _wanted(view: View) -> list[Seen]:
    """Those that are to come up, in their order."""
    step_s = view.turn_s + max((s.switch_s for s in view.servers), default=0.0)
    off = [s for s in view.servers if s.state == "off" and s.ready]
    waiting = [s for s in off if s.waits]
    waiting.sort(key=lambda s: (s.waits_since - s.priority * step_s, -s.priority))
    return [*waiting, *(s for s in off if s.due is not None and not s.waits)]


def _may_go_unasked(wanted: Seen, going: Iterable[Seen]) -> bool:
    """Whether they may go for one without a request: idle ones, and only for the first start."""
    return wanted.due == "preload" and not any(each.busy for each in going)


class _Chooser:
    """Fills the devices with those that come first."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._there = [s for s in view.servers if s.state != "off"]
        self._leaving = [s for s in self._there if s.leaves or s.state == "stopping"]
        self._claims: list[Seen] = []

    def has_room(self, wanted: Seen) -> bool:
        """Now, and also when those before it have come up."""
        return self.fits(wanted, self._there) and self._will_fit(wanted, ())

    def keep_room(self, wanted: Seen, going: Collection[Seen]) -> None:
        """From here on ``going`` leave, and ``wanted`` comes."""
        self._claims.append(wanted)
        self._leaving += going

    def going(self, wanted: Seen) -> list[Seen] | None:
        """The fewest that have to go for it, those first that may go soonest; None: it would not
        fit all the same."""
        found: list[Seen] = []
        for each in sorted(
            (s for s in self._there if s not in self._leaving and _may_go(wanted, s)),
            key=lambda s: self._goes_first(wanted, s),
        ):
            if self._will_fit(wanted, found):
                break
            found.append(each)
        if not self._will_fit(wanted, found):
            return None
        for each in reversed(found.copy()):
            others = [s for s in found if s is not each]
            if self._will_fit(wanted, others):
                found = others
        return found

    def never(self, wanted: Seen) -> str:
        """Why it would wait for ever; empty if it would not."""
        stay = [s for s in self._there if s.state != "stopping" and not _may_go(wanted, s)]
        gone = [s for s in self._there if s not in stay]
        if self.fits(wanted, stay, gone) or any(s.state == "starting" for s in stay):
            return ""
        near = [s for s in stay if wanted.places & s.places or _excludes(wanted, s)]
        stuck = next((s.error for s in near if s.state == "stuck"), "")
        names = ", ".join(s.name for s in near)
        return stuck or (
            f"{wanted.name} does not fit beside {names}, awake in a persistent group; put it to "
            "sleep, or change its group in models.yaml"
        )

    def rest(self, wanted: Seen, server: Seen) -> float:
        """Seconds until it may go. By bytes, an idle one keeps its turn for as long as its last
        switch took, because waking it again for a request that comes soon would take longer."""
        now, turn_ends = self._view.now, server.awake_since + self._view.turn_s
        if server.busy:
            return max(0.0, turn_ends - now) if server.served else math.inf
        if self._view.max_awake is not None or wanted.priority > server.priority:
            return 0.0
        idle_since = max(server.last_used, server.awake_since)
        return max(0.0, min(turn_ends, idle_since + server.switch_s) - now)

    def without_host_memory(self, going: Iterable[Seen]) -> frozenset[int]:
        """Those for whose backups the host has too little memory."""
        left, found = self._host_free(), set()
        for each in going:
            if each.host > left:
                found.add(each.key)
            else:
                left -= each.host
        return frozenset(found)

    def fits(
        self,
        wanted: Seen,
        staying: Iterable[Seen],
        gone: Collection[Seen] = (),
        claims: Collection[Seen] = (),
    ) -> bool:
        """Whether it may be awake beside ``staying``, when ``gone`` have gone and ``claims`` have
        come."""
        others = [s for s in (*staying, *claims) if s is not wanted]
        if any(_excludes(wanted, other) for other in others):
            return False
        for place in wanted.places:
            near = [s for s in others if place in s.places]
            if self._view.max_awake is not None:
                if len(near) >= self._view.max_awake:
                    return False
            # One that is alone is always tried: its own wake says what it lacks.
            elif near and not self._has_bytes(wanted, place, near, gone, claims):
                return False
        return True

    def _has_bytes(
        self,
        wanted: Seen,
        place: int,
        near: Iterable[Seen],
        gone: Iterable[Seen],
        claims: Iterable[Seen],
    ) -> bool:
        if place not in self._view.free or any(s.takes is None for s in (wanted, *near)):
            return False
        free = self._view.free[place] + _bytes(gone, place) - _bytes(claims, place)
        return _bytes([wanted], place) <= free

    def _will_fit(self, wanted: Seen, going: Collection[Seen]) -> bool:
        gone = [*self._leaving, *going]
        return self.fits(wanted, [s for s in self._there if s not in gone], gone, self._claims)

    def _goes_first(self, wanted: Seen, server: Seen) -> tuple[bool, float, int, int, float]:
        """Idle ones before busy ones, also if that takes a moment; then those for whose backups the
        host has memory, by priority; the least recently used, or the one with the longest turn."""
        since = server.awake_since if server.busy else server.last_used
        # Of those without memory for a backup, first the one that can do with less.
        lacks_host = int(server.host > self._host_free()) * (1 if server.deepens else 2)
        rest = self.rest(wanted, server)
        return (server.busy, rest, lacks_host, server.priority, since)

    def _host_free(self) -> float:
        return math.inf if self._view.host_free is None else self._view.host_free


def _bytes(servers: Iterable[Seen], place: int) -> int:
    return sum(s.takes.get(place, 0) for s in servers if s.takes is not None)


def _may_go(wanted: Seen, server: Seen) -> bool:
    if server.state != "awake":
        return False
    return not _persists(server) or _same_group(wanted, server)


def _persists(server: Seen) -> bool:
    return server.group is not None and server.group.persistent


def _excludes(wanted: Seen, other: Seen) -> bool:
    """Whether their groups do not let ``wanted`` come up beside it."""
    if wanted.group is None:
        return False
    if _same_group(wanted, other):
        return wanted.group.swap
    return wanted.group.exclusive and not _persists(other)


def _same_group(one: Seen, other: Seen) -> bool:
    return one.group is not None and other.group is not None and one.group.name == other.group.name
