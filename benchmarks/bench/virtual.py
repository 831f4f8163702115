# SPDX-License-Identifier: Apache-2.0
"""Servers of one device in virtual time, driven by the proxy's own choice."""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from vllm_sleep_ascend.proxy.choice import Choice, Seen, Step, View, choose
from vllm_sleep_ascend.proxy.config.groups import Group

DEVICE = 0


@dataclass(frozen=True)
class Model:
    """One that takes ``bytes`` of the device while it is awake."""

    name: str
    bytes: int
    sleep_s: float
    wake_s: float
    priority: int = 0
    group: Group | None = None
    host: int = 0  # bytes of its backup


@dataclass(frozen=True)
class Request:
    at: float
    model: str
    seconds: float


@dataclass
class Outcome:
    """waits: seconds from each request to its start. switching_s: spent in sleeps and wakes."""

    waits: list[float] = field(default_factory=list)
    waits_of: dict[str, list[float]] = field(default_factory=dict)
    wakes: int = 0
    sleeps: int = 0
    switching_s: float = 0.0
    end: float = 0.0
    most_bytes: int = 0
    most_awake: int = 0
    broken_turns: list[str] = field(default_factory=list)


@dataclass
class _Server:
    model: Model
    awake: bool = False
    open: bool = False
    waiting: list[Request] = field(default_factory=list)
    running: int = 0
    served: bool = False
    awake_since: float = -math.inf
    last_used: float = -math.inf
    switch_s: float = 0.0


class Device:
    """Serves requests as ``proxy.schedule`` does; sleeps and wakes run one after the other.

    Args:
        capacity: bytes of the device.
        max_awake: None: as many as fit.
        choose: what to do, of a view.
    """

    def __init__(
        self,
        models: Iterable[Model],
        capacity: int,
        max_awake: int | None = None,
        turn_s: float = 2.0,
        host: int | None = None,
        choose: Callable[[View], Choice] = choose,
    ) -> None:
        self.servers = [_Server(model) for model in models]
        self.capacity, self.max_awake, self.turn_s, self.host = capacity, max_awake, turn_s, host
        self.now = 0.0
        self._choose = choose
        self.outcome = Outcome()
        self._numbers = count()
        self._events: list[tuple[float, int, str, object]] = []
        self._switching: _Server | None = None
        self._timer = math.inf

    def serve(self, requests: Sequence[Request]) -> Outcome:
        """Until all of them have ended."""
        by_name = {server.model.name: server for server in self.servers}
        for request in requests:
            self._at(request.at, "comes", (by_name[request.model], request))
        while self._events:
            self.now, _, what, of = heapq.heappop(self._events)
            if what == "timer":
                self._timer = math.inf
            else:
                getattr(self, f"_{what}")(*of)  # type: ignore[misc]
            if self._switching is None:
                self._step()
        self.outcome.end = self.now
        return self.outcome

    def view(self) -> View:
        free = self.capacity - sum(s.model.bytes for s in self.servers if s.awake)
        seen = [self._seen(key, server) for key, server in enumerate(self.servers)]
        return View(self.now, seen, {DEVICE: free}, self._host_free(), self.max_awake, self.turn_s)

    def _host_free(self) -> int | None:
        if self.host is None:
            return None
        return self.host - sum(s.model.host for s in self.servers if not s.awake)

    def _seen(self, key: int, server: _Server) -> Seen:
        return Seen(
            key,
            server.model.name,
            "awake" if server.awake else "off",
            frozenset({DEVICE}),
            {DEVICE: server.model.bytes},
            host=server.model.host,
            priority=server.model.priority,
            group=server.model.group,
            running=server.running,
            waits_since=server.waiting[0].at if server.waiting else math.inf,
            served=server.served,
            awake_since=server.awake_since,
            last_used=server.last_used,
            switch_s=server.switch_s,
        )

    def _at(self, time: float, what: str, of: object = ()) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), what, of))

    def _comes(self, server: _Server, request: Request) -> None:
        if server.open:
            self._begin(server, request)
        else:
            server.waiting.append(request)

    def _begin(self, server: _Server, request: Request) -> None:
        server.running += 1
        server.served, server.last_used = True, self.now
        wait = self.now - request.at
        self.outcome.waits.append(wait)
        self.outcome.waits_of.setdefault(request.model, []).append(wait)
        self._at(self.now + request.seconds, "ends", (server,))

    def _ends(self, server: _Server) -> None:
        server.running -= 1
        server.last_used = self.now

    def _step(self) -> None:
        choice = self._choose(self.view())
        leaving: set[int] = set()
        for step in choice.steps:
            if not step.leaving:
                self._wake(self.servers[step.wanted])
                return
            leaving.update(step.leaving)
            busy = [key for key in step.leaving if self.servers[key].running]
            for key in busy or step.leaving:
                self._close(self.servers[key])
            if not busy:
                self._sleep(self.servers[step.leaving[0]])
                return
        for key, server in enumerate(self.servers):
            if server.awake and key not in leaving:
                server.open = True
                waiting, server.waiting = server.waiting, []
                for request in waiting:
                    self._begin(server, request)
        if choice.later_s is not None and self.now + choice.later_s < self._timer:
            # Never at this very moment again, by the rounding of a sum.
            self._timer = max(self.now + choice.later_s, math.nextafter(self.now, math.inf))
            self._at(self._timer, "timer")

    def _close(self, server: _Server) -> None:
        if server.open and server.running and self.now < server.awake_since + self.turn_s:
            self.outcome.broken_turns.append(f"{server.model.name} at {self.now}")
        server.open = False

    def _wake(self, server: _Server) -> None:
        server.awake = True  # Its bytes are taken from now on.
        awake = [s.model.bytes for s in self.servers if s.awake]
        self.outcome.most_bytes = max(self.outcome.most_bytes, sum(awake))
        self.outcome.most_awake = max(self.outcome.most_awake, len(awake))
        self._switch(server, server.model.wake_s)
        self.outcome.wakes += 1

    def _sleep(self, server: _Server) -> None:
        self._switch(server, server.model.sleep_s)
        self.outcome.sleeps += 1

    def _switch(self, server: _Server, seconds: float) -> None:
        self._switching = server
        self.outcome.switching_s += seconds
        self._at(self.now + seconds, "switched", (server,))

    def _switched(self, server: _Server) -> None:
        self._switching = None
        server.switch_s = server.model.sleep_s + server.model.wake_s
        if server.awake_since == -math.inf:
            server.awake_since, server.served = self.now, False
        else:
            server.awake, server.awake_since = False, -math.inf


def least_recently_used(view: View) -> Choice:
    """As a cache does: the first that waits comes, and those go that were used least recently, idle
    ones first, until its bytes are free. Turns, priorities and later requests do not count."""
    waiting = [s for s in view.servers if s.waits and s.state == "off"]
    if not waiting:
        return Choice((), None)
    wanted = min(waiting, key=lambda s: s.waits_since)
    free, leaving = view.free[DEVICE], []
    awake = [s for s in view.servers if s.state == "awake" and (s.served or not s.waits)]
    for each in sorted(awake, key=lambda s: (s.running > 0, s.last_used)):
        if free >= _takes(wanted):
            break
        leaving.append(each.key)
        free += _takes(each)
    fits = free >= _takes(wanted)
    return Choice((Step(wanted.key, tuple(leaving)),) if fits else (), None)


def _takes(server: Seen) -> int:
    return server.takes[DEVICE] if server.takes is not None else 0


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))] if ordered else 0.0
