# SPDX-License-Identifier: Apache-2.0
"""Server-sent events: what /status says, whenever that has changed."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from vllm_sleep_ascend.proxy.http.responses import Refused
from vllm_sleep_ascend.proxy.http.status import Status
from vllm_sleep_ascend.proxy.turns import Turns

logger = logging.getLogger(__name__)

MOST = 32
"""Streams at a time."""

BEAT_S = 10.0
"""Seconds after which an event comes although nothing has changed."""

_LOOK_S = 0.2  # seconds between two looks at what has changed
_QUIET_LOOK_S = 1.0  # the same once nothing has changed for a while
_QUIET_S = 5.0


class Events:
    """Streams of events, until ``close``. Each has the time in ``now`` and in ``history`` the
    states that servers have entered since the event before: ``[id, since, state]``; the first one
    has those of the last hour. One task looks for all of them what has changed."""

    def __init__(self, turns: Turns, status: Status) -> None:
        self._turns, self._status = turns, status
        self._closed = False
        self._open = 0
        self._said: tuple[str, int] = ("", 0)  # what /status says, and the last state's number
        self._news = asyncio.Event()  # set at the next change; then another one is there
        self._looking: asyncio.Task[None] | None = None

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        self._news.set()

    def stream(self) -> Response:
        """
        Raises:
            Refused: there are too many.
        """
        if self._open >= MOST:
            raise Refused(503, f"{MOST} pages are open already; close one", retry_after_s=10)
        return _Stream(self)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """While a stream is open."""
        self._open += 1
        if self._looking is None:
            self._look()
            self._looking = asyncio.create_task(self._look_again())
        try:
            yield
        finally:
            self._open -= 1
            if not self._open and self._looking is not None:
                self._looking.cancel()
                self._looking = None

    async def _look_again(self) -> None:
        changed_at = time.monotonic()
        while True:
            is_quiet = time.monotonic() - changed_at > _QUIET_S
            await asyncio.sleep(_QUIET_LOOK_S if is_quiet else _LOOK_S)
            try:
                if self._look():
                    changed_at = time.monotonic()
            except Exception:  # the streams would stop without a word
                logger.exception("the page is not up to date")

    def _look(self) -> bool:
        """Returns whether anything has changed."""
        self._status.look()
        number = max((server.history.number for server in self._turns.servers), default=0)
        before, self._said = self._said, (json.dumps(self._status.describe()), number)
        if self._said == before:
            return False
        self._news.set()
        self._news = asyncio.Event()
        return True

    async def events(self) -> AsyncIterator[str]:
        number = 0
        while not self._closed:
            news, (content, _) = self._news, self._said
            new = [
                (server.history.id, since)
                for server in self._turns.servers
                for since in server.history.after(number)
            ]
            number = max([number, *(since.number for _, since in new)])
            history = [(id, since.at, since.state) for id, since in new]
            event = json.dumps({"now": time.time(), "history": history})
            yield f"data: {event[:-1]}, {content[1:]}\n\n"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), BEAT_S)


class _Stream(StreamingResponse):
    def __init__(self, events: Events) -> None:
        super().__init__(events.events(), media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._events.looking():
            await super().__call__(scope, receive, send)
