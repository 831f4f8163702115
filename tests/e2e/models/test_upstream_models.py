# SPDX-License-Identifier: Apache-2.0
"""From vLLM's model_executor/test_sleep_mode_tensor_ownership.py: tensors besides parameters."""

import pytest
from helpers.engine import engine, few
from helpers.models import make_model
from helpers.reference import hf_few


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma2", "tiny-qwen3-moe"])
def test_static_model_tensors_survive_level2_restore(name):
    """Scales, soft caps, rotary tables and expert maps, which no checkpoint contains."""
    model = make_model(name)
    expected = hf_few(model)
    with engine(model, enable_sleep_mode=True) as other:
        for _ in range(2):
            other.sleep(level=2)
            other.wake_up(tags=["weights"])
            other.collective_rpc("reload_weights")
            other.wake_up(tags=["kv_cache"])
            assert few(other) == expected
