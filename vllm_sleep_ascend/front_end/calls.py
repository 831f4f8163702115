# SPDX-License-Identifier: Apache-2.0
"""The calls of ``LLM``, ``LLMEngine`` and ``AsyncLLM``: checked input, typed errors, metrics."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from vllm_sleep_ascend import policy
from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.engine import core
from vllm_sleep_ascend.engine.refusals import NotServingError
from vllm_sleep_ascend.engine.serving_gate import ServingGate
from vllm_sleep_ascend.error_text import restored
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.front_end import metrics
from vllm_sleep_ascend.front_end.admission import Admission
from vllm_sleep_ascend.front_end.replicas import call_all

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.entrypoints.llm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import EngineCoreClient, SyncMPClient
    from vllm.v1.engine.llm_engine import LLMEngine

_P = ParamSpec("_P")
_T = TypeVar("_T")
_OfAsync = Callable[Concatenate["AsyncLLM", _P], Awaitable[_T]]  # a method of AsyncLLM
_OfEngine = Callable[Concatenate["LLMEngine", _P], _T]
_OfLLM = Callable[Concatenate["LLM", _P], _T]
_Check = Callable[Concatenate["VllmConfig", _P], None]


def noted(stock: _OfAsync[_P, _T]) -> _OfAsync[_P, _T]:
    """A call after which the engine may refuse requests, or sleep."""

    async def call(self: "AsyncLLM", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        admission = Admission.of(self)
        admission.may_change()
        try:
            return await stock(self, *args, **kwargs)
        finally:
            admission.may_change()

    return call


def admitted(stock: _OfAsync[_P, _T]) -> _OfAsync[_P, _T]:
    async def add_request(self: "AsyncLLM", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        reason = await Admission.of(self).refusal(self)
        if reason is not None:
            raise NotServingError(reason)
        return await stock(self, *args, **kwargs)

    return add_request


def admitted_in_process(stock: _OfEngine[_P, _T]) -> _OfEngine[_P, _T]:
    """An engine in a process of its own answers a request that it refuses with "abort": to ask it
    first would take a step of it for each request."""

    def add_request(self: "LLMEngine", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        in_process = _in_process(self.engine_core)
        gate = None if in_process is None else ServingGate.of(in_process)
        reason = gate.look_and_refuse() if gate is not None and gate.refuses else None
        if reason is not None:
            raise NotServingError(reason)
        return stock(self, *args, **kwargs)

    return add_request


def resume_generation(stock: _OfAsync[[], None]) -> _OfAsync[[], None]:
    """While a sleep waits for requests on one engine, others may sleep already: all of it is called
    off."""

    async def resume_generation(self: "AsyncLLM", /) -> None:
        with typed():
            if any(await call_all(self.engine_core, "sleep_mode_pending")):
                await self.wake_up()
            await stock(self)

    return resume_generation


def serving(stock: _OfLLM[_P, _T]) -> _OfLLM[_P, _T]:
    """An engine that sleeps would be stepped for ever."""

    def call(self: "LLM", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        engine = self.llm_engine
        config = engine.vllm_config
        asleep, reason = engine.is_sleeping(), None
        wakes = SleepModeConfig.from_vllm_config(config).wake_on_request
        if config.model_config.enable_sleep_mode and (wakes or not asleep):
            reason = _refusal_of(engine.engine_core)
            asleep = asleep and engine.is_sleeping()
        if reason is None and asleep:
            reason = f"the engine sleeps; call wake_up() before {stock.__name__}()"
        if reason is not None:
            raise NotServingError(reason)
        return stock(self, *args, **kwargs)

    return call


def with_place(stock: Callable[..., _T]) -> Callable[..., _T]:
    """A ``sleep`` that may name the place of its backups. vLLM hands the mode on as it is."""

    def sleep(self: object, /, level: int = 1, mode: Any = "abort", *, to: Any = None) -> _T:
        return stock(self, level, policy.with_place(mode, to))

    return sleep


def sleep_of_llm(stock: _OfLLM[..., None]) -> _OfLLM[..., None]:
    def sleep(self: "LLM", /, level: int = 1, mode: Any = "abort", *, to: Any = None) -> None:
        if to is None:
            return stock(self, level, mode)
        self.llm_engine.sleep(level, mode, to=to)  # type: ignore[call-arg]
        return None

    return sleep


def _refusal_of(client: "EngineCoreClient") -> str | None:
    """As ``core.refusal``, of an engine in this process or in its own."""
    in_process = _in_process(client)
    if in_process is not None:
        return core.refusal(in_process)
    reason: str | None = cast("SyncMPClient", client).call_utility("sleep_mode_refusal")
    return reason


def _in_process(client: "EngineCoreClient") -> "EngineCore | None":
    """The engine of this client, if it is in this process."""
    in_process: EngineCore | None = getattr(client, "engine_core", None)
    return in_process


@contextmanager
def typed() -> Iterator[None]:
    """Errors of the engine's process get their type again."""
    try:
        yield
    except Exception as error:
        raised = restored(error, otherwise=SleepModeError)
        if raised is error:
            raise
        raise raised from None


def checked(check: _Check[_P]) -> Callable[[_OfEngine[_P, _T]], _OfEngine[_P, _T]]:
    """Wrapper of a method with the parameters of ``check``, which refuses bad input."""

    def wrapper(stock: _OfEngine[_P, _T]) -> _OfEngine[_P, _T]:
        def call(self: "LLMEngine", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
            check(self.vllm_config, *args, **kwargs)
            try:
                with typed():
                    return stock(self, *args, **kwargs)
            finally:
                metrics.record(self)

        return call

    return wrapper


def checked_async(check: _Check[_P]) -> Callable[[_OfAsync[_P, _T]], _OfAsync[_P, _T]]:
    def wrapper(stock: _OfAsync[_P, _T]) -> _OfAsync[_P, _T]:
        with_note = noted(stock)

        async def call(self: "AsyncLLM", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
            check(self.vllm_config, *args, **kwargs)
            try:
                with typed():
                    return await with_note(self, *args, **kwargs)
            finally:
                if metrics.has_metrics(self):
                    await metrics.record_async(self)

        return call

    return wrapper
