# SPDX-License-Identifier: Apache-2.0
"""AsyncLLM with its engine in a separate process, and running requests."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.reference import hf_greedy

PROMPT = "Once upon a time, in a land far away,"
LONG = 240


def rejects_while_paused() -> bool:
    """Whether this vLLM rejects new requests during the user's own pause, but for mode "keep".
    vLLM 0.32 queues them."""
    from vllm.v1.engine.core import EngineCoreProc

    return hasattr(EngineCoreProc, "pause_generation")


def async_llm(
    model: Path, rules: Path | None = None, **options: Any
) -> Iterator[tuple[Any, Callable]]:
    """An engine, and ``run``, which runs a coroutine in the engine's event loop. ``rules`` is the
    file of its device's faults."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    if rules is not None:
        patch.setenv("NPU_SIM_FAULTS_FILE", str(rules))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine: Any, timeout: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout)

    async def start() -> Any:
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(model),
                dtype="float32",
                max_model_len=512,
                max_num_batched_tokens=256,
                kv_cache_memory_bytes=64 << 20,
                gpu_memory_utilization=0.5,
                enable_sleep_mode=True,
                **options,
            )
        )

    try:
        llm = run(start())
        try:
            yield llm, run
        finally:
            llm.shutdown()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        patch.undo()


class Request:
    """A running request, token by token."""

    def __init__(self, llm: Any, name: str, tokens: int, n: int = 1) -> None:
        self._arguments = llm, name, tokens, n
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.started = asyncio.Event()

    async def run(self) -> "Request":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        llm, name, tokens, n = self._arguments
        params = SamplingParams(
            n=n,
            temperature=0 if n == 1 else 1,
            max_tokens=tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        async for output in llm.generate(PROMPT, params, name):
            self.tokens += output.outputs[0].token_ids
            self.reason = output.outputs[0].finish_reason
            if len(self.tokens) > 5:
                self.started.set()
        return self


def greedy(model: Path) -> list[int]:
    """The tokens of an undisturbed request."""
    (tokens,) = hf_greedy(model, [PROMPT], LONG)
    return tokens


async def under_way(llm: Any, name: str, tokens: int = LONG) -> tuple[Request, asyncio.Task]:
    request = Request(llm, name, tokens)
    task = asyncio.create_task(request.run())
    await asyncio.wait_for(request.started.wait(), 60)
    return request, task


async def held(llm: Any) -> dict[str, int]:
    (status,) = await llm.collective_rpc("sleep_status")
    return {tag: status["tags"][tag]["device"] for tag in ("weights", "kv_cache")}


async def serves(llm: Any, expected: list[int]) -> None:
    request = await Request(llm, f"after-{time.monotonic()}", 12).run()
    assert request.tokens == expected[:12]
