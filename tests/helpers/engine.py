# SPDX-License-Identifier: Apache-2.0
"""Engines in this process, and what tests ask of them."""

import gc
from collections.abc import Iterator, Mapping, Sequence
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
    """An ``LLM`` in float32, so that its tokens must equal the reference's; gone afterwards.

    A shared engine of this process ends first: a process can have one that sleeps."""
    shared.close()
    llm = start(model, **options)
    try:
        yield llm
    finally:
        _end(llm)
        del llm
        _clean_up()


def start(model: Path, **options: Any) -> Any:
    """An ``LLM`` as the tests want it, whatever else runs in this process."""
    from vllm import LLM

    with report.start_of("engine"):
        return LLM(str(model), **{**_DEFAULTS, **options})


def _end(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


def _clean_up() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    _ROPE_DICT.clear()  # vLLM keeps rotary tables for the life of a process
    gc.collect()
    cleanup_dist_env_and_memory()


class _Shared:
    """One engine that the tests of a run share as long as they want the same options."""

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
    """Greedy tokens of the prompts, all in one batch, ``n`` of each, end-of-text included."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    answers = llm.generate(list(prompts), params, use_tqdm=False, **kwargs)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def few(llm: Any) -> list[list[int]]:
    """A few tokens of a few prompts: enough to tell one set of weights from another."""
    return tokens(llm, FEW, FEW_TOKENS)


def sleep_and_wake(llm: Any, level: int) -> None:
    """One cycle; after level 2 with weights from the checkpoint before the cache wakes."""
    llm.sleep(level=level)
    llm.wake_up(tags=["weights"])
    if level == 2:
        llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def send_update(llm: Any, weights: Mapping[str, Any], folder: Path, draft: bool = False) -> None:
    """A weight update in two parts, of the model or its draft model, as a trainer sends one to an
    engine whose backend for that is ``safetensors``."""
    from safetensors.torch import save_file

    llm.collective_rpc("start_draft_weight_update") if draft else llm.start_weight_update()
    for number in range(2):
        path = folder / f"{number}.safetensors"
        save_file({name: weights[name] for name in list(weights)[number::2]}, path)
        llm.update_weights({"update_info": {"path": str(path)}})
    llm.finish_weight_update()


def draft_counts(llm: Any) -> tuple[float, float]:
    """Tokens that were drafted, and those of them that the model took, since the start of an engine
    that counts them."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    drafted, taken = (
        metrics[f"vllm:spec_decode_num_{kind}_tokens"].value for kind in ("draft", "accepted")
    )
    return drafted, taken


def driver_worker(llm: Any) -> Any:
    """The worker of an engine of one rank."""
    return llm.llm_engine.model_executor.driver_worker.worker


def mapped(tag: str | None = None) -> int:
    """Device bytes of this process's allocations, of one tag or of all."""
    from vllm_sleep_ascend import _camem

    return sum(a["device_bytes"] for a in _camem.allocations() if tag in (None, a["tag"]))


def used() -> int:
    """Bytes of the current device that all processes hold."""
    import torch

    free, total = torch.npu.mem_get_info()
    return total - free
