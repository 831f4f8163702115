# SPDX-License-Identifier: Apache-2.0
"""A client of the sleep endpoints of one vLLM server: at its admin door, or those of the
development mode, this package's or stock."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypedDict

from vllm_sleep_ascend.client.calls import CallFailed, Calls, Options
from vllm_sleep_ascend.status import RankStatus, in_no_checkpoint, level_of

Progress = Callable[[str], None]


class Step(TypedDict):
    """One call that changed the server, and how long it took."""

    url: str
    step: str
    seconds: float


class ServerStatus(TypedDict):
    """``ranks`` as in /sleep_status; None without that endpoint (stock vLLM)."""

    url: str
    is_sleeping: bool
    models: list[str]
    ranks: list[RankStatus] | None


class SleepClient:
    """Sleep, wake and status of the server at ``url``. Use as an async context manager.

    Args:
        url: such as ``http://127.0.0.1:8001``, or its admin door: ``unix:/run/vllm/admin``.
        timeout_s: seconds that one call may take.
        progress: called with a text after each step.
        api_key: for servers that require one (``vllm serve --api-key``), or the door's at ``url``.
        door: the address of the admin door, if ``url`` is that of users.
        door_key: the key there.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = 600.0,
        progress: Progress = lambda text: None,
        api_key: str | None = None,
        door: str | None = None,
        door_key: str | None = None,
    ) -> None:
        self._public = Calls(url, timeout_s, api_key)
        self._calls = self._public if door is None else Calls(door, timeout_s, door_key)
        self.url = self._public.url
        self.steps: list[Step] = []
        self._progress = progress

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._public.close()
        await self._calls.close()

    async def status(self) -> ServerStatus:
        """
        Raises:
            CallFailed: the server is unreachable or has no sleep endpoints.
        """
        ranks = await self.ranks()
        return {
            "url": self.url,
            "is_sleeping": await self.is_sleeping(),
            "models": await self.models(),
            "ranks": ranks,
        }

    async def is_sleeping(self, timeout_s: float | None = None) -> bool:
        """Whether any memory of the server sleeps."""
        sleeps: bool = await self._calls.get("/is_sleeping", "is_sleeping", timeout_s)
        return sleeps

    async def models(self, timeout_s: float | None = None) -> list[str]:
        """Names of its models."""
        models = await self._public.get("/v1/models", "data", timeout_s, optional=True)
        if models is None:  # an admin door
            names: list[str] = await self._calls.get("/sleep_status", "models", timeout_s)
            return names
        try:
            return [model["id"] for model in models]
        except (KeyError, TypeError):
            raise CallFailed(f"{self.url}: /v1/models lists no ids; is it vLLM?") from None

    async def ranks(self, timeout_s: float | None = None) -> list[RankStatus] | None:
        """See ``ServerStatus.ranks``."""
        ranks: list[RankStatus] | None
        ranks = await self._calls.get("/sleep_status", "ranks", timeout_s, optional=True)
        return ranks

    async def reports_memory(self) -> bool:
        """Whether it is a server with this package, whose wake is a transaction."""
        return await self.ranks() is not None

    async def frees_host_memory(self) -> bool:
        """Whether it sleeps with weights in host memory, which level 2 would free. False if they
        are on disk, or the server does not tell."""
        weights = [rank.get("tags", {}).get("weights") for rank in await self.ranks() or ()]
        return any(usage is not None and usage["host"] > 0 for usage in weights)

    async def is_gone(self, timeout_s: float) -> bool:
        """See ``Calls.is_gone``."""
        return await self._public.is_gone(timeout_s)

    async def serves(self, timeout_s: float) -> bool:
        """See ``Calls.serves``."""
        return await self._public.serves(timeout_s)

    async def sleep(
        self,
        level: int = 1,
        mode: str = "abort",
        discard_trained: bool = False,
        place: str | None = None,
    ) -> None:
        """Put the server to sleep, and check that it sleeps.

        Args:
            discard_trained: level 2 may lose weights that are in no checkpoint.
            place: "disk" or "host", where the backup goes, also that of a server that sleeps
                already.

        Raises:
            CallFailed: it did not go to sleep.
        """
        if place is not None and not await self.reports_memory():
            raise CallFailed(
                f"{self.url}: stock vLLM has no other place for backups; leave out --to"
            )
        if not discard_trained:
            await self.check_sleep(level)
        # In the query: stock servers ignore a body.
        options: Options = {"params": {"level": level, "mode": mode}}
        if place is not None:
            options["params"]["to"] = place
        await self._step("sleep", self._calls.call("POST", "/sleep", **options))
        if level > 0 and not await self.is_sleeping():
            raise CallFailed(f"{self.url}: /sleep succeeded, but the server is not asleep")

    async def wake(self, tags: list[str] | None = None) -> None:
        """Wake these tags, or all.

        Raises:
            OutOfMemory: too little device memory is free.
            CallFailed: it did not wake.
        """
        name = f"wake {' '.join(tags)}" if tags else "wake"
        options: Options = {"params": {"tags": tags} if tags else {}}
        await self._step(name, self._calls.call("POST", "/wake_up", **options))
        if not tags and await self.is_sleeping() and not await self._is_paused():
            raise CallFailed(f"{self.url}: /wake_up succeeded, but the server still sleeps")

    async def wake_to_serve(
        self, slept_at: int | None = None, discard_trained: bool = False
    ) -> None:
        """Wake everything; after level 2, load the weights before the KV cache comes back.

        Args:
            slept_at: the level of the sleep, for a server that does not report it.
            discard_trained: load the checkpoint even if other weights were discarded.

        Raises:
            OutOfMemory: too little device memory is free.
            CallFailed: it did not wake, or other weights than the checkpoint's were discarded.
        """
        if not discard_trained:
            await self.check_wake()
        if await self.level(slept_at) == 2:
            await self.wake(["weights"])
            await self.reload_weights()
            await self.wake()
            await self.reset_prefix_cache()
        else:
            await self.wake()

    async def level(self, otherwise: int | None = None) -> int:
        """The level at which the weights sleep, as in ``status.level_of``; ``otherwise`` for a
        sleeping server that does not report it."""
        ranks = await self.ranks()
        if ranks is None:
            return (otherwise or 1) if await self.is_sleeping() else 0
        return level_of(ranks)

    async def check_sleep(self, level: int) -> None:
        """
        Raises:
            CallFailed: level 2 would lose weights that are in no checkpoint.
        """
        lost = await self.would_lose(level)
        if lost:
            raise CallFailed(
                f"{self.url}: {lost} are in no checkpoint that the server knows, and level 2 would "
                "lose them; sleep at level 1, or with --discard-trained"
            )

    async def check_wake(self) -> None:
        """
        Raises:
            CallFailed: weights were lost that are in no checkpoint.
        """
        lost = await self._in_no_checkpoint()
        if lost and await self.level() == 2:
            raise CallFailed(
                f"{self.url}: {lost} were lost, and are in no checkpoint that the server knows. "
                "Wake the tag weights alone, send them again from where they came, and wake the "
                "rest; or load the checkpoint with vllm-sleep wake --discard-trained"
            )

    async def would_lose(self, level: int) -> str | None:
        """Text that names weights which a sleep at this level would lose for good; None if there
        are none, or the server does not tell."""
        lost = await self._in_no_checkpoint() if level == 2 else None
        return lost if lost and await self.level() != 2 else None

    async def _in_no_checkpoint(self) -> str | None:
        for rank in await self.ranks() or ():
            if "weights" in rank and (words := in_no_checkpoint(rank["weights"])):
                return words
        return None

    async def reload_weights(self) -> None:
        """Load the weights from disk into awake memory."""

        async def reload() -> object:
            answer = await self._calls.call("POST", "/reload_weights", optional=True)
            if answer is not None:
                return answer
            body = {"method": "reload_weights"}  # of the development mode
            return await self._calls.call("POST", "/collective_rpc", json=body)

        await self._step("reload_weights", reload())

    async def reset_prefix_cache(self) -> None:
        """Reset the prefix cache, because its blocks are from old weights."""
        call = self._calls.call("POST", "/reset_prefix_cache")
        answer = await self._step("reset_prefix_cache", call)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise CallFailed(f"{self.url}: the prefix cache is in use and was not reset; repeat it")

    def say(self, text: str) -> None:
        """Report progress."""
        self._progress(f"{self.url}: {text}")

    async def _step(self, name: str, call: Coroutine[Any, Any, object]) -> object:
        started = time.perf_counter()
        answer = await self._calls.unless_the_engine_dies(asyncio.create_task(call))
        seconds = time.perf_counter() - started
        self.steps.append({"url": self.url, "step": name, "seconds": round(seconds, 4)})
        self.say(f"{name} {seconds:.3f} s")
        return answer

    async def _is_paused(self) -> bool:
        """Whether its memory is awake, and the user has paused it (/pause)."""
        state: str | None = await self._calls.get("/sleep_status", "state", optional=True)
        return state == "paused"
