# SPDX-License-Identifier: Apache-2.0
"""Runs the ``stop_command`` of a model whose server does not end by a signal to its command."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence

_LEAST_S = 5.0  # that it gets also where nothing else is waited for


async def run(
    words: Sequence[str], environment: Mapping[str, str], log: int, timeout_s: float
) -> str:
    """Wait for its end; its output goes to the descriptor ``log``, which is closed. Returns why it
    has failed, "" if it has not."""
    timeout_s = max(timeout_s, _LEAST_S)
    try:
        process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return f"cannot run: {error.strerror}"
    finally:
        os.close(log)
    try:
        async with asyncio.timeout(timeout_s):
            code = await process.wait()
    except TimeoutError:
        return f"did not end within {timeout_s:g} s"
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return f"has ended with exit code {code}" if code else ""
