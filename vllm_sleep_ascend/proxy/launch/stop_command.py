# SPDX-License-Identifier: Apache-2.0
"""Runs the ``stop_command`` of a model whose server does not end by a signal to its command."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

_LEAST_S = 5.0  # that it gets also where nothing else is waited for


class StopCommand:
    """Runs one at a time."""

    def __init__(self) -> None:
        self._limit: asyncio.Timeout | None = None

    def hurry(self) -> None:
        """From now on it gets no more than the least."""
        if self._limit is not None and (end := self._limit.when()) is not None:
            with contextlib.suppress(RuntimeError):  # its time is over
                self._limit.reschedule(min(end, asyncio.get_running_loop().time() + _LEAST_S))

    async def run(
        self, words: Sequence[str], environment: Mapping[str, str], log: int, timeout_s: float
    ) -> str:
        """Wait for its end; its output goes to the descriptor ``log``, which is closed. Returns why
        it has failed, "" if it has not."""
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return f"cannot run: {getattr(error, 'strerror', None) or error}"
        finally:
            os.close(log)
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(timeout_s, _LEAST_S)) as self._limit:
                code = await process.wait()
        except TimeoutError:
            return f"did not end within {asyncio.get_running_loop().time() - began:.0f} s"
        finally:
            self._limit = None
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return f"has ended with exit code {code}" if code else ""
