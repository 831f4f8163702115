# SPDX-License-Identifier: Apache-2.0
"""This package's state of an EngineCore, and what it uses of one beyond vLLM's interfaces."""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

    from vllm_sleep_ascend.engine.backups.to_disk import ToDisk
    from vllm_sleep_ascend.engine.on_request import OnRequest
    from vllm_sleep_ascend.engine.pauses import WaitBeforeSleep
    from vllm_sleep_ascend.engine.serving_gate import ServingGate

_ATTRIBUTE = "sleep_mode_state"


@dataclass
class EngineState:
    """
    gate: whether it may serve; None without sleep mode.
    on_request: when it sleeps and wakes by itself, if options ask for that.
    to_disk: when it moves its backup by itself, if an option asks for that.
    finished: requests that ended while memory sleeps; the workers forget them with the next step.
    pending_sleep: a sleep that waits for requests to end.
    wait: its part before any memory moves.
    pauses_to_sleep: the current pause call belongs to a sleep, not to the user.
    wakes: the current resume call belongs to a wake, not to the user.
    undelivered: outputs of an in-process engine that have not been fetched yet.
    """

    gate: "ServingGate | None" = None
    on_request: "OnRequest | None" = None
    to_disk: "ToDisk | None" = None
    pending_sleep: Future[None] | None = None
    wait: "WaitBeforeSleep | None" = None
    pauses_to_sleep: bool = False
    wakes: bool = False
    finished: set[str] = field(default_factory=set)
    undelivered: "deque[EngineCoreOutputs]" = field(default_factory=deque)

    @classmethod
    def of(cls, core: "EngineCore") -> "EngineState":
        """The state of this engine, which keeps it as an attribute."""
        state: EngineState | None = getattr(core, _ATTRIBUTE, None)
        if state is None:
            state = cls()
            setattr(core, _ATTRIBUTE, state)
        return state


def scheduler_of(core: "EngineCore") -> "Scheduler":
    """The scheduler as vLLM's own class, because its interface has neither requests nor caches."""
    return cast("Scheduler", core.scheduler)


def is_pending(core: "EngineCore") -> bool:
    """Whether a sleep waits for requests to end."""
    return EngineState.of(core).pending_sleep is not None


def come_by(core: "EngineCore") -> None:
    """Have the engine's loop come by, from any thread."""
    from vllm.v1.engine import EngineCoreRequestType

    queue = getattr(core, "input_queue", None)  # an in-process engine has no loop
    if queue is not None:
        queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


def unfinished(core: "EngineCore") -> "list[Request]":
    """Its requests, also those that vLLM's own counts leave out: what waits during a pause, and a
    session that waits for input."""
    requests = scheduler_of(core).requests.values()
    return [request for request in requests if not request.is_finished()]
