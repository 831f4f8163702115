# SPDX-License-Identifier: Apache-2.0
"""vLLM's V1 model runner on an NPU."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch_npu
from torch.overrides import TorchFunctionMode
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.compilation.monitor import set_cudagraph_capturing_enabled
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.multimodal.utils import get_mm_features_in_window
from vllm.utils.mem_utils import format_gib
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.workspace import lock_workspace

from vllm_sleep_ascend.memory.account import held_bytes
from vllm_sleep_ascend.native.graphs import NPUGraphWrapper, capture_stream
from vllm_sleep_ascend.native.kernels import leave_triton_out_of_models
from vllm_sleep_ascend.native.lora import restore_adapters

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

# A child of vLLM's logger, so that its handlers and level apply.
logger = init_logger(f"vllm.{__name__}")


def _npu_event(*args: Any, blocking: bool = False, **kwargs: Any) -> Any:
    """``torch.npu.Event`` has no ``blocking``, because its wait never spins."""
    return torch_npu.npu.Event(*args, **kwargs)


@contextmanager
def cuda_streams_on_npu() -> Iterator[None]:
    """Redirect the ``torch.cuda`` stream functions that vLLM calls to ``torch.npu``."""
    names = {
        "Stream": torch_npu.npu.Stream,
        "Event": _npu_event,
        "stream": torch_npu.npu.stream,
        "current_stream": torch_npu.npu.current_stream,
        "default_stream": torch_npu.npu.default_stream,
        "set_stream": torch_npu.npu.set_stream,
    }
    saved = {name: getattr(torch.cuda, name) for name in names}
    for name, value in names.items():
        setattr(torch.cuda, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(torch.cuda, name, value)


class _UnwrittenZeros(TorchFunctionMode):
    """Turns ``torch.zeros`` into an allocation without a write."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.empty if func is torch.zeros else func)(*args, **(kwargs or {}))


def _let_phi3v_load_again(model: Any) -> None:
    """Have later loads find Phi-3-vision's embedding under its first name.

    vLLM's model replaces its own embedding by the text model's once a checkpoint has been loaded
    without the former. That makes two names of one parameter, of which vLLM's loader takes the
    first, and a checkpoint has the second: ``reload_weights`` would fail.
    """
    # vLLM's conversions to embedding models and the like are subclasses.
    if all(kind.__name__ != "Phi3VForCausalLM" for kind in type(model).__mro__):
        return
    if model.embed_tokens is not model.language_model.model.embed_tokens:
        return
    stock: Callable[[Iterable[tuple[str, torch.Tensor]]], set[str]] = model.load_weights
    first, second = "model.vision_embed_tokens.wte.weight", "model.embed_tokens.weight"

    @wraps(stock)
    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return stock((first if name == second else name, weight) for name, weight in weights)

    model.load_weights = load_weights


class NPUModelRunner(GPUModelRunner):
    """The stock V1 model runner. Its methods that use streams get the NPU's."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self._dropped_images: set[str] = set()
        with cuda_streams_on_npu():
            super().__init__(vllm_config, device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        leave_triton_out_of_models()
        _let_phi3v_load_again(self.get_model())
        if self.vllm_config.quant_config is not None and self.model_config.enable_sleep_mode:
            from vllm_sleep_ascend.native.quantization import compact

            compact(self.get_model())
        if isinstance(self.model, CUDAGraphWrapper):
            self.model = NPUGraphWrapper(
                self.model.unwrap(), self.vllm_config, self.model.runtime_mode
            )

    def capture_model(self) -> int:
        """Capture the graphs, the largest first; returns the bytes of device memory they took.

        The stock method asserts that the ranks' communicator is one for CUDA.
        """
        if self.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
            return 0
        before = held_bytes(self.device)
        set_cudagraph_capturing_enabled(True)
        try:
            with cuda_streams_on_npu(), self._freeze_gc(), capture_stream(self.device):
                for mode, batches in self.cudagraph_dispatcher.get_capture_descs():
                    self._capture_cudagraphs(batches, mode)
        finally:
            set_cudagraph_capturing_enabled(False)
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
        lock_workspace()  # graphs hold its address
        taken = held_bytes(self.device) - before
        logger.info(
            "NPU %s: %d graphs were captured, and hold %s GiB.",
            self.device.index,
            sum(len(batches) for _, batches in self.cudagraph_dispatcher.get_capture_descs()),
            format_gib(taken),
        )
        return taken

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        with cuda_streams_on_npu():
            return super().execute_model(*args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        with cuda_streams_on_npu():
            return super().sample_tokens(*args, **kwargs)

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        with cuda_streams_on_npu():
            return super()._dummy_run(*args, **kwargs)

    def initialize_kv_cache_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Do not zero a new cache. Attention reads only slots that have been written."""
        with _UnwrittenZeros():
            return super().initialize_kv_cache_tensors(*args, **kwargs)

    def reset_lora_state(self) -> None:
        """Keep the loaded adapters when the base weights are replaced. The stock method drops them:
        the next request for one would read its folder again, and end the engine if that is gone.

        Images are encoded anew. vLLM sees to that after ``reload_weights`` only, and not after a
        weight update."""
        restore_adapters(self)
        self.drop_images()

    def drop_images(self) -> None:
        """Have later steps encode the present images anew. A second call changes nothing."""
        self._dropped_images |= self.encoder_cache.keys()
        super().reset_encoder_cache()

    def reset_encoder_cache(self) -> None:
        if self.encoder_cache:  # no load has emptied it: the scheduler forgets its images too
            self._dropped_images.clear()
        super().reset_encoder_cache()

    def _execute_mm_encoder(self, scheduler_output: "SchedulerOutput") -> Any:
        self._plan_dropped_images(scheduler_output)
        return super()._execute_mm_encoder(scheduler_output)

    def _plan_dropped_images(self, scheduler_output: "SchedulerOutput") -> None:
        """Have this step encode its images that a load of weights has dropped here alone: to the
        scheduler they are encoded, and the stock runner would end the engine."""
        self._dropped_images.difference_update(scheduler_output.free_encoder_mm_hashes)
        if not self._dropped_images:
            return
        planned = scheduler_output.scheduled_encoder_inputs
        for request, indices in planned.items():
            features = self.requests[request].mm_features
            self._dropped_images -= {features[index].identifier for index in indices}
        for request, count in scheduler_output.num_scheduled_tokens.items():
            state = self.requests[request]
            start = state.num_computed_tokens
            window = get_mm_features_in_window(state.mm_features, start=start, end=start + count)
            for index in range(*window):
                image = state.mm_features[index].identifier
                if image in self._dropped_images:
                    planned.setdefault(request, []).append(index)
                    self._dropped_images.remove(image)
