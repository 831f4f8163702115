# SPDX-License-Identifier: Apache-2.0
"""vLLM's own tests of an engine with sleep mode, adapted to ours.

The tests have the same names as vLLM's; docs/upstream_tests.md lists them all, including those in
other files.
"""

import pytest
import torch
from helpers import MIB
from helpers.engine import driver_worker, engine, few, mapped
from helpers.reference import FEW, FEW_TOKENS, PROMPTS
from vllm import SamplingParams

from vllm_sleep_ascend import _camem

KV_CACHE = 64 * MIB


@pytest.fixture(scope="module")
def llm(tiny_model):
    with engine(
        tiny_model,
        enable_sleep_mode=True,
        kv_cache_memory_bytes=KV_CACHE,
        sleep_preserve_parameter_names=["*.norm.weight", "draft.*"],
    ) as llm:
        yield llm


@pytest.fixture(autouse=True)
def awake(llm):
    yield
    llm.wake_up()


# --- tests/basic_correctness/memory/sleep_mode/test_sleep_mode.py --------------------------------


def test_end_to_end(llm, expected):
    assert few(llm) == expected
    awake, kv_cache = mapped(), mapped("kv_cache")
    llm.sleep(level=1)
    assert mapped() == 0
    llm.wake_up()
    assert (mapped(), few(llm)) == (awake, expected)
    llm.sleep(level=1)
    llm.wake_up(tags=["weights"])
    assert (mapped(), mapped("kv_cache")) == (awake - kv_cache, 0)
    llm.wake_up(tags=["kv_cache"])
    assert (mapped(), few(llm)) == (awake, expected)


def test_deep_sleep(llm, expected):
    awake, kv_cache = mapped(), mapped("kv_cache")
    for _ in range(3):
        llm.sleep(level=2)
        assert mapped() == 0
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        assert mapped() == awake - kv_cache
        llm.wake_up(tags=["kv_cache"])
        assert (mapped(), few(llm)) == (awake, expected)


# --- tests/basic_correctness/memory/cumem/test_cumem.py ------------------------------------------


@pytest.mark.parametrize("full_sleep", [0, 1, 2])
def test_release_kv_cache_memory_preserves_generation(llm, expected, full_sleep):
    before, kv_cache = mapped(), mapped("kv_cache")
    with pytest.raises(RuntimeError, match="requires a completed pause"):
        llm.release_kv_cache_memory()
    assert mapped() == before
    assert few(llm) == expected

    llm.sleep(level=0)
    llm.release_kv_cache_memory()
    assert (mapped(), mapped("kv_cache")) == (before - kv_cache, 0)
    assert llm.llm_engine.is_sleeping()
    if full_sleep:
        llm.sleep(level=full_sleep)
        assert mapped() == 0
    llm.wake_up(tags=None if full_sleep else ["kv_cache"])
    if full_sleep == 2:
        llm.collective_rpc("reload_weights")
    assert mapped() == before
    assert few(llm) == expected


# --- tests/v1/worker/test_kv_cache_allocation_scope.py -------------------------------------------


def test_mrv1_kv_pool_only_wraps_backing_allocation(llm):
    caches = driver_worker(llm).model_runner.kv_caches
    assert sum(cache.nbytes for cache in caches) == KV_CACHE
    assert KV_CACHE <= mapped("kv_cache") <= KV_CACHE + len(caches) * 2 * MIB


def test_kv_wake_does_not_run_model_runner_recovery(llm):
    model = driver_worker(llm).model_runner.model
    before = {name: (b.data_ptr(), b.cpu()) for name, b in model.named_buffers()}
    caches = [cache.data_ptr() for cache in driver_worker(llm).model_runner.kv_caches]
    llm.sleep(level=0)
    llm.release_kv_cache_memory()
    llm.wake_up(tags=["kv_cache"])
    for name, buffer in model.named_buffers():
        address, content = before[name]
        assert buffer.data_ptr() == address
        assert torch.equal(buffer.cpu(), content)
    assert [cache.data_ptr() for cache in driver_worker(llm).model_runner.kv_caches] == caches


# --- tests/v1/worker/test_gpu_worker.py ----------------------------------------------------------


def test_sleep_preservation(llm, expected):
    """Parameters that the trainer leaves out are kept in place at level 2, as buffers are."""
    model = driver_worker(llm).model_runner.model
    parameters = dict(model.named_parameters())
    kept = parameters["model.norm.weight"]
    address, content = kept.data_ptr(), kept.cpu()
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    assert (kept.data_ptr(), torch.equal(kept.cpu(), content)) == (address, True)
    (status,) = llm.collective_rpc("sleep_status")
    assert status["parameters_without_content"] == len(parameters) - 1
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    assert few(llm) == expected


def test_sleep_preservation_allows_empty_draft_but_rejects_target_typo(llm, expected):
    names = driver_worker(llm).model_config.sleep_preserve_parameter_names
    names.append("missing")
    try:
        with pytest.raises(ValueError, match="'missing' matches no parameter"):
            llm.sleep(level=2)
    finally:
        names.remove("missing")
    assert not llm.llm_engine.is_sleeping()
    assert few(llm) == expected


# --- Other files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("asleep", [[], ["weights"], ["kv_cache"]])
def test_kv_cache_release_rejects_nonresident_memory(llm, asleep):
    """From v1/core/test_scheduler.py."""
    llm.sleep(level=1)
    if asleep:
        llm.wake_up(tags=asleep)
    before = [(a["tag"], a["state"]) for a in _camem.allocations()]
    with pytest.raises(RuntimeError, match="requires all executor memory to be resident"):
        llm.release_kv_cache_memory()
    assert [(a["tag"], a["state"]) for a in _camem.allocations()] == before


def test_requests_queued_while_paused_run_as_one_batch(llm, expected):
    """From compile/fullgraph/test_full_cudagraph.py; test_graph_mode.py has it with graphs."""
    params = SamplingParams(temperature=0, max_tokens=FEW_TOKENS, ignore_eos=True)
    llm.sleep(level=0, mode="keep")
    llm.enqueue(FEW, params, use_tqdm=False)
    assert llm.llm_engine.get_num_unfinished_requests() == 3
    llm.wake_up(tags=["scheduling"])
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected


def test_sleep_wake_preserves_mm_cache_consistency(llm, expected):
    """From multimodal/test_cache.py. A text model's caches are empty, and are reset."""
    llm.llm_engine.reset_mm_cache()
    llm.sleep(level=1)
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    llm.wake_up()
    assert few(llm) == expected


def test_the_prefix_cache_is_reset_by_a_sleep_that_forgets_the_kv_cache(llm, expected):
    """A discarded cache is not used; level 0 keeps the cache."""

    def cached() -> int:
        params = SamplingParams(temperature=0, max_tokens=FEW_TOKENS, ignore_eos=True)
        (output,) = llm.generate([PROMPTS[-1]], params, use_tqdm=False)
        return output.num_cached_tokens

    cached()
    assert (hits := cached()) > 100
    llm.sleep(level=0)
    llm.wake_up()
    assert cached() == hits
    llm.sleep(level=1)
    llm.wake_up()
    assert cached() == 0
    assert cached() == hits
    assert llm.reset_prefix_cache()
    assert cached() == 0
