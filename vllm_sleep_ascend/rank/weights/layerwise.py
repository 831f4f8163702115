# SPDX-License-Identifier: Apache-2.0
"""vLLM's layerwise reload: what a load has left out, and how it is called off.

vLLM moves a model's parameters aside, collects what is loaded of each layer, and puts the layer
together once it has as many numbers as the layer. At the end of a load it also puts together the
layers that have fewer, because some are padded; what is really missing then comes from memory that
nobody wrote.
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
    """What is missing of layers of which a load has brought a part, by the names of checkpoints.

    Layers of which it brought nothing are none of them: an update may leave layers as they are.
    """
    return [
        name
        for path, layer in model.named_modules()
        if _is_begun(layer)
        for name in _missing_of(model, path, layer)
    ]


def call_off(model: nn.Module, model_config: "ModelConfig") -> None:
    """End a load that is under way, if one is: every layer that was not put together has the
    parameters that it had before."""
    infos = [get_layerwise_info(layer) for layer in model.modules()]
    if any(info.can_load() for info in infos):
        for info in infos:
            info.load_numel = 0
            info.loaded_weights.clear()
        finalize_layerwise_reload(model, model_config)
    unwrap_loaders(model)


def unwrap_loaders(model: nn.Module) -> None:
    """Take vLLM's loader off parameters of layers that no load is collecting for.

    vLLM does so itself when it puts a layer together. Other layers get back the parameters that
    were moved aside; a bias is never moved and keeps that loader, which drops all it is given once
    the load is over.
    """
    for layer in model.modules():
        if get_layerwise_info(layer).can_load():
            continue
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            if _is_vllms(getattr(tensor, "weight_loader", None)):
                tensor.weight_loader = _loader(tensor)  # type: ignore[attr-defined]


def forget(models: Iterable[nn.Module]) -> None:
    """Let go of the layers. vLLM remembers by layer how to load it again, and what it remembers
    refers to the layer."""
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
    """Load what was collected into marked memory of the host, and look at what is left."""
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
    """The loader of the parameter's own, below those that vLLM put around it."""
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    loader: Callable[..., object] = getattr(parameter, "weight_loader", default_weight_loader)
    while _is_vllms(loader):
        loader = loader.__wrapped__  # type: ignore[attr-defined]
    return loader


def _is_vllms(loader: object) -> bool:
    return getattr(loader, "__name__", "") == "online_process_loader"
