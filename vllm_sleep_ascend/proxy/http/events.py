# SPDX-License-Identifier: Apache-2.0
"""Server-sent events: what /status says, whenever that has changed."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from vllm_sleep_ascend.proxy.http.responses import Refused
from vllm_sleep_ascend.proxy.http.status import Status
from vllm_sleep_ascend.proxy.turns import Turns

MOST = 32
"""Streams at a time."""

BEAT_S = 10.0
"""Seconds after which an event comes although nothing has changed."""

_LOOK_S = 0.2  # seconds between two looks at what has changed


class Events:
    """Streams of events, until ``close``. Each has the time in ``now`` and in ``history`` the
    states that servers have entered since the event before: ``[id, since, state]``; the first one
    has those of the last hour."""

    def __init__(self, turns: Turns, status: Status) -> None:
        self._turns, self._status = turns, status
        self._closed = asyncio.Event()
        self._open = 0

    def close(self) -> None:
        """End all streams."""
        self._closed.set()

    def stream(self) -> Response:
        """
        Raises:
            Refused: there are too many.
        """
        if self._open >= MOST:
            raise Refused(503, f"{MOST} pages are open already; close one", retry_after_s=10)
        return _Stream(self)

    async def _events(self) -> AsyncIterator[str]:
        said, number, beat = "", 0, 0.0
        while not self._closed.is_set():
            self._status.look()
            content = self._status.describe()
            text = json.dumps(content)
            new = [
                (server.history.id, since)
                for server in self._turns.servers
                for since in server.history.after(number)
            ]
            if text != said or new or time.monotonic() > beat:
                number = max([number, *(since.number for _, since in new)])
                history = [(id, since.at, since.state) for id, since in new]
                said, beat = text, time.monotonic() + BEAT_S
                event = {"now": time.time(), "history": history, **content}
                yield f"data: {json.dumps(event)}\n\n"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), _LOOK_S)


class _Stream(StreamingResponse):
    def __init__(self, events: Events) -> None:
        super().__init__(events._events(), media_type="text/event-stream")
        self._of = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._of._open += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._of._open -= 1
