# SPDX-License-Identifier: Apache-2.0
"""The two ports, and the signals that end them."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

import uvicorn
from starlette.applications import Starlette


class _Listener(uvicorn.Server):
    """One whose signals are handled for all of them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Listeners:
    """Serves applications, each with its host and port, until ``stop``.

    Args:
        grace_s: seconds that running requests get then.
        at_stop: called then; it ends requests that would not end by themselves.
    """

    def __init__(
        self, apps: list[tuple[Starlette, str, int]], grace_s: int, at_stop: Callable[[], None]
    ) -> None:
        configs = (
            uvicorn.Config(app, host, port, access_log=False, timeout_graceful_shutdown=grace_s)
            for app, host, port in apps
        )
        self._listeners = [_Listener(config) for config in configs]
        self._at_stop = at_stop

    def stop(self) -> None:
        for listener in self._listeners:
            listener.should_exit = True
        self._at_stop()

    def stop_at_once(self) -> None:
        """Also what still runs."""
        for listener in self._listeners:
            listener.should_exit = listener.force_exit = True

    async def serve(self) -> int:
        """Returns the exit code; it is not 0 if a port cannot be had."""

        async def serve(listener: uvicorn.Server) -> int:
            try:
                await listener.serve()
            except SystemExit as failed:  # it has logged why
                return int(failed.code or 0)
            finally:
                self.stop()
            return 0

        return max(await asyncio.gather(*map(serve, self._listeners)))


def on_signals(stop: Callable[[], None], at_once: Callable[[], None]) -> None:
    """Call ``stop`` at the first SIGTERM or SIGINT, and ``at_once`` at any further one."""
    calls = iter([stop])

    def handle() -> None:
        next(calls, at_once)()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, handle)
