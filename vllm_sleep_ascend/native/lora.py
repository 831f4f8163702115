# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in plain PyTorch, and restoring their device memory after sleep discarded it.

vLLM keeps an adapter on the host and copies it into one of a few device slots. The slots of a
layer are one tensor: A is ``[slots, 1, rank, inputs]``, B ``[slots, 1, outputs, rank]``.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.utils.torch_utils import async_tensor_h2d

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping

Rows = slice | torch.Tensor


class NPUPunicaWrapper(PunicaWrapperBase):
    """Applies the adapters of a batch, each to its own rows.

    Rows without an adapter are left unchanged. Unused slots are never read.
    """

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device, **_: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._tokens: list[tuple[int, Rows]] = []
        self._outputs: list[tuple[int, Rows]] = []

    def update_metadata(
        self,
        mapping: "LoRAMapping",
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Set the adapter of each token and each output of the next batch."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        slots = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter}
        self._tokens = list(_rows(mapping.index_mapping, slots, self.device))
        self._outputs = list(_rows(mapping.prompt_mapping, slots, self.device))

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """``y[i] = x @ A[i]^T * scale``. ``y`` is zero in rows without an adapter."""
        x = x.view(-1, x.shape[-1])
        for slot, rows in self._tokens:
            for out, a in zip(y, lora_a_stacked, strict=True):
                out[rows] = (F.linear(x[rows].to(a.dtype), a[slot, 0]) * scale).to(out.dtype)

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add ``x[i] @ B[i]^T`` to the i-th slice of ``y``'s columns. Slices are adjacent."""
        y = y.view(-1, y.shape[-1])
        for slot, rows in self._tokens:
            start = offset_start
            for part, b, width in zip(x, lora_b_stacked, output_slices, strict=True):
                _add(y[:, start : start + width], rows, part, b[slot, 0], add_inputs)
                start += width

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add ``x @ B^T``, where ``x`` holds each token's row of A."""
        for slot, rows in self._tokens:
            _add(y, rows, x, lora_b_stacked[slot, 0], add_inputs)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ``x @ A[i]^T @ B[i]^T * scale`` to the i-th slice of ``y``'s columns."""
        if not self._tokens:
            return
        if buffer is None:
            shape = (x.view(-1, x.shape[-1]).shape[0], lora_b_stacked[0].shape[-1])
            buffer = tuple(x.new_zeros(shape, dtype=torch.float32) for _ in output_slices)
        self.add_shrink(buffer, x, lora_a_stacked, scale)
        self.add_expand(y, buffer, lora_b_stacked, output_slices)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add ``x @ A^T @ B^T * scale``. Here a row is an output, not a token."""
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        for slot, rows in self._outputs:
            a, b = lora_a_stacked[slot, 0], lora_b_stacked[slot, 0]
            part = F.linear(F.linear(x[rows].to(a.dtype), a) * scale, b)
            width = min(part.shape[1], y.shape[1])  # either may have more padding
            y[rows, :width] += part[:, :width].to(y.dtype)

    def apply_lora_full_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        weight_stacked: torch.Tensor,
        bias_stacked: torch.Tensor,
        module_enabled: torch.Tensor,
    ) -> None:
        """Replace ``y`` by the output of the adapter's classification head, if it has one."""
        own = y.new_zeros((x.shape[0], weight_stacked.shape[-2]), dtype=torch.float32)
        for slot, rows in self._outputs:
            own[rows] = F.linear(x[rows], weight_stacked[slot].flatten(0, -2)).float()
        y.copy_(self._select_full_linear_output(y, own, bias_stacked, module_enabled))


def _rows(
    adapters: Sequence[int], slots: dict[int, int], device: torch.device | str
) -> Iterator[tuple[int, Rows]]:
    """Each used slot with its rows; contiguous rows are a slice."""
    rows: dict[int, list[int]] = {}
    for row, adapter in enumerate(adapters):
        if adapter > 0:
            rows.setdefault(slots[adapter], []).append(row)
    for slot, mine in rows.items():
        if mine[-1] - mine[0] + 1 == len(mine):
            yield slot, slice(mine[0], mine[-1] + 1)
        else:
            yield slot, async_tensor_h2d(mine, dtype=torch.long, device=device)


def _add(y: torch.Tensor, rows: Rows, x: torch.Tensor, b: torch.Tensor, add_inputs: bool) -> None:
    part = F.linear(x[rows].to(b.dtype), b).to(y.dtype)
    if add_inputs:
        y[rows] += part
    else:
        y[rows] = part


def restore_adapters(model_runner: Any) -> None:
    """Copy the loaded adapters, pinned ones included, from the host into their slots again.

    Needed after level 2, which discards the slots together with the weights.
    """
    if not model_runner.lora_config:
        return
    from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA

    manager = model_runner.lora_manager._adapter_manager
    active = manager._active_adapters
    adapters, pinned = list(active.order), set(active.pinned_items)
    for adapter in adapters:
        manager.deactivate_adapter(adapter)
    for adapter in adapters:
        manager.activate_adapter(adapter)
        if adapter in pinned:
            active.pin(adapter)
    manager._last_mapping = None  # its index tensors were discarded too
    for module in model_runner.get_model().modules():
        if isinstance(module, LogitsProcessorWithLoRA):
            module.reset_sharded_to_full_mapping()
