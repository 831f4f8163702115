# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's engines in this process, and what they should answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ITS_OWN = {
    "VLLM_PLUGINS": "ascend,ascend_kv_connector,ascend_model,ascend_model_loader,"
    "ascend_service_profiling",
    "VLLM_ASCEND_ENABLE_NZ": "0",
}
"""vllm-ascend as it is, set up as its guide to sleep mode says."""


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An ``LLM``; gone afterwards."""
    from helpers import engine as plain

    with plain.engine(model, **{"enforce_eager": True, **options}) as llm:
        yield llm
