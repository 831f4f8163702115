# SPDX-License-Identifier: Apache-2.0
"""What `make_model.py` needs to make LoRA adapters in PEFT's format, each for one of its models.

Both factors, A and B, are random, so that an adapter changes the model from the first token on.
"""

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

Config = dict[str, Any]

ADAPTERS: dict[str, Config] = {
    name: {
        "base_model_name_or_path": "tiny-qwen2",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [f"{kind}_proj" for kind in kinds.split()],
    }
    for name, rank, kinds in (
        ("tiny-qwen2-lora", 8, "q k v o gate up down"),
        ("tiny-qwen2-lora-attention", 4, "q v"),
    )
}


def config_of(adapter: Config) -> Config:
    """The content of its adapter_config.json."""
    return {**adapter, "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}


def weights(
    name: str, base: Iterable[tuple[str, tuple[int, ...], float]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and float32 contents of all parameters. A name seeds its content.

    Args:
        base: name, shape and gain of each of the base model's parameters.
    """
    rank, targets = ADAPTERS[name]["r"], ADAPTERS[name]["target_modules"]
    for parameter, shape, gain in base:
        module = parameter.removesuffix(".weight")
        if module.split(".")[-1] not in targets or len(shape) != 2:
            continue
        for half, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
            key = f"base_model.model.{module}.lora_{half}.weight"
            random = torch.Generator().manual_seed(zlib.crc32(f"{name} {key}".encode()))
            yield key, torch.randn(size, generator=random) * (gain / 2 / size[1]) ** 0.5
