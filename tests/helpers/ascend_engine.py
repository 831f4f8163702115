# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's engines in this process, and their expected tokens."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ITS_OWN = {
    "VLLM_PLUGINS": "ascend,ascend_kv_connector,ascend_model,ascend_model_loader,"
    "ascend_service_profiling",
    "VLLM_ASCEND_ENABLE_NZ": "0",
}
"""Unmodified vllm-ascend, set up as its guide to sleep mode says."""


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An ``LLM``, shut down at the end."""
    from helpers import engine as plain

    try:
        with plain.engine(model, **{"enforce_eager": True, **options}) as llm:
            yield llm
    finally:
        _forget_rotary_tables()


def _forget_rotary_tables() -> None:
    """vllm-ascend keeps them in a module for the life of a process. They are in memory of the
    weights, and it refuses another engine with sleep mode as long as there is any."""
    rotary_embedding = sys.modules.get("vllm_ascend.ops.rotary_embedding")
    if rotary_embedding is None:  # the engine ran in other processes
        return
    import torch

    for name, value in list(vars(rotary_embedding).items()):
        if isinstance(value, torch.Tensor):
            setattr(rotary_embedding, name, None)
    torch.npu.empty_cache()


@contextmanager
def engine_of_ranks(model: Path, **options: Any) -> Iterator[Any]:
    """An ``LLM`` with sleep mode, whose engine and ranks run in separate processes.

    vLLM 0.23 may hang in a zmq context at the end of an in-process engine with ranks elsewhere.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for the tests' functions
        with engine(
            model, enable_sleep_mode=True, distributed_executor_backend="mp", **options
        ) as llm:
            yield llm
