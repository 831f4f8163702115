# SPDX-License-Identifier: Apache-2.0
"""Decode steps captured as graphs: they are replayed, also after any sleep, and never captured
again."""

import gc
import json
import os
from typing import Any

import pytest
import torch
from helpers import MIB
from helpers.engine import driver_worker, engine, few, mapped, send_update, shared, tokens, used
from helpers.faults import DRIVER_ERROR, calls_of
from helpers.models import make_model
from helpers.ranks import assert_tokens_survive_sleep, status
from helpers.reference import FEW, FEW_TOKENS, PROMPTS, hf_few, hf_greedy
from helpers.server import MEMORY, SMALL, Server
from safetensors.torch import load_file

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.policy import GRAPHS
from vllm_sleep_ascend.sim import control

SIZES = [1, 2, 4]
OPTIONS: dict[str, Any] = {
    "enable_sleep_mode": True,
    "sleep_mode_offload_cudagraph": True,
    "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES},
}


def captures(_worker: Any = None) -> int:
    return control.call_count("aclmdlRICaptureBegin")


def replays(_worker: Any = None) -> int:
    return control.call_count("aclmdlRIExecuteAsync")


def few_by_graphs(llm) -> list[list[int]]:
    """The tokens of ``few``, every decode step of which is a replay."""
    llm.reset_prefix_cache()
    before = captures(), replays()
    answers = few(llm)
    assert captures() == before[0]
    assert replays() >= before[1] + FEW_TOKENS - 1
    return answers


@pytest.fixture
def llm(tiny_model):
    from vllm.config import WeightTransferConfig

    transfer = WeightTransferConfig(backend="safetensors")
    llm = shared.get(tiny_model, weight_transfer_config=transfer, **OPTIONS)
    yield llm
    control.set_faults("")
    llm.wake_up()
    llm.reset_prefix_cache()


@pytest.mark.parametrize("batch", range(1, len(PROMPTS) + 1))
def test_batches_of_any_size(llm, tiny_model, batch):
    """Those of a captured size, those between, which are padded, and those beyond the largest."""
    prompts = PROMPTS[:batch]
    before = captures(), replays()
    assert tokens(llm, prompts, FEW_TOKENS) == hf_greedy(tiny_model, prompts, FEW_TOKENS)
    assert captures() == before[0]
    if batch <= max(SIZES):
        assert replays() - before[1] == FEW_TOKENS - 1
    elif batch < 7:  # the last two prompts are long: their chunks delay them
        assert replays() == before[1]


def test_each_prompt_alone(llm, tiny_model):
    for prompt in PROMPTS:
        before = replays()
        assert tokens(llm, [prompt]) == hf_greedy(tiny_model, [prompt])
        assert replays() - before == 23


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("first", ["weights", "kv_cache"])
def test_they_give_the_same_tokens_after_a_sleep(llm, expected, level, first):
    assert few_by_graphs(llm) == expected
    addresses = {a["address"] for a in _camem.allocations() if a["tag"] == GRAPHS}
    awake = mapped(GRAPHS)
    assert awake > 0
    llm.sleep(level=level)
    (asleep,) = status(llm)
    assert mapped() == asleep["resident"]["graphs"] == 0
    assert asleep["tags"][GRAPHS]["host"] == awake, "backed up at both levels"
    llm.wake_up(tags=[first])
    assert mapped(GRAPHS) == awake, "it comes back with any tag"
    if level == 2:
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
    llm.wake_up()
    assert {a["address"] for a in _camem.allocations() if a["tag"] == GRAPHS} == addresses
    assert few_by_graphs(llm) == expected
    (status_awake,) = status(llm)
    assert status_awake["resident"]["graphs"] == awake


def test_asleep_the_engine_holds_no_more_than_without_graphs(llm):
    awake, ours = used(), mapped()
    llm.sleep(level=1)
    assert used() <= awake - ours
    assert used() < 64 * MIB  # as test_sleep.py asserts for eager mode


def test_new_weights_in_replays(llm, tiny_model, other_model, tmp_path):
    """By a checkpoint, after level 2, and by a weight update."""
    weights, old, new = load_file(other_model / "model.safetensors"), tiny_model, other_model
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(new)})
    assert few_by_graphs(llm) == hf_few(new)
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(old)})
    llm.wake_up()
    assert few_by_graphs(llm) == hf_few(old)
    llm.init_weight_transfer_engine({"init_info": {}})
    send_update(llm, weights, tmp_path)
    assert few_by_graphs(llm) == hf_few(new)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(old)})
    assert few_by_graphs(llm) == hf_few(old)


def test_20_mixed_cycles_capture_nothing_and_leave_nothing(llm, expected):
    before, figures = captures(), []
    for cycle in range(20):
        level = 1 + cycle % 2
        if cycle % 3 == 0:
            llm.sleep(level=0)
        llm.sleep(level=level)
        llm.wake_up(tags=["weights"])
        if level == 2:
            llm.collective_rpc("reload_weights")
        llm.wake_up()
        if cycle % 5 == 0:
            assert few_by_graphs(llm) == expected
        gc.collect()
        figures.append((used(), control.counters(), _camem.pinned_host_bytes()))
    assert captures() == before
    assert len(set(figures[4::2])) == len(set(figures[5::2])) == 1
    assert few_by_graphs(llm) == expected


@pytest.mark.parametrize("operation", ["sleep", "wake"])
def test_a_call_that_fails_leaves_all_as_it_was(llm, expected, operation):
    """Each call of a sleep, or a wake, fails once, the first time and the last."""
    steps = {"sleep": lambda: llm.sleep(level=1), "wake": llm.wake_up}
    calls = {name: calls_of(step) for name, step in steps.items()}[operation]
    before, failed = captures(), 0
    for call in dict.fromkeys(calls):
        for nth in sorted({1, calls.count(call)}):
            for name, step in steps.items():
                control.set_faults(f"{call}:{nth}:{DRIVER_ERROR}" if name == operation else "")
                try:
                    step()
                    continue
                except RuntimeError:  # ours, or of torch's own calls
                    failed += 1
                finally:
                    control.set_faults("")
                assert llm.llm_engine.is_sleeping() == (name == "wake"), call
                # A wake may have failed after the memory was back.
                assert (mapped(GRAPHS) > 0) == (mapped("weights") > 0), call
                if name == "sleep":
                    assert mapped(GRAPHS) > 0, call
                    assert few_by_graphs(llm) == expected, call
                step()
            assert few_by_graphs(llm) == expected, call
    assert failed > 3
    assert captures() == before


def test_requests_queued_while_paused_run_as_one_batch(llm, expected):
    """From vLLM's compile/fullgraph/test_full_cudagraph.py: one replay for each of their steps."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=FEW_TOKENS, ignore_eos=True)
    llm.sleep(level=0, mode="keep")
    llm.enqueue(FEW, params, use_tqdm=False)
    before = replays()
    llm.wake_up(tags=["scheduling"])
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert replays() - before == FEW_TOKENS - 1


def test_graphs_of_several_ranks(tiny_model):
    """Each rank's graphs hold its communicator, which sleep keeps."""
    with engine(
        tiny_model, tensor_parallel_size=2, distributed_executor_backend="mp", **OPTIONS
    ) as llm:
        assert llm.collective_rpc(captures) == [len(SIZES)] * 2
        before = llm.collective_rpc(replays)
        assert tokens(llm, FEW, FEW_TOKENS) == hf_greedy(tiny_model, FEW, FEW_TOKENS)
        assert llm.collective_rpc(replays) == [count + FEW_TOKENS - 1 for count in before]
        assert_tokens_survive_sleep(llm, tiny_model)
        assert llm.collective_rpc(captures) == [len(SIZES)] * 2


def test_graphs_stay_in_their_memory_without_vllms_option(tiny_model, expected):
    """``sleep_mode_offload_cudagraph`` is off by default. Beside them the KV cache gets what the
    engine's share has left."""
    options = OPTIONS | {"sleep_mode_offload_cudagraph": False, "kv_cache_memory_bytes": None}
    control.reset_counters()
    before = used()
    with engine(tiny_model, **options) as llm:
        assert captures() == len(SIZES)
        assert used() - before <= driver_worker(llm).requested_memory
        assert few_by_graphs(llm) == expected
        assert mapped(GRAPHS) == 0
        for level in (1, 2):
            llm.sleep(level=level)
            assert mapped() == 0
            llm.wake_up()
            if level == 2:
                llm.collective_rpc("reload_weights")
            assert few_by_graphs(llm) == expected
        assert captures() == len(SIZES)


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-qwen3"], ids=["BSH", "TND"])
def test_the_attention_operator_is_told_the_lengths_of_each_replay(name):
    """In bfloat16 the operator attends, with lengths from the host: a task group for each layer.
    Its layout for decoding depends on the heads' size."""
    model, prompts, n = make_model(name), PROMPTS[:4], 10
    with engine(model, dtype="bfloat16") as llm:
        assert (
            driver_worker(llm).model_runner.attn_groups[0][0].get_metadata_builder().mask
            is not None
        )
        alone = [tokens(llm, [prompt], n)[0] for prompt in prompts]
        together = tokens(llm, prompts[:3], n)
    control.reset_counters()
    with engine(model, **OPTIONS, dtype="bfloat16") as llm:
        layers = driver_worker(llm).model_config.hf_config.num_hidden_layers
        assert captures() == len(SIZES)
        assert control.call_count("aclmdlRICaptureTaskGrpEnd") == layers * len(SIZES)
        for level in (0, 1, 2):
            llm.sleep(level=level)
            llm.wake_up()
            if level == 2:
                llm.collective_rpc("reload_weights")
            llm.reset_prefix_cache()
            before = replays(), control.call_count("aclmdlRICaptureTaskUpdateEnd")
            assert [tokens(llm, [prompt], n)[0] for prompt in prompts] == alone
            assert tokens(llm, prompts[:3], n) == together
            assert replays() - before[0] == 5 * (n - 1)
            updates = control.call_count("aclmdlRICaptureTaskUpdateEnd") - before[1]
            assert updates == layers * 5 * (n - 1)
        assert captures() == len(SIZES)

        # An update that fails leaves no replay that waits for it.
        before = replays()
        control.set_faults(f"aclmdlRICaptureTaskUpdateBegin:{layers}:{DRIVER_ERROR}")
        with pytest.raises(RuntimeError, match=str(DRIVER_ERROR)):
            tokens(llm, prompts[:1], n)
        control.set_faults("")
        assert replays() == before
        torch.npu.synchronize()
        llm.sleep(level=1)
        assert mapped() == 0


def test_a_step_that_the_attention_operator_does_not_take_runs_eagerly(tiny_model):
    """Requests that share more blocks of the prefix cache than its document allows."""
    blocks, shared_prompt = 80, PROMPTS[-1]
    options = {
        "dtype": "bfloat16",
        "max_model_len": 16 * (blocks - 2),
        "num_gpu_blocks_override": blocks,
    }
    with engine(tiny_model, **OPTIONS | options) as llm:
        (alone,) = tokens(llm, [shared_prompt], FEW_TOKENS)
        before = replays()
        assert tokens(llm, [shared_prompt] * 4, FEW_TOKENS) == [alone] * 4
        assert replays() == before
        assert tokens(llm, [shared_prompt], FEW_TOKENS) == [alone]
        assert replays() == before + FEW_TOKENS - 1


def test_a_server_in_graph_mode(tiny_model, tmp_path):
    """With the guide's command line, and only a few sizes."""
    options = (
        "--enable-sleep-mode",
        *("--compilation-config", json.dumps(OPTIONS["compilation_config"])),
        "--sleep-mode-offload-cudagraph",
        *("--dtype", "float32", *SMALL, *MEMORY),
    )
    env = {"VLLM_SERVER_DEV_MODE": "1", "NPU_SIM_MACHINE": f"graphs-{os.getpid()}"}
    with Server(tiny_model, *options, log=tmp_path / "log", env=env) as server:
        assert f"{len(SIZES)} graphs were captured" in server.log.read_text()
        awake = server.rank_status()["resident"]["graphs"]
        text = server.complete()
        assert awake > 0
        for level in (1, 2):
            server.post("/sleep", params={"level": level})
            assert server.rank_status()["resident"]["graphs"] == 0
            server.post("/wake_up", params={"tags": "weights"})
            if level == 2:
                server.post("/collective_rpc", json={"method": "reload_weights"})
            server.post("/wake_up")
            assert server.rank_status()["resident"]["graphs"] == awake
            assert server.complete() == text


def test_eager_mode_captures_nothing(tiny_model, expected):
    control.reset_counters()
    with engine(tiny_model, **OPTIONS, enforce_eager=True) as llm:
        assert few(llm) == expected
        assert captures() == replays() == 0
