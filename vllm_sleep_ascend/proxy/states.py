# SPDX-License-Identifier: Apache-2.0
"""The states of a server, and which it had in the last hour."""

import itertools
import time
from collections import deque
from typing import Literal, NamedTuple, get_args

State = Literal["awake", "asleep", "unknown", "starting", "stopping", "stuck", "stopped"]
STATES: tuple[State, ...] = get_args(State)

KEPT_S = 3600.0
"""Seconds for which a state that has ended is kept."""

_MOST = 1000  # states of one server that are kept, if it changes that often
_numbers, _ids = itertools.count(1), itertools.count(1)


class Since(NamedTuple):
    """A state, and when it began, in seconds of the Unix epoch. Numbers grow with time, over all
    servers."""

    number: int
    at: float
    state: State


class History:
    """The states of one server. ``id`` tells it from others with its name, before a reload."""

    def __init__(self) -> None:
        self.id = next(_ids)
        self._states: deque[Since] = deque(maxlen=_MOST)
        self.enter("unknown")

    @property
    def state(self) -> State:
        return self._states[-1].state

    @property
    def number(self) -> int:
        """That of its state."""
        return self._states[-1].number

    def enter(self, state: State) -> None:
        """It has this state from now on."""
        if not self._states or state != self.state:
            self._states.append(Since(next(_numbers), time.time(), state))

    def after(self, number: int) -> list[Since]:
        """Those after the one with this number; 0 for all."""
        start = time.time() - KEPT_S
        while len(self._states) > 1 and self._states[1].at < start:
            self._states.popleft()
        return [since for since in self._states if since.number > number]
