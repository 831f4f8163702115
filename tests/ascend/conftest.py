# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend on the simulated NPU; before vLLM is imported."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("VLLM_ASCEND_ENABLE_NZ", "0")  # as its guide to sleep mode sets it
# NPU attention knows no float32; the tokens of 16-bit engines differ from another
# implementation's where two logits nearly tie.
os.environ.setdefault("NPU_SIM_FLOAT32_ATTENTION", "1")


@pytest.fixture(scope="module")
def sleeper(tiny_model) -> Iterator[Any]:
    """An engine with sleep mode, in this process."""
    from ascend_engines import engine

    with engine(tiny_model, enable_sleep_mode=True) as llm:
        yield llm
