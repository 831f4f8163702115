# SPDX-License-Identifier: Apache-2.0
"""What `make_model.py` needs to make vision models: configurations, towers and processors.

The towers have the parameters of published checkpoints, by the same names, and are small. The
processors are those that Transformers ships, but for Phi-3-vision's (`phi3v_processor.py`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Config = dict[str, Any]
Parameter = tuple[str, tuple[int, ...], float]

FIRST_TOKEN = 3
"""The id of the first token that only vision models have."""

_QWEN_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
_SMOLVLM_TOKENS = {
    "image_token_id": "<image>",
    "fake_image_token_id": "<fake_token_around_image>",
    "global_image_token_id": "<global-img>",
    "end_of_utterance_token_id": "<end_of_utterance>",
}
_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
_TOKENS = {
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "qwen2_5_vl": [*_QWEN_TOKENS.values()],
    "qwen3_vl": [*_QWEN_TOKENS.values()],
    "smolvlm": [*_SMOLVLM_TOKENS.values(), *_TILES],
}
_IMAGE = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "smolvlm": "<image>",
}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _ids(tokens: dict[str, str]) -> Config:
    return {key: FIRST_TOKEN + index for index, key in enumerate(tokens)}


def configs(tiny: Config) -> dict[str, Config]:
    """Every vision model's config.json, around a tiny text model."""
    hidden = tiny["hidden_size"]
    heads = {"head_dim": 32, "attention_bias": False}
    return {
        # vLLM knows one tower for it, CLIP's ViT-L/14-336, of which this has the first layer, and
        # one token for images, which is beyond a tiny vocabulary. A published model calls
        # itself phi3_v, which Transformers does not know.
        "tiny-phi3v": {
            **tiny,
            "model_type": "phi3",
            "architectures": ["Phi3VForCausalLM"],
            "vocab_size": 32064,
            "sliding_window": None,
            "img_processor": {
                "name": "clip_vision_model",
                "layer_idx": 0,
                "type_feature": "patch",
                "image_dim_out": 1024,
                "num_img_tokens": 144,
            },
            "embd_layer": {
                "embedding_cls": "image",
                "use_hd_transform": True,
                "with_learnable_separator": True,
                "hd_transform_order": "sub_glb",
                "projection_cls": "mlp",
            },
        },
        # Three rotary positions for each token, and attention within windows in two of three
        # layers of the tower.
        "tiny-qwen2.5-vl": {
            **tiny,
            **_ids(_QWEN_TOKENS),
            "model_type": "qwen2_5_vl",
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "depth": 3,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 4,
                "hidden_act": "silu",
                "out_hidden_size": hidden,
                "in_chans": 3,
                "patch_size": 14,
                "spatial_patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "tokens_per_second": 2,
                "window_size": 112,
                "fullatt_block_indexes": [1],
            },
        },
        # Learned positions that are interpolated, and a layer of the tower whose output goes into
        # the text model's first layer.
        "tiny-qwen3-vl": {
            **_ids(_QWEN_TOKENS),
            "model_type": "qwen3_vl",
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "tie_word_embeddings": False,
            "text_config": {
                **tiny,
                **heads,
                "model_type": "qwen3_vl_text",
                "rope_scaling": {
                    "rope_type": "default",
                    "mrope_section": [6, 5, 5],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "model_type": "qwen3_vl",
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 4,
                "hidden_act": "gelu_pytorch_tanh",
                "out_hidden_size": hidden,
                "in_channels": 3,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
        },
        # An image as tiles and as a whole.
        "tiny-smolvlm": {
            **_ids(_SMOLVLM_TOKENS),
            "model_type": "smolvlm",
            "architectures": ["SmolVLMForConditionalGeneration"],
            "scale_factor": 2,
            "tie_word_embeddings": False,
            "text_config": {
                **tiny,
                **heads,
                "model_type": "llama",
                "architectures": ["VLlama3ForCausalLM"],
                "mlp_bias": False,
            },
            "vision_config": {
                "model_type": "smolvlm_vision",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 16,
                "hidden_act": "gelu_pytorch_tanh",
                "layer_norm_eps": 1e-6,
            },
        },
    }


def tokens(config: Config) -> list[str]:
    """The special tokens that only this model has."""
    return _TOKENS.get(config["model_type"], [])


def chat_template(config: Config) -> str:
    if config["model_type"] == "phi3":  # vLLM puts an image's number into the text
        return (
            "{% for message in messages %}{{ '<|' + message['role'] + '|>\n'"
            " + message['content'] + '<|end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        )
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        f"{{{{ '{_IMAGE[config['model_type']]}' if part['type'] == 'image' else part['text'] }}}}"
        "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def processor_files(config: Config) -> dict[str, Config]:
    """The files of the processor, with limits on an image's size that fit the tower."""
    kind, tower = config["model_type"], config.get("vision_config", {})
    if kind == "phi3":
        return {
            "processor_config.json": {
                "processor_class": "Phi3VProcessor",
                "auto_map": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"},
                "num_crops": 2,
            },
        }
    if kind == "smolvlm":
        size = tower["image_size"]
        return {
            "preprocessor_config.json": {
                **_HALF,
                "image_processor_type": "SmolVLMImageProcessor",
                "processor_class": "SmolVLMProcessor",
                "size": {"longest_edge": 4 * size},
                "max_image_size": {"longest_edge": size},
                "video_sampling": {
                    "fps": 1,
                    "max_frames": 4,
                    "video_size": {"longest_edge": size},
                },
            },
            "processor_config.json": {
                "processor_class": "SmolVLMProcessor",
                "image_seq_len": (size // tower["patch_size"] // config["scale_factor"]) ** 2,
            },
        }
    name = "Qwen2_5_VLProcessor" if kind == "qwen2_5_vl" else "Qwen3VLProcessor"
    token = tower["patch_size"] * tower["spatial_merge_size"]
    limits = {
        **_HALF,
        "processor_class": name,
        "patch_size": tower["patch_size"],
        "merge_size": tower["spatial_merge_size"],
        "temporal_patch_size": tower["temporal_patch_size"],
        "size": {"shortest_edge": 4 * token**2, "longest_edge": 64 * token**2},
    }
    video = "Qwen2VLVideoProcessor" if kind == "qwen2_5_vl" else "Qwen3VLVideoProcessor"
    return {
        "preprocessor_config.json": {**limits, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {**limits, "video_processor_type": video},
    }


def code(config: Config) -> dict[str, str]:
    """The Python files that come with the model."""
    if config["model_type"] != "phi3":
        return {}
    processor = Path(__file__).with_name("phi3v_processor.py")
    return {"processing_phi3_v.py": processor.read_text(encoding="utf-8")}


def rename(name: str, config: Config) -> str:
    """A text parameter's name in the vision model."""
    inner = {"qwen3_vl": "model.language_model.", "smolvlm": "model.text_model."}
    prefix = inner.get(config["model_type"], "model.")
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name


def parameters(config: Config) -> Iterator[Parameter]:
    """Name, shape and gain of every parameter of the tower, and of what joins it to the text."""
    kind = config["model_type"]
    if kind == "phi3":
        yield from _phi3v(config)
    elif kind == "smolvlm":
        yield from _smolvlm(config)
    elif kind in ("qwen2_5_vl", "qwen3_vl"):
        yield from _qwen(config)


def _linear(name: str, outputs: int, inputs: int, gain: float = 1.0) -> Iterator[Parameter]:
    yield f"{name}.weight", (outputs, inputs), gain
    yield f"{name}.bias", (outputs,), 0.1


def _norm(name: str, size: int, bias: bool = True) -> Iterator[Parameter]:
    yield f"{name}.weight", (size,), 1.0
    if bias:
        yield f"{name}.bias", (size,), 0.1


def _qwen(config: Config) -> Iterator[Parameter]:
    tower, third = config["vision_config"], config["model_type"] == "qwen3_vl"
    hidden, inner, out = (tower[k] for k in ("hidden_size", "intermediate_size", "out_hidden_size"))
    merged = hidden * tower["spatial_merge_size"] ** 2
    root = "model.visual." if third else "visual."
    patch = (tower["temporal_patch_size"], tower["patch_size"], tower["patch_size"])
    yield f"{root}patch_embed.proj.weight", (hidden, 3, *patch), 1.0
    if third:
        yield f"{root}patch_embed.proj.bias", (hidden,), 0.1
        yield f"{root}pos_embed.weight", (tower["num_position_embeddings"], hidden), hidden**0.5
    for index in range(tower["depth"]):
        block = f"{root}blocks.{index}."
        yield from _norm(f"{block}norm1", hidden, bias=third)
        yield from _norm(f"{block}norm2", hidden, bias=third)
        yield from _linear(f"{block}attn.qkv", 3 * hidden, hidden, 1.5)
        yield from _linear(f"{block}attn.proj", hidden, hidden)
        if third:
            yield from _linear(f"{block}mlp.linear_fc1", inner, hidden, 1.5)
            yield from _linear(f"{block}mlp.linear_fc2", hidden, inner)
        else:
            yield from _linear(f"{block}mlp.gate_proj", inner, hidden, 1.5)
            yield from _linear(f"{block}mlp.up_proj", inner, hidden, 1.5)
            yield from _linear(f"{block}mlp.down_proj", hidden, inner)
    if not third:
        yield from _norm(f"{root}merger.ln_q", hidden, bias=False)
        yield from _linear(f"{root}merger.mlp.0", merged, merged, 1.5)
        yield from _linear(f"{root}merger.mlp.2", out, merged, 1.5)
        return
    mergers = [("merger", hidden)]
    deep = range(len(tower["deepstack_visual_indexes"]))
    mergers += [(f"deepstack_merger_list.{index}", merged) for index in deep]
    for name, normed in mergers:
        yield from _norm(f"{root}{name}.norm", normed)
        yield from _linear(f"{root}{name}.linear_fc1", merged, merged, 1.5)
        yield from _linear(f"{root}{name}.linear_fc2", out, merged, 1.5)


def _encoder_layer(layer: str, hidden: int, inner: int) -> Iterator[Parameter]:
    """A layer of CLIP or SigLIP."""
    yield from _norm(f"{layer}layer_norm1", hidden)
    yield from _norm(f"{layer}layer_norm2", hidden)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from _linear(f"{layer}self_attn.{name}", hidden, hidden, 1.5)
    yield from _linear(f"{layer}mlp.fc1", inner, hidden, 1.5)
    yield from _linear(f"{layer}mlp.fc2", hidden, inner)


def _smolvlm(config: Config) -> Iterator[Parameter]:
    tower, text = config["vision_config"], config["text_config"]
    hidden, inner, patch = (tower[k] for k in ("hidden_size", "intermediate_size", "patch_size"))
    root = "model.vision_model."
    yield f"{root}embeddings.patch_embedding.weight", (hidden, 3, patch, patch), 1.0
    yield f"{root}embeddings.patch_embedding.bias", (hidden,), 0.1
    positions = (tower["image_size"] // patch) ** 2
    yield f"{root}embeddings.position_embedding.weight", (positions, hidden), hidden**0.5
    for index in range(tower["num_hidden_layers"]):
        yield from _encoder_layer(f"{root}encoder.layers.{index}.", hidden, inner)
    yield from _norm(f"{root}post_layernorm", hidden)
    joined = hidden * config["scale_factor"] ** 2
    yield "model.connector.modality_projection.proj.weight", (text["hidden_size"], joined), 1.0


def _phi3v(config: Config) -> Iterator[Parameter]:
    hidden, inner, patch, positions = 1024, 4096, 14, 577
    root = "model.vision_embed_tokens."
    tower = f"{root}img_processor.vision_model."
    yield f"{tower}embeddings.class_embedding", (hidden,), 1.0
    yield f"{tower}embeddings.patch_embedding.weight", (hidden, 3, patch, patch), 1.0
    yield f"{tower}embeddings.position_embedding.weight", (positions, hidden), hidden**0.5
    yield from _norm(f"{tower}pre_layrnorm", hidden)
    for index in range(config["img_processor"]["layer_idx"] + 1):
        yield from _encoder_layer(f"{tower}encoder.layers.{index}.", hidden, inner)
    yield f"{root}glb_GN", (1, 1, 4 * hidden), (4 * hidden) ** 0.5
    yield f"{root}sub_GN", (1, 1, 1, 4 * hidden), (4 * hidden) ** 0.5
    yield from _linear(f"{root}img_projection.0", config["hidden_size"], 4 * hidden, 1.0)
    yield from _linear(f"{root}img_projection.2", config["hidden_size"], config["hidden_size"], 2.0)
