# SPDX-License-Identifier: Apache-2.0
"""Responses of the proxy: a server's answer, streamed, or a refusal with the reason."""

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import TypeVar

import httpx
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

CLIENT_LEFT = 499

# Of one connection, not of the message that is passed on.
HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te"),
    *(b"trailer", b"transfer-encoding", b"upgrade", b"host", b"content-length", b"expect"),
}


class Refused(Exception):
    """A request that is not sent to a server, or that no server answers."""

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s

    def response(self) -> Response:
        kind = f"{HTTPStatus(self.status).phrase.title().replace(' ', '')}Error"  # as vLLM's
        error = {"message": str(self), "type": kind, "param": None, "code": self.status}
        wait = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else None
        return JSONResponse({"error": error}, self.status, headers=wait)


class NoAnswer(Refused):
    """The server did not answer."""

    def __init__(self, server: str, reason: str | Exception) -> None:
        text = str(reason) or type(reason).__name__
        super().__init__(502, f"{server} did not answer: {text}")


class PassedOn(StreamingResponse):
    """A server's answer, streamed.

    Args:
        finish: called once at the end, with whether the server has broken off the answer.
    """

    def __init__(
        self, upstream: httpx.Response, finish: Callable[[bool], None] = lambda _: None
    ) -> None:
        super().__init__(upstream.aiter_raw(), upstream.status_code)
        self.raw_headers = end_to_end(upstream.headers.raw)
        self._upstream, self._finish = upstream, finish
        self._broken = False

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except httpx.HTTPError as error:
            # Not terminated, so that the client notices that something is missing.
            logger.warning("%s broke off its answer: %r", self._upstream.url, error)
            self._broken = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._finish(self._broken)
            # Ends the request at the server, if its client left.
            await self._upstream.aclose()


def end_to_end(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers that are passed on."""
    return [(key, value) for key, value in headers if key.lower() not in HOP_BY_HOP]


async def unless_client_leaves(receive: Receive, working: "asyncio.Task[_T]") -> _T:
    """The result of the work, which is cancelled if the client disconnects.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    leaving = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})


async def _disconnect(receive: Receive) -> None:
    while not (await receive())["type"].endswith(".disconnect"):
        pass
