# SPDX-License-Identifier: Apache-2.0
"""The shards of fused parameters, by their names in checkpoints.

vLLM fuses several tensors of a checkpoint into one parameter: query, key and value; gate and up;
all experts of a layer.
"""

import torch
from torch import nn

_EXPERTS = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}


def plain(name: str) -> str:
    """A parameter's name without LoRA's wrapper of its layer."""
    return name.replace(".base_layer.", ".")


def shards_of(model: nn.Module, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The shards of a parameter as views; an unfused parameter itself.

    Args:
        name: the parameter's name in the model.
        parameter: its content, as in the model or of the same shape.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    kind = leaf.partition("_")[0]
    if kind in _EXPERTS and parameter.dim() > 1:
        return _of_experts(module, plain(path), leaf, parameter)
    layer, _, projection = plain(f"{path}.").rstrip(".").rpartition(".")
    parts = (getattr(model, "packed_modules_mapping", None) or {}).get(projection, ())
    sizes = getattr(module, "output_partition_sizes", ())
    axis = getattr(parameter, "output_dim", None) or 0
    if len(parts) < 2 or len(parts) != len(sizes) or parameter.shape[axis] != sum(sizes):
        return {plain(name): parameter}
    shards = torch.split(parameter, list(sizes), dim=axis)
    return {
        f"{layer}.{part}.{leaf}".lstrip("."): shard
        for part, shard in zip(parts, shards, strict=True)
    }


def _of_experts(
    module: nn.Module, path: str, leaf: str, parameter: torch.Tensor
) -> dict[str, torch.Tensor]:
    """``parameter`` is ``[experts of this rank, ...]``; gate and up share the second dimension."""
    kind, _, rest = leaf.partition("_")
    layer = path.removesuffix(".routed_experts")
    experts = _numbers(module, len(parameter))
    shards = {}
    for expert, content in zip(experts, parameter, strict=True):
        parts = content.chunk(len(_EXPERTS[kind]))
        for part, shard in zip(_EXPERTS[kind], parts, strict=True):
            shards[f"{layer}.{expert}.{part}.{rest}"] = shard
    return shards


def _numbers(module: nn.Module, count: int) -> list[int]:
    """This rank's experts by their numbers in the checkpoint."""
    local = getattr(module, "expert_map", None)
    if local is None:
        return list(range(count))
    return [number for number, place in enumerate(local.tolist()) if place >= 0]
