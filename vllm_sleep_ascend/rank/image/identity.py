# SPDX-License-Identifier: Apache-2.0
"""Which engine an image fits: one of the same model, versions, parallel layout, dtype and
quantisation."""

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from vllm_sleep_ascend.config import IMAGE_FORMAT, KEY, SleepModeConfig
from vllm_sleep_ascend.errors import ImageError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_NAMED = 4  # differences of a model's configuration
_OF_FILES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # not of the model
_REMEDIES = {
    "model": "start with the model of the image, or save one of this model",
    "vllm": "install that version of vLLM, or save the image again with this one",
    "vllm_sleep_ascend": "install that version, or save the image again with this one",
    "torch_npu": "install that version, or save the image again with this one",
    "device": "start on such a device, or save an image on this one",
}
_SAME_OPTION = "start with the option of the engine that saved it, or save the image again"


def identity_of(vllm_config: "VllmConfig") -> dict[str, Any]:
    """Of an engine whose model has not been made yet: making it may change its configuration."""
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    hf_config = model.hf_config.to_dict()
    made = {
        "architecture": model.architectures,
        "model": {name: value for name, value in hf_config.items() if name not in _OF_FILES},
        "untied_by_checkpoint": bool(getattr(model, "word_embeddings_untied_by_checkpoint", False)),
        "vllm": version("vllm"),
        "vllm_sleep_ascend": version("vllm_sleep_ascend"),
        "torch_npu": version("torch_npu"),
        "device": current_platform.get_device_name(torch.accelerator.current_device_index()),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "enable_expert_parallel": bool(parallel.enable_expert_parallel),
        "expert_placement_strategy": getattr(parallel, "expert_placement_strategy", "linear"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
    }
    text = json.dumps(made, default=str, skipkeys=True)
    plain: dict[str, Any] = json.loads(text, parse_constant=str)  # NaN is not equal to itself
    return plain


def identity_or_reason(vllm_config: "VllmConfig") -> dict[str, Any] | str:
    """The identity, or why this engine has none: it starts all the same, and saves no image."""
    try:
        return identity_of(vllm_config)
    except Exception as error:
        return (
            "the model's configuration cannot be written down, by which an image is known "
            f"({type(error).__name__}: {error}); save its checkpoint instead"
        )


def check(directory: object, image: Mapping[str, Any], engine: Mapping[str, Any]) -> None:
    """
    Raises:
        ImageError: they differ; names each difference, with what either has and the remedy.
    """
    differences = [
        text
        for name in (*engine, *(name for name in image if name not in engine))
        for text in _differences(name, image.get(name), engine.get(name))
    ]
    if differences:
        raise ImageError(f"{directory} does not fit this engine: {'; '.join(differences)}")


def refusal(vllm_config: "VllmConfig") -> str | None:
    """Why an engine with these options has no images; None if it has."""
    parallel, offload = vllm_config.parallel_config, getattr(vllm_config, "offload_config", None)
    if vllm_config.lora_config is not None:
        return "LoRA adapters (enable_lora), which an image does not hold; merge the adapter first"
    if parallel.enable_eplb:
        return "enable_eplb, which moves experts between ranks; leave it out"
    if parallel.data_parallel_size > 1:
        return (
            f"data_parallel_size={parallel.data_parallel_size}, whose engines would write the same "
            "files; use data_parallel_size=1, with a server for each engine"
        )
    if offload is not None and (offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size):
        return (
            "offloaded weights, which are not in device memory; leave out --cpu-offload-gb and "
            "--offload-group-size"
        )
    return None


def check_start(vllm_config: "VllmConfig") -> None:
    """Before an engine starts.

    Raises:
        ValueError: it would start from an image and does not say which, or cannot.
    """
    directory = SleepModeConfig.from_vllm_config(vllm_config).image_dir
    wanted = vllm_config.load_config.load_format == IMAGE_FORMAT
    if wanted and directory is None:
        raise ValueError(
            f"load_format={IMAGE_FORMAT!r} needs the option image_dir of "
            f"additional_config[{KEY!r}], the directory of a saved image"
        )
    if directory is not None and not wanted:
        raise ValueError(
            f"additional_config[{KEY!r}]: image_dir={directory!r} needs --load-format "
            f"{IMAGE_FORMAT} (load_format={vllm_config.load_config.load_format!r} would load a "
            "checkpoint); add it, or leave out image_dir"
        )
    if wanted and (reason := refusal(vllm_config)) is not None:
        raise ValueError(f"load_format={IMAGE_FORMAT!r} is not supported with {reason}")


def _differences(name: str, image: Any, engine: Any) -> Iterator[str]:
    if name == "untied_by_checkpoint" or image == engine:
        return
    remedy = _REMEDIES.get(name, _SAME_OPTION)
    if name != "model" or not (isinstance(image, dict) and isinstance(engine, dict)):
        yield f"{name} is {image!r} in the image and {engine!r} here ({remedy})"
        return
    keys = [key for key in sorted({*image, *engine}) if image.get(key) != engine.get(key)]
    told = [f"{key} {image.get(key)!r} and {engine.get(key)!r}" for key in keys[:_NAMED]]
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    yield f"the model's configuration, in the image and here: {', '.join(told)}{more} ({remedy})"
