# SPDX-License-Identifier: Apache-2.0
"""The two layouts of experts' weights.

vllm-ascend's kernels want the matrices of unquantized experts transposed; checkpoints have them as
they are. Its wake shows them in the layout of the checkpoint, so that a trainer can load weights,
and leaves them so, which no kernel understands. Here they are shown so after a wake, and are as the
kernels want them again before anything runs. Both are views of the same memory.
"""

import torch
from torch import nn

_AXES = {"w2_weight": 2, "w13_weight": 1}  # where the kernel's layout has the hidden size


class ExpertLayouts:
    """The experts' weights that are shown in the layout of the checkpoint now."""

    def __init__(self) -> None:
        self._shown: list[tuple[nn.Module, str, nn.Parameter]] = []

    def open(self, model: nn.Module, hidden_size: int) -> None:
        """Show experts' weights in the layout of the checkpoint."""
        for module in model.modules():
            for name, axis in _AXES.items():
                kernel = module._parameters.get(name)
                if kernel is None or kernel.dim() != 3 or kernel.shape[axis] != hidden_size:
                    continue
                if kernel.shape[1] == kernel.shape[2]:
                    continue  # either layout may be the one that is there
                view = nn.Parameter(kernel.data.transpose(1, 2), requires_grad=False)
                loader = getattr(module, "weight_loader", None)
                if loader is not None:
                    view.weight_loader = loader  # type: ignore[attr-defined]
                module._parameters[name] = view
                self._shown.append((module, name, kernel))

    @torch.no_grad()
    def close(self) -> None:
        """Have them as the kernels want them, with what was loaded since, in their own memory."""
        while self._shown:
            module, name, kernel = self._shown[-1]
            loaded = module._parameters.get(name)
            if loaded is not None and loaded.data_ptr() != kernel.data_ptr():
                # Somebody made new weights: from the checkpoint's layout, or for the kernels.
                new = loaded.data
                kernel.copy_(new if new.shape == kernel.shape else new.transpose(1, 2))
            module._parameters[name] = kernel
            self._shown.pop()
