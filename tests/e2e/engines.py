# SPDX-License-Identifier: Apache-2.0
"""Engines in this process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reference import MAX_NUM_BATCHED_TOKENS


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An ``LLM`` in float32, so that its tokens must equal the reference's; gone afterwards."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
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


def sleep_and_wake(llm: Any, level: int) -> None:
    """One cycle; after level 2 with weights from the checkpoint before the cache wakes."""
    llm.sleep(level=level)
    llm.wake_up(tags=["weights"])
    if level == 2:
        llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
