# SPDX-License-Identifier: Apache-2.0
"""KV-cache events: a sleep tells subscribers that the cache is empty."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
import zmq
from helpers.patience import patience, wait_for

PROMPT = "Once upon a time, in a land far away, there lived a programmer."


class Subscriber:
    """Collects an engine's events."""

    def __init__(self, endpoint: str) -> None:
        from vllm.distributed.kv_events import KVEventBatch

        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.subscribe(b"")
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)

    def take(self, timeout_s: float) -> list[str]:
        """The names of the next batch's events; empty if none comes in time."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return []
        _, _, payload = self._socket.recv_multipart()
        return [type(event).__name__ for event in self._decoder.decode(payload).events]

    def wait_for(self, event: str) -> None:
        """Read until a batch ends with this event, and check that nothing follows."""
        wait_for(lambda: self.take(0.1)[-1:] == [event], event)

    def assert_silent(self) -> None:
        assert self.take(0.2) == []

    def drain(self) -> None:
        """Read what has been published so far."""
        wait_for(lambda: self.take(0.2) == [], "silence")

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture(scope="module")
def published(tiny_model, tmp_path_factory):
    """An engine in a separate process, a function that runs coroutines, and a subscriber."""
    from vllm import AsyncEngineArgs
    from vllm.config import KVEventsConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    endpoint = f"ipc://{tmp_path_factory.mktemp('events')}/socket"
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine: Coroutine, timeout: float = 60) -> Any:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        return future.result(timeout * patience())

    async def start() -> Any:
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(tiny_model),
                dtype="float32",
                max_model_len=2048,
                kv_cache_memory_bytes=64 << 20,
                gpu_memory_utilization=0.5,
                enable_sleep_mode=True,
                kv_events_config=KVEventsConfig(
                    enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint
                ),
            )
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        llm = run(start(), 120)
    subscriber = Subscriber(endpoint)

    def hears() -> bool:
        run(generate(llm, 20))
        return bool(subscriber.take(0.1))

    try:
        wait_for(hears, "the subscription")
        yield llm, run, subscriber
    finally:
        subscriber.close()
        llm.shutdown()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def generate(llm, n: int, started: Callable[[], None] = lambda: None) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    async for _ in llm.generate(PROMPT, params, f"{n}-{id(started)}"):
        started()


async def wake(llm) -> None:
    await llm.wake_up()
    await llm.collective_rpc("reload_weights")
    await llm.resume_generation()  # ends the pause before the release, which outlives the wake


async def release(llm, mode: str) -> None:
    await llm.pause_generation(mode=mode, clear_cache=False)
    await llm.release_kv_cache_memory()


WAYS = {
    "level 1": lambda llm, mode: llm.sleep(level=1, mode=mode),
    "level 2": lambda llm, mode: llm.sleep(level=2, mode=mode),
    "release": release,
}
PAST_THE_ENGINE = {
    "sleep": lambda llm, mode: llm.collective_rpc("sleep", kwargs={"level": 2}),
    "discard": lambda llm, mode: llm.collective_rpc("discard", args=(("kv_cache",),)),
}


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
@pytest.mark.parametrize("way", WAYS)
def test_with_requests_under_way(published, way, mode):
    llm, run, subscriber = published
    subscriber.drain()

    async def test() -> None:
        started = asyncio.Event()
        request = asyncio.create_task(generate(llm, 100, started.set))
        await started.wait()
        await WAYS[way](llm, mode)
        assert await llm.is_sleeping()
        subscriber.wait_for("AllBlocksCleared")
        await wake(llm)
        await request

    run(test())


@pytest.mark.parametrize("way", [*WAYS, *PAST_THE_ENGINE])
def test_of_an_idle_engine(published, way):
    llm, run, subscriber = published
    run(generate(llm, 20))
    subscriber.drain()
    run((WAYS | PAST_THE_ENGINE)[way](llm, "abort"))
    subscriber.wait_for("AllBlocksCleared")
    subscriber.assert_silent()
    run(wake(llm))
    subscriber.assert_silent()


def test_level_0_and_a_reset_without_a_sleep(published):
    llm, run, subscriber = published
    run(generate(llm, 20))
    subscriber.drain()
    run(llm.sleep(level=0))
    subscriber.assert_silent()  # the cache stays
    run(llm.wake_up(tags=["scheduling"]))
    run(llm.reset_prefix_cache())
    subscriber.wait_for("AllBlocksCleared")
