# SPDX-License-Identifier: Apache-2.0
"""The NPU as an out-of-tree platform for stock vLLM.

vLLM imports this to detect the platform, so torch_npu must not be imported at module level.
"""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
    from vllm.v1.attention.backends.mla.prefill.selector import MLAPrefillSelectorConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger(f"vllm.{__name__}")

_SLEEP_BACKEND = "camem"
_VLLMS_BACKEND = "cumem"  # vLLM's default, for CUDA
_SHUTDOWN_S = 10


def _npu() -> Any:
    import torch_npu

    return torch_npu.npu


class NPUPlatform(Platform):
    """Ascend NPUs through torch_npu, without any other plugin."""

    _enum = PlatformEnum.OOT
    # vLLM builds torch.device(f"{device_name}:{index}").
    device_name: str = "npu"
    device_type: str = "npu"
    dispatch_key: str = "PrivateUse1"
    dist_backend: str = "hccl"
    ray_device_key: str = "NPU"
    device_control_env_var: str = "ASCEND_RT_VISIBLE_DEVICES"
    ray_noset_device_env_vars: list[str] = [  # noqa: RUF012  an instance variable to vLLM
        "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
    ]
    simple_compile_backend: str = "eager"

    @classmethod
    def get_compile_backend(cls) -> str:
        """vLLM's default. Nothing is compiled, but another name would look like a user's choice."""
        return "inductor"

    # --- Configuration ---------------------------------------------------------------------------

    @classmethod
    def pre_register_and_update(cls, parser: "FlexibleArgumentParser | None" = None) -> None:
        from vllm_sleep_ascend.native.unsupported import choose_model_runner_v1

        choose_model_runner_v1()

    @classmethod
    def apply_config_platform_defaults(cls, vllm_config: "VllmConfig") -> None:
        """Defaults for what the user has not chosen, before vLLM's own.

        Raises:
            ValueError: ``compilation_config`` has a mode that this platform lacks.
        """
        from vllm_sleep_ascend.native.unsupported import choose_compilation, choose_model_runner_v1

        choose_model_runner_v1()
        choose_compilation(vllm_config.compilation_config)
        # Even with Triton installed, this platform launches none of vLLM's Triton kernels.
        vllm_config.kernel_config.enable_jit_warmup = False

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Fill in the defaults for an NPU.

        Raises:
            ValueError: the model or an option is not supported; names it and the remedy.
        """
        from vllm_sleep_ascend.native.unsupported import refuse_unsupported

        refuse_unsupported(vllm_config)
        if vllm_config.quant_config is not None:
            logger.warning_once(
                "NPU: --quantization %s stores weights as 8-bit integers with a scale per output "
                "channel, and computes in %s: NPUs of this generation have no fp8 arithmetic.",
                vllm_config.model_config.quantization,
                vllm_config.model_config.dtype,
            )
        parallel_config = vllm_config.parallel_config
        if parallel_config.worker_cls == "auto":
            parallel_config.worker_cls = "vllm_sleep_ascend.native.worker.NPUWorker"
        if vllm_config.shutdown_timeout == 0:
            # Engine processes are killed at once by default; let them close the device first.
            vllm_config.shutdown_timeout = _SHUTDOWN_S
        if parallel_config.distributed_executor_backend == "ray":
            from vllm.v1.executor import ray_utils

            # Ray assigns devices on each node; the driver's list does not apply there.
            ray_utils.WORKER_SPECIFIC_ENV_VARS.add(cls.device_control_env_var)
        # A forked child cannot use a device that its parent has opened.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        _configure_sleep_mode(vllm_config)
        if vllm_config.model_config is not None:
            from vllm_sleep_ascend.rank.image.identity import check_start

            check_start(vllm_config)

    @classmethod
    def is_sleep_mode_available(cls) -> bool:
        """vLLM calls this only if sleep mode is on.

        Raises:
            ValueError: the package was installed without the compiled allocator.
        """
        if importlib.util.find_spec("vllm_sleep_ascend._camem") is None:
            raise ValueError(
                "sleep mode needs the compiled allocator, and vllm_sleep_ascend was installed "
                "without it; source CANN's set_env.sh and install it again with "
                "COMPILE_CUSTOM_KERNELS=1 pip install . (COMPILE.md), or leave out "
                "enable_sleep_mode"
            )
        return True

    @classmethod
    def is_cumem_allocator_available(cls) -> bool:
        return False

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        return True

    @classmethod
    def check_runner_kv_caches_multi_layer(cls) -> None:
        """Accept layers that share an index: each has its own cache here."""

    @classmethod
    def opaque_attention_op(cls) -> bool:
        return False

    # --- Implementations -------------------------------------------------------------------------

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: "AttentionBackendEnum | None",
        attn_selector_config: "AttentionSelectorConfig",
        num_heads: int | None = None,
    ) -> str:
        """This platform has one backend for each kind of attention.

        Raises:
            ValueError: another backend was requested, or this one does not support the layer.
        """
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if selected_backend not in (None, AttentionBackendEnum.CUSTOM):
            raise ValueError(
                f"NPU: attention backend {selected_backend.name} is not available; "
                "leave out --attention-backend"
            )
        backend = _attention_backend(latent=attn_selector_config.use_mla)
        reasons = backend.validate_configuration(
            device_capability=None,  # type: ignore[arg-type]
            **attn_selector_config._asdict(),
        )
        if reasons:
            raise ValueError(
                f"NPU: attention with {attn_selector_config!r} is not supported: "
                f"{', '.join(reasons)}; choose a model or options without it"
            )
        return f"{backend.__module__}.{backend.__qualname__}"

    @classmethod
    def get_mla_prefill_backend_cls(
        cls, mla_selector_config: "MLAPrefillSelectorConfig"
    ) -> "type[MLAPrefillBackend]":
        from vllm_sleep_ascend.native.attention.mla import NoPrefill

        return NoPrefill

    @classmethod
    def get_vit_attn_backend(
        cls, head_size: int, dtype: torch.dtype, backend: "AttentionBackendEnum | None" = None
    ) -> "AttentionBackendEnum":
        """PyTorch attends in the encoders of images.

        Raises:
            ValueError: another backend was requested.
        """
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if backend not in (None, AttentionBackendEnum.TORCH_SDPA):
            raise ValueError(
                f"NPU: attention backend {backend.name} is not available for encoders; "
                "leave out --mm-encoder-attn-backend"
            )
        return AttentionBackendEnum.TORCH_SDPA

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        from vllm_sleep_ascend.native.kernels import replace_triton_kernels

        replace_triton_kernels()

    @classmethod
    def import_kernels(cls) -> None:
        """Nothing to import: vLLM's compiled kernels are for other devices."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        import vllm_sleep_ascend.native.dense.norms  # noqa: F401

    @classmethod
    def get_default_ir_op_priority(cls, vllm_config: "VllmConfig") -> "IrOpPriorityConfig":
        from vllm.config.kernel import IrOpPriorityConfig

        from vllm_sleep_ascend.native.dense.norms import PROVIDER

        norms = [PROVIDER, "native"]
        return IrOpPriorityConfig.with_default(["native"], rms_norm=norms, fused_add_rms_norm=norms)

    @classmethod
    def get_static_graph_wrapper_cls(cls) -> str:
        return "vllm_sleep_ascend.native.graphs.NPUGraphWrapper"

    @classmethod
    def get_punica_wrapper(cls) -> str:
        return "vllm_sleep_ascend.native.lora.NPUPunicaWrapper"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return (
            "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"
        )

    # --- Device ----------------------------------------------------------------------------------

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        _npu().set_device(device)

    @classmethod
    def device_count(cls) -> int:
        return _npu().device_count()

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return _npu().get_device_name(device_id)

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        """The device's uuid, or ``npu-<physical id>`` if the driver has none."""
        uuid = getattr(_npu().get_device_properties(device_id), "uuid", None)
        return (
            str(uuid) if uuid else f"npu-{cls.visible_device_id_to_physical_device_id(device_id)}"
        )

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return _npu().get_device_properties(device_id).total_memory

    @classmethod
    def get_current_memory_usage(cls, device: torch.types.Device | None = None) -> float:
        """Bytes that torch has allocated."""
        npu = _npu()
        npu.empty_cache()
        npu.reset_peak_memory_stats(device)
        return npu.max_memory_allocated(device)

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        _npu().manual_seed_all(seed)

    @classmethod
    def inference_mode(cls) -> Any:
        return torch.inference_mode()

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return True

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return getattr(_npu().get_device_properties(device_id), "cube_core_num", 1)

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        """
        Raises:
            ValueError: not one of bfloat16, float16 and float32.
        """
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"NPU: dtype {dtype} is not supported; use bfloat16")


def _attention_backend(latent: bool) -> "type[AttentionBackend]":
    if latent:
        from vllm_sleep_ascend.native.attention.mla import NPUMLABackend

        return NPUMLABackend
    from vllm_sleep_ascend.native.attention.backend import NPUAttentionBackend

    return NPUAttentionBackend


def _configure_sleep_mode(vllm_config: "VllmConfig") -> None:
    model_config = vllm_config.model_config
    additional = vllm_config.additional_config
    asked = isinstance(additional, dict) and bool(additional.get("sleep_mode"))
    enabled = model_config is not None and model_config.enable_sleep_mode
    if not enabled and not asked:
        return
    from vllm_sleep_ascend.config import SleepModeConfig
    from vllm_sleep_ascend.engine.checks import check_door, check_on_request

    check_door(SleepModeConfig.from_vllm_config(vllm_config))
    check_on_request(vllm_config)
    if enabled:
        from vllm_sleep_ascend.engine.checks import check_engines, check_graphs
        from vllm_sleep_ascend.engine.kv_cache import check_connector

        check_engines(vllm_config)
        check_connector(vllm_config)
        check_graphs(vllm_config)
        chosen = model_config.sleep_mode_backend
        if chosen not in (_VLLMS_BACKEND, _SLEEP_BACKEND):
            raise ValueError(
                f"NPU: sleep_mode_backend {chosen!r} is not supported: this platform's worker "
                f"sleeps with {_SLEEP_BACKEND!r}; leave out --sleep-mode-backend"
            )
        model_config.sleep_mode_backend = _SLEEP_BACKEND
