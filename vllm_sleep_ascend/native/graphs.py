# SPDX-License-Identifier: Apache-2.0
"""Graph mode: the model's part of a decode step is captured once for each batch size, and replayed.

vLLM's runner chooses the step's graph, pads the batch to its size, and keeps the inputs at the same
addresses. Which steps are graphs is ``cudagraph_mode``; see ``unsupported`` for what cannot be one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch_npu
from vllm.compilation.counter import compilation_counter
from vllm.compilation.cuda_graph import CUDAGraphEntry, CUDAGraphWrapper
from vllm.compilation.monitor import validate_cudagraph_capturing_enabled
from vllm.forward_context import (
    BatchDescriptor,
    get_forward_context,
    is_forward_context_available,
)


class NPUGraphWrapper(CUDAGraphWrapper):
    """vLLM's wrapper of a model, with torch_npu's graphs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_forward_context_available():
            return self.runnable(*args, **kwargs)
        context = get_forward_context()
        if context.cudagraph_runtime_mode != self.runtime_mode:
            return self.runnable(*args, **kwargs)
        batch = context.batch_descriptor
        assert batch is not None
        entry = self.concrete_cudagraph_entries.get(batch)
        if entry is None:
            return self._capture(batch, lambda: self.runnable(*args, **kwargs))
        assert entry.cudagraph is not None
        entry.cudagraph.replay()
        return entry.output

    def _capture(self, batch: BatchDescriptor, run: Callable[[], Any]) -> Any:
        """Capture a graph, and return where its replays write their output."""
        validate_cudagraph_capturing_enabled()
        graph = torch_npu.npu.NPUGraph()
        with (
            self._pool() as pool,
            torch_npu.npu.graph(graph, pool=pool, stream=torch_npu.npu.current_stream()),
        ):
            output = run()
        # A weak reference: graphs share memory, and a step is done with its output when the next
        # one writes to it.
        self.concrete_cudagraph_entries[batch] = CUDAGraphEntry(
            batch, graph, torch_npu._C._weak_ref_tensor(output)
        )
        compilation_counter.num_cudagraph_captured += 1
        return output

    def _pool(self) -> AbstractContextManager[tuple[int, int]]:
        """The memory pool of the graphs: by vLLM's option it sleeps with the engine."""
        model_config = self.vllm_config.model_config
        if model_config.enable_sleep_mode and model_config.sleep_mode_offload_cudagraph:
            from vllm_sleep_ascend.memory.pool import use_graph_pool

            return use_graph_pool()
        return nullcontext(self.graph_pool)


@contextmanager
def capture_stream(device: torch.device) -> Iterator[None]:
    """A stream that can capture: the default one cannot."""
    stream = torch_npu.npu.Stream(device)
    stream.wait_stream(torch_npu.npu.current_stream(device))
    with torch_npu.npu.stream(stream):
        yield
