# SPDX-License-Identifier: Apache-2.0
"""Engines in this process."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers import report
from helpers.reference import FEW, FEW_TOKENS, MAX_NUM_BATCHED_TOKENS, PROMPTS

_DEFAULTS = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
    "kv_cache_memory_bytes": 64 << 20,
    "gpu_memory_utilization": 0.5,
}


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An ``LLM`` in float32, so that its tokens equal the reference's; shut down at the end.

    A shared engine is shut down first, because a process can have only one with sleep mode.
    """
    shared.close()
    llm = start(model, **options)
    try:
        yield llm
    finally:
        _end(llm)
        del llm
        _clean_up()


def start(model: Path, **options: Any) -> Any:
    """An ``LLM`` with the tests' defaults."""
    # Something of vLLM keeps the frames of its first import, and so what their callers refer to.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_llm_class).result()
    with report.start_of("engine"):
        return _llm_class()(str(model), **{**_DEFAULTS, **options})


def _llm_class() -> Any:
    from vllm import LLM

    return LLM


def _end(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


def _clean_up() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.v1.worker.workspace import reset_workspace_manager

    _ROPE_DICT.clear()  # vLLM caches rotary tables for the life of a process
    reset_workspace_manager()  # refers to the worker of a start that has failed
    gc.collect()
    cleanup_dist_env_and_memory()


class _Shared:
    """An engine that tests share as long as they use the same options."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._llm: Any = None

    def get(self, model: Path, **options: Any) -> Any:
        """The engine with these options, awake and with empty caches."""
        key = (str(model), repr(sorted(options.items())))
        if key != self._key:
            self.close()
            self._llm = start(model, **options)
            self._key = key
        return self._llm

    def is_open(self) -> bool:
        return self._llm is not None

    def close(self) -> None:
        if self._llm is not None:
            _end(self._llm)
            self._key = self._llm = None
            _clean_up()


shared = _Shared()


def tokens(
    llm: Any, prompts: Sequence[str] = PROMPTS, n: int = 24, **kwargs: Any
) -> list[list[int]]:
    """``n`` greedy tokens of each prompt, in one batch, end-of-text included."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    answers = llm.generate(list(prompts), params, use_tqdm=False, **kwargs)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def few(llm: Any) -> list[list[int]]:
    """A few tokens of a few prompts, enough to distinguish weights."""
    return tokens(llm, FEW, FEW_TOKENS)


def sleep_and_wake(llm: Any, level: int) -> None:
    """One cycle. After level 2 the checkpoint is loaded before the cache wakes."""
    llm.sleep(level=level)
    llm.wake_up(tags=["weights"])
    if level == 2:
        llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def send_update(llm: Any, weights: Mapping[str, Any], folder: Path, draft: bool = False) -> None:
    """Send a weight update of the model or its draft model in two parts.

    The engine's weight-transfer backend is ``safetensors``.
    """
    from safetensors.torch import save_file

    llm.collective_rpc("start_draft_weight_update") if draft else llm.start_weight_update()
    for number in range(2):
        path = folder / f"{number}.safetensors"
        save_file({name: weights[name] for name in list(weights)[number::2]}, path)
        llm.update_weights({"update_info": {"path": str(path)}})
    llm.finish_weight_update()


def draft_counts(llm: Any) -> tuple[float, float]:
    """Drafted and accepted tokens since the start of an engine that logs its statistics."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    drafted, taken = (
        metrics[f"vllm:spec_decode_num_{kind}_tokens"].value for kind in ("draft", "accepted")
    )
    return drafted, taken


def only_rank(llm: Any) -> Any:
    """``sleep_status`` of the worker of an engine with one rank."""
    (rank,) = llm.collective_rpc("sleep_status")
    return rank


def driver_worker(llm: Any) -> Any:
    """The worker of an engine with one rank."""
    return llm.llm_engine.model_executor.driver_worker.worker


def mapped(tag: str | None = None) -> int:
    """Device bytes of this process's allocations, for one tag or all."""
    from vllm_sleep_ascend import _camem

    return sum(a["device_bytes"] for a in _camem.allocations() if tag in (None, a["tag"]))


def used() -> int:
    """Bytes of the current device held by all processes."""
    import torch

    free, total = torch.npu.mem_get_info()
    return total - free
