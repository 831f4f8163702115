# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention with other options: types, ranks, 8-bit weights, draft models,
graphs."""

import pytest
import torch
from helpers.engine import driver_worker, engine, few, sleep_and_wake, tokens
from helpers.models import make_model, other_weights
from helpers.ranks import assert_tokens_survive_sleep
from helpers.reference import FEW_TOKENS, PROMPTS, assert_greedy, hf_few, hf_greedy, round_weights
from safetensors.torch import load_file

SOME = PROMPTS[1:7:2]


@pytest.mark.parametrize(
    "name",
    [
        "tiny-deepseek-v2",
        pytest.param("tiny-deepseek-v2-lite", marks=pytest.mark.slow),
        pytest.param("tiny-deepseek-v3", marks=pytest.mark.slow),
    ],
)
def test_sixteen_bits(name):
    model = make_model(name)
    with engine(model, dtype="bfloat16", enable_sleep_mode=True) as llm:
        before = tokens(llm)
        assert_greedy(model, before)
        same = [answer == want for answer, want in zip(before, hf_greedy(model), strict=True)]
        assert sum(same) > len(same) / 2
        for level in (1, 2):
            sleep_and_wake(llm, level)
            llm.reset_prefix_cache()
            assert tokens(llm) == before, f"after level {level}"


def test_quantised_weights(tmp_path):
    """Rounded weights cannot be viewed: the derived matrices have memory of their own here, and
    follow each load."""
    model = make_model("tiny-deepseek-v2")
    with engine(model, enable_sleep_mode=True, dtype="float16", quantization="fp8") as llm:
        before = tokens(llm)
        assert_greedy(model, before, change=round_weights)
        layers = driver_worker(llm).model_runner.get_model().model.layers
        derived = [layer.self_attn.mla_attn.mla_attn.W_UV for layer in layers]
        addresses = [matrix.data_ptr() for matrix in derived]
        for level in (1, 2):
            sleep_and_wake(llm, level)
            llm.reset_prefix_cache()
            assert tokens(llm) == before, f"after level {level}"
            assert [matrix.data_ptr() for matrix in derived] == addresses

        changed = other_weights(model, tmp_path / "other")

        def torn():
            for name, weight in load_file(changed / "model.safetensors").items():
                if name == "model.norm.weight":  # the last, as they are sorted
                    raise OSError("the disk is gone")
                yield name, weight

        with pytest.raises(Exception, match="the disk is gone"):
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": torn()})
        llm.reset_prefix_cache()
        assert tokens(llm) == before
        assert [matrix.data_ptr() for matrix in derived] == addresses

        other = {"weights_path": str(changed)}
        llm.collective_rpc("reload_weights", kwargs=other)
        want = [matrix.cpu() for matrix in derived]
        parameters = driver_worker(llm).model_runner.get_model().named_parameters()
        weights = [(n, p.cpu()) for n, p in parameters if not n.endswith(("W_UK_T", "W_UV"))]
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})
        assert not any(map(torch.equal, want, (matrix.cpu() for matrix in derived)))
        kernel_format = {"weights_iterator": iter(weights), "is_checkpoint_format": False}
        llm.collective_rpc("reload_weights", kwargs=kernel_format)
        assert all(map(torch.equal, want, (matrix.cpu() for matrix in derived)))
        assert [matrix.data_ptr() for matrix in derived] == addresses


def test_views_of_a_weight_stay_views_beside_quantised_experts():
    """A write of one weight alone changes the tokens as the same load by vLLM does."""
    model = make_model("tiny-deepseek-v2")
    experts = {"quantization": "int8_per_channel_weight_only"}
    with engine(model, enable_sleep_mode=True, dtype="float16", **experts) as llm:
        assert_greedy(model, tokens(llm, SOME), SOME)
        network = driver_worker(llm).model_runner.get_model()
        layers = [layer.self_attn.mla_attn.mla_attn for layer in network.model.layers]
        quantised = [n for n, p in network.named_parameters() if p.dtype == torch.int8]
        assert quantised
        assert all(".experts." in name for name in quantised)

        def assert_views():
            for layer in layers:
                whole = layer.kv_b_proj.weight
                for part in (layer.W_UK_T, layer.W_UV):
                    assert part.dtype == whole.dtype == torch.float16
                    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()

        assert_views()
        before = tokens(llm, SOME)
        for level in (1, 2):
            sleep_and_wake(llm, level)
            llm.reset_prefix_cache()
            assert tokens(llm, SOME) == before, f"after level {level}"
            assert_views()
        whole = layers[0].kv_b_proj.weight
        name = "model.layers.0.self_attn.kv_b_proj.weight"
        changed = whole.detach().cpu().flip(0)
        new = {"weights_iterator": [(name, changed)], "is_checkpoint_format": False}
        llm.collective_rpc("reload_weights", kwargs=new)
        rank = whole.shape[1]
        absorbed = changed.view(4, -1, rank)
        assert layers[0].W_UK_T.cpu().equal(absorbed[:, :32])
        assert layers[0].W_UV.cpu().equal(absorbed[:, 32:].transpose(1, 2))


def test_a_wake_that_loads_the_weights():
    model = make_model("tiny-deepseek-v3")
    reload = {"sleep_mode": {"after_level2": "reload"}}
    with engine(model, enable_sleep_mode=True, additional_config=reload) as llm:
        before = llm.collective_rpc("compute_weight_checksums")
        llm.sleep(level=2)
        llm.wake_up()
        assert few(llm) == hf_few(model)
        assert llm.collective_rpc("compute_weight_checksums") == before


def test_a_step_takes_no_more_than_the_profiling_run(monkeypatch):
    """vLLM's takes keys and values of 65,536 tokens. The scratch memory is small here, so that the
    queries of all tokens weigh more than it."""
    import torch_npu

    from vllm_sleep_ascend.native.attention import tiles

    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 1 << 20)
    monkeypatch.setattr(tiles, "PEAK_BYTES", 4 << 20)
    new = 1024
    model = make_model("tiny-deepseek-v2-dense")
    with engine(model, max_num_batched_tokens=new, max_num_seqs=2) as llm:
        worker = driver_worker(llm)

        def peak_of(run):
            torch_npu.npu.synchronize()
            torch_npu.npu.reset_peak_memory_stats()
            before = torch_npu.npu.memory_allocated()
            run()
            torch_npu.npu.synchronize()
            return torch_npu.npu.max_memory_allocated() - before

        prompt = {"prompt_token_ids": [3 + n % 200 for n in range(new - 1)]}
        step = peak_of(lambda: tokens(llm, [prompt], 1))
        profiled = peak_of(worker._run_largest_batch)
        queries = 2 * new * 4 * 64 * 4  # of four heads with 64 latents, in float32
        assert queries < step <= profiled, (queries, step, profiled)


LAYOUTS = {
    "halves of heads and experts": {"tensor_parallel_size": 2},
    "half of the experts": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "half of the layers": {"pipeline_parallel_size": 2},
}
OFTEN = "halves of heads and experts"


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name, marks=() if name == OFTEN else pytest.mark.slow)
        for name, layout in LAYOUTS.items()
    ],
)
def test_two_ranks(layout):
    model = make_model("tiny-deepseek-v3")
    ranks = {**layout, "distributed_executor_backend": "mp"}
    with engine(model, enable_sleep_mode=True, **ranks) as llm:
        assert_tokens_survive_sleep(llm, model)


DRAFTS = [
    pytest.param("tiny-deepseek-v2", "tiny-qwen2-draft", marks=pytest.mark.slow),
    ("tiny-deepseek-v2", "tiny-deepseek-v2-lite"),
    pytest.param("tiny-qwen2", "tiny-deepseek-v2-dense", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "draft"), DRAFTS)
def test_with_a_draft_model(name, draft):
    """The draft has a cache of another shape, or of latents too; or it alone has latents."""
    model = make_model(name)
    speculative = {"method": "draft_model", "num_speculative_tokens": 3}
    speculative["model"] = str(make_model(draft))
    with engine(model, enable_sleep_mode=True, speculative_config=speculative) as llm:
        assert tokens(llm) == hf_greedy(model)
        for level in (1, 2):
            sleep_and_wake(llm, level)
            llm.reset_prefix_cache()
            assert tokens(llm, SOME) == hf_greedy(model, SOME), f"after level {level}"


@pytest.mark.slow
def test_graphs_of_a_model_without_experts(tmp_path):
    """They read the derived matrices at the addresses where a load writes the weights."""
    from vllm_sleep_ascend.sim import control

    model = make_model("tiny-deepseek-v2-dense")
    graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
    with engine(model, enable_sleep_mode=True, compilation_config=graphs) as llm:
        assert tokens(llm) == hf_greedy(model)
        captured = control.call_count("aclmdlRICaptureBegin")
        other = other_weights(model, tmp_path / "other")
        for level, served in ((1, model), (2, model), (2, other)):
            llm.sleep(level=level)
            llm.wake_up(tags=["weights"])
            if level == 2:
                llm.collective_rpc("reload_weights", kwargs={"weights_path": str(served)})
            llm.wake_up(tags=["kv_cache"])
            replayed = control.call_count("aclmdlRIExecuteAsync")
            assert few(llm) == hf_few(served)
            assert control.call_count("aclmdlRIExecuteAsync") >= replayed + FEW_TOKENS - 1
        assert control.call_count("aclmdlRICaptureBegin") == captured > 0
