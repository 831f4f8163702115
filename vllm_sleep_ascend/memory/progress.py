# SPDX-License-Identifier: Apache-2.0
"""Log messages during a long transfer."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_sleep_ascend import _camem

logger = logging.getLogger(f"vllm.{__name__}")

EVERY_S = 5.0
_GIB = 1 << 30


@contextmanager
def logged(operation: str) -> Iterator[None]:
    """Log every ``EVERY_S`` seconds how much the transaction inside has copied."""
    ended = threading.Event()

    def log() -> None:
        start = time.monotonic()
        while not ended.wait(EVERY_S):
            seconds = time.monotonic() - start
            copied = _camem.copied_bytes()
            logger.info(
                "camem: %s goes on: %.2f GiB copied in %.0f s, %.1f GB/s",
                operation,
                copied / _GIB,
                seconds,
                copied / 1e9 / seconds,
            )

    thread = threading.Thread(target=log, name="camem-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
