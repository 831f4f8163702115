# SPDX-License-Identifier: Apache-2.0
"""Engines that tests share."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def llm(tiny_model) -> Iterator[Any]:
    """An engine with sleep mode, in this process."""
    from engines import engine

    with engine(tiny_model, enable_sleep_mode=True) as llm:
        yield llm
