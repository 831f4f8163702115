# SPDX-License-Identifier: Apache-2.0
"""Stands in front of the admin door's endpoints, and refuses what is not an operator's request."""

import asyncio
from http import HTTPStatus
from typing import TYPE_CHECKING

from vllm_sleep_ascend import admin_key

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 64 << 10
SLOW_S = 5.0
"""Seconds in which the headers of a request have to be there, and its body."""

_ONCE = (b"authorization", b"content-length", b"content-type", b"host", b"transfer-encoding")


class Refused(Exception):
    """A request that reaches no endpoint."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Guard:
    """Middleware of the door's application.

    Args:
        digest: of the key (``admin_key.digest``); None: no key is needed.
        address: where the door listens, "" for a Unix socket. Without a key, a request has to name
            it, or loopback, as its host. A web page whose host's name a browser was made to look up
            as this machine names its own.
    """

    def __init__(self, app: "ASGIApp", digest: bytes | None, address: str) -> None:
        self._app = app
        self._digest = digest
        self._address = address

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def send_last(message: "Message") -> None:
            """A connection has one request: a slow client cannot keep it for the next."""
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        try:
            self._check(scope)
            body = await _read(scope, receive)
        except Refused as refused:
            await _answer(refused)(scope, receive, send_last)
            return
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> "Message":
            return given.pop() if given else await receive()

        await self._app(scope, receive_body, send_last)

    def _check(self, scope: "Scope") -> None:
        """
        Raises:
            Refused: by what the headers say.
        """
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if reason := admin_key.repeated(headers, _ONCE):
            raise Refused(HTTPStatus.BAD_REQUEST, reason)
        values = dict(headers)
        if b"content-length" in values and b"transfer-encoding" in values:
            raise Refused(
                HTTPStatus.BAD_REQUEST, "content-length and transfer-encoding exclude each other"
            )
        if b"origin" in values or values.get(b"sec-fetch-site", b"none") != b"none":
            raise Refused(HTTPStatus.FORBIDDEN, "requests of web pages are refused here")
        self._check_key(values)
        if scope["raw_path"] != scope["path"].encode():  # it has %-codes, and no endpoint has
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such endpoint here")
        kind = values.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise Refused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a body must be of type application/json"
            )
        if int(values.get(b"content-length", b"0")) > MAX_BODY:
            raise _too_large()

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if self._digest is None:
            name = admin_key.host_name(headers.get(b"host", b""))
            if self._address and name != self._address and not admin_key.is_loopback(name):
                raise Refused(HTTPStatus.FORBIDDEN, "the request is for another host")
            return
        if reason := admin_key.refusal(headers.get(b"authorization", b""), self._digest):
            raise Refused(HTTPStatus.UNAUTHORIZED, reason)


async def _read(scope: "Scope", receive: "Receive") -> bytes:
    """The whole body.

    Raises:
        Refused: it is too large, or does not come in time.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(SLOW_S):
            while True:
                message = await receive()
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    raise _too_large()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refused(
            HTTPStatus.REQUEST_TIMEOUT, f"the body did not come within {SLOW_S:g} s"
        ) from None


def _too_large() -> Refused:
    return Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {MAX_BODY} bytes here")


def _answer(refused: Refused) -> "ASGIApp":
    from fastapi.responses import JSONResponse

    from vllm_sleep_ascend.front_end.endpoints import error_body

    needs_key = refused.status == HTTPStatus.UNAUTHORIZED
    headers = {"WWW-Authenticate": "Bearer"} if needs_key else None
    return JSONResponse(error_body(refused, refused.status), refused.status, headers)
