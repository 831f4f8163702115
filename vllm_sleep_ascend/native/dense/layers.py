# SPDX-License-Identifier: Apache-2.0
"""vLLM's layers that become one operator: imported before a model is built."""

import torch
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding import (
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    NTKScalingRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)

from vllm_sleep_ascend.native.dense import operators


@CustomOp.register_oot(name="SiluAndMul")
class NPUSiluAndMul(SiluAndMul):
    def forward_oot(self, x: torch.Tensor) -> torch.Tensor:
        if operators.can_activate(x):
            return operators.silu_and_mul(x)
        return self.forward_native(x)


class _OneLaunch(RotaryEmbedding):
    def forward_oot(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = self.head_size, self.rotary_dim, self.is_neox_style
        if key is None or not operators.can_rotate(positions, query, key, *shape):
            return self.forward_native(positions, query, key)
        return operators.rotate(
            positions,
            query,
            key,
            self.head_size,
            self.rotary_dim,
            self._match_cos_sin_cache_dtype(query),
            self.is_neox_style,
        )


# vLLM looks for a replacement by the exact class. These differ from the first in the table of
# angles alone.
for _embedding in (
    RotaryEmbedding,
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    NTKScalingRotaryEmbedding,
    YaRNScalingRotaryEmbedding,
):
    CustomOp.register_oot(
        type(f"NPU{_embedding.__name__}", (_OneLaunch, _embedding), {}), name=_embedding.__name__
    )
