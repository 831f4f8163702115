# SPDX-License-Identifier: Apache-2.0
"""Requests that are under way when an engine goes to sleep: aborted, awaited or kept."""

import asyncio
import threading
import time

import pytest
from helpers.reference import hf_greedy

PROMPT = "Once upon a time, in a land far away,"
LONG = 400


@pytest.fixture(scope="module")
def engine_process(tiny_model):
    """AsyncLLM with its engine in a process of its own, and the loop that it lives in."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(coroutine, timeout=120):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout)

    async def start():
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(tiny_model),
                dtype="float32",
                max_model_len=512,
                max_num_batched_tokens=256,
                kv_cache_memory_bytes=64 << 20,
                gpu_memory_utilization=0.5,
                enable_sleep_mode=True,
            )
        )

    llm = run(start())
    yield llm, run
    llm.shutdown()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    patch.undo()


class Request:
    """One request under way, token by token."""

    def __init__(self, llm, name: str, tokens: int):
        self._arguments = llm, name, tokens
        self.tokens: list[int] = []
        self.reason: str | None = None
        self.started = asyncio.Event()

    async def run(self) -> "Request":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        llm, name, tokens = self._arguments
        params = SamplingParams(
            temperature=0,
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


@pytest.fixture(scope="module")
def expected(tiny_model):
    (tokens,) = hf_greedy(tiny_model, [PROMPT], LONG)
    return tokens


async def under_way(llm, name: str, tokens: int = LONG) -> tuple[Request, asyncio.Task]:
    request = Request(llm, name, tokens)
    task = asyncio.create_task(request.run())
    await asyncio.wait_for(request.started.wait(), 60)
    return request, task


async def held(llm) -> dict[str, int]:
    (status,) = await llm.collective_rpc("sleep_status")
    return {tag: status["tags"][tag]["device"] for tag in ("weights", "kv_cache")}


async def serves(llm, expected) -> None:
    request = await Request(llm, f"after-{time.monotonic()}", 12).run()
    assert request.tokens == expected[:12]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_abort_ends_requests_with_what_they_have(engine_process, expected, level):
    llm, run = engine_process

    async def test():
        request, task = await under_way(llm, f"abort-{level}")
        await llm.sleep(level=level, mode="abort")
        await asyncio.wait_for(task, 30)
        assert request.reason == "abort"
        assert 5 < len(request.tokens) < LONG
        assert request.tokens == expected[: len(request.tokens)]
        assert await llm.is_sleeping()
        assert set((await held(llm)).values()) == {0} or level == 0
        assert await llm.wake_up(tags=["scheduling"] if level == 0 else None)
        if level == 2:
            await llm.collective_rpc("reload_weights")
            await llm.reset_prefix_cache()
        await serves(llm, expected)

    run(test())


@pytest.mark.parametrize("level", [0, 1, 2])
def test_wait_lets_requests_finish_first(engine_process, expected, level):
    llm, run = engine_process

    async def test():
        request, task = await under_way(llm, f"wait-{level}")
        await llm.sleep(level=level, mode="wait")
        assert await llm.is_sleeping()
        await asyncio.wait_for(task, 30)
        assert (request.reason, request.tokens) == ("length", expected)
        await llm.wake_up()
        if level == 2:
            await llm.collective_rpc("reload_weights")
            await llm.reset_prefix_cache()
        await serves(llm, expected)

    run(test())


@pytest.mark.parametrize("level", [0, 1, 2])
def test_keep_goes_on_after_the_wake(engine_process, expected, level):
    """At levels 1 and 2 the KV cache is gone: what was computed is computed again."""
    llm, run = engine_process

    async def test():
        request, task = await under_way(llm, f"keep-{level}")
        await llm.sleep(level=level, mode="keep")
        asleep = len(request.tokens)
        late = asyncio.create_task(Request(llm, f"late-{level}", 12).run())
        await asyncio.sleep(0.3)
        assert not task.done()
        assert not late.done()
        assert len(request.tokens) - asleep <= 2  # what was on its way already
        if level == 2:
            await llm.wake_up(tags=["weights"])
            await llm.collective_rpc("reload_weights")
            await llm.wake_up(tags=["kv_cache"])
        else:
            await llm.wake_up()
        await asyncio.wait_for(task, 60)
        assert (request.reason, request.tokens) == ("length", expected)
        assert (await late).tokens == expected[:12]

    run(test())


def test_kept_requests_are_computed_again_after_the_cache_was_released(engine_process, expected):
    llm, run = engine_process

    async def test():
        request, task = await under_way(llm, "released")
        await llm.sleep(level=0, mode="keep")
        before = await held(llm)
        await llm.release_kv_cache_memory()
        assert await held(llm) == {"weights": before["weights"], "kv_cache": 0}
        assert await llm.wake_up(tags=["kv_cache"]) is True
        assert await held(llm) == before
        await asyncio.wait_for(task, 60)
        assert (request.reason, request.tokens) == ("length", expected)

    run(test())


def test_a_wake_waits_for_a_sleep_that_waits_for_requests(engine_process, expected):
    llm, run = engine_process

    async def test():
        request, task = await under_way(llm, "overtaken")
        sleep = asyncio.create_task(llm.sleep(level=1, mode="wait"))
        await asyncio.sleep(0.05)
        with pytest.raises(Exception, match="a sleep waits for requests to end"):
            await llm.resume_generation()
        wake = asyncio.create_task(llm.wake_up())
        await asyncio.sleep(0.05)
        assert not sleep.done()
        assert not wake.done()
        await asyncio.wait_for(task, 60)
        assert (request.reason, request.tokens) == ("length", expected)
        await sleep
        assert await wake is True
        assert not await llm.is_sleeping()
        await serves(llm, expected)

    run(test())


def test_a_second_sleep_ends_the_wait_of_the_first(engine_process, expected):
    llm, run = engine_process

    async def test():
        request, task = await under_way(llm, "impatient")
        first = asyncio.create_task(llm.sleep(level=1, mode="wait"))
        await asyncio.sleep(0.05)
        await llm.sleep(level=2, mode="abort")
        await asyncio.gather(first, task)
        assert request.reason == "abort"
        (status,) = await llm.collective_rpc("sleep_status")
        assert status["tags"]["weights"]["discarded"] > 0
        await llm.wake_up()
        await llm.collective_rpc("reload_weights")
        await llm.reset_prefix_cache()
        await serves(llm, expected)

    run(test())


@pytest.mark.parametrize("level", [0, 1])
def test_pauses_of_an_engine_that_sleeps_start_nothing(engine_process, expected, level):
    """With requests kept, stock vLLM would go on with them on memory that is not there."""
    llm, run = engine_process

    async def test():
        request, task = await under_way(llm, f"kept-{level}")
        await llm.sleep(level=1, mode="keep")
        await llm.sleep(level=level, mode="wait")
        pause = asyncio.create_task(llm.pause_generation(mode="wait"))
        await asyncio.sleep(0.3)
        assert not task.done()
        assert set((await held(llm)).values()) == {0}
        assert await llm.wake_up() is True
        await asyncio.wait_for(task, 60)
        assert (request.reason, request.tokens) == ("length", expected)
        await asyncio.wait_for(pause, 10)
        await llm.resume_generation()
        await serves(llm, expected)

    run(test())


def test_input_is_refused_with_its_type_across_the_process(engine_process, expected):
    from vllm_sleep_ascend.errors import SleepModeError

    llm, run = engine_process

    async def test():
        for call, error, words in (
            (lambda: llm.sleep(level=3), ValueError, "level 3 does not exist"),
            (lambda: llm.sleep(mode="kill"), ValueError, "'kill' does not exist"),
            (lambda: llm.wake_up(tags=["kv"]), ValueError, "tag 'kv' does not exist"),
            (llm.release_kv_cache_memory, SleepModeError, "requires a completed pause first"),
        ):
            with pytest.raises(error, match=words):
                await call()
        assert not await llm.is_sleeping()
        await llm.sleep(level=1)
        with pytest.raises(Exception, match="execute_dummy_batch needs the weights, which sleep"):
            await llm.collective_rpc("execute_dummy_batch")
        with pytest.raises(Exception, match=r"the engine sleeps; wake it with wake_up"):
            await llm.resume_generation()
        assert await llm.is_sleeping()
        await llm.wake_up()
        await serves(llm, expected)

    run(test())


def test_a_process_checkpoint_is_refused_with_the_reason(engine_process, expected):
    llm, run = engine_process

    async def test():
        for call in (llm.checkpoint_prepare, llm.checkpoint_restore):
            words = r"NPU: a process checkpoint is not supported.*sleep\(level=1\)"
            with pytest.raises(Exception, match=words):
                await call()
        await serves(llm, expected)

    run(test())


def test_over_http_the_same(server, tiny_model):
    text = server.complete(tokens=300)
    for mode in ("abort", "wait", "keep"):
        answers: list[dict] = []

        def ask(answers=answers):
            body = {"model": server.model, "prompt": "The future of AI is", "max_tokens": 300}
            answers.append(server.post("/v1/completions", json={**body, "temperature": 0}))

        thread = threading.Thread(target=ask)
        thread.start()
        deadline = time.monotonic() + 20
        while "num_requests_running{" not in (metrics := server.http.get("/metrics").text) or (
            running(metrics) == 0 and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        server.post(f"/sleep?level=1&mode={mode}")
        assert server.is_sleeping()
        if mode == "keep":
            assert thread.is_alive()
            server.post("/wake_up")
        thread.join(60)
        server.post("/wake_up")
        choice = answers[0]["choices"][0]
        if mode == "abort":
            assert choice["finish_reason"] == "abort"
            assert text.startswith(choice["text"])
        else:
            assert (choice["finish_reason"], choice["text"]) == ("length", text)


def running(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if "num_requests_running{" in line]
    return float(lines[0].rpartition(" ")[2])
