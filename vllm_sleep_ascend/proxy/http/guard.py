# SPDX-License-Identifier: Apache-2.0
"""Stands in front of the admin port: refuses what another web page has a browser ask, and whoever
does not have the key, if there is one."""

from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.proxy.http.responses import Refused
from vllm_sleep_ascend.proxy.launch import ports

HEADER = "x-vllm-sleep"
"""Requests of the page that change something have it. Another page cannot add it without being
asked first whether it may (CORS), and nobody answers that."""

_ONCE = (b"authorization", b"host", b"origin")
_HEADERS = {
    # No text becomes markup, also if the page made a mistake.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


class Guard:
    """Middleware of the admin port's application.

    Args:
        digest: of the key (``admin_key.digest``). None: no key is needed, and a request has to name
            loopback as its host. A page whose own name a browser was made to look up as this
            machine names itself.
        anybody: paths that need no key, and to which other pages may link.
        own: paths that without a key are for the proxy's own user, and root, alone.
    """

    def __init__(
        self,
        app: ASGIApp,
        digest: bytes | None,
        anybody: frozenset[str],
        own: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._digest = digest
        self._anybody = anybody
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            self._check(scope)
        except Refused as refused:
            response = refused.response()
            if refused.status == 401:
                response.headers["www-authenticate"] = "Bearer"
            await response(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, scope: Scope) -> None:
        """
        Raises:
            Refused: by what the headers say.
        """
        if reason := admin_key.repeated(scope["headers"], _ONCE):
            raise Refused(400, reason)
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"")
        if self._digest is None and not admin_key.is_loopback(admin_key.host_name(host)):
            raise Refused(403, "the request is for another host; ask for 127.0.0.1 or localhost")
        changes = scope["method"] not in ("GET", "HEAD")
        is_open = scope["path"] in self._anybody and not changes
        if not is_open and not _is_ours(headers, host):
            raise Refused(403, "requests of other web pages are refused here")
        by_page = any(name in headers for name in (b"origin", b"referer", b"sec-fetch-site"))
        if changes and by_page and HEADER.encode() not in headers:
            raise Refused(403, f"a web page has to send the header {HEADER}")
        if self._digest is None:
            if scope["path"] in self._own and not _is_our_user(scope):
                raise Refused(
                    403,
                    "without an admin key only the proxy's own user and root may do this; "
                    "start the proxy with SLEEP_ADMIN_KEY or --admin-key-file",
                )
        elif not is_open and (
            reason := admin_key.refusal(headers.get(b"authorization", b""), self._digest)
        ):
            raise Refused(401, reason)


def _is_our_user(scope: Scope) -> bool:
    client, server = scope.get("client"), scope.get("server")
    if not client or not server or server[1] is None:
        return False
    users = ports.users_of(client[1], server[1])
    return bool(users) and users <= ports.TRUSTED


def _is_ours(headers: dict[bytes, bytes], host: bytes) -> bool:
    """Whether it comes from the page here, or from no page."""
    if headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
        return False
    origin = headers.get(b"origin")
    try:
        return origin is None or urlsplit(origin).netloc == host
    except ValueError:
        return False
