# SPDX-License-Identifier: Apache-2.0
"""The calls of ``LLM``, ``LLMEngine`` and ``AsyncLLM``: checked input, typed errors, metrics."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.engine.not_serving import NotServingError
from vllm_sleep_ascend.engine.serving_gate import ServingGate
from vllm_sleep_ascend.error_text import restored
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.front_end import metrics
from vllm_sleep_ascend.front_end.replicas import call_all

_MAY_REFUSE = "sleep_mode_may_refuse"  # of an AsyncLLM: whether its engine has to be asked


async def refusal(client: Any) -> str | None:
    """Why this engine takes no request now; None if it does, or if no option refuses any.

    An answer takes a step of the engine, so it is asked only after a call of this front end that
    may keep it from serving. Otherwise the engine itself says so: see ``refusals``.

    Args:
        client: vLLM's AsyncLLM.
    """
    if not getattr(client, _MAY_REFUSE, False):
        return None
    config = SleepModeConfig.from_vllm_config(client.vllm_config)
    if config.after_level2 == "warn" and config.while_asleep == "wait":
        return None
    setattr(client, _MAY_REFUSE, False)  # a call that comes meanwhile sets it again
    reasons = await call_all(client.engine_core, "sleep_mode_refusal")
    reason = next((reason for reason in reasons if reason), None)
    if reason is not None:
        setattr(client, _MAY_REFUSE, True)
    return reason


def noted(stock: Callable) -> Callable:
    """A call after which the engine may refuse requests."""

    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        setattr(self, _MAY_REFUSE, True)
        try:
            return await stock(self, *args, **kwargs)
        finally:
            setattr(self, _MAY_REFUSE, True)

    return call


def admitted(stock: Callable) -> Callable:
    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        reason = await refusal(self)
        if reason is not None:
            raise NotServingError(reason)
        return await stock(self, *args, **kwargs)

    return add_request


def admitted_in_process(stock: Callable) -> Callable:
    """An engine in a process of its own answers a request that it refuses with "abort": to ask it
    first would take a step of it for each request."""

    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        core = getattr(self.engine_core, "engine_core", None)
        gate = None if core is None else ServingGate.of(core)
        reason = gate.look_and_refuse() if gate is not None and gate.refuses else None
        if reason is not None:
            raise NotServingError(reason)
        return stock(self, *args, **kwargs)

    return add_request


def resume_generation(stock: Callable) -> Callable:
    """While a sleep waits for requests on one engine, others may sleep already: all of it is called
    off."""

    async def resume_generation(self: Any) -> None:
        with _typed():
            if any(await call_all(self.engine_core, "sleep_mode_pending")):
                await self.wake_up()
            await stock(self)

    return resume_generation


def with_guarded_llm(stock: Callable) -> Callable:
    """``LLM`` is patched when it makes its engine: other processes never load its module."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_sleep_ascend import patches

        if "vllm.entrypoints.llm" in sys.modules:
            patches.install(patches.OFFLINE)
        stock(self, *args, **kwargs)

    return init


def serving(stock: Callable) -> Callable:
    """An engine that sleeps would be stepped for ever."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = self.llm_engine
        reason = None
        if engine.is_sleeping():
            reason = f"the engine sleeps; call wake_up() before {stock.__name__}()"
        elif engine.vllm_config.model_config.enable_sleep_mode:
            reason = _call_core(engine.engine_core, "sleep_mode_refusal")
        if reason is not None:
            raise NotServingError(reason)
        return stock(self, *args, **kwargs)

    return call


def _call_core(client: Any, method: str) -> Any:
    """A method of EngineCore, in this process or in its own."""
    if hasattr(client, "call_utility"):
        return client.call_utility(method)
    return getattr(client.engine_core, method)()


@contextmanager
def _typed() -> Iterator[None]:
    """Errors of the engine's process get their type again."""
    try:
        yield
    except Exception as error:
        raised = restored(error, otherwise=SleepModeError)
        if raised is error:
            raise
        raise raised from None


def checked(check: Callable) -> Callable:
    def wrapper(stock: Callable) -> Callable:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            check(self.vllm_config, *args, **kwargs)
            try:
                with _typed():
                    return stock(self, *args, **kwargs)
            finally:
                metrics.record(self)

        return call

    return wrapper


def checked_async(check: Callable) -> Callable:
    def wrapper(stock: Callable) -> Callable:
        with_note = noted(stock)

        async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            check(self.vllm_config, *args, **kwargs)
            try:
                with _typed():
                    return await with_note(self, *args, **kwargs)
            finally:
                if metrics.has_metrics(self):
                    await metrics.record_async(self)

        return call

    return wrapper
