# SPDX-License-Identifier: Apache-2.0
"""vLLM's layerwise reload: what a load has left out, and how it is aborted.

vLLM moves a model's parameters aside, collects the loaded tensors of each layer, and assembles the
layer once it has all of its elements. At the end of a load it also assembles layers with fewer,
because some are padded. Shards that are really missing then have the content of unwritten memory.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor, to_meta_tensor

from vllm_sleep_ascend.rank.weights.shards import shards_of
from vllm_sleep_ascend.rank.weights.unwritten import mark, unwritten

if TYPE_CHECKING:
    from vllm.config import ModelConfig

try:
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
except ImportError:  # vLLM 0.23
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    def is_deferred_attention_layer(layer: nn.Module) -> bool:
        return isinstance(layer, Attention | MLAAttention)


def missing_shards(model: nn.Module) -> list[str]:
    """The missing shards of partly loaded layers, by their names in checkpoints.

    Layers without any loaded shard do not count, because an update may leave layers unchanged.
    """
    return [
        name
        for path, layer in model.named_modules()
        if _is_begun(layer)
        for name in _missing_of(model, path, layer)
    ]


def call_off(model: nn.Module, model_config: "ModelConfig") -> None:
    """Abort a running load, if any. Layers that were not assembled get their previous parameters
    back."""
    infos = [get_layerwise_info(layer) for layer in model.modules()]
    if any(info.can_load() for info in infos):
        for info in infos:
            info.load_numel = 0
            info.loaded_weights.clear()
        finalize_layerwise_reload(model, model_config)
    unwrap_loaders(model)


def unwrap_loaders(model: nn.Module) -> None:
    """Remove vLLM's loader from parameters of layers that no load is collecting.

    vLLM does this itself when it assembles a layer. Other layers get back the parameters that were
    moved aside. But a bias is never moved, and keeps a loader that drops everything after the load.
    """
    for layer in model.modules():
        if get_layerwise_info(layer).can_load():
            continue
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            if _is_vllms(getattr(tensor, "weight_loader", None)):
                tensor.weight_loader = _loader(tensor)  # type: ignore[attr-defined]


def forget(models: Iterable[nn.Module]) -> None:
    """Release the layers: vLLM's information on how to load a layer again refers to the layer."""
    for model in models:
        for layer in model.modules():
            LAYERWISE_INFO.pop(layer, None)


def _is_begun(layer: nn.Module) -> bool:
    info = get_layerwise_info(layer)
    return (
        info.load_numel_total is not None
        and 0 < info.load_numel < info.load_numel_total
        and not is_deferred_attention_layer(layer)
    )


def _missing_of(model: nn.Module, path: str, layer: nn.Module) -> Iterator[str]:
    """Load the collected tensors into marked host memory, and find the marks that are left."""
    copies: dict[str, torch.Tensor] = {}
    for name, parameter in layer.named_parameters(recurse=False):
        with torch.device("cpu"):
            copies[name] = materialize_meta_tensor(to_meta_tensor(parameter))
        mark(copies[name])
    for name, arguments in get_layerwise_info(layer).loaded_weights:
        if name not in copies:
            continue
        collected = arguments.arguments["param"]
        arguments.arguments["param"] = copies[name]
        try:
            _loader(collected)(*arguments.args, **arguments.kwargs)
        finally:
            arguments.arguments["param"] = collected
    for name, copy in copies.items():
        shards = shards_of(model, f"{path}.{name}", copy)
        for shard, missing in zip(shards, unwritten(shards.values()), strict=True):
            if missing:
                yield shard


def _loader(parameter: torch.Tensor) -> Callable[..., object]:
    """The parameter's own loader, without vLLM's wrappers."""
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    loader: Callable[..., object] = getattr(parameter, "weight_loader", default_weight_loader)
    while _is_vllms(loader):
        loader = loader.__wrapped__  # type: ignore[attr-defined]
    return loader


def _is_vllms(loader: object) -> bool:
    return getattr(loader, "__name__", "") == "online_process_loader"
