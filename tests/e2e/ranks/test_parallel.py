# SPDX-License-Identifier: Apache-2.0
"""Engines with several ranks, each on its own simulated NPU: the tokens are those of one device,
and sleep frees the memory of every device."""

import pytest
from helpers.engine import engine, few, send_update
from helpers.models import other_weights
from helpers.ranks import (
    assert_all,
    assert_cycles_leave_nothing,
    assert_tokens_survive_sleep,
    fail_on,
    status,
)
from helpers.reference import hf_few
from safetensors.torch import load_file

LAYOUTS = {
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "tp2-pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request, tiny_model):
    from vllm.config import WeightTransferConfig

    with engine(
        tiny_model,
        enable_sleep_mode=True,
        weight_transfer_config=WeightTransferConfig(backend="safetensors"),
        distributed_executor_backend="mp",
        **LAYOUTS[request.param],
    ) as llm:
        yield llm


def test_every_rank_sleeps_and_the_tokens_stay(ranks, tiny_model) -> None:
    devices = [rank["device"] for rank in status(ranks)]
    assert devices == list(range(len(devices)))
    assert_tokens_survive_sleep(ranks, tiny_model)


def test_cycles_leave_nothing_behind(ranks, tiny_model) -> None:
    assert_cycles_leave_nothing(ranks, tiny_model)


def test_an_update_that_lacks_a_shard_happens_on_no_rank(ranks, tiny_model, tmp_path) -> None:
    """With pipeline stages, only the first one knows that it is missing."""
    missing = "model.layers.0.self_attn.k_proj.weight"
    other = other_weights(tiny_model, tmp_path / "model")
    weights = load_file(other / "model.safetensors")
    lacking = {name: weight for name, weight in weights.items() if name != missing}
    ranks.init_weight_transfer_engine({"init_info": {}})
    for level in (0, 2):
        if level:
            ranks.sleep(level=level)
            ranks.wake_up(tags=["weights"])
        with pytest.raises(RuntimeError, match=rf"happened on none: rank 0.* for {missing}"):
            send_update(ranks, lacking, tmp_path)
        if level:
            ranks.wake_up()
            with pytest.raises(RuntimeError, match="does not serve yet"):
                few(ranks)
        else:
            assert few(ranks) == hf_few(tiny_model)
    send_update(ranks, weights, tmp_path)
    ranks.reset_prefix_cache()
    assert few(ranks) == hf_few(other)
    ranks.collective_rpc("reload_weights")
    ranks.reset_prefix_cache()
    assert few(ranks) == hf_few(tiny_model)


# One call of each step of a rank: a wait, a copy, an unmapping and a mapping.
SLEEP_FAULTS = ("aclrtSynchronizeDeviceWithTimeout", "aclrtMemcpyAsync", "aclrtUnmapMem")
WAKE_FAULTS = ("aclrtMallocPhysical", "aclrtMapMem", "aclrtMemcpyAsync")


def test_a_fault_on_one_rank_keeps_all_as_they_were(ranks, tiny_model) -> None:
    expected = hf_few(tiny_model)
    last = len(status(ranks)) - 1
    where = f"rank {last}, device {last}"
    for level in (1, 2):
        for call in SLEEP_FAULTS:
            if level == 2 and call == "aclrtMemcpyAsync":
                continue
            fail_on(ranks, last, f"{call}:1:507899")
            with pytest.raises(RuntimeError, match=where):
                ranks.sleep(level=level)
            fail_on(ranks, last, "")
            assert_all(ranks, "RUNNING")
            assert few(ranks) == expected
    ranks.sleep(level=1)
    for call in WAKE_FAULTS:
        fail_on(ranks, last, f"{call}:1:507899")
        with pytest.raises(RuntimeError, match=where):
            ranks.wake_up()
        fail_on(ranks, last, "")
        assert_all(ranks, "SUSPENDED")
    ranks.wake_up()
    assert_all(ranks, "RUNNING")
    assert few(ranks) == expected
