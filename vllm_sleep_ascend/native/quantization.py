# SPDX-License-Identifier: Apache-2.0
"""8-bit weights: vLLM's online quantisation with int8 in place of its fp8 kernels.

The weight matrices of linear layers and experts are stored as int8 with one float32 scale per
output channel. Activations and products stay in the model's dtype. Importing this module registers
the methods with vLLM for the schemes in ``INT8_FOR``.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.online import base
from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
    kInt8StaticChannelSym,
)
from vllm.model_executor.utils import replace_parameter

from vllm_sleep_ascend.native.int8 import linear, quantize
from vllm_sleep_ascend.native.moe import ExpertsMethod
from vllm_sleep_ascend.rank.weights.parameters import clone_parameters

INT8_FOR = (kFp8StaticTensorSym, kFp8StaticChannelSym, kInt8StaticChannelSym)
"""vLLM's weight schemes with 8 bits and a scale per tensor or per output channel."""


class NPUInt8LinearMethod(OnlineLinearBase):
    """Quantises a linear layer's weight as soon as the layer is loaded."""

    activation_quant_key = None

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        weight, scale = quantize(self.get_weight_for_quantization(layer))
        replace_parameter(layer, "weight", weight)
        replace_parameter(layer, "weight_scale", scale)
        layer._already_called_process_weights_after_loading = True

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, layer.weight, bias, layer.weight_scale)


class NPUInt8MoEMethod(ExpertsMethod, OnlineMoEMethodBase):  # type: ignore[misc]
    """The experts' weights, quantised as soon as a layer is loaded."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        for name in ("w13", "w2"):
            weight, scale = quantize(getattr(layer, f"{name}_weight"))
            replace_parameter(layer, f"{name}_weight", weight)
            replace_parameter(layer, f"{name}_weight_scale", scale)
        layer._already_called_process_weights_after_loading = True

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM's runs."""


for _key in INT8_FOR:
    base._ONLINE_LINEAR_METHODS[_key] = NPUInt8LinearMethod
    base._ONLINE_MOE_METHODS[_key] = NPUInt8MoEMethod


def compact(model: nn.Module) -> None:
    """Copy the parameters into new segments, so that those with unquantised weights are freed."""
    from vllm_sleep_ascend.memory.pool import use_pool

    with use_pool("weights"):
        clone_parameters(model, lambda parameter: parameter.device.type == "npu")
