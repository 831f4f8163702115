# SPDX-License-Identifier: Apache-2.0
"""Responses that go on after their answer (``"background": true``).

Each keeps its server's turn, as a request does whose client waits, but not for ever: vLLM leaves
one that failed before its first token as queued. One that runs for longer is not lost, because a
sleep waits for it, and a server that may have one sleeps before it ends.
"""

import asyncio
import json
from http import HTTPStatus
from urllib.parse import quote

import httpx
from starlette.responses import Response

from vllm_sleep_ascend.proxy.http.responses import NoAnswer, end_to_end
from vllm_sleep_ascend.proxy.operations import ASK_S
from vllm_sleep_ascend.proxy.servers import Server
from vllm_sleep_ascend.proxy.turns import Turns

LONGEST_S = 60.0
"""Seconds for which one keeps the turn."""

_ASK_EVERY_S = 0.25
_MOST_FAILURES = 5  # in a row, of questions
_GOES_ON = ("queued", "in_progress")


class Background:
    """Follows responses; ``close`` forgets them."""

    def __init__(self, turns: Turns, http: httpx.AsyncClient) -> None:
        self._turns, self._http = turns, http
        self._following: set[asyncio.Task[None]] = set()

    async def begun(self, server: Server, upstream: httpx.Response) -> Response:
        """The server's answer. If the response goes on, it leaves the turn when that has ended.

        Raises:
            NoAnswer: the server broke it off; it has left the turn.
        """
        try:
            content = b"".join([part async for part in upstream.aiter_raw()])
        except BaseException as error:
            self._turns.leave(server, broken=isinstance(error, httpx.HTTPError))
            if isinstance(error, httpx.HTTPError):
                raise NoAnswer(server.name, error) from None
            raise
        finally:
            await upstream.aclose()
        task = asyncio.create_task(self._follow(server, upstream.request, content))
        self._following.add(task)
        task.add_done_callback(self._following.discard)
        response = Response(content, upstream.status_code)
        response.raw_headers += end_to_end(upstream.headers.raw)
        return response

    async def _follow(self, server: Server, asked: httpx.Request, content: bytes) -> None:
        broken = False
        try:
            name = _unfinished(content)
            async with asyncio.timeout(LONGEST_S):
                broken = name is not None and not await self._ends(asked, name)
        except TimeoutError:
            server.outlasted = True
        finally:
            self._turns.leave(server, broken)

    async def _ends(self, asked: httpx.Request, name: str) -> bool:
        """Wait until the response has ended, or is gone. Returns whether the server answered."""
        key = asked.headers.get("authorization")
        headers = {"authorization": key} if key else {}
        url = asked.url.copy_with(path=f"/v1/responses/{quote(name, safe='')}", query=None)
        failures = 0
        while failures < _MOST_FAILURES:
            await asyncio.sleep(_ASK_EVERY_S)
            try:
                answer = await self._http.get(url, headers=headers, timeout=ASK_S)
            except httpx.HTTPError:
                failures += 1
                continue
            if answer.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
                failures = 0
                if _unfinished(answer.content) is None:
                    return True
        return False

    async def close(self) -> None:
        for task in self._following:
            task.cancel()
        if self._following:
            await asyncio.wait(self._following)


def _unfinished(content: bytes) -> str | None:
    """The name of the response, if it goes on."""
    try:
        response = json.loads(content)
        return str(response["id"]) if response["status"] in _GOES_ON else None
    except (ValueError, KeyError, TypeError):
        return None  # an error, or no longer there
