# SPDX-License-Identifier: Apache-2.0
"""The engines of a data-parallel server, which vLLM calls all at once: an error names its engine,
and the call returns only after every engine has answered."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from vllm_sleep_ascend.error_text import restored
from vllm_sleep_ascend.status import RankStatus

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient

_Utility = Callable[..., Awaitable[Any]]
_Sleeps = Callable[["AsyncMPClient"], Awaitable[bool]]


async def call_all(self: "AsyncMPClient", method: str, *args: object) -> list[Any]:
    """Call a method of every engine of vLLM's AsyncMPClient, and return all answers.

    Raises:
        Exception: engines failed; names them where there are several.
    """
    engines = self.core_engines
    calls = [self._call_utility_async(method, *args, engine=engine) for engine in engines]
    if len(engines) == 1:
        return [await calls[0]]
    results = await asyncio.gather(*calls, return_exceptions=True)
    failed = {n: r for n, r in enumerate(results) if isinstance(r, BaseException)}
    if failed:
        _raise(method, failed, [_number(engine) for engine in engines])
    return results


async def rank_status(client: "AsyncLLM") -> list[RankStatus]:
    """``sleep_status`` of every rank of every engine."""
    call = ("collective_rpc", "sleep_status", None, (), None)
    engines = await call_all(client.engine_core, *call)
    return [rank for ranks in engines for rank in ranks]


def of_the_first(stock: _Utility) -> _Utility:
    async def call_utility_async(self: "AsyncMPClient", method: str, *args: object) -> Any:
        return (await call_all(self, method, *args))[0]

    return call_utility_async


def _raise(method: str, failed: dict[int, BaseException], engines: list[int]) -> None:
    """Raise one error for all that failed, with the type of the first."""
    raised = {n: restored(error, otherwise=RuntimeError) for n, error in failed.items()}
    first, *_ = failed
    if raised[first] is failed[first]:  # not the engine's error: it is gone
        raise failed[first]
    texts = [f"engine {engines[n]}: {error}" for n, error in raised.items()]
    done = [str(engine) for n, engine in enumerate(engines) if n not in failed]
    others = f". Engines that did it: {', '.join(done)}" if done else ""
    head = f"Call to {method} method failed: " if type(raised[first]) is RuntimeError else ""
    raise type(raised[first])(  # vLLM's words, where the type did not come with it
        f"{head}{method} failed on {len(failed)} of {len(engines)} data-parallel engines: "
        f"{'; '.join(texts)}{others}. Repeat the call: engines that did it stay as they are"
    ) from failed[first]


def _number(engine: bytes) -> int:
    return int.from_bytes(engine, "little")


def is_sleeping(stock: _Sleeps) -> _Sleeps:
    """Whether any engine sleeps. If they differ after a failure, stock vLLM raises."""

    async def is_sleeping_async(self: "AsyncMPClient") -> bool:
        return any(await call_all(self, "is_sleeping"))

    return is_sleeping_async
