# SPDX-License-Identifier: Apache-2.0
"""What the platform tells vLLM, and what it refuses. Needs CANN or the simulator."""

import importlib.util
import json
import logging
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers.models import make_model

pytest.importorskip("torch_npu", exc_type=ImportError, reason="needs CANN or the simulator")


@pytest.fixture(scope="module")
def model():
    return str(make_model("tiny-qwen2"))


def config_of(model: str, **options):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=model, max_model_len=512, **options).create_engine_config()


def test_vllm_finds_the_platform():
    from vllm.platforms import current_platform

    assert type(current_platform).__name__ == "NPUPlatform"
    assert current_platform.is_out_of_tree()
    assert torch.device(f"{current_platform.device_name}:0").type == "npu"
    assert current_platform.is_sleep_mode_available() == bool(
        importlib.util.find_spec("vllm_sleep_ascend._camem")
    )
    assert current_platform.get_device_total_memory() == torch.npu.mem_get_info()[1]
    assert current_platform.get_device_uuid(0)
    assert current_platform.num_compute_units() >= 1


def test_defaults(model):
    from vllm.config import CompilationMode, CUDAGraphMode

    config = config_of(model)
    assert config.parallel_config.worker_cls == "vllm_sleep_ascend.native.worker.NPUWorker"
    assert config.use_v2_model_runner is False
    assert config.compilation_config.mode == CompilationMode.NONE
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    assert config.model_config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options,mode",
    [
        ({}, "NONE"),
        ({"enforce_eager": True}, "NONE"),
        ({"optimization_level": 3}, "NONE"),
        ({"compilation_config": {"cudagraph_mode": "NONE"}}, "NONE"),
        ({"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}, "FULL_DECODE_ONLY"),
        (
            {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}, "enforce_eager": True},
            "NONE",
        ),
    ],
)
def test_graph_modes(model, options, mode):
    compilation = config_of(model, max_num_seqs=6, **options).compilation_config
    assert compilation.mode.name == "NONE"
    assert compilation.cudagraph_mode.name == mode
    assert compilation.cudagraph_capture_sizes == ([] if mode == "NONE" else [1, 2, 4, 6, 8])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"mode": 3}, "compilation mode VLLM_COMPILE needs torch.compile, .*leave mode out"),
        ({"cudagraph_mode": "PIECEWISE"}, "PIECEWISE needs .*; use NONE or FULL_DECODE_ONLY"),
        ({"cudagraph_mode": "FULL_AND_PIECEWISE"}, "FULL_AND_PIECEWISE needs torch.compile"),
        ({"cudagraph_mode": "FULL"}, "FULL captures prompts too, .*; use NONE or FULL_DECODE_ONLY"),
        ({"cudagraph_mm_encoder": True}, "encoders are not captured; leave cudagraph_mm_encoder"),
    ],
)
def test_other_graph_modes_are_refused_by_name(model, options, message):
    with pytest.raises(ValueError, match=message):
        config_of(model, compilation_config=options)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"enable_lora": True}, "graphs with LoRA adapters, .*leave cudagraph_mode out"),
        ({"pipeline_parallel_size": 2}, "graphs with pipeline parallelism; .*use --enforce-eager"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "graphs with speculative decoding",
        ),
    ],
)
def test_what_no_graph_was_captured_of_is_refused(model, options, message):
    graphs = {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}
    with pytest.raises(ValueError, match=message):
        config_of(model, **graphs, **options)
    config_of(model, **graphs, **options, enforce_eager=True)


def test_graphs_of_experts_are_refused():
    graphs = {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}
    with pytest.raises(ValueError, match="graphs of a mixture of experts"):
        config_of(str(make_model("tiny-qwen3-moe")), **graphs)


@pytest.mark.parametrize(
    "release",
    [
        {"additional_config": {"sleep_mode": {"release_communicators": True}}},
        {"additional_config": {"enable_sleep_mode_extra_cleanup": True}},
        {"additional_config": {"rl_config": {"enabled": True, "sleep_mode_extra_cleanup": True}}},
        {"enable_nccl_comm_suspend": True},
    ],
)
def test_communicators_are_not_released_under_graphs(model, release):
    release = release | {"enable_sleep_mode": True}
    graphs = {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}
    with pytest.raises(
        ValueError,
        match=r"release_communicators and captured graphs .*cudagraph_mode=FULL_DECODE_ONLY\) is "
        r"not supported: .*Start with enforce_eager=True .*or leave out release_communicators",
    ):
        config_of(model, tensor_parallel_size=2, **graphs, **release)
    config_of(model, tensor_parallel_size=2, **graphs, **release, enforce_eager=True)
    config_of(model, tensor_parallel_size=2, **release)
    config_of(model, **graphs, **release)  # one rank has no communicators


def test_model_runner_v1_even_where_triton_works(model, monkeypatch):
    import vllm.config.vllm

    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(vllm.config.vllm, "HAS_TRITON", True)
    assert config_of(model).use_v2_model_runner is False


def test_model_runner_v2_is_refused(model, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="unset VLLM_USE_V2_MODEL_RUNNER"):
        config_of(model)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype fp8; use --kv-cache-dtype auto"),
        ({"enable_dbo": True}, "leave out --enable-dbo"),
        ({"quantization": "fp8_per_block"}, "quantisation to .*; use --quantization fp8"),
        ({"quantization": "int8_per_channel_weight_only"}, "experts alone, and there are none"),
        ({"additional_config": {"sleep_mode": {"chunk": 1}}}, "chunk"),
    ],
)
def test_refused_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        config_of(model, **options)


def test_fault_tolerance_is_refused(model):
    """vLLM takes it for data-parallel engines alone."""
    from vllm_sleep_ascend.native.unsupported import refuse_unsupported

    config = config_of(model)
    refuse_unsupported(config)
    config.parallel_config.enable_fault_tolerance = True
    with pytest.raises(ValueError, match="leave out --enable-fault-tolerance"):
        refuse_unsupported(config)


@pytest.mark.parametrize("chosen", ["cumem", "camem", "my_backend"])
def test_another_sleep_backend_is_refused_and_never_replaced(model, chosen):
    """ "cumem" is vLLM's default, which a user cannot be told from."""
    from vllm.platforms import current_platform

    config = config_of(model, enable_sleep_mode=True)
    assert config.model_config.sleep_mode_backend == "camem"
    config.model_config.sleep_mode_backend = chosen
    if chosen == "my_backend":
        with pytest.raises(ValueError, match=r"'my_backend' .*leave out --sleep-mode-backend"):
            current_platform.check_and_update_config(config)
    else:
        current_platform.check_and_update_config(config)
    assert config.model_config.sleep_mode_backend == {"cumem": "camem"}.get(chosen, chosen)


def test_where_there_is_no_cann_one_line_says_so(monkeypatch, caplog):
    import torch_npu

    import vllm_sleep_ascend

    def fail() -> int:
        raise RuntimeError("dcmi model initialized failed")

    monkeypatch.setattr(torch_npu.npu, "device_count", fail)
    caplog.set_level(logging.WARNING, "vllm_sleep_ascend")  # libraries set that of the root logger
    assert vllm_sleep_ascend.register_platform() is None
    (record,) = caplog.records
    assert record.getMessage().startswith("No NPU: torch_npu cannot be used (dcmi")
    assert record.exc_info is None


@pytest.mark.parametrize("layout", ["HND", "LBHNC", "BLNHC", "BHLNC"])
def test_other_kv_cache_layouts_are_refused_by_name(model, monkeypatch, layout):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    with pytest.raises(ValueError, match=f"KV cache layout {layout}, .*unset VLLM_KV_CACHE_LAYOUT"):
        config_of(model)


def test_the_contiguous_kv_cache_layout_is_the_only_one(model, monkeypatch):
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts

    from vllm_sleep_ascend.native.attention.backend import NPUAttentionBackend

    (layout,) = get_supported_kv_cache_layouts([NPUAttentionBackend])
    assert layout.name == "LBNHC"
    for name in (layout.name, "NHD"):
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", name)
        config_of(model)


def test_connectors_with_another_kv_cache_layout_are_refused_by_name(model, monkeypatch):
    """Unless the user says that the default layout works."""
    connector = {
        "kv_connector": "HeadMajorConnector",
        "kv_connector_module_path": "helpers.connectors",
        "kv_role": "kv_both",
    }
    refusal = "HeadMajorConnector with its KV cache layout LBHNC, .*or set VLLM_KV_CACHE_LAYOUT="
    with pytest.raises(ValueError, match=refusal):
        config_of(model, kv_transfer_config=connector)
    for name in ("EmptiedConnector", "TokenMajorConnector"):
        config_of(model, kv_transfer_config=connector | {"kv_connector": name})
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBNHC")
    config_of(model, kv_transfer_config=connector)


def test_other_kinds_of_speculative_decoding_are_refused(model):
    options = {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(ValueError, match="method ngram_gpu; use one of ngram, draft_model, eagle,"):
        config_of(model, speculative_config=options)
    options = {"method": "ngram", "num_speculative_tokens": 2, "rejection_sample_method": "block"}
    with pytest.raises(ValueError, match="rejection_sample_method block"):
        config_of(model, speculative_config=options)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype fp8; use --kv-cache-dtype auto"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "context parallelism"),
        ({"enable_lora": True}, "LoRA adapters with multi-head latent attention; merge"),
        ({"cpu_offload_gb": 1}, "offloaded weights with multi-head latent attention; leave out"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "KV connector ExampleConnector with multi-head latent attention; leave it out",
        ),
        (
            {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
            "graphs of a mixture of experts",
        ),
    ],
)
def test_what_latent_attention_lacks_is_refused_by_name(options, message):
    model = str(make_model("tiny-deepseek-v2"))
    config_of(model)
    with pytest.raises(ValueError, match=message):
        config_of(model, **options)


def test_what_latent_attention_of_a_draft_lacks_is_refused_by_name(model):
    draft = {"method": "draft_model", "num_speculative_tokens": 2}
    draft["model"] = str(make_model("tiny-deepseek-v2-dense"))
    config_of(model, speculative_config=draft)
    with pytest.raises(ValueError, match=r"draft model .*: offloaded weights with multi-head"):
        config_of(model, speculative_config=draft, cpu_offload_gb=1)


def test_a_draft_with_experts_beside_a_model_without_is_refused(model):
    draft = {"method": "draft_model", "num_speculative_tokens": 2}
    draft["model"] = str(make_model("tiny-qwen3-moe"))
    with pytest.raises(ValueError, match=r"draft model .*: experts beside a model without, .*; ch"):
        config_of(model, speculative_config=draft)


@pytest.mark.parametrize(
    "options,more,message",
    [
        ({"pipeline_parallel_size": 2}, {}, "method eagle with pipeline parallelism; use tensor"),
        (
            {},
            {"parallel_drafting": True},
            "parallel drafting with method eagle; leave out parallel",
        ),
    ],
)
def test_what_eagle_lacks_is_refused_by_name(options, more, message):
    head = {"method": "eagle", "num_speculative_tokens": 2}
    head["model"] = str(make_model("tiny-llama-eagle"))
    target = str(make_model("tiny-llama"))
    config_of(target, speculative_config=head)
    with pytest.raises(ValueError, match=message):
        config_of(target, speculative_config=head | more, **options)


def test_multi_token_prediction_of_another_model_is_refused():
    from vllm_sleep_ascend.native.unsupported import refuse_unsupported

    mtp = {"method": "mtp", "num_speculative_tokens": 2}
    config = config_of(str(make_model("tiny-deepseek-v3-mtp")), speculative_config=mtp)
    config.speculative_config.draft_model_config.hf_config.model_type = "mimo_mtp"
    with pytest.raises(ValueError, match="multi-token prediction of mimo_mtp; use a draft model"):
        refuse_unsupported(config)


def test_adapters_of_experts_are_refused():
    with pytest.raises(ValueError, match="LoRA adapters of experts; merge the adapter"):
        config_of(str(make_model("tiny-qwen3-moe")), enable_lora=True)


def test_engines_that_share_experts_do_not_sleep(model):
    experts, sleeps = str(make_model("tiny-qwen3-moe")), {"enable_sleep_mode": True}
    with pytest.raises(ValueError, match=r"data_parallel_size=2 .*\(tensor_parallel_size=4\)"):
        config_of(experts, data_parallel_size=2, tensor_parallel_size=2, **sleeps)
    config_of(experts, data_parallel_size=2)
    config_of(experts, tensor_parallel_size=2, **sleeps)
    config_of(model, data_parallel_size=2, **sleeps)


@pytest.mark.parametrize(
    "trait,message",
    [
        ("use_mla", "sparse attention by an indexer, with multi-head latent attention"),
        ("zero_expert_num", r"zero experts \(LongCat\), which vLLM computes with Triton; choose"),
        ("is_hybrid", "Mamba or linear-attention layers"),
        ("has_inner_state", "Mamba or linear-attention layers"),
        ("is_encoder_decoder", "encoder-decoder cross attention"),
        ("is_mm_prefix_lm", "attention in both directions within an image"),
        ("quantization", "quantisation of a checkpoint needs compiled kernels"),
    ],
)
def test_refused_models(trait, message):
    from vllm_sleep_ascend.native.unsupported import refuse_unsupported

    traits = dict.fromkeys(
        ("use_mla", "is_hybrid", "has_inner_state", "is_attention_free", "is_encoder_decoder"),
        False,
    )
    traits |= {"is_mm_prefix_lm": False, "quantization": None, trait: "awq"}
    zeros = 256 if trait == "zero_expert_num" else 0
    config = Mock()
    config.model_config = SimpleNamespace(
        model="some/model",
        architectures=["SomeLM"],
        hf_text_config=SimpleNamespace(index_topk=2048, zero_expert_num=zeros),
        **traits,
    )
    config.offload_config.uva.cpu_offload_gb = 0
    config.offload_config.prefetch.offload_group_size = 0
    config.cache_config.cache_dtype = "auto"
    config.cache_config.kv_offloading_size = config.kv_transfer_config = None
    config.parallel_config = SimpleNamespace(
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
        enable_dbo=False,
        enable_fault_tolerance=False,
    )
    config.speculative_config = config.lora_config = None
    config.compilation_config.cudagraph_mode.has_full_cudagraphs.return_value = False
    config.use_v2_model_runner = False
    with pytest.raises(ValueError, match=message) as refused:
        refuse_unsupported(config)
    assert "some/model (SomeLM)" in str(refused.value)
    assert str(refused.value).count("\n- ") == 1


def test_attention_backends(model):
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plain = {"head_size": 80, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 3}
    config = AttentionSelectorConfig(**plain, has_sink=True, has_sliding_window=True)
    path = current_platform.get_attn_backend_cls(None, config)
    assert path == "vllm_sleep_ascend.native.attention.backend.NPUAttentionBackend"
    with pytest.raises(ValueError, match="FLASH_ATTN is not available; leave out"):
        current_platform.get_attn_backend_cls(AttentionBackendEnum.FLASH_ATTN, config)
    options = ["use_sparse", "use_mm_prefix", "use_rswa", "use_dcp"]
    for option in options:
        with pytest.raises(ValueError, match="is not supported: "):
            current_platform.get_attn_backend_cls(None, config._replace(**{option: True}))

    latent = AttentionSelectorConfig(**plain, use_mla=True)
    path = current_platform.get_attn_backend_cls(None, latent)
    assert path == "vllm_sleep_ascend.native.attention.mla.NPUMLABackend"
    options += ["has_sink", "has_sliding_window", "use_non_causal", "use_kv_connector"]
    for option in options:
        with pytest.raises(ValueError, match="is not supported: "):
            current_platform.get_attn_backend_cls(None, latent._replace(**{option: True}))


def test_encoders_have_one_attention_backend():
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    choose = current_platform.get_vit_attn_backend
    pytorch = AttentionBackendEnum.TORCH_SDPA
    assert choose(80, torch.bfloat16) == choose(80, torch.bfloat16, pytorch) == pytorch
    with pytest.raises(ValueError, match="FLASH_ATTN is not available for encoders; leave out"):
        choose(80, torch.bfloat16, AttentionBackendEnum.FLASH_ATTN)


@pytest.mark.parametrize(
    "online", [{}, {"quantization_config": {"moe": "int8_per_channel_weight_only"}}]
)
def test_a_quantised_checkpoint_is_not_quantised_anew(model, tmp_path, online):
    """vLLM 0.33 does so for experts."""
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="fp8 quantisation of a checkpoint needs compiled kernels"):
        config_of(str(copy), **online)
