# SPDX-License-Identifier: Apache-2.0
"""What the product logs in this process."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_of(module: str) -> Iterator[list[str]]:
    """The warnings that a module of ``vllm_sleep_ascend`` logs inside, as they come."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(f"vllm.vllm_sleep_ascend.{module}")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
