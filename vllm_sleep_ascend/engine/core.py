# SPDX-License-Identifier: Apache-2.0
"""The calls of ``EngineCore``, in the engine's process."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState

from vllm_sleep_ascend import policy
from vllm_sleep_ascend.config import check_enabled
from vllm_sleep_ascend.engine.backups.place import set_place
from vllm_sleep_ascend.engine.backups.to_disk import ToDisk
from vllm_sleep_ascend.engine.checks import check_sleep, check_wake_up
from vllm_sleep_ascend.engine.launched import on_any_rank
from vllm_sleep_ascend.engine.on_request import OnRequest
from vllm_sleep_ascend.engine.pauses import call_off_sleep, pausing_to_sleep
from vllm_sleep_ascend.engine.refusals import refuse, refuse_new, refuse_waiting
from vllm_sleep_ascend.engine.serving_gate import ServingGate, serve_on
from vllm_sleep_ascend.engine.state import EngineState, is_pending, scheduler_of, unfinished
from vllm_sleep_ascend.engine.wrap import wrap
from vllm_sleep_ascend.error_text import write_type
from vllm_sleep_ascend.errors import RankGoneError, SleepModeError
from vllm_sleep_ascend.policy import PauseMode
from vllm_sleep_ascend.rank.guarded_calls import GuardedCall, guards_calls

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

_T = TypeVar("_T")
_Method = str | Callable[..., Any]  # of a worker
_Sleep = Callable[["EngineCore", int, PauseMode], Future[None] | None]
_WakeUp = Callable[["EngineCore", list[str] | None], bool | Future[bool]]
_Step = Callable[["EngineCore"], tuple[dict[int, "EngineCoreOutputs"] | None, bool]]

_MOVES = ("sleep", "discard", "wake_up")  # the worker's methods that move memory


@contextmanager
def _recording_sleep(core: "EngineCore") -> Iterator[None]:
    """Record what really sleeps after the call; after a failure, resume serving if nothing does."""
    was_paused = core.is_scheduler_paused()
    try:
        yield
    except Exception:
        _record_sleep(core, was_paused, failed=True)
        raise
    _record_sleep(core, was_paused, failed=False)


def _record_sleep(core: "EngineCore", was_paused: bool, failed: bool) -> None:
    """Record what sleeps according to the workers; stock vLLM records what was requested."""
    executor = core.model_executor
    if getattr(executor, "is_failed", False):  # a worker died
        return
    if core.vllm_config.model_config.enable_sleep_mode:
        executor.sleeping_tags = set().union(*executor.collective_rpc("sleeping_tags"))
        if not isinstance(getattr(type(executor), "is_sleeping", None), property):
            vars(executor)["is_sleeping"] = bool(executor.sleeping_tags)  # vLLM 0.23 keeps both
    ToDisk.of(core).follow()
    if failed and not was_paused and not executor.is_sleeping:
        serve_on(core)


def sleep(stock: _Sleep) -> _Sleep:
    def sleep(self: "EngineCore", level: int = 1, mode: str = "abort") -> Future[None] | None:
        return sleep_to(self, level, *policy.split_place(mode))

    def sleep_to(
        self: "EngineCore", level: int, given_mode: str, to: str | None
    ) -> Future[None] | None:
        check_sleep(self.vllm_config, level, given_mode, to)
        mode, place = policy.check_mode(given_mode), policy.check_place(to, level)
        if place is None or not self.model_executor.is_sleeping:  # a move leaves it asleep as it is
            OnRequest.of(self).sleeps_by_itself = False
        pending = EngineState.of(self).pending_sleep
        if pending is not None:
            if mode == "abort":  # of the requests that the pending sleep waits for
                with pausing_to_sleep(self):
                    self.pause_scheduler("abort", clear_cache=False)
            return _afterwards(pending, lambda: sleep_to(self, level, mode, place))
        was_paused = self.is_scheduler_paused()
        with _named(), _recording_sleep(self):
            if self.model_executor.is_sleeping:
                # Stock vLLM does nothing if the weights sleep, though the KV cache may be awake or
                # the level may differ; and a second pause could start requests that are kept.
                if level > 0:
                    rpc_options = {"level": level, **({} if place is None else {"to": place})}
                    self.model_executor.collective_rpc("sleep", kwargs=rpc_options)
                    if place is not None:
                        ToDisk.of(self).begin()
                return None
            if mode == "wait":
                _check_wait(self)
            if level > 0:
                _check_workers(self, level)
            gate = ServingGate.of(self)
            if gate is not None and gate.refuses_while_asleep:
                refuse_waiting(self, gate.asleep)
            set_place(self.model_executor, place)
            try:
                with pausing_to_sleep(self):
                    result = stock(self, level, mode)
            except Exception:
                set_place(self.model_executor, None)
                raise
        if isinstance(result, Future):  # Requests are running: the sleep follows later.
            EngineState.of(self).pending_sleep = result
            result.add_done_callback(lambda done: _sleep_is_done(self, done, was_paused, mode))
        else:
            set_place(self.model_executor, None)
            _wake_for_waiting(self, mode)
        return result

    return sleep


def _check_wait(core: "EngineCore") -> None:
    """Refuse mode "wait" while requests wait for weights: they may not be stepped, and so never
    end."""
    gate = ServingGate.of(core)
    if gate is None or not gate.held:
        return
    reason = gate.look_and_refuse()
    if reason is not None and unfinished(core):
        raise SleepModeError(
            f"sleep(mode='wait') refused: requests are under way, and {reason}. Or use mode "
            "'abort' or 'keep'"
        )


def _check_workers(core: "EngineCore", level: int) -> None:
    """Let the workers refuse before the scheduler pauses, which aborts requests."""
    reasons: list[str | None]
    reasons = core.model_executor.collective_rpc("sleep_refusal", args=(level,))
    for reason in reasons:
        if reason is not None:
            raise SleepModeError(f"sleep refused: {reason}")


def _sleep_is_done(
    core: "EngineCore", done: Future[None], was_paused: bool, mode: PauseMode
) -> None:
    EngineState.of(core).pending_sleep = None
    set_place(core.model_executor, None)
    error = done.exception()
    if error is not None:
        with suppress(BaseException), _named():
            raise error
    _record_sleep(core, was_paused, failed=error is not None)
    _wake_for_waiting(core, mode)


def _wake_for_waiting(core: "EngineCore", mode: PauseMode) -> None:
    waiting, reason = OnRequest.of(core).wake_after_sleep(mode)
    if reason is not None:
        refuse(core, waiting, reason)


def wake_up(stock: _WakeUp) -> _WakeUp:
    def wake_up(self: "EngineCore", tags: list[str] | None = None) -> bool | Future[bool]:
        check_wake_up(self.vllm_config, tags)
        OnRequest.of(self).sleeps_by_itself = False
        call_off_sleep(self, "wake_up()")
        state = EngineState.of(self)
        if state.pending_sleep is not None:
            return _afterwards(state.pending_sleep, lambda: wake_up(self, tags))
        tags = policy.check_tags(tags)
        gate = ServingGate.of(self)
        if gate is not None and policy.SCHEDULING_TAG in (tags or ()):
            gate.users_pause = PauseState.UNPAUSED
        if tags is not None:
            asleep = self.model_executor.sleeping_tags
            awake = [tag for tag in tags if tag in policy.DEFERRABLE_TAGS and tag not in asleep]
            if awake:
                logger.warning("wake_up: awake already: %s.", ", ".join(awake))
            tags = [tag for tag in tags if tag in asleep]
        with _named(), _recording_sleep(self):
            state.wakes = True
            try:
                fully_awake = stock(self, tags)
            finally:
                state.wakes = False
        # vLLM 0.23 returns nothing.
        return not self.model_executor.is_sleeping if fully_awake is None else fully_awake

    return wake_up


def _afterwards(pending: Future[None], call: Callable[[], _T | Future[_T]]) -> Future[_T]:
    """The result of a call that follows the pending one."""
    result: Future[_T] = Future()

    def resolve(get: Callable[[], _T | Future[_T]]) -> None:
        try:
            value = get()
        except Exception as error:
            result.set_exception(error)
        else:
            if isinstance(value, Future):
                value.add_done_callback(lambda done: resolve(done.result))
            else:
                result.set_result(value)

    pending.add_done_callback(lambda _: resolve(call))
    return result


def release_kv_cache_memory(
    stock: Callable[["EngineCore"], None],
) -> Callable[["EngineCore"], None]:
    def release_kv_cache_memory(self: "EngineCore") -> None:
        check_enabled(self.vllm_config)
        with _named(), _recording_sleep(self):
            asleep = ", ".join(sorted(self.model_executor.sleeping_tags))
            if asleep:
                raise SleepModeError(
                    "release_kv_cache_memory() requires all executor memory to be resident; "
                    f"asleep: {asleep}. Call wake_up() first"
                )
            _finish_steps(self)
            return stock(self)

    return release_kv_cache_memory


def _finish_steps(core: "EngineCore") -> None:
    """An in-process engine is stepped only while requests run. Work that its last step has left to
    the next one would keep a pause from completing."""
    scheduler = core.scheduler
    for _ in range(3):
        if not core.is_scheduler_paused() or scheduler.has_unfinished_requests():
            return
        if not scheduler.has_requests() and not core.batch_queue:
            return
        core.step_fn()


def resume_scheduler(stock: Callable[["EngineCore"], None]) -> Callable[["EngineCore"], None]:
    """The only way to resume serving, once memory and weights are available. Only the user's own
    call ends the user's own pause."""

    def resume_scheduler(self: "EngineCore") -> None:
        gate, on_request = ServingGate.of(self), OnRequest.of(self)
        wakes = EngineState.of(self).wakes
        if not wakes:
            call_off_sleep(self, "resume_scheduler()")
        if gate is None:
            return stock(self)
        if self.model_executor.is_sleeping:
            if wakes:  # vLLM 0.23 resumes after each part of a wake
                return None
            if on_request.sleeps_by_itself:
                gate.users_pause = PauseState.UNPAUSED
                return on_request.end_own_sleep()
            raise SleepModeError("the engine sleeps; wake it with wake_up() before it resumes")
        if is_pending(self):
            raise SleepModeError("a sleep waits for requests to end; wait for it, then wake_up()")
        on_request.resumes()
        if not wakes:
            gate.users_pause = PauseState.UNPAUSED
        gate.look()
        if gate.closed:
            gate.hold(gate.users_pause)
            return None
        gate.held = False
        if gate.users_pause != PauseState.UNPAUSED:
            self.scheduler.set_pause_state(gate.users_pause)
            return None
        stock(self)
        if self.scheduler.has_unfinished_requests():
            gate.warn()
        return None

    return resume_scheduler


def is_sleeping(stock: Callable[["EngineCore"], bool]) -> Callable[["EngineCore"], bool]:
    """An engine that waits for its weights has its memory: it does not sleep, unless at level 0."""

    def is_sleeping(self: "EngineCore") -> bool:
        gate = ServingGate.of(self)
        if gate is not None and gate.held:
            return self.model_executor.is_sleeping or gate.was_paused
        return stock(self)

    return is_sleeping


def collective_rpc(stock: Callable[..., _T]) -> Callable[..., _T]:
    def collective_rpc(self: "EngineCore", method: _Method, *args: Any, **kwargs: Any) -> _T:
        gate, on_request = ServingGate.of(self), OnRequest.of(self)
        if gate is None:
            return stock(self, method, *args, **kwargs)
        if method in _MOVES:
            on_request.sleeps_by_itself = False
        elif _may_touch_memory(method):
            on_request.end_own_sleep()
        wrap(type(self.model_executor), "collective_rpc", guards_calls)  # Ray's, or a user's own
        call = GuardedCall(method) if method in policy.STEP_CALLS else method
        try:
            with _following_move(self) if method in _MOVES else nullcontext():
                result = stock(self, call, *args, **kwargs)
        except (TimeoutError, RankGoneError):
            gate.unseen = True  # a query now would wait for the rank that does not answer
            raise
        except Exception:
            _follow_load(gate, method)
            raise
        finally:
            if _may_touch_memory(method):
                on_request.works()
        _follow_load(gate, method)
        return result

    return collective_rpc


def _may_touch_memory(method: _Method) -> bool:
    return not isinstance(method, str) or method not in policy.SAFE_CALLS


def _follow_load(gate: ServingGate, method: _Method) -> None:
    if _may_touch_memory(method) or gate.unseen or gate.held or not gate.clear:
        gate.follow_load()


@contextmanager
def _following_move(core: "EngineCore") -> Iterator[None]:
    """collective_rpc("sleep") or ("wake_up") bypasses the engine: bring its state in line."""
    executor = core.model_executor
    before = set(executor.sleeping_tags)
    try:
        with _recording_sleep(core):
            yield
    finally:
        asleep = executor.sleeping_tags
        if "kv_cache" in asleep - before:  # what it held is gone; running requests start anew
            core.reset_prefix_cache(reset_running_requests=True)
        if before and not asleep and not is_pending(core):
            serve_on(core)


def add_request(stock: Callable[..., None]) -> Callable[..., None]:
    def add_request(self: "EngineCore", request: "Request", *args: Any, **kwargs: Any) -> None:
        OnRequest.of(self).works()
        if refuse_new(self, request):
            return None
        gate = ServingGate.of(self)
        if gate is not None and not self.is_scheduler_paused():
            gate.warn()
        return stock(self, request, *args, **kwargs)

    return add_request


def step(stock: _Step) -> _Step:
    """The last line of defence: no step runs on memory that sleeps, however the scheduler was
    paused."""

    def step(self: "EngineCore") -> tuple[dict[int, "EngineCoreOutputs"] | None, bool]:
        scheduler, finished = scheduler_of(self), EngineState.of(self).finished
        if self.model_executor.sleeping_tags:
            if scheduler.pause_state != PauseState.PAUSED_ALL:
                scheduler.set_pause_state(PauseState.PAUSED_ALL)
            if not self.batch_queue:
                # A step would tell the workers. Meanwhile they are no work for the engine.
                finished |= scheduler.finished_req_ids
                scheduler.finished_req_ids.clear()
                return {}, False
        if finished:
            scheduler.finished_req_ids |= finished
            finished.clear()
        result = stock(self)
        OnRequest.of(self).works()
        return result

    return step


def refusal(self: "EngineCore") -> str | None:
    """Why new requests are refused now; None if they are accepted. A sleeping engine wakes before
    that, if an option says so."""
    gate = ServingGate.of(self)
    if gate is None:
        return None
    on_request = OnRequest.of(self)
    reason = on_request.wake()
    on_request.works()  # the request is about to come
    return on_any_rank(self, reason or gate.look_and_refuse())


@contextmanager
def _named() -> Iterator[None]:
    """Errors in here keep their type on the way to the front end's process."""
    try:
        yield
    except Exception as error:
        write_type(error)
        raise
