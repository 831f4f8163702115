# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's engines in this process, and what they should answer."""

import gc
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
    from reference import MAX_NUM_BATCHED_TOKENS
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        "kv_cache_memory_bytes": 64 << 20,
        "gpu_memory_utilization": 0.5,
    }
    llm = LLM(str(model), **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
