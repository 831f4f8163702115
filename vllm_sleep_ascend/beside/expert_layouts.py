# SPDX-License-Identifier: Apache-2.0
"""The two layouts of experts' weights.

vllm-ascend's kernels need the matrices of unquantized experts transposed, compared with
checkpoints. Its wake switches to the checkpoint's layout, so that a trainer can load weights, and
never switches back, so no kernel can run. Here a wake switches too, but the kernels' layout is
restored before anything runs. Both layouts are views of the same memory.
"""

import torch
from torch import nn

_AXES = {"w2_weight": 2, "w13_weight": 1}  # the axis of the hidden size in the kernels' layout


class ExpertLayouts:
    """Keeps track of the weights that are in the checkpoint's layout."""

    def __init__(self) -> None:
        self._shown: list[tuple[nn.Module, str, nn.Parameter]] = []

    def open(self, model: nn.Module, hidden_size: int) -> None:
        """Switch the experts' weights to the checkpoint's layout."""
        for module in model.modules():
            for name, axis in _AXES.items():
                kernel = module._parameters.get(name)
                if kernel is None or kernel.dim() != 3 or kernel.shape[axis] != hidden_size:
                    continue
                if kernel.shape[1] == kernel.shape[2]:
                    continue  # the shape does not tell the layouts apart
                view = nn.Parameter(kernel.data.transpose(1, 2), requires_grad=False)
                loader = getattr(module, "weight_loader", None)
                if loader is not None:
                    view.weight_loader = loader  # type: ignore[attr-defined]
                module._parameters[name] = view
                self._shown.append((module, name, kernel))

    @torch.no_grad()
    def close(self) -> None:
        """Switch back to the kernels' layout, with weights loaded since, in the original memory."""
        while self._shown:
            module, name, kernel = self._shown[-1]
            loaded = module._parameters.get(name)
            if loaded is not None and loaded.data_ptr() != kernel.data_ptr():
                # The parameter was replaced, in either layout.
                new = loaded.data
                kernel.copy_(new if new.shape == kernel.shape else new.transpose(1, 2))
            module._parameters[name] = kernel
            self._shown.pop()
