# SPDX-License-Identifier: Apache-2.0
"""The product's log messages in this process."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def messages_of(module: str, level: int = logging.WARNING) -> Iterator[list[str]]:
    """The messages that a module of ``vllm_sleep_ascend`` logs inside, from this level on."""
    messages: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(f"vllm.vllm_sleep_ascend.{module}")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield messages
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
