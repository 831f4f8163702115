# SPDX-License-Identifier: Apache-2.0
"""Refuses what this platform cannot run, before any weight is read."""

import os
from collections.abc import Iterator

from vllm import envs
from vllm.config import (
    CompilationConfig,
    CompilationMode,
    CUDAGraphMode,
    ModelConfig,
    ParallelConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.logger import init_logger

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger(f"vllm.{__name__}")

_MODEL_RUNNER_V2 = "VLLM_USE_V2_MODEL_RUNNER"
_CUDA_WEIGHT_TRANSFER = ("nccl", "ipc", "sparse_nccl", "nccl_m2n", "sharded_rdt")
_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")
_KV_CACHE_LAYOUTS = (None, "LBNHC", "NHD")  # NHD is the old name of LBNHC, vLLM's default
_SPECULATIVE_METHODS = ("ngram", "draft_model", "eagle", "eagle3", "mtp")
_MTP = "deepseek_mtp"  # what vLLM calls the layer of DeepSeek-V3 and R1
_REJECTION_METHODS = ("standard", "synthetic")
_CUDA_KV_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector")
_EAGER = "leave cudagraph_mode out of --compilation-config, or use --enforce-eager"
_GRAPHS = (CUDAGraphMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY)


def choose_model_runner_v1() -> None:
    """Choose Model Runner V1. V2 is vLLM's default with Triton, and needs Triton kernels.

    Raises:
        ValueError: the environment requests V2.
    """
    if os.environ.get(_MODEL_RUNNER_V2, "0").strip().lower() not in ("", "0", "false"):
        raise ValueError(
            f"NPU: Model Runner V2 is not supported; unset {_MODEL_RUNNER_V2} or set it to 0"
        )
    os.environ[_MODEL_RUNNER_V2] = "0"


def choose_compilation(compilation: CompilationConfig) -> None:
    """Nothing is compiled, and graphs are captured if the user asks for it.

    Raises:
        ValueError: the user asks for a mode that this platform lacks.
    """
    mode, graphs = compilation.mode, compilation.cudagraph_mode
    if mode not in (None, CompilationMode.NONE):
        raise ValueError(
            f"NPU: compilation mode {mode.name} needs torch.compile, which is not supported; leave "
            "mode out of --compilation-config"
        )
    if graphs not in (None, *_GRAPHS):
        reason = "needs torch.compile, to leave attention out of its graphs"
        if graphs == CUDAGraphMode.FULL:
            reason = "captures prompts too, and their attention depends on their lengths"
        raise ValueError(
            f"NPU: cudagraph_mode {graphs.name} {reason}; use "
            f"{' or '.join(mode.name for mode in _GRAPHS)}"
        )
    if compilation.cudagraph_mm_encoder:
        raise ValueError(
            "NPU: graphs of encoders are not captured; leave cudagraph_mm_encoder out of "
            "--compilation-config"
        )
    if graphs is None:
        logger.info_once(
            "NPU: the model runs eagerly, without torch.compile. Decode steps are captured as "
            'graphs with --compilation-config \'{"cudagraph_mode": "FULL_DECODE_ONLY"}\'.'
        )
    compilation.mode = CompilationMode.NONE
    compilation.cudagraph_mode = graphs or CUDAGraphMode.NONE


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Refuse a configuration that would fail later or give wrong results.

    Raises:
        ValueError: one line for each unsupported feature, with its remedy.
    """
    reasons = list(_reasons(vllm_config))
    if reasons:
        raise ValueError("Not supported on the NPU:\n" + "\n".join(f"- {r}" for r in reasons))


def _reasons(vllm_config: VllmConfig) -> Iterator[str]:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    if model is not None:
        name = f"model {model.model} ({', '.join(model.architectures)})"
        if model.use_mla:
            yield from (f"{name}: {what}" for what in _not_with_latents(model, vllm_config))
        if getattr(model.hf_text_config, "zero_expert_num", 0):
            yield (
                f"{name}: zero experts (LongCat), which vLLM computes with Triton; choose a model "
                "without zero_expert_num"
            )
        if model.is_hybrid or model.has_inner_state or model.is_attention_free:
            yield (
                f"{name}: Mamba or linear-attention layers; choose a model with attention in "
                "every layer"
            )
        if model.is_encoder_decoder:
            yield f"{name}: encoder-decoder cross attention; choose a decoder-only model"
        if model.is_mm_prefix_lm:
            yield (
                f"{name}: attention in both directions within an image; choose a model whose "
                "attention is causal"
            )
        if vllm_config.lora_config is not None and model.is_moe:
            yield f"{name}: LoRA adapters of experts; merge the adapter into the model"
        if model.quantization is not None:
            reason = _quantization(vllm_config)
            if reason is not None:
                yield f"{name}: {reason}"
    if cache is not None and cache.cache_dtype not in _KV_CACHE_DTYPES:
        yield f"KV cache dtype {cache.cache_dtype}; use --kv-cache-dtype auto"
    yield from _kv_offloading(vllm_config)
    yield from _kv_cache_layout(vllm_config)
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        yield "context parallelism; use tensor parallelism instead"
    if parallel.enable_dbo:
        yield "dual-batch overlap; leave out --enable-dbo"
    if parallel.enable_fault_tolerance:
        yield (
            "fault tolerance, for which ranks do not say why they failed; leave out "
            "--enable-fault-tolerance"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _SPECULATIVE_METHODS:
        yield (
            f"speculative decoding with method {speculative.method}; use one of "
            f"{', '.join(_SPECULATIVE_METHODS)}"
        )
    elif speculative is not None and speculative.method != "ngram":
        draft = speculative.draft_model_config
        yield from _not_with_heads(speculative, vllm_config.parallel_config)
        if draft.is_moe and not (model is not None and model.is_moe):
            yield (
                f"draft model {draft.model}: experts beside a model without, for which vLLM has no "
                "group of ranks; choose a draft model without experts"
            )
        if draft.use_mla and not (model is not None and model.use_mla):
            what = _not_with_latents(draft, vllm_config)
            yield from (f"draft model {draft.model}: {reason}" for reason in what)
    rejection = speculative.rejection_sample_method if speculative is not None else "standard"
    if rejection not in _REJECTION_METHODS:
        yield (
            f"rejection_sample_method {rejection}, which needs Triton; use "
            f"{' or '.join(_REJECTION_METHODS)}"
        )
    transfer = vllm_config.weight_transfer_config
    if transfer is not None and transfer.backend in _CUDA_WEIGHT_TRANSFER:
        yield (
            f"weight transfer with backend {transfer.backend}, which is for CUDA; use "
            '--weight-transfer-config \'{"backend": "safetensors"}\''
        )
    if vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        yield from (f"{what}; {_EAGER}" for what in _not_in_graphs(vllm_config))
    if vllm_config.use_v2_model_runner:
        yield "Model Runner V2, which watermarking and HiSparse need; turn these off"


def _not_with_heads(speculative: SpeculativeConfig, parallel: ParallelConfig) -> Iterator[str]:
    """What a draft lacks that sees the hidden states of its target."""
    method, kind = speculative.method, speculative.draft_model_config.hf_config.model_type
    if method == "draft_model":
        return
    if method == "mtp" and kind != _MTP:
        yield f"multi-token prediction of {kind}; use a draft model, or a model of DeepSeek's shape"
    if parallel.pipeline_parallel_size > 1:
        yield f"method {method} with pipeline parallelism; use tensor parallelism"
    if speculative.parallel_drafting:
        yield f"parallel drafting with method {method}; leave out parallel_drafting"


def _not_with_latents(model: ModelConfig, vllm_config: VllmConfig) -> Iterator[str]:
    """What models with multi-head latent attention lack."""
    latent = "with multi-head latent attention"
    if hasattr(model.hf_text_config, "index_topk"):
        yield f"sparse attention by an indexer, {latent}; choose a model without index_topk"
    if vllm_config.lora_config is not None:
        yield f"LoRA adapters {latent}; merge the adapter into the model"
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector is not None:
        yield f"KV connector {transfer.kv_connector} {latent}; leave it out"
    offload = vllm_config.offload_config
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        yield (f"offloaded weights {latent}; leave out --cpu-offload-gb and --offload-group-size")


def _not_in_graphs(vllm_config: VllmConfig) -> Iterator[str]:
    """What makes a step depend on more than the content of tensors, or was never captured."""
    if vllm_config.model_config is not None and vllm_config.model_config.is_moe:
        yield "graphs of a mixture of experts, whose host counts each expert's tokens"
    if vllm_config.lora_config is not None:
        yield "graphs with LoRA adapters, whose rows the host knows"
    if vllm_config.speculative_config is not None:
        yield "graphs with speculative decoding"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        yield "graphs with pipeline parallelism"
    offload = vllm_config.offload_config
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        yield "graphs with offloaded weights (--cpu-offload-gb, --offload-group-size)"
    if os.environ.get("TASK_QUEUE_ENABLE") == "2":
        yield "graphs with TASK_QUEUE_ENABLE=2, under which torch_npu captures none"


def _kv_offloading(vllm_config: VllmConfig) -> Iterator[str]:
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    if cache is not None and cache.kv_offloading_size is not None:
        yield (
            f"offloading of the KV cache with --kv-offloading-backend "
            f"{cache.kv_offloading_backend}, which needs CUDA; leave out --kv-offloading-size"
        )
    for connector in _CUDA_KV_CONNECTORS:
        if transfer is not None and transfer.has_connector(connector):
            yield f"KV connector {connector}, which needs CUDA; leave it out"


def _kv_cache_layout(vllm_config: VllmConfig) -> Iterator[str]:
    requested, copies = envs.VLLM_KV_CACHE_LAYOUT, "in which operators copy a layer's whole cache"
    if requested not in _KV_CACHE_LAYOUTS:
        yield f"KV cache layout {requested}, {copies}; unset VLLM_KV_CACHE_LAYOUT"
    transfer = vllm_config.kv_transfer_config
    if requested is not None or transfer is None or transfer.kv_connector is None:
        return
    required = _layout_of_connector(vllm_config)
    if required not in _KV_CACHE_LAYOUTS:
        yield (
            f"KV connector {transfer.kv_connector} with its KV cache layout {required}, {copies}; "
            "leave it out, or set VLLM_KV_CACHE_LAYOUT=LBNHC if the connector works with it"
        )


def _layout_of_connector(vllm_config: VllmConfig) -> str | None:
    from vllm.distributed.kv_transfer.kv_connector.utils import get_kv_connector_cache_layout

    try:
        return get_kv_connector_cache_layout(vllm_config)
    except ImportError:  # vLLM reports it when it creates the connector
        return None


def _quantization(vllm_config: VllmConfig) -> str | None:
    from vllm.config.quantization import _ONLINE_SHORTHANDS
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    from vllm_sleep_ascend.native.quantization import INT8_FOR

    name, quant = vllm_config.model_config.quantization, vllm_config.quant_config
    if not isinstance(quant, OnlineQuantizationConfig):
        return (
            f"{name} quantisation of a checkpoint needs compiled kernels; use the unquantised "
            "model, with --quantization fp8 if its weights should take 8 bits"
        )
    args = [quant.args, *(_ONLINE_SHORTHANDS[key] for key in (quant.args.targets or {}).values())]
    linear = {spec.linear.weight for spec in args if spec.linear is not None}
    experts = {spec.moe.weight for spec in args if spec.moe is not None}
    for key in (linear | experts) - {None}:
        if key not in INT8_FOR:
            return f"{name} quantisation to {key}; use --quantization fp8"
    if not linear and not vllm_config.model_config.is_moe:
        return f"{name} quantises experts alone, and there are none; use --quantization fp8"
    return None
