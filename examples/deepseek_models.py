# SPDX-License-Identifier: Apache-2.0
"""What `make_model.py` needs to make models of DeepSeek's shape: configurations and layers.

They have multi-head latent attention, and after a dense layer a mixture of experts, one of which
every token takes. The parameters have the names of published checkpoints.
"""

from collections.abc import Iterator
from typing import Any

Config = dict[str, Any]
Parameter = tuple[str, tuple[int, ...], float]

KINDS = ("deepseek_v2", "deepseek_v3")

_LATENT: Config = {
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
}
_YARN: Config = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def configs(tiny: Config) -> dict[str, Config]:
    """By name. ``tiny``: what all tiny models have."""
    v2 = {
        **tiny,
        **_LATENT,
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
    }
    v3 = {
        **v2,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rope_scaling": _YARN,
    }
    return {
        # Queries are projected at once, and any experts are chosen.
        "tiny-deepseek-v2-lite": {
            **v2,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
        },
        # Queries are projected through a lower rank, and experts chosen in the best groups.
        "tiny-deepseek-v2": {
            **v2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 2.0,
        },
        # Without experts.
        "tiny-deepseek-v2-dense": {
            **v2,
            "first_k_dense_replace": tiny["num_hidden_layers"],
            "n_routed_experts": 0,
        },
        # They are chosen by a sigmoid with a bias, and positions are stretched.
        "tiny-deepseek-v3": v3,
        # The same with a layer that predicts the token after the next.
        "tiny-deepseek-v3-mtp": {**v3, "num_nextn_predict_layers": 1},
    }


def mtp_layer(prefix: str, config: Config) -> Iterator[Parameter]:
    """The parameters of the layer after the last, which drafts. It adds little to its input."""
    hidden, shape = config["hidden_size"], (config["vocab_size"], config["hidden_size"])
    for name, size, gain in layer(prefix, config["num_hidden_layers"], config):
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        yield name, size, 0.1 * gain if adds else gain
    for norm in ("input_layernorm", "post_attention_layernorm", "enorm", "hnorm"):
        yield f"{prefix}{norm}.weight", (hidden,), 1.0
    yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden), 0.1
    yield f"{prefix}shared_head.norm.weight", (hidden,), 1.0
    yield f"{prefix}embed_tokens.weight", shape, 1.0
    yield f"{prefix}shared_head.head.weight", shape, 2.0


def layer(prefix: str, index: int, config: Config) -> Iterator[Parameter]:
    """The parameters of a layer, but for its norms."""
    yield from _attention(f"{prefix}self_attn.", config)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    mlps = {f"{prefix}mlp.": (inner, 0.5)}
    if index >= config["first_k_dense_replace"]:
        experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
        # Rounding can change who is chosen, so no expert weighs much.
        routed = 0.25 / config["routed_scaling_factor"]
        yield f"{prefix}mlp.gate.weight", (experts, hidden), 2.0
        if config["topk_method"] == "noaux_tc":
            yield f"{prefix}mlp.gate.e_score_correction_bias", (experts,), 0.1
        mlps = {f"{prefix}mlp.experts.{expert}.": (inner, routed) for expert in range(experts)}
        mlps[f"{prefix}mlp.shared_experts."] = inner * config["n_shared_experts"], 0.5
    for mlp, (inner, gain) in mlps.items():
        yield f"{mlp}gate_proj.weight", (inner, hidden), 1.5
        yield f"{mlp}up_proj.weight", (inner, hidden), 1.5
        yield f"{mlp}down_proj.weight", (hidden, inner), gain


def copy_of(name: str) -> str | None:
    """The parameter whose copy this one is, in a layer for drafts."""
    if ".layers." not in name:
        return None
    copies = {"shared_head.head": "lm_head", "embed_tokens": "model.embed_tokens"}
    return next(
        (f"{of}.weight" for end, of in copies.items() if name.endswith(f".{end}.weight")), None
    )


def _attention(prefix: str, config: Config) -> Iterator[Parameter]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    queries, q_rank = heads * (nope + rope), config["q_lora_rank"]
    # Large queries and keys, so that the softmax concentrates on few tokens.
    if q_rank is None:
        yield f"{prefix}q_proj.weight", (queries, hidden), 2.0
    else:
        yield f"{prefix}q_a_proj.weight", (q_rank, hidden), 1.0
        yield f"{prefix}q_a_layernorm.weight", (q_rank,), 1.0
        yield f"{prefix}q_b_proj.weight", (queries, q_rank), 2.0
    yield f"{prefix}kv_a_proj_with_mqa.weight", (rank + rope, hidden), 2.0
    yield f"{prefix}kv_a_layernorm.weight", (rank,), 1.0
    yield f"{prefix}kv_b_proj.weight", (heads * (nope + value), rank), 1.0
    yield f"{prefix}o_proj.weight", (hidden, heads * value), 0.7
