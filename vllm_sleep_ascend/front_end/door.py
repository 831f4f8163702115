# SPDX-License-Identifier: Apache-2.0
"""The admin door: the sleep endpoints on a port or a Unix socket of their own, without vLLM's
development mode. It is a second listener in the API server's process and event loop.
"""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from vllm.logger import init_logger

from vllm_sleep_ascend import admin_key
from vllm_sleep_ascend.config import SleepModeConfig
from vllm_sleep_ascend.engine.checks import check_door
from vllm_sleep_ascend.front_end.admin import application
from vllm_sleep_ascend.front_end.guard import SLOW_S

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = init_logger(f"vllm.{__name__}")

_MAX_CONNECTIONS = 256
"""The server's users need file descriptors too."""

_GRACE_S = 5
"""Requests under way may end within it when the server ends."""


class _Connection(H11Protocol):
    """A connection for one request, which has to come in time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS:
            transport.abort()
        else:
            self._late = self.loop.call_later(SLOW_S, self._close_if_late)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _close_if_late(self) -> None:
        if self.scope is None:  # no headers yet
            self.transport.abort()


class _Listener(uvicorn.Server):
    """Signals are vLLM's own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def opened(app: "FastAPI", config: SleepModeConfig) -> AsyncIterator[None]:
    """The door of vLLM's application ``app``, for as long as the context lasts.

    Raises:
        ValueError: the port or the socket's path cannot be had, or the key's file has changed.
    """
    key = check_door(config)
    if config.admin_port is not None and config.admin_port == app.state.args.port:
        raise ValueError(
            f"admin_port={config.admin_port} is also the server's --port; choose another port"
        )
    digest = None if key is None else admin_key.digest(key)
    address = "" if config.admin_socket is not None else config.admin_host.lower()
    with _bound(config) as (listening, place):
        listener = _Listener(
            uvicorn.Config(
                application(app, digest, address),
                http=_Connection,
                ws="none",
                lifespan="off",
                log_config=None,  # vLLM has configured uvicorn's loggers, for both
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        serving = asyncio.create_task(listener.serve([listening]))
        logger.info("The admin door is open at %s.", place)
        _warn(config, has_key=key is not None)
        try:
            yield
        finally:
            listener.should_exit = True
            await serving


def _warn(config: SleepModeConfig, has_key: bool) -> None:
    if not config.door_is_local:
        logger.warning(
            "Other machines reach the admin door at %s, and nothing encrypts its key on the way.",
            config.admin_host,
        )
    elif config.admin_port is not None and not has_key:
        logger.warning(
            "The admin door has no key: every user of this machine may put the server to sleep. "
            "Set %s or admin_key_file, or use admin_socket.",
            admin_key.VARIABLE,
        )


@contextmanager
def _bound(config: SleepModeConfig) -> Iterator[tuple[socket.socket, str]]:
    """The socket, which listens, and how to write its address."""
    if config.admin_socket is not None:
        with _at_path(config.admin_socket) as listening:
            yield listening, f"unix:{config.admin_socket}"
        return
    host, port = config.admin_host, config.admin_port or 0
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(
            f"the admin door cannot be opened at admin_host={host!r}, admin_port={port}: "
            f"{error.strerror or error}; choose another port, or end what listens there"
        ) from None
    with bound as listening:
        yield listening, f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def _at_path(path: str) -> Iterator[socket.socket]:
    """A Unix socket that its user alone may open, and that is removed at the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        try:
            _remove_stale(path)
            listening.bind(path)
            os.chmod(path, 0o600)  # before it listens: nobody has connected yet
            ours = os.lstat(path)
            listening.listen()
        except OSError as error:
            raise ValueError(
                f"the admin door cannot be opened at admin_socket={path!r}: "
                f"{error.strerror or error}; its folder must exist and be the server's to write"
            ) from None
        try:
            yield listening
        finally:
            with suppress(OSError):
                if os.path.samestat(os.lstat(path), ours):
                    os.unlink(path)


def _remove_stale(path: str) -> None:
    """Remove a socket that a killed server has left.

    Raises:
        ValueError: something else is there, or a server that lives.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ValueError(
            f"admin_socket={path!r} is there and is no socket; move it away, or choose another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(SLOW_S)
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                os.unlink(path)
                return
            raise
    raise ValueError(
        f"admin_socket={path!r} is in use by another server; choose another path, or end that one"
    )
