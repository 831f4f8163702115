# SPDX-License-Identifier: Apache-2.0
"""Requests that are in the engine already and are refused there: from the engine's process to the
front end, where ``generate`` and ``encode`` raise."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from vllm_sleep_ascend.engine.not_serving import NotServingError
from vllm_sleep_ascend.engine.pauses import undelivered
from vllm_sleep_ascend.engine.serving_gate import ServingGate

# In front of a stop_reason of vLLM's, which the engine itself leaves to numbers of tokens.
_MARK = f"{NotServingError.__name__}: "


def refuse_new(core: Any, request: Any) -> bool:
    """Whether this request, which the front end let through a moment ago, is refused."""
    gate = ServingGate.of(core)
    if gate is None or not gate.refuses:
        return False
    if request.request_id in core.scheduler.requests:  # more input of a session
        return False
    if getattr(request, "abort_immediately", False):
        return False
    reason = gate.refusal()
    if reason is not None:
        _answer(core, [request], reason)
    return reason is not None


def refuse_waiting(core: Any) -> None:
    """Before a sleep, with ``while_asleep="refuse"``: of all requests that have not begun."""
    from vllm.v1.request import RequestStatus

    gate = ServingGate.of(core)
    if gate is None or not gate.refuses_while_asleep:
        return
    waiting = [
        request.request_id
        for request in core.scheduler.requests.values()
        if request.status < RequestStatus.RUNNING
        and not request.num_computed_tokens
        and not request.num_output_tokens
    ]
    if waiting:
        refused = core.scheduler.finish_requests(waiting, RequestStatus.FINISHED_ABORTED)
        _answer(core, refused, gate.asleep)


def _answer(core: Any, requests: Iterable[Any], reason: str) -> None:
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
            undelivered(core).append(answer)


def process_outputs(stock: Callable) -> Callable:
    """All outputs of one message are refusals, or none. ``LLM`` gets them as they are: aborted."""

    def process_outputs(
        self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        if not engine_core_outputs or not str(engine_core_outputs[0].stop_reason).startswith(_MARK):
            return stock(self, engine_core_outputs, *args, **kwargs)
        states = [self.request_states.get(output.request_id) for output in engine_core_outputs]
        if any(state is not None and state.queue is None for state in states):
            return stock(self, engine_core_outputs, *args, **kwargs)
        result = stock(self, [], *args, **kwargs)
        for output, state in zip(engine_core_outputs, states, strict=True):
            if output.request_id in self.request_states:  # not ended with another of its parent
                result.reqs_to_abort += _raise_in(self, state, output)
        return result

    return process_outputs


def _raise_in(processor: Any, state: Any, output: Any) -> list[str]:
    """Have the caller of a request get a NotServingError. With ``n`` above 1 all of them end."""
    whole = output.request_id if state.parent_req is None else state.parent_req.request_id
    ended = processor.abort_requests([whole], internal=True)
    # After the outputs of the abort: an error takes their place.
    state.queue.put(NotServingError(output.stop_reason.removeprefix(_MARK)))
    return ended
