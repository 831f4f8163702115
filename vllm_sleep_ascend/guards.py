# SPDX-License-Identifier: Apache-2.0
"""Checks in front of vLLM's sleep calls, and one truth behind them.

Stock vLLM pauses the scheduler before anybody looks at the level, takes any tag, and notes what
sleeps by what was asked rather than by what happened. The wrappers here refuse bad input before
anything is touched, and after a failed call take the workers' word for what sleeps.
"""

import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import wraps
from typing import Any

from vllm.logger import init_logger

from vllm_sleep_ascend import policy

logger = init_logger(f"vllm.{__name__}")

_MARK = "guarded_by_camem"
_FROM_ENGINE = re.compile(r"Call to \w+ method failed: ((?:(\w+): )?.*)", re.DOTALL)


def install() -> None:
    """Wrap the sleep calls of the engine and of its front ends. Repeating it changes nothing."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine

    _wrap(EngineCore, "sleep", _core_sleep)
    _wrap(EngineCore, "wake_up", _core_wake_up)
    _wrap(EngineCore, "release_kv_cache_memory", _core_release_kv_cache_memory)
    for name, check in (
        ("sleep", check_sleep),
        ("wake_up", check_wake_up),
        ("release_kv_cache_memory", check_enabled),
    ):
        _wrap(LLMEngine, name, _checked(check))
        _wrap(AsyncLLM, name, _checked_async(check))
    _wrap(LLMEngine, "__init__", _with_guarded_llm)


def _with_guarded_llm(stock: Callable) -> Callable:
    """``LLM`` is wrapped when it makes its engine: other processes never load its module."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        offline = sys.modules.get("vllm.entrypoints.llm")
        if offline is not None:
            for name in ("generate", "chat", "encode", "embed", "classify", "score", "beam_search"):
                if hasattr(offline.LLM, name):
                    _wrap(offline.LLM, name, _awake)
        stock(self, *args, **kwargs)

    return init


def check_enabled(vllm_config: Any) -> None:
    """
    Raises:
        ValueError: the engine was started without sleep mode.
    """
    if not vllm_config.model_config.enable_sleep_mode:
        raise ValueError(
            "sleep mode is not enabled; start the engine with LLM(..., enable_sleep_mode=True) or "
            "vllm serve --enable-sleep-mode"
        )


def check_sleep(vllm_config: Any, level: object = 1, mode: object = "abort") -> None:
    """
    Raises:
        ValueError: level or mode does not exist, or the level needs sleep mode.
    """
    if policy.check_level(level) > 0:
        check_enabled(vllm_config)
    policy.check_mode(mode)


def check_wake_up(vllm_config: Any, tags: list[str] | None = None) -> None:
    """
    Raises:
        ValueError: a tag does not exist, or names memory that cannot sleep.
    """
    if set(policy.check_tags(tags) or ()) - {policy.SCHEDULING_TAG}:
        check_enabled(vllm_config)


def _wrap(owner: type, name: str, wrapper: Callable) -> None:
    stock = getattr(owner, name)
    if not hasattr(stock, _MARK):
        wrapped = wraps(stock)(wrapper(stock))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)


# --- The engine's process ------------------------------------------------------------------------


@contextmanager
def _truth(core: Any) -> Iterator[None]:
    """After a failure, note what really sleeps, and serve on if nothing does."""
    was_paused = core.is_scheduler_paused()
    try:
        yield
    except Exception:
        _settle(core, was_paused)
        raise


def _settle(core: Any, was_paused: bool) -> None:
    executor = core.model_executor
    executor.sleeping_tags = set().union(*executor.collective_rpc("sleeping_tags"))
    if not was_paused and not executor.is_sleeping:
        core.resume_scheduler()


def _core_sleep(stock: Callable) -> Callable:
    def sleep(self: Any, level: int = 1, mode: str = "abort") -> Any:
        check_sleep(self.vllm_config, level, mode)
        was_paused = self.is_scheduler_paused()
        with _named(), _truth(self):
            if level == 2 and "weights" in self.model_executor.sleeping_tags:
                self.model_executor.collective_rpc("sleep", kwargs={"level": 2})
                return None
            result = stock(self, level, mode)
        if isinstance(result, Future):  # mode "wait": the sleep is still to come
            result.add_done_callback(
                lambda done: _settle(self, was_paused) if done.exception() else None
            )
        return result

    return sleep


def _core_wake_up(stock: Callable) -> Callable:
    def wake_up(self: Any, tags: list[str] | None = None) -> bool:
        check_wake_up(self.vllm_config, tags)
        tags = policy.check_tags(tags)
        if tags is not None:
            asleep = self.model_executor.sleeping_tags
            awake = [tag for tag in tags if tag in policy.DEFERRABLE_TAGS and tag not in asleep]
            if awake:
                logger.warning("wake_up: %s is awake already.", ", ".join(awake))
            tags = [tag for tag in tags if tag in asleep]
        with _named(), _truth(self):
            return stock(self, tags)

    return wake_up


def _core_release_kv_cache_memory(stock: Callable) -> Callable:
    def release_kv_cache_memory(self: Any) -> None:
        check_enabled(self.vllm_config)
        with _named(), _truth(self):
            return stock(self)

    return release_kv_cache_memory


@contextmanager
def _named() -> Iterator[None]:
    """Put the error's type in front of its text: only the text reaches the front end's process."""
    from vllm_sleep_ascend.errors import SleepModeError

    try:
        yield
    except SleepModeError as error:
        name = type(error).__name__
        if not str(error).startswith(name):
            error.args = (f"{name}: {error}",)
        raise


# --- The front ends ------------------------------------------------------------------------------


@contextmanager
def _typed() -> Iterator[None]:
    """Give an error that crossed from the engine's process its type again."""
    from vllm_sleep_ascend import errors

    try:
        yield
    except Exception as error:
        crossed = _FROM_ENGINE.fullmatch(str(error))
        if crossed is None:
            raise
        raise getattr(errors, crossed[2] or "", errors.SleepModeError)(crossed[1]) from None


def _awake(stock: Callable) -> Callable:
    """``LLM`` steps its engine until all answers are there, which never comes while it sleeps."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.llm_engine.is_sleeping():
            from vllm_sleep_ascend.errors import SleepModeError

            raise SleepModeError(f"the engine sleeps; call wake_up() before {stock.__name__}()")
        return stock(self, *args, **kwargs)

    return call


def _checked(check: Callable) -> Callable:
    def wrapper(stock: Callable) -> Callable:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            check(self.vllm_config, *args, **kwargs)
            with _typed():
                return stock(self, *args, **kwargs)

        return call

    return wrapper


def _checked_async(check: Callable) -> Callable:
    def wrapper(stock: Callable) -> Callable:
        async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            check(self.vllm_config, *args, **kwargs)
            with _typed():
                return await stock(self, *args, **kwargs)

        return call

    return wrapper
