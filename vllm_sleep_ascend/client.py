# SPDX-License-Identifier: Apache-2.0
"""A client of the development endpoints of one vLLM server, this package's or stock."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Self

import httpx

Progress = Callable[[str], None]

GONE_ATTEMPTS = 5
HEALTH_S = 1.0
"""Seconds between two looks at whether an engine that works on a call is still alive."""


class CallFailed(Exception):
    """A server refused or failed a call; the text says which, and why."""


class OutOfMemory(CallFailed):
    """A wake that found too little free device memory. What slept still sleeps."""


class Unreachable(CallFailed):
    """No answer from the server: nobody listens, or the connection broke."""


class NobodyListens(Unreachable):
    """The connection was refused: there is no server process."""


class SleepClient:
    """Sleep, wake and status of the server at ``url``. Use as an async context manager.

    Args:
        url: such as ``http://127.0.0.1:8001``.
        timeout_s: seconds that one call may take.
        progress: is told of each finished step, in words.
        api_key: of servers that ask for one (``vllm serve --api-key``).
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = 600.0,
        progress: Progress = lambda text: None,
        api_key: str | None = None,
    ) -> None:
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"{url!r} is not a server's address; write such as http://HOST:PORT")
        self.url = url.rstrip("/")
        self.steps: list[dict[str, Any]] = []
        self._progress = progress
        # Proxies of the environment are for the outside; servers that sleep are near. Idle
        # connections end before the server ends them (after 5 s), which a call could collide with.
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            limits=httpx.Limits(keepalive_expiry=2.0),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def status(self) -> dict[str, Any]:
        """``is_sleeping``, ``models``, and ``ranks`` as /sleep_status gives them (None: stock).

        Raises:
            CallFailed: the server is unreachable or has no development endpoints.
        """
        ranks = await self._ranks()
        return {
            "url": self.url,
            "is_sleeping": await self.is_sleeping(),
            "models": await self.models(),
            "ranks": ranks,
        }

    async def is_sleeping(self, timeout_s: float | None = None) -> bool:
        """Whether any memory of the server sleeps."""
        return await self._get("/is_sleeping", "is_sleeping", timeout_s)

    async def models(self, timeout_s: float | None = None) -> list[str]:
        """Names of what it serves."""
        models = await self._get("/v1/models", "data", timeout_s)
        try:
            return [model["id"] for model in models]
        except (KeyError, TypeError):
            raise CallFailed(f"{self.url}: /v1/models lists no ids; is it vLLM?") from None

    async def reports_memory(self) -> bool:
        """Whether it is a server of this package, which wakes as a transaction."""
        return await self._ranks() is not None

    async def is_gone(self, timeout_s: float) -> bool:
        """Whether there is no engine any more, so that its device memory is free: nobody listens,
        or vLLM says that its engine is dead. False if the server does not say."""
        for _ in range(GONE_ATTEMPTS):
            try:
                answer = await self._http.get("/health", timeout=timeout_s)
            except httpx.ConnectError:
                return True
            except httpx.TimeoutException:
                return False
            except httpx.TransportError:
                continue  # A connection of old, which broke as well.
            return answer.status_code == 503
        return False

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Put the server to sleep, and see that it sleeps.

        Raises:
            CallFailed: it did not fall asleep.
        """
        # In the query: stock servers ignore a body.
        await self._step("sleep", "POST", "/sleep", params={"level": level, "mode": mode})
        if level > 0 and not await self.is_sleeping():
            raise CallFailed(f"{self.url}: /sleep succeeded, but the server is not asleep")

    async def wake(self, tags: list[str] | None = None) -> None:
        """Wake these tags, or all.

        Raises:
            OutOfMemory: too little device memory is free.
            CallFailed: it did not wake.
        """
        name = f"wake {' '.join(tags)}" if tags else "wake"
        await self._step(name, "POST", "/wake_up", params={"tags": tags} if tags else {})
        if not tags and await self.is_sleeping():
            raise CallFailed(f"{self.url}: /wake_up succeeded, but the server still sleeps")

    async def wake_to_serve(self, slept_at: int | None = None) -> None:
        """Wake everything; after level 2, load the weights before the KV cache comes back.

        Args:
            slept_at: the level at which the server sleeps, for a server that does not tell.
        """
        if await self.level(slept_at) == 2:
            await self.wake(["weights"])
            await self.reload_weights()
            await self.wake()
            await self.reset_prefix_cache()
        else:
            await self.wake()

    async def level(self, otherwise: int | None = None) -> int:
        """The level at which the weights sleep (0: they are awake), from the ranks' bytes."""
        ranks = await self._ranks()
        if ranks is None:
            return (otherwise or 1) if await self.is_sleeping() else 0
        levels = {"discarded": 2, "offloaded": 1}
        weights = [rank.get("tags", {}).get("weights", {}) for rank in ranks]
        return max(
            (level for state, level in levels.items() if any(w.get(state) for w in weights)),
            default=0,
        )

    async def reload_weights(self) -> None:
        """Load the weights from disk into awake memory."""
        body = {"method": "reload_weights"}
        await self._step("reload_weights", "POST", "/collective_rpc", json=body)

    async def reset_prefix_cache(self) -> None:
        """Forget the prefix cache: its blocks are of weights that are gone."""
        answer = await self._step("reset_prefix_cache", "POST", "/reset_prefix_cache")
        if answer is not None and answer.get("success") is False:
            raise CallFailed(f"{self.url}: the prefix cache is in use and was not reset; repeat it")

    def say(self, text: str) -> None:
        """Tell whoever follows the progress."""
        self._progress(f"{self.url}: {text}")

    async def _step(self, name: str, method: str, path: str, **options: Any) -> Any:
        started = time.perf_counter()
        answer = await self._unless_the_engine_dies(self._call(method, path, **options))
        seconds = time.perf_counter() - started
        self.steps.append({"url": self.url, "step": name, "seconds": round(seconds, 4)})
        self.say(f"{name} {seconds:.3f} s")
        return answer

    async def _unless_the_engine_dies(self, call: Coroutine[Any, Any, Any]) -> Any:
        """What the call gives. vLLM may leave it without an answer when its engine dies."""
        working = asyncio.create_task(call)
        try:
            while not (await asyncio.wait({working}, timeout=HEALTH_S))[0]:
                if await self.is_gone(HEALTH_S) and not working.done():
                    raise CallFailed(f"{self.url}: its engine died; restart the server")
            return working.result()
        finally:
            working.cancel()
            await asyncio.wait({working})

    async def _ranks(self) -> list[dict[str, Any]] | None:
        """What /sleep_status says of each rank; None: there is no such endpoint (stock vLLM)."""
        return await self._get("/sleep_status", "ranks", optional=True)

    async def _get(
        self, path: str, field: str, timeout_s: float | None = None, optional: bool = False
    ) -> Any:
        options = {"timeout": timeout_s} if timeout_s else {}
        answer = await self._call("GET", path, optional, **options)
        if answer is None and optional:
            return None
        if not isinstance(answer, dict) or field not in answer:
            raise CallFailed(f"{self.url}: {path} answered without {field!r}; is it vLLM?")
        return answer[field]

    async def _call(self, method: str, path: str, optional: bool = False, **options: Any) -> Any:
        try:
            answer = await self._http.request(method, path, **options)
        except httpx.ConnectError as error:
            raise NobodyListens(
                f"{self.url}: cannot connect ({error}); is the server up, and is this its address?"
            ) from None
        except httpx.ConnectTimeout:
            raise Unreachable(f"{self.url}: connecting took too long") from None
        except httpx.TimeoutException:
            raise CallFailed(f"{self.url}: {path} gave no answer in time") from None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(f"{self.url}: {path}: the connection broke ({reason})") from None
        if answer.status_code == 404:
            if optional:
                return None
            raise CallFailed(
                f"{self.url}: there is no {path}; start the server with VLLM_SERVER_DEV_MODE=1"
            )
        if answer.status_code != 200:
            kind, reason = _reason(answer)
            failure = OutOfMemory if kind == "DeviceOutOfMemoryError" else CallFailed
            raise failure(f"{self.url}: {path} answered {answer.status_code}: {reason}")
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise CallFailed(f"{self.url}: {path} did not answer in JSON; is it vLLM?") from None


def _reason(answer: httpx.Response) -> tuple[str, str]:
    """Type and text of an error answer, in the form of this package or of FastAPI."""
    try:
        body = answer.json()
    except ValueError:
        return "", answer.text.strip() or answer.reason_phrase
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        return str(body["error"].get("type", "")), str(body["error"].get("message", ""))
    return "", str(body.get("detail", body) if isinstance(body, dict) else body)
