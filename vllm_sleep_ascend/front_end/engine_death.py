# SPDX-License-Identifier: Apache-2.0
"""Calls to an engine that dies before it has answered. vLLM's clients notice the death, and their
next call raises; the one that waits would wait for ever."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import InvalidStateError
from contextlib import suppress
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.engine.core_client import AsyncMPClient, SyncMPClient

_LOOK_S = 1.0


def raises(stock: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def _call_utility_async(
        self: "AsyncMPClient", method: str, *args: object, **kwargs: object
    ) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        call = asyncio.ensure_future(stock(self, method, *args, **kwargs))
        try:
            while not (await asyncio.wait([call], timeout=_LOOK_S))[0]:
                if self.resources.engine_dead:
                    raise EngineDeadError
            return call.result()
        finally:
            if not call.cancel() and not call.cancelled():
                call.exception()  # nobody else asks, if the caller is cancelled at this moment

    return _call_utility_async


def raises_in_thread(stock: Callable[..., Any]) -> Callable[..., Any]:
    """As ``raises``, of a client whose caller blocks: a thread looks meanwhile."""

    def call_utility(self: "SyncMPClient", method: str, *args: object) -> Any:
        answered = Event()
        Thread(target=_fail_if_dead, args=(self, answered), daemon=True).start()
        try:
            return stock(self, method, *args)
        finally:
            answered.set()

    return call_utility


def _fail_if_dead(client: "SyncMPClient", answered: Event) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    while not answered.wait(_LOOK_S):
        if client.resources.engine_dead:
            for waiting in list(client.utility_results.values()):
                with suppress(InvalidStateError):  # answered just now
                    waiting.set_exception(EngineDeadError())
