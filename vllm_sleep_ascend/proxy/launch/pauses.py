# SPDX-License-Identifier: Apache-2.0
"""When a server that does not stay up is started again."""

import math
import time

STABLE_S = 60.0
"""Seconds after which a server that dies is started again as at first."""

LONGEST_S = 60.0
"""Between two starts of a server that dies again and again."""


class Pauses:
    """How long to wait before the next start: 1 s after a failure, then twice as long each time."""

    def __init__(self) -> None:
        self._failures = 0  # in a row, of starts and of what they have started
        self._until = self._serves_since = -math.inf

    def rest_s(self) -> float:
        """Seconds until the next start."""
        return max(0.0, self._until - time.monotonic())

    def serves(self) -> None:
        """It serves from now on."""
        self._serves_since = time.monotonic()

    def has_died(self) -> None:
        if time.monotonic() - self._serves_since > STABLE_S:
            self._failures = 0
        self.has_failed()

    def has_failed(self) -> None:
        """A start, or what it has started."""
        self._failures += 1
        self._until = time.monotonic() + min(LONGEST_S, 2.0 ** min(self._failures - 1, 30))
