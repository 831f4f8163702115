# SPDX-License-Identifier: Apache-2.0
"""What `make_model.py` needs to make EAGLE heads: draft models that see states of their target.

A head's answer is close to the embedding of the last token. The targets' last layers lean towards a
successor of each token (``LEAN``), so a head guesses right more often than not. It has no embedding
of its own and takes the target's. The parameters have the names of published checkpoints.
"""

from typing import Any

import torch

Config = dict[str, Any]

_NOISE = 0.05  # so that each parameter matters

HEADS: dict[str, Config] = {
    # Shares the target's last layer too.
    "tiny-llama-eagle": {"target": "tiny-llama", "method": "eagle"},
    # Sees the states of three layers, and knows three of four tokens.
    "tiny-llama-eagle3": {"target": "tiny-llama", "method": "eagle3"},
}


def config_of(head: Config, target: Config) -> Config:
    """The content of its config.json."""
    config = {**target, "num_hidden_layers": 1}
    if head["method"] == "eagle3":
        config |= {
            "architectures": ["LlamaForCausalLMEagle3"],
            "num_key_value_heads": target["num_attention_heads"],
            "draft_vocab_size": len(_known(target["vocab_size"])),
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
        }
    return config


def weights(
    head: Config, config: Config, last_layer: torch.Tensor, random: torch.Generator
) -> dict[str, torch.Tensor]:
    """
    Args:
        config: the head's own.
        last_layer: the target's, ``[vocabulary, hidden]``.
    """
    size, inner = config["hidden_size"], config["intermediate_size"]
    kv = size // config["num_attention_heads"] * config["num_key_value_heads"]
    one = torch.eye(size)

    def noise(rows: int, columns: int, gain: float = _NOISE) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * gain / columns**0.5

    def norm() -> torch.Tensor:
        return 1 + 0.1 * torch.randn(size, generator=random)

    mlp = {
        "mlp.gate_proj.weight": noise(inner, size, 1.5),
        "mlp.up_proj.weight": noise(inner, size, 1.5),
        "mlp.down_proj.weight": noise(size, inner),
        "post_attention_layernorm.weight": norm(),
    }
    if head["method"] == "eagle":
        layer = {
            "self_attn.q_proj.weight": noise(size, size, 2.0),
            "self_attn.k_proj.weight": noise(kv, size, 2.0),
            "self_attn.v_proj.weight": noise(kv, size, 1.0),
            "self_attn.o_proj.weight": noise(size, size),
            **mlp,
        }
        found = {"fc.weight": torch.cat((one, noise(size, size)), dim=1)}
        return {**_under("layers.0.", layer), **found}
    # Each token attends to itself, and what it takes is its embedding.
    embedding = torch.cat((one, torch.zeros(size, size)), dim=1)
    layer = {
        "self_attn.q_proj.weight": 3 * embedding + noise(size, 2 * size),
        "self_attn.k_proj.weight": 3 * embedding + noise(kv, 2 * size),
        "self_attn.v_proj.weight": embedding + noise(kv, 2 * size),
        "self_attn.o_proj.weight": one + noise(size, size),
        "input_layernorm.weight": norm(),
        "hidden_norm.weight": norm(),
        **mlp,
    }
    known = _known(config["vocab_size"])
    knows = torch.zeros(config["vocab_size"], dtype=torch.bool)
    knows[known] = True
    return {
        **_under("midlayer.", layer),
        "fc.weight": noise(size, 3 * size),
        "norm.weight": norm(),
        "lm_head.weight": last_layer[known],
        "d2t": known - torch.arange(len(known)),
        "t2d": knows,
    }


def _known(vocab_size: int) -> torch.Tensor:
    """The target's tokens that a head of EAGLE-3 knows."""
    tokens = torch.arange(vocab_size)
    return tokens[tokens % 4 != 3]


def _under(prefix: str, layer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: weight for name, weight in layer.items()}
