# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters on two ranks: the tokens of one rank, before and after sleep."""

from functools import partial

from helpers.engine import engine, sleep_and_wake, tokens
from helpers.models import make_model
from helpers.ranks import assert_all, assert_asleep
from helpers.reference import PROMPTS, hf_greedy, merge
from vllm.lora.request import LoRARequest

TOKENS = 8
SOME = PROMPTS[:3] + PROMPTS[6:7]
ADAPTERS = (None, "tiny-qwen2-lora", "tiny-qwen2-lora-attention")


def test_adapters_survive_both_levels(tiny_model):
    paths = [name and make_model(name) for name in ADAPTERS]
    expected = [
        hf_greedy(tiny_model, SOME, TOKENS, change=path and partial(merge, path)) for path in paths
    ]
    assert expected[0] != expected[1] != expected[2] != expected[0]
    requests = [path and LoRARequest(path.name, n, str(path)) for n, path in enumerate(paths)]

    with engine(
        tiny_model,
        enable_sleep_mode=True,
        distributed_executor_backend="mp",
        tensor_parallel_size=2,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
    ) as llm:

        def answers() -> list[list[list[int]]]:
            """By adapter, all in one batch."""
            each = [request for request in requests for _ in SOME]
            flat = tokens(llm, SOME * len(requests), TOKENS, lora_request=each)
            return [flat[n : n + len(SOME)] for n in range(0, len(flat), len(SOME))]

        assert answers() == expected
        llm.llm_engine.pin_lora(1)
        for level in (1, 2, 2):
            llm.sleep(level=level)
            assert_asleep(llm, backup=level == 1)
            llm.wake_up()
            if level == 2:
                llm.collective_rpc("reload_weights")
                llm.reset_prefix_cache()
            assert_all(llm, "RUNNING")
            assert llm.llm_engine.list_loras() == {1, 2}
            assert answers() == expected, level
        sleep_and_wake(llm, 2)  # the cache wakes after the load
        assert answers() == expected
