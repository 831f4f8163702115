# SPDX-License-Identifier: Apache-2.0
"""Sleep and wake through ``LLM`` beside vllm-ascend: memory, tokens, refusals, faults."""

import gc

import pytest
import torch
from helpers import MIB
from helpers.engine import tokens
from helpers.reference import PROMPTS, hf_greedy

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import SleepModeError
from vllm_sleep_ascend.sim import control

TOKENS = 8
TAGS = ("weights", "kv_cache")
DRIVER_ERROR = 507899
FRACTAL_NZ = 29


@pytest.fixture(scope="module")
def llm(sleeper):
    return sleeper


@pytest.fixture(scope="module")
def expected(tiny_model):
    return hf_greedy(tiny_model, PROMPTS, TOKENS)


@pytest.fixture(autouse=True)
def awake(llm):
    yield
    control.set_faults("")
    llm.wake_up()
    if worker(llm).weights_content()["missing"]:
        reload(llm)


def worker(llm):
    return llm.llm_engine.model_executor.driver_worker.worker


def reload(llm):
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()


def used() -> int:
    free, total = torch.npu.mem_get_info()
    return total - free


def held(tag: str) -> int:
    return sum(a["device_bytes"] for a in _camem.allocations() if a["tag"] == tag)


def test_allocator_and_worker_are_ours_over_vllm_ascends(llm):
    import vllm_ascend.device_allocator.camem
    import vllm_ascend.worker.worker
    from vllm.platforms import current_platform

    from vllm_sleep_ascend.beside.allocator import SleepingAllocator
    from vllm_sleep_ascend.beside.worker import SleepingNPUWorker

    assert type(current_platform).__module__ == "vllm_ascend.platform"
    assert type(worker(llm)) is SleepingNPUWorker
    assert isinstance(worker(llm), vllm_ascend.worker.worker.NPUWorker)
    assert vllm_ascend.device_allocator.camem.CaMemAllocator is SleepingAllocator
    assert vllm_ascend.worker.worker.CaMemAllocator is SleepingAllocator
    assert SleepingAllocator.get_instance().get_current_usage() == sum(held(tag) for tag in TAGS)


def test_level_1_frees_weights_and_cache_and_keeps_the_tokens(llm, expected):
    awake = used()
    ours = sum(held(tag) for tag in TAGS)
    assert held("weights") > 0
    assert held("kv_cache") >= 64 * MIB
    llm.sleep(level=1)
    assert llm.llm_engine.is_sleeping()
    assert sum(held(tag) for tag in TAGS) == 0
    asleep = used()
    assert asleep <= awake - ours
    llm.wake_up()
    assert not llm.llm_engine.is_sleeping()
    assert used() - asleep == ours
    assert tokens(llm, PROMPTS, TOKENS) == expected


def test_level_2_with_reload_keeps_the_tokens(llm, expected):
    parameter = worker(llm).model_runner.model.model.norm.weight
    before = parameter.cpu()
    llm.sleep(level=2)
    assert _camem.pinned_host_bytes() == 0
    llm.wake_up(tags=["weights"])
    assert not torch.equal(parameter.cpu(), before)
    assert held("kv_cache") == 0
    llm.collective_rpc("reload_weights")
    assert llm.llm_engine.is_sleeping()
    llm.wake_up(tags=["kv_cache"])
    llm.reset_prefix_cache()
    assert torch.equal(parameter.cpu(), before)
    assert tokens(llm, PROMPTS, TOKENS) == expected


def test_level_2_keeps_buffers_and_what_is_neither_buffer_nor_parameter(llm, expected):
    """vllm-ascend keeps tables and derived matrices in attributes and globals, some in FRACTAL_NZ
    regardless of VLLM_ASCEND_ENABLE_NZ. An option preserves two parameters."""
    import torch_npu

    model = worker(llm).model_runner.model
    matrix = torch.arange(300 * 35).remainder(97).view(300, 35).half()
    with _in_weights_pool():
        model.stray = [torch.arange(100_000, device="npu")]
        model.tiled = torch_npu.npu_format_cast(matrix.npu(), FRACTAL_NZ)
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    assert buffers
    norms = {n: p.cpu() for n, p in model.named_parameters() if "layernorm" in n}
    llm.sleep(level=2)
    llm.wake_up()
    kept = {n for n, p in model.named_parameters() if n in norms and torch.equal(p.cpu(), norms[n])}
    preserved = {f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")}
    assert kept == preserved
    assert preserved.isdisjoint(worker(llm).weights_content()["missing"])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer.cpu(), buffers[name]), name
    assert torch.equal(model.stray[0].cpu(), torch.arange(100_000))
    assert torch_npu.get_npu_format(model.tiled) == FRACTAL_NZ
    assert torch.equal(model.tiled.cpu(), matrix)
    del model.stray, model.tiled
    reload(llm)
    assert tokens(llm, PROMPTS, TOKENS) == expected


def _in_weights_pool():
    from vllm_ascend.device_allocator.camem import CaMemAllocator

    return CaMemAllocator.get_instance().use_memory_pool(tag="weights")


@pytest.mark.parametrize("order", [["weights", "kv_cache"], ["kv_cache", "weights"]])
def test_tags_wake_in_any_order_and_nothing_runs_before_the_last(llm, expected, order):
    llm.sleep(level=1)
    llm.wake_up(tags=order[:1])
    assert held(order[0]) > 0
    assert held(order[1]) == 0
    assert llm.llm_engine.is_sleeping()
    with pytest.raises(SleepModeError, match=r"call wake_up\(\) before generate\(\)"):
        tokens(llm, PROMPTS, TOKENS)
    llm.wake_up(tags=order[1:])
    assert not llm.llm_engine.is_sleeping()
    assert tokens(llm, PROMPTS, TOKENS) == expected


def test_a_second_sleep_after_a_partial_wake_puts_all_to_sleep(llm, expected):
    llm.sleep(level=1)
    llm.wake_up(tags=["kv_cache"])
    llm.sleep(level=1)
    assert sum(held(tag) for tag in TAGS) == 0
    llm.wake_up()
    assert tokens(llm, PROMPTS, TOKENS) == expected


def test_level_0_moves_no_memory(llm, expected):
    before = used()
    llm.sleep(level=0)
    assert llm.llm_engine.is_sleeping()
    assert used() == before
    llm.wake_up(tags=["scheduling"])
    assert tokens(llm, PROMPTS, TOKENS) == expected


@pytest.mark.parametrize("level", [3, -1])
def test_a_level_that_does_not_exist_is_refused_and_the_engine_serves_on(llm, expected, level):
    with pytest.raises(ValueError, match=f"sleep level {level} does not exist"):
        llm.sleep(level=level)
    assert not llm.llm_engine.is_sleeping()
    assert tokens(llm, PROMPTS, TOKENS) == expected


def test_persistent_memory_stays_mapped_and_has_segments_of_its_own(llm):
    from vllm_ascend.device_allocator.camem import CaMemAllocator

    allocator = CaMemAllocator.get_instance()
    with allocator.use_memory_pool(tag="kv_cache"):
        cache = torch.ones(1000, device="npu")
        with allocator.use_allocation_tag(CaMemAllocator.sleep_persistent_tag):
            table = torch.arange(1000, device="npu")
    bytes_of = {a["tag"]: a["device_bytes"] for a in _camem.allocations()}
    assert bytes_of[CaMemAllocator.sleep_persistent_tag] == 2 * MIB
    for level in (1, 2):
        llm.sleep(level=level)
        assert held(CaMemAllocator.sleep_persistent_tag) == 2 * MIB
        assert torch.equal(table.cpu(), torch.arange(1000))
        llm.wake_up()
    del cache, table
    reload(llm)


def test_the_allocators_own_calls(llm, expected):
    from vllm_ascend.device_allocator.camem import CaMemAllocator

    allocator = CaMemAllocator.get_instance()
    llm.sleep(level=1)  # frees unused memory of earlier tests
    llm.wake_up()
    usage = allocator.get_current_usage()
    allocator.sleep(offload_tags=("weights",))
    assert sum(held(tag) for tag in TAGS) == 0
    assert allocator.get_current_usage() == usage
    allocator.wake_up(tags=["weights"])
    assert (held("weights") > 0, held("kv_cache")) == (True, 0)
    allocator.wake_up()
    assert held("kv_cache") > 0
    assert tokens(llm, PROMPTS, TOKENS) == expected


def test_weights_in_nz_format_sleep_at_level_1_and_are_refused_at_level_2(llm, expected):
    import torch_npu

    norm = worker(llm).model_runner.model.model.norm
    stock = norm.weight
    nz = torch_npu.empty_with_format((32, 32), dtype=torch.float16, device="npu", acl_format=29)
    norm.weight = torch.nn.Parameter(nz, requires_grad=False)
    try:
        with pytest.raises(SleepModeError, match=r"FRACTAL_NZ.*VLLM_ASCEND_ENABLE_NZ=0"):
            llm.sleep(level=2)
        assert not llm.llm_engine.is_sleeping()
        with pytest.raises(SleepModeError, match=r"FRACTAL_NZ.*VLLM_ASCEND_ENABLE_NZ=0"):
            llm.collective_rpc("reload_weights")
        llm.sleep(level=1)
        llm.wake_up()
    finally:
        norm.weight = stock
    assert tokens(llm, PROMPTS, TOKENS) == expected


def test_the_status_says_what_each_rank_holds(llm):
    llm.sleep(level=1)
    (status,) = llm.collective_rpc("sleep_status")
    weights = status["tags"]["weights"]
    assert (weights["device"], weights["offloaded"]) == (0, weights["host"])
    assert status["state"] == "SUSPENDED"
    llm.wake_up()


def test_20_cycles_leave_memory_handles_and_mappings_where_they_were(llm, expected):
    figures = []
    for _ in range(20):
        llm.sleep(level=1)
        llm.wake_up()
        gc.collect()
        figures.append((used(), control.counters(), _camem.pinned_host_bytes()))
    assert len(set(figures[2:])) == 1
    assert tokens(llm, PROMPTS, TOKENS) == expected
