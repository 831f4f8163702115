# SPDX-License-Identifier: Apache-2.0
"""HTTP calls to one vLLM server, and the ways in which they fail."""

import asyncio
import errno
from typing import Any, TypedDict, TypeVar, Unpack

import httpx

_T = TypeVar("_T")

SOCKET = "unix:"
"""In front of a path, in place of a URL."""

HEALTH_S = 1.0
"""Seconds between checks that an engine that works on a call is still alive."""

_ATTEMPTS = 5


class CallFailed(Exception):
    """A server refused or failed a call; the text says which, and why."""


class OutOfMemory(CallFailed):
    """A wake that found too little free device memory. What slept still sleeps."""


class Unreachable(CallFailed):
    """No answer from the server: the connection was refused or broke."""


class NoServer(Unreachable):
    """The connection was refused: there is no server process."""


class TooLate(CallFailed):
    """No answer from the server within the time that the call may take."""


class Options(TypedDict, total=False):
    """A request's options of httpx, besides its path."""

    params: dict[str, str | int | list[str]]
    json: dict[str, str | bool]
    timeout: float


class Calls:
    """Calls to the server at ``url``; each may take ``timeout_s`` seconds. ``key`` is that which it
    asks for, if any."""

    def __init__(self, url: str, timeout_s: float, key: str | None) -> None:
        self.url = url.rstrip("/")
        path = url.removeprefix(SOCKET) if url.startswith(SOCKET) else None
        parsed = httpx.URL("http://localhost" if path else url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(
                f"{url!r} is not a server's address; write such as http://HOST:PORT or unix:/PATH"
            )
        # The environment's proxies are for other hosts; sleeping servers are near. Idle connections
        # are closed before the server closes them (after 5 s), which could collide with a call.
        self._http = httpx.AsyncClient(
            base_url=parsed,
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            transport=httpx.AsyncHTTPTransport(
                limits=httpx.Limits(keepalive_expiry=2.0), trust_env=False, uds=path
            ),
            headers={"Authorization": f"Bearer {key}"} if key else None,
            trust_env=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def call(
        self, method: str, path: str, optional: bool = False, **options: Unpack[Options]
    ) -> object:
        """The JSON answer, None if it is empty or an ``optional`` path is missing.

        Raises:
            OutOfMemory: the server found too little free device memory.
            Unreachable: it gave no answer; NoServer: there is no process.
            CallFailed: it refused or failed the call.
        """
        try:
            answer = await self._http.request(method, path, **options)
        except httpx.ConnectError as error:
            if _no_descriptor_is_free(error):
                raise Unreachable(f"{self.url}: no file descriptor is free to connect") from None
            raise NoServer(
                f"{self.url}: cannot connect ({error}); is the server up, and is this its address?"
            ) from None
        except httpx.ConnectTimeout:
            raise Unreachable(f"{self.url}: connecting took too long") from None
        except httpx.TimeoutException:
            raise TooLate(f"{self.url}: {path} gave no answer in time") from None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(f"{self.url}: {path}: the connection broke ({reason})") from None
        if answer.status_code == 404:
            if optional:
                return None
            raise CallFailed(
                f"{self.url}: there is no {path}; start the server with admin_port or admin_socket "
                "and use that address, or with VLLM_SERVER_DEV_MODE=1"
            )
        if answer.status_code != 200:
            kind, reason = _reason(answer)
            failure = OutOfMemory if kind == "DeviceOutOfMemoryError" else CallFailed
            raise failure(f"{self.url}: {path} answered {answer.status_code}: {reason}")
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise CallFailed(f"{self.url}: {path} did not answer in JSON; is it vLLM?") from None

    async def get(
        self, path: str, field: str, timeout_s: float | None = None, optional: bool = False
    ) -> Any:
        """A field of the JSON object at ``path``; None if an optional path is missing."""
        options: Options = {"timeout": timeout_s} if timeout_s else {}
        answer = await self.call("GET", path, optional, **options)
        if answer is None and optional:
            return None
        if not isinstance(answer, dict) or field not in answer:
            raise CallFailed(f"{self.url}: {path} answered without {field!r}; is it vLLM?")
        return answer[field]

    async def is_gone(self, timeout_s: float) -> bool:
        """Whether the engine is gone, so that its device memory is free: the connection is refused,
        or vLLM reports a dead engine. False if the server does not tell."""
        for _ in range(_ATTEMPTS):
            try:
                answer = await self._http.get("/health", timeout=timeout_s)
            except httpx.ConnectError as error:
                return not _no_descriptor_is_free(error)
            except httpx.TimeoutException:
                return False
            except httpx.TransportError:
                continue  # an idle connection that also broke
            return answer.status_code == 503
        return False

    async def serves(self, timeout_s: float) -> bool:
        """Whether it answers, and its engine lives. It is asked without the key."""
        asked = self._http.build_request("GET", "/health", timeout=timeout_s)
        asked.headers.pop("authorization", None)
        try:
            answer = await self._http.send(asked)
        except httpx.TransportError:
            return False
        return answer.status_code == 200

    async def unless_the_engine_dies(self, call: asyncio.Task[_T]) -> _T:
        """The result of the call, which is cancelled if the engine dies: vLLM may never answer."""
        try:
            while not (await asyncio.wait({call}, timeout=HEALTH_S))[0]:
                if await self.is_gone(HEALTH_S) and not call.done():
                    raise CallFailed(f"{self.url}: its engine died; restart the server")
            return call.result()
        finally:
            call.cancel()
            await asyncio.wait({call})


def _no_descriptor_is_free(error: BaseException | None) -> bool:
    """Whether this is why it could not connect, which says nothing about the server."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        if isinstance(error, BaseExceptionGroup):  # one error for each address
            return any(map(_no_descriptor_is_free, error.exceptions))
        error = error.__cause__ or error.__context__
    return False


def _reason(answer: httpx.Response) -> tuple[str, str]:
    """Type and text of an error answer, in the form of this package or of FastAPI."""
    try:
        body = answer.json()
    except ValueError:
        return "", answer.text.strip() or answer.reason_phrase
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        return str(body["error"].get("type", "")), str(body["error"].get("message", ""))
    return "", str(body.get("detail", body) if isinstance(body, dict) else body)
