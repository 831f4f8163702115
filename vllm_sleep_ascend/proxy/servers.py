# SPDX-License-Identifier: Apache-2.0
"""The proxy's state of one vLLM server, and the requests that wait for it."""

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.client.sleep_client import SleepClient
from vllm_sleep_ascend.proxy.config.model import DeepSleep
from vllm_sleep_ascend.proxy.states import History, State

if TYPE_CHECKING:
    from vllm_sleep_ascend.proxy.config.groups import Group
    from vllm_sleep_ascend.proxy.figures import Figures
    from vllm_sleep_ascend.proxy.launch.launched import Launched

TRUST_S = 1.0
"""Seconds without a request after which a server that was awake is asked whether it still is."""


class Operation(NamedTuple):
    """A start, sleep or wake that has succeeded; ``at``: its end, in seconds of the Unix epoch."""

    name: str
    seconds: float
    at: float


@dataclass(eq=False)
class Server:
    """One vLLM server. ``state`` is unknown until the server has answered, and after a failure.

    name: that of its model in models.yaml, else its URL.
    names: those that models.yaml gives its model.
    devices: which it uses; None for all.
    priority: higher ones come first.
    deep_sleep: what its deep sleep is, in place of one at level 2.
    start_share: which part of each device its start takes, if its command says.
    launched: its process, if the proxy starts it.
    models: what it has listed.
    """

    client: SleepClient
    name: str = ""
    names: tuple[str, ...] = ()
    level: int = 1
    devices: tuple[int, ...] | None = None
    priority: int = 0
    group: "Group | None" = None
    deep_sleep: DeepSleep = "level-2"
    start_share: float | None = None
    launched: "Launched | None" = None
    models: list[str] = field(default_factory=list)
    history: History = field(default_factory=History)
    # Requests are admitted at once: it is awake, and its turn continues.
    open: bool = False
    in_flight: int = 0
    # Requests beside the turns, which need no device. An end waits for them as well.
    passing: int = 0
    # Whether a background response may still run that keeps the turn no longer.
    outlasted: bool = False
    # The times at which those requests arrived that wait for it, in their order.
    waiting: "dict[asyncio.Future[None], float]" = field(default_factory=dict)
    awake_since: float = 0.0
    last_used: float = 0.0
    # Whether a request was admitted since it woke: each turn serves at least one.
    served: bool = False
    # When the proxy got to know it.
    known_since: float = field(default_factory=time.monotonic)
    # Seconds without a request after which it goes down a step: it sleeps, sleeps deeply, ends.
    sleep_after: float | None = None
    deep_sleep_after: float | None = None
    stop_after: float | None = None
    # The level of its sleep, as far as is known, and whether it is as deep as it can be.
    slept_at: int | None = None
    deepest: bool = False
    # How long its last sleep and its last wake took, in seconds.
    sleep_s: float = 0.0
    wake_s: float = 0.0
    # Its bytes, if it tells; and whether it had too few for a wake beside others, by these.
    figures: "Figures | None" = None
    does_not_fit: bool = False
    # Bytes of each device when it began to start that were free or held by others.
    start_room: dict[int, int] = field(default_factory=dict)
    # When a deep sleep is tried again, after one that was refused.
    deepens_again_at: float = 0.0
    # Set if an operator has asked for a sleep; done once it sleeps.
    sleep_asked: "asyncio.Future[None] | None" = None
    # The same for its end.
    stop_asked: "asyncio.Future[None] | None" = None
    last_operation: Operation | None = None
    # Started without a request: ahead of the first, or again after it has died.
    due: Literal["preload", "restart"] | None = None
    # No longer in models.yaml: it serves what has come, and ends.
    retiring: bool = False
    # When its sleep, after one that failed, is tried again.
    rests_until: float = 0.0

    def __post_init__(self) -> None:
        self.name = self.name or self.url

    @property
    def state(self) -> State:
        return self.history.state

    @state.setter
    def state(self, state: State) -> None:
        self.history.enter(state)

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def runs(self) -> bool:
        """Whether it can be asked something, as far as is known."""
        return self.state in ("awake", "asleep", "unknown")

    @property
    def on_device(self) -> bool:
        """Whether it has its share of the device, or is about to."""
        return self.state in ("awake", "starting", "stopping", "stuck")

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or self.in_flight > 0

    @property
    def unsure(self) -> bool:
        """Whether it was idle for so long that something else may have put it to sleep."""
        last = max(self.last_used, self.awake_since)
        return self.in_flight == 0 and time.monotonic() - last > TRUST_S

    @property
    def idle_s(self) -> float:
        """Seconds since it was last used, or was brought up."""
        return time.monotonic() - max(self.last_used, self.awake_since, self.known_since)

    @property
    def closing(self) -> bool:
        """Whether an operator has asked for its sleep or its end."""
        return self.sleep_asked is not None or self.stop_asked is not None

    def waits_since(self) -> float:
        return next(iter(self.waiting.values()), math.inf)

    def enter(self) -> None:
        """Another request runs on it."""
        self.in_flight += 1
        self.served = True
        self.last_used = time.monotonic()

    def leave(self) -> None:
        """A request on it has ended."""
        self.in_flight -= 1
        self.last_used = time.monotonic()

    async def wait(self) -> None:
        """Wait until the server opens; then like ``enter``.

        Raises:
            CallFailed: it could not be woken.
        """
        admitted = asyncio.get_running_loop().create_future()
        self.waiting[admitted] = time.monotonic()
        try:
            await admitted
        except BaseException:
            if self.waiting.pop(admitted, None) is None and _succeeded(admitted):
                self.leave()  # Admitted at the moment in which its client went away.
            raise

    def open_up(self) -> None:
        """Admit the requests that wait, and new ones until ``open`` is reset."""
        self.open = True
        for admitted in self._all_that_wait():
            self.enter()
            admitted.set_result(None)

    def fail(self, error: CallFailed) -> None:
        """Fail the requests that wait."""
        for admitted in self._all_that_wait():
            admitted.set_exception(error)

    def _all_that_wait(self) -> "list[asyncio.Future[None]]":
        """From here on they do not; those whose clients went away are left out."""
        waiting, self.waiting = self.waiting, {}
        return [admitted for admitted in waiting if not admitted.done()]


def _succeeded(future: asyncio.Future[None]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
