# SPDX-License-Identifier: Apache-2.0
"""Running requests when an engine goes to sleep: aborted, awaited or kept."""

import asyncio
import threading
import time

import pytest
from helpers.async_engine import (
    LONG,
    PROMPT,
    Request,
    async_llm,
    greedy,
    held,
    rejects_while_paused,
    serves,
    under_way,
)


@pytest.fixture(scope="module")
def engine_process(tiny_model):
    yield from async_llm(tiny_model)


@pytest.fixture(scope="module")
def expected(tiny_model):
    return greedy(tiny_model)


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
    """At levels 1 and 2 the KV cache is discarded, so it is computed again."""
    llm, run = engine_process

    async def test():
        request, task = await under_way(llm, f"keep-{level}")
        await llm.sleep(level=level, mode="keep")
        asleep = len(request.tokens)
        late = asyncio.create_task(Request(llm, f"late-{level}", 12).run())
        await asyncio.sleep(0.3)
        assert not task.done()
        assert not late.done()
        assert len(request.tokens) - asleep <= 2  # they were in flight already
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


@pytest.mark.parametrize(
    ("level", "call"), [(1, "wake_up"), (1, "wake_up weights"), (0, "wake_up"), (1, "resume")]
)
def test_a_sleep_that_waits_for_requests_can_be_called_off(engine_process, expected, level, call):
    """Its caller may still be waiting, or have given up."""
    from vllm_sleep_ascend.errors import SleepModeError

    llm, run = engine_process
    caller_gives_up = call == "wake_up weights"

    async def test():
        request, task = await under_way(llm, f"called-off-{level}-{call}")
        before = await held(llm)
        sleep = asyncio.create_task(llm.sleep(level=level, mode="wait"))
        while not await llm.is_sleeping():
            await asyncio.sleep(0.01)
        late = asyncio.create_task(Request(llm, f"late-{level}-{call}", 12).run())
        if caller_gives_up:
            sleep.cancel()
            assert await llm.wake_up(tags=["weights"]) is True
        elif call == "wake_up":
            assert await llm.wake_up() is True
        else:
            await llm.resume_generation()
        assert not task.done()
        assert not await llm.is_sleeping()
        (outcome,) = await asyncio.gather(sleep, return_exceptions=True)
        if not caller_gives_up:
            assert isinstance(outcome, SleepModeError)
            assert "called the sleep off while it waited" in str(outcome)
        assert (await asyncio.wait_for(late, 60)).tokens == expected[:12]
        assert not task.done()
        await asyncio.wait_for(task, 60)
        assert (request.reason, request.tokens) == ("length", expected)
        assert await held(llm) == before
        assert not await llm.is_paused()
        await llm.sleep(level=level, mode="wait")
        assert await llm.is_sleeping()
        assert await llm.wake_up() is True
        await serves(llm, expected)

    run(test())


def test_a_sleep_that_is_called_off_leaves_the_prefix_cache(engine_process, expected):
    llm, run = engine_process

    async def cached(name: str) -> int:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1)
        async for output in llm.generate(PROMPT * 8, params, name):
            found = output.num_cached_tokens
        return found

    async def test():
        await cached("first")
        before = await cached("second")
        assert before > 0
        _, task = await under_way(llm, "under way")
        sleep = asyncio.create_task(llm.sleep(level=1, mode="wait"))
        while not await llm.is_sleeping():
            await asyncio.sleep(0.01)
        await llm.wake_up()
        await asyncio.gather(sleep, task, return_exceptions=True)
        assert await cached("third") == before

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
    """Stock vLLM would continue kept requests on memory that is not mapped."""
    llm, run = engine_process

    async def test():
        request, task = await under_way(llm, f"kept-{level}")
        await llm.sleep(level=1, mode="keep")
        await llm.sleep(level=level, mode="wait")
        await asyncio.wait_for(llm.pause_generation(mode="wait"), 10)
        await asyncio.sleep(0.3)
        assert not task.done()
        assert set((await held(llm)).values()) == {0}
        assert await llm.wake_up() is True
        assert await llm.is_paused()
        assert not task.done()
        await llm.resume_generation()
        await asyncio.wait_for(task, 60)
        assert (request.reason, request.tokens) == ("length", expected)
        await serves(llm, expected)

    run(test())


async def rejected(request: asyncio.Task) -> None:
    with pytest.raises(Exception, match=r"Generation is paused\.") as caught:
        await asyncio.wait_for(request, 30)
    assert type(caught.value).__name__ == "RetryableRequestError"


def test_a_resume_that_is_refused_ends_no_rejection(engine_process, expected):
    llm, run = engine_process
    if not rejects_while_paused():
        pytest.skip("vLLM 0.32 queues requests during a pause")

    async def test():
        await llm.pause_generation(mode="abort")
        await rejected(asyncio.create_task(Request(llm, "before", 12).run()))
        await llm.sleep(level=1)
        with pytest.raises(Exception, match="the engine sleeps; wake it"):
            await llm.resume_generation()
        await rejected(asyncio.create_task(Request(llm, "asleep", 12).run()))
        await llm.wake_up()
        await rejected(asyncio.create_task(Request(llm, "awake", 12).run()))
        await llm.pause_generation(mode="keep")
        late = asyncio.create_task(Request(llm, "kept", 12).run())
        await llm.resume_generation()
        assert (await asyncio.wait_for(late, 60)).tokens == expected[:12]
        await serves(llm, expected)

    run(test())


@pytest.mark.parametrize(("mode", "level"), [("abort", 0), ("wait", 2), ("keep", 1)])
def test_a_pause_outlives_a_sleep(engine_process, expected, mode, level):
    """Only the user's own call ends the user's own pause, whatever wakes the engine."""
    llm, run = engine_process

    async def test():
        request, task = await under_way(llm, f"paused-{mode}-{level}")
        await llm.pause_generation(mode=mode)
        assert task.done() == (mode != "keep")
        await llm.sleep(level=level, mode="keep")
        if level:
            await llm.wake_up(tags=["weights"])
            if level == 2:
                await llm.collective_rpc("reload_weights")
        assert await llm.wake_up() is True
        assert await llm.wake_up(tags=["kv_cache"]) is True
        await llm.sleep(level=1, mode="keep")
        await llm.collective_rpc("wake_up")
        assert set((await held(llm)).values()) != {0}
        assert await llm.is_paused()
        rejects = mode != "keep" and rejects_while_paused()
        late = asyncio.create_task(Request(llm, f"queued-{mode}-{level}", 12).run())
        await asyncio.sleep(0.3)
        if rejects:
            await rejected(late)
        else:
            assert not late.done()
        if level == 2:
            assert await llm.wake_up(tags=["scheduling"]) is True
        else:
            await llm.resume_generation()
        assert not await llm.is_paused()
        if not rejects:
            assert (await asyncio.wait_for(late, 60)).tokens == expected[:12]
        await asyncio.wait_for(task, 60)
        ended = {"abort": "abort", "wait": "length", "keep": "length"}[mode]
        assert request.reason == ended
        assert request.tokens == expected[: len(request.tokens) if mode == "abort" else None]
        await llm.sleep(level=1)
        await llm.wake_up()
        assert not await llm.is_paused()
        await serves(llm, expected)

    run(test())


def test_a_pause_by_level_0_ends_with_the_wake(engine_process, expected):
    """vLLM's contract: a sleep at level 0 is ended by a wake of everything."""
    llm, run = engine_process

    async def test():
        await llm.sleep(level=0)
        await llm.sleep(level=1)
        assert await llm.wake_up() is True
        assert not await llm.is_paused()
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
        with pytest.raises(Exception, match=r"execute_dummy_batch needs .*\(weights, kv_cache\)"):
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
            words = r"NPU: process checkpoints are not supported.*sleep\(level=1\)"
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
