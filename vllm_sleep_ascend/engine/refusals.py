# SPDX-License-Identifier: Apache-2.0
"""The answer to a request that the engine cannot serve now.

If the request is already in the engine, the reason goes from its process to the front end, where
``generate`` and ``encode`` raise it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm_sleep_ascend.engine.on_request import OnRequest
from vllm_sleep_ascend.engine.serving_gate import ServingGate
from vllm_sleep_ascend.engine.state import EngineState, scheduler_of, unfinished
from vllm_sleep_ascend.errors import SleepModeError

try:
    from vllm.exceptions import GracefulHTTPError
except ImportError:  # an older vLLM; its server is answered for by SleepModeMiddleware
    GracefulHTTPError = Exception  # type: ignore[assignment,misc]

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.output_processor import (
        OutputProcessor,
        OutputProcessorOutput,
        RequestState,
    )
    from vllm.v1.request import Request

_Process = Callable[..., "OutputProcessorOutput"]

# In front of a stop_reason of vLLM's, which the engine itself leaves to numbers of tokens.
_MARK = "NotServingError: "


class NotServingError(SleepModeError, GracefulHTTPError):
    """A generation request came while the engine sleeps, or before its weights were loaded.

    vLLM's server answers it with 503.
    """

    def __init__(self, message: str) -> None:
        RuntimeError.__init__(self, message)
        self.message = message
        self.http_status = HTTPStatus.SERVICE_UNAVAILABLE


def refuse_new(core: "EngineCore", request: "Request") -> bool:
    """Whether this request, which has passed the front end's check, is refused; before that it
    wakes the engine, if an option says so."""
    gate = ServingGate.of(core)
    if gate is None or getattr(request, "abort_immediately", False):
        return False
    reason = OnRequest.of(core).wake(request.request_id)
    if request.request_id in scheduler_of(core).requests:  # more input of a session
        if reason is not None:
            refuse(core, [request.request_id], reason)
        return reason is not None
    if reason is None and gate.refuses:
        reason = gate.refusal()
    if reason is not None:
        _answer(core, [request], reason)
    return reason is not None


def refuse_waiting(core: "EngineCore", reason: str) -> None:
    """Refuse all requests that have not begun."""
    from vllm.v1.request import RequestStatus

    waiting = [
        request.request_id
        for request in unfinished(core)
        if request.status < RequestStatus.RUNNING
        and not request.num_computed_tokens
        and not request.num_output_tokens
    ]
    if waiting:
        refuse(core, waiting, reason)


def refuse(core: "EngineCore", names: list[str], reason: str) -> None:
    """End these requests of the engine."""
    from vllm.v1.request import RequestStatus

    requests = scheduler_of(core).requests
    refused = [requests[name] for name in names]
    core.scheduler.finish_requests(names, RequestStatus.FINISHED_ABORTED)
    _answer(core, refused, reason)


def _answer(core: "EngineCore", requests: "Iterable[Request]", reason: str) -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    by_client: dict[int, list[EngineCoreOutput]] = defaultdict(list)
    for request in requests:
        output = EngineCoreOutput(
            request.request_id,
            [],
            finish_reason=FinishReason.ABORT,
            stop_reason=f"{_MARK}{reason}",
        )
        by_client[request.client_index].append(output)
    for client, outputs in by_client.items():
        names = {output.request_id for output in outputs}
        answer = EngineCoreOutputs(outputs=outputs, finished_requests=names)
        if hasattr(core, "output_queue"):
            core.output_queue.put_nowait((client, answer))
        else:
            EngineState.of(core).undelivered.append(answer)


def process_outputs(stock: _Process) -> _Process:
    """All outputs of one message are refusals, or none. ``LLM`` gets them as they are: aborted."""

    def process_outputs(
        self: "OutputProcessor",
        engine_core_outputs: "list[EngineCoreOutput]",
        *args: Any,
        **kwargs: Any,
    ) -> "OutputProcessorOutput":
        if not engine_core_outputs or not str(engine_core_outputs[0].stop_reason).startswith(_MARK):
            return stock(self, engine_core_outputs, *args, **kwargs)
        states = (self.request_states.get(output.request_id) for output in engine_core_outputs)
        if any(state is not None and state.queue is None for state in states):
            return stock(self, engine_core_outputs, *args, **kwargs)
        result = stock(self, [], *args, **kwargs)
        for output in engine_core_outputs:
            state = self.request_states.get(output.request_id)
            if state is not None:  # not ended with another of its parent
                result.reqs_to_abort += _raise_in(self, state, output)
        return result

    return process_outputs


def _raise_in(
    processor: "OutputProcessor", state: "RequestState", output: "EngineCoreOutput"
) -> list[str]:
    """Raise a NotServingError at a request's caller. With ``n`` above 1 all of its parts end."""
    whole = output.request_id if state.parent_req is None else state.parent_req.request_id
    ended = processor.abort_requests([whole], internal=True)
    assert state.queue is not None
    # After the outputs of the abort: an error replaces them.
    state.queue.put(NotServingError(str(output.stop_reason).removeprefix(_MARK)))
    return ended
