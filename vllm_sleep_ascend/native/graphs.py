# SPDX-License-Identifier: Apache-2.0
"""Graph mode: the model's part of a decode step is captured once for each batch size, and replayed.

vLLM's runner chooses the step's graph, pads the batch to its size, and keeps the inputs at the same
addresses. Which steps are graphs is ``cudagraph_mode``; see ``unsupported`` for what cannot be one.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch_npu
from vllm.compilation.counter import compilation_counter
from vllm.compilation.cuda_graph import CUDAGraphEntry, CUDAGraphWrapper
from vllm.compilation.monitor import validate_cudagraph_capturing_enabled
from vllm.forward_context import (
    BatchDescriptor,
    ForwardContext,
    get_forward_context,
    is_forward_context_available,
)

from vllm_sleep_ascend.native.attention.fused import Layout
from vllm_sleep_ascend.native.attention.metadata import NPUAttentionMetadata


@dataclass
class _Entry(CUDAGraphEntry):
    """A captured graph."""

    uses: dict[str, set[tuple[Layout, int]]] = field(default_factory=dict)
    """By a layer of each KV cache group: how the attention operator is called in the graph."""


class NPUGraphWrapper(CUDAGraphWrapper):
    """vLLM's wrapper of a model, with torch_npu's graphs.

    The attention operator takes lengths from the host. torch_npu captures each of its calls as a
    task group behind an event, and ``NPUGraph.update`` gives it those of the next replay.
    """

    _update_failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_forward_context_available():
            return self.runnable(*args, **kwargs)
        context = get_forward_context()
        if context.cudagraph_runtime_mode != self.runtime_mode:
            return self.runnable(*args, **kwargs)
        batch = context.batch_descriptor
        assert batch is not None
        entry = cast(_Entry | None, self.concrete_cudagraph_entries.get(batch))
        if entry is None:
            return self._capture(batch, context, lambda: self.runnable(*args, **kwargs))
        updates = None if self._update_failed else _lengths(entry, batch, context)
        if updates is None:
            return self.runnable(*args, **kwargs)
        graph = cast(torch_npu.npu.NPUGraph, entry.cudagraph)
        if updates:
            self._update(graph, updates)
        graph.replay()
        return entry.output

    def _update(self, graph: torch_npu.npu.NPUGraph, lengths: dict[str, list[int]]) -> None:
        """Before the replay: one that waits for an update that failed would never end."""
        # The lengths of an earlier replay are in use until that has ended.
        stream = graph.graph_dispatch_mode.update_stream
        stream.wait_stream(torch_npu.npu.current_stream())
        try:
            graph.update([lengths])
        except BaseException:
            self._update_failed = True  # layers with new lengths would not wait for newer ones
            raise

    def _capture(
        self, batch: BatchDescriptor, context: ForwardContext, run: Callable[[], Any]
    ) -> Any:
        """Capture a graph, and return where its replays write their output."""
        validate_cudagraph_capturing_enabled()
        graph = torch_npu.npu.NPUGraph()
        with (
            self._pool() as pool,
            torch_npu.npu.graph(
                graph,
                pool=pool,
                stream=torch_npu.npu.current_stream(),
                auto_dispatch_capture=True,
            ),
        ):
            output = run()
        # A weak reference: graphs share memory, and a step is done with its output when the next
        # one writes to it.
        self.concrete_cudagraph_entries[batch] = _Entry(
            batch,
            graph,
            torch_npu._C._weak_ref_tensor(output),
            uses={name: group.captured for name, group in _groups(context) if group.captured},
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


def _groups(context: ForwardContext) -> Iterable[tuple[str, NPUAttentionMetadata]]:
    """A layer of each KV cache group, and the group's metadata."""
    metadata = cast(dict[str, NPUAttentionMetadata], context.attn_metadata)
    return {id(group): (name, group) for name, group in metadata.items()}.values()


def _lengths(
    entry: _Entry, batch: BatchDescriptor, context: ForwardContext
) -> dict[str, list[int]] | None:
    """The arguments to update in a graph, if there are any. None if the attention operator does not
    take this step's requests."""
    lengths: dict[str, list[int]] = {}
    metadata = cast(dict[str, NPUAttentionMetadata], context.attn_metadata)
    for name, uses in entry.uses.items():
        requests = metadata[name].batch
        if requests is None:
            return None
        requests = requests.padded(batch.num_tokens)
        if not all(requests.takes(*use) for use in uses):
            return None
        lengths = {
            "actual_seq_lengths": requests.ends,
            "actual_seq_lengths_kv": requests.lengths,
        }
    return lengths


@contextmanager
def capture_stream(device: torch.device) -> Iterator[None]:
    """A stream that can capture: the default one cannot."""
    stream = torch_npu.npu.Stream(device)
    stream.wait_stream(torch_npu.npu.current_stream(device))
    with torch_npu.npu.stream(stream):
        yield
