# SPDX-License-Identifier: Apache-2.0
"""Refusals of requests that are already in the engine: the reason goes from the engine's process to
the front end, where ``generate`` and ``encode`` raise it."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vllm_sleep_ascend.engine.not_serving import NotServingError
from vllm_sleep_ascend.engine.serving_gate import ServingGate
from vllm_sleep_ascend.engine.state import EngineState, scheduler_of

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
_MARK = f"{NotServingError.__name__}: "


def refuse_new(core: "EngineCore", request: "Request") -> bool:
    """Whether this request, which has passed the front end's check, is refused."""
    gate = ServingGate.of(core)
    if gate is None or not gate.refuses:
        return False
    if request.request_id in scheduler_of(core).requests:  # more input of a session
        return False
    if getattr(request, "abort_immediately", False):
        return False
    reason = gate.refusal()
    if reason is not None:
        _answer(core, [request], reason)
    return reason is not None


def refuse_waiting(core: "EngineCore") -> None:
    """Before a sleep, with ``while_asleep="refuse"``: refuse all requests that have not begun."""
    from vllm.v1.request import RequestStatus

    gate = ServingGate.of(core)
    if gate is None or not gate.refuses_while_asleep:
        return
    waiting = [
        request.request_id
        for request in scheduler_of(core).requests.values()
        if request.status < RequestStatus.RUNNING
        and not request.num_computed_tokens
        and not request.num_output_tokens
    ]
    if waiting:
        refused = core.scheduler.finish_requests(waiting, RequestStatus.FINISHED_ABORTED)
        _answer(core, refused, gate.asleep)


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
