# SPDX-License-Identifier: Apache-2.0
"""Switches from one server to another on the same device: one goes to sleep, the other wakes."""

import asyncio
from collections.abc import Awaitable, Callable

from vllm_sleep_ascend.client.calls import CallFailed, OutOfMemory
from vllm_sleep_ascend.client.sleep_client import SleepClient

RETRY_S = 0.01
"""Seconds between two attempts of a wake that waits for memory."""


async def switch(
    old: SleepClient,
    new: SleepClient,
    level: int,
    mode: str,
    overlap: bool,
    discard_trained: bool = False,
) -> None:
    """Put ``old`` to sleep at ``level`` and wake ``new`` to serve, unless either loses weights that
    are in no checkpoint (and ``discard_trained`` does not allow it).

    With ``overlap`` both run at the same time: the weights of ``new`` are restored while those of
    ``old`` are offloaded. A server that does not report its memory (stock vLLM) may not survive a
    wake without enough memory, so its wake begins after the sleep.

    Raises:
        CallFailed: the text says what failed, and the state of both servers.
    """
    await new.is_sleeping()  # if the server is unreachable, fails before anything sleeps
    if not discard_trained:
        await new.check_wake()
        await old.check_sleep(level)
    if overlap:
        if await new.reports_memory():
            await _overlapped(old, new, level, mode)
            return
        new.say("stock vLLM, which may not survive a wake without room: it wakes after the sleep")
    await old.sleep(level, mode, discard_trained=True)
    try:
        await new.wake_to_serve(slept_at=level, discard_trained=True)
    except CallFailed as error:
        raise type(error)(f"{error}. {old.url} sleeps at level {level}") from None


async def _overlapped(old: SleepClient, new: SleepClient, level: int, mode: str) -> None:
    slept_at = await new.level()
    going = asyncio.create_task(old.sleep(level, mode, discard_trained=True))
    coming = asyncio.create_task(_wake_as_memory_comes(new, slept_at, going))
    await asyncio.wait({going, coming})
    sleep_error, wake_error = going.exception(), coming.exception()
    errors = [error for error in (sleep_error, wake_error) if error is not None]
    for error in errors:
        if not isinstance(error, CallFailed):
            raise error
    if errors:
        slept = "did not fall asleep" if sleep_error else f"sleeps at level {level}"
        woke = "did not wake" if wake_error else "is awake"
        reasons = "; ".join(map(str, errors))
        raise type(errors[0])(f"{reasons}. {old.url} {slept}, {new.url} {woke}")


async def _wake_as_memory_comes(new: SleepClient, slept_at: int, going: asyncio.Task[None]) -> None:
    """Wake the weights first: the other server frees its KV cache before its weights, which leaves
    room for them."""

    async def weights() -> None:
        await new.wake(["weights"])

    if slept_at > 0:
        await _retry_until(going, weights)
    if slept_at == 2:
        await new.reload_weights()
    await _retry_until(going, new.wake)
    if slept_at == 2:
        await new.reset_prefix_cache()


async def _retry_until(going: asyncio.Task[None], attempt: Callable[[], Awaitable[None]]) -> None:
    """Retry ``attempt`` while there is too little memory, the last time after ``going`` is done."""
    while True:
        last = going.done()
        try:
            await attempt()
            return
        except OutOfMemory:
            if last:
                raise
        await asyncio.wait({going}, timeout=RETRY_S)
