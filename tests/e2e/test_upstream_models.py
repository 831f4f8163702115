# SPDX-License-Identifier: Apache-2.0
"""Of vLLM's model_executor/test_sleep_mode_tensor_ownership.py: what models hold beside their
parameters."""

import pytest
from engines import engine
from reference import PROMPTS, hf_greedy, vllm_greedy
from support import make_model

TOKENS = 8


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2", "tiny-qwen3-moe"])
def test_static_model_tensors_survive_level2_restore(name):
    """Scales, soft caps, rotary tables and expert maps, which are in no checkpoint."""
    model = make_model(name)
    expected = hf_greedy(model, PROMPTS[:3], TOKENS)
    with engine(model, enable_sleep_mode=True) as other:
        for _ in range(2):
            other.sleep(level=2)
            other.wake_up(tags=["weights"])
            other.collective_rpc("reload_weights")
            other.wake_up(tags=["kv_cache"])
            assert vllm_greedy(other, PROMPTS[:3], TOKENS) == expected
