# SPDX-License-Identifier: Apache-2.0
"""Ranks under ``torchrun``, each with the engine in its own process."""

import os
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
from helpers.patience import patience
from helpers.reference import FEW, hf_greedy
from helpers.server import free_ports

RANKS = 2
TOKENS = 24


def rank_of(number: int, port: int, model: Path, results: Queue) -> None:
    """For each level: device bytes while asleep, and the tokens after the wake."""
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from helpers.engine import mapped, start
    from vllm import SamplingParams

    llm = start(
        model,
        tensor_parallel_size=RANKS,
        distributed_executor_backend="external_launcher",
        enable_sleep_mode=True,
    )
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for level in (0, 1, 2):
        for name, prompt in enumerate(FEW):
            llm.llm_engine.add_request(str(name), prompt, params)
        for _ in range(3):
            llm.llm_engine.step()
        llm.sleep(level=level, mode="wait")
        asleep = mapped()
        llm.wake_up()
        if level == 2:
            llm.collective_rpc("reload_weights")
            llm.reset_prefix_cache()
        done = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                if output.finished:
                    done[int(output.request_id)] = list(output.outputs[0].token_ids)
        results.put((number, level, asleep, [done[name] for name in range(len(FEW))]))


@pytest.mark.slow
def test_wait_lets_requests_finish_on_every_rank(tiny_model):
    expected = hf_greedy(tiny_model, FEW, TOKENS)
    spawning = get_context("spawn")
    results = spawning.Queue()
    (port,) = free_ports(1)
    ranks = [
        spawning.Process(target=rank_of, args=(number, port, tiny_model, results))
        for number in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    try:
        found = [results.get(timeout=240 * patience()) for _ in range(3 * RANKS)]
        for rank in ranks:
            rank.join(60 * patience())
        assert [rank.exitcode for rank in ranks] == [0] * RANKS
    finally:
        for rank in ranks:
            rank.kill()
    for _, level, asleep, tokens in found:
        assert (asleep == 0) == (level > 0)
        assert tokens == expected
    assert sorted(one[:2] for one in found) == [
        (number, level) for number in range(RANKS) for level in (0, 1, 2)
    ]
