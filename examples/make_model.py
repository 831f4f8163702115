# SPDX-License-Identifier: Apache-2.0
"""Create a model with seeded random weights in Hugging Face's format, without a download.

    python examples/make_model.py tiny-qwen2 build/models/tiny-qwen2

The folder has the same files as a published model: config.json, model.safetensors, tokenizer.json
and so on. The same name gives the same weights everywhere. The tokenizer is a real byte-level BPE,
trained on the source of Python's standard library. The weights are meaningless, but scaled so that
attention concentrates on few tokens and the next token has a clear winner: greedy decoding depends
on the whole context and does not get stuck on one token.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # Weights are created on the host.

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).parent))  # where it is run by path, from another folder
import deepseek_models
import eagle_models
import lora_adapters
import vision_models

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT_MODULES = "argparse ast calendar csv datetime difflib doctest email.message inspect"
TEXT_MODULES += " ipaddress json.decoder locale logging mailbox optparse pathlib pickle pydoc"
TEXT_MODULES += " statistics string subprocess tarfile textwrap threading typing unittest.mock"
# As in Qwen2's tokenizer.json.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TINY: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

RECIPE = 1
"""Must change whenever the weights of a name change."""

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-qwen2": {**_TINY, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    # A draft model for tiny-qwen2: its vocabulary, other weights.
    "tiny-qwen2-draft": {
        **_TINY,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
    },
    # Wide enough that its weights weigh more than what is around them.
    "small-qwen2": {
        **_TINY,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
    },
    "tiny-llama": {
        **_TINY,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
    },
    "tiny-gemma2": {
        **_TINY,
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    # Heads of a size that NPUs have attention for, whatever the batch.
    "tiny-qwen3": {
        **_TINY,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 64,
        "attention_bias": False,
    },
    # The same with a sliding window in each layer.
    "tiny-mistral": {
        **_TINY,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "head_dim": 64,
        "sliding_window": 16,
    },
    "tiny-qwen3-moe": {
        **_TINY,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "attention_bias": False,
    },
    "qwen2.5-0.5b": {
        **_TINY,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    **deepseek_models.configs(_TINY),
    **vision_models.configs(_TINY),
}

NAMES = (*CONFIGS, *lora_adapters.ADAPTERS, *eagle_models.HEADS)

TIED_DEVIATION = 0.03
LEAN = 1.5

Shape = tuple[int, ...]


def parameters(config: dict[str, Any]) -> Iterator[tuple[str, Shape, float]]:
    """Name, shape and gain of every parameter; a matrix has deviation gain / sqrt(inputs)."""
    for name, shape, gain in text_parameters(text_config(config)):
        yield vision_models.rename(name, config), shape, gain
    yield from vision_models.parameters(config)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("text_config", config)


def text_parameters(config: dict[str, Any]) -> Iterator[tuple[str, Shape, float]]:
    hidden, kind = config["hidden_size"], config["model_type"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden), 1.0
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        if kind == "phi3":
            yield from _fused_layer(layer, hidden, q, kv, config["intermediate_size"])
            continue
        if kind in deepseek_models.KINDS:
            yield from deepseek_models.layer(layer, index, config)
            yield f"{layer}input_layernorm.weight", (hidden,), 1.0
            yield f"{layer}post_attention_layernorm.weight", (hidden,), 1.0
            continue
        # Large queries and keys, so that the softmax concentrates on few tokens.
        for name, rows, gain in (("q", q, 2.0), ("k", kv, 2.0), ("v", kv, 1.0)):
            yield f"{layer}self_attn.{name}_proj.weight", (rows, hidden), gain
            if kind in ("qwen2", "qwen2_5_vl"):
                yield f"{layer}self_attn.{name}_proj.bias", (rows,), 0.1 * gain
        yield f"{layer}self_attn.o_proj.weight", (hidden, q), 0.7
        if kind in ("qwen3", "qwen3_moe", "qwen3_vl_text"):
            yield f"{layer}self_attn.q_norm.weight", (head,), 1.5
            yield f"{layer}self_attn.k_norm.weight", (head,), 1.5
        if kind == "qwen3_moe":
            yield f"{layer}mlp.gate.weight", (config["num_experts"], hidden), 2.0
            mlps = [f"{layer}mlp.experts.{e}." for e in range(config["num_experts"])]
            inner = config["moe_intermediate_size"]
        else:
            mlps, inner = [f"{layer}mlp."], config["intermediate_size"]
        for mlp in mlps:
            yield f"{mlp}gate_proj.weight", (inner, hidden), 1.5
            yield f"{mlp}up_proj.weight", (inner, hidden), 1.5
            yield f"{mlp}down_proj.weight", (hidden, inner), 0.5
        norms = ["input_layernorm", "post_attention_layernorm"]
        if kind == "gemma2":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for norm in norms:
            yield f"{layer}{norm}.weight", (hidden,), 1.0
    for index in range(config.get("num_nextn_predict_layers", 0)):
        layer = f"model.layers.{config['num_hidden_layers'] + index}."
        yield from deepseek_models.mtp_layer(layer, config)
    # Scales the logits of tied embeddings, which are small, to a deviation of about 3.
    tied = config["tie_word_embeddings"]
    yield "model.norm.weight", (hidden,), 3.0 / (TIED_DEVIATION * hidden**0.5) if tied else 1.0
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden), 2.0


def _fused_layer(
    layer: str, hidden: int, q: int, kv: int, inner: int
) -> Iterator[tuple[str, Shape, float]]:
    yield f"{layer}self_attn.qkv_proj.weight", (q + 2 * kv, hidden), 2.0
    yield f"{layer}self_attn.o_proj.weight", (hidden, q), 0.7
    yield f"{layer}mlp.gate_up_proj.weight", (2 * inner, hidden), 1.5
    yield f"{layer}mlp.down_proj.weight", (hidden, inner), 0.5
    yield f"{layer}input_layernorm.weight", (hidden,), 1.0
    yield f"{layer}post_attention_layernorm.weight", (hidden,), 1.0


def make_weight(
    name: str, shape: Shape, gain: float, config: dict[str, Any], used_vocab: int
) -> torch.Tensor:
    """A bfloat16 parameter, seeded by its name."""
    text = text_config(config)
    name = deepseek_models.copy_of(name) or name
    random = torch.Generator().manual_seed(zlib.crc32(f"{config['model_type']} {name}".encode()))
    weight = torch.randn(shape, generator=random)
    if len(shape) == 1 and name.endswith(".weight"):
        # Gemma stores a norm's weight minus one.
        weight = weight * 0.1 + gain - (1.0 if config["model_type"] == "gemma2" else 0.0)
    elif len(shape) == 1:
        weight *= gain
    elif shape[0] != text["vocab_size"]:
        weight *= gain / math.prod(shape[1:]) ** 0.5
        if name.endswith("eh_proj.weight"):  # mostly the embedding of the last token
            weight[:, : shape[0]] += torch.eye(shape[0])
    elif text["tie_word_embeddings"]:
        # Small as an input compared with the layers' output, otherwise every token predicts itself.
        weight *= TIED_DEVIATION
        # Rows that no text uses must not win.
        weight[used_vocab:] *= 0.01
    elif name == "lm_head.weight":
        # A token leans towards its neighbour's successor, by about as much as the context weighs:
        # sequences move on, and the best logit leads by more than rounding can change.
        embedding = vision_models.rename("model.embed_tokens.weight", config)
        before = make_weight(embedding, shape, 1.0, config, used_vocab).float()
        order = torch.randperm(shape[0], generator=random)
        weight[order] += LEAN * before[order.roll(1)]
        weight *= gain / shape[1] ** 0.5
        # The token of an image never wins: another image would have to come with it.
        first = vision_models.FIRST_TOKEN
        weight[first : first + len(vision_models.tokens(config))] = 0
    return weight.to(torch.bfloat16)


def train_tokenizer(vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens, special tokens first."""
    library = Path(argparse.__file__).parent
    files = [library / f"{name.replace('.', '/')}" for name in TEXT_MODULES.split()]
    files = [f / "__init__.py" if f.is_dir() else f.with_suffix(".py") for f in files]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f.read_text(encoding="utf-8") for f in files), trainer)
    return tokenizer


def processor_files(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a vision model's processor, its own code apart."""
    template = {"chat_template": vision_models.chat_template(config)}
    return {**vision_models.processor_files(config), "chat_template.json": template}


def recipe_of(name: str) -> dict[str, Any]:
    """All that the files of a folder are made from, to tell whether it is up to date."""
    if name in lora_adapters.ADAPTERS:
        return {"recipe": RECIPE, **lora_adapters.ADAPTERS[name]}
    if name in eagle_models.HEADS:
        head = eagle_models.HEADS[name]
        return {"recipe": RECIPE, **head, **eagle_models.config_of(head, CONFIGS[head["target"]])}
    config = CONFIGS[name]
    files = processor_files(config) if vision_models.tokens(config) else {}
    return {"recipe": RECIPE, **config, **files, **vision_models.code(config)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_model(config: dict[str, Any], folder: Path) -> None:
    """Write every file of a model into an existing folder."""
    text = text_config(config)
    special_tokens = [*SPECIAL_TOKENS, *vision_models.tokens(config)]
    tokenizer = train_tokenizer(min(text["vocab_size"], 8192), special_tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    texts = {
        "config.json": {**config, **end, "torch_dtype": "bfloat16", "use_cache": True},
        "generation_config.json": {**end, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": SPECIAL_TOKENS[0],
            "pad_token": SPECIAL_TOKENS[0],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": text["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
        "special_tokens_map.json": {"eos_token": SPECIAL_TOKENS[0], "pad_token": SPECIAL_TOKENS[0]},
    }
    if vision_models.tokens(config):
        processor = processor_files(config)
        texts |= processor
        texts["tokenizer_config.json"] |= processor["chat_template.json"]
    for name, code in vision_models.code(config).items():
        (folder / name).write_text(code, encoding="utf-8")
    for name, content in texts.items():
        write_json(folder / name, content)
    used_vocab = tokenizer.get_vocab_size()
    weights = {
        name: make_weight(name, shape, gain, config, used_vocab)
        for name, shape, gain in parameters(config)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(name: str, folder: Path) -> None:
    """Write every file of an adapter into an existing folder."""
    adapter = lora_adapters.ADAPTERS[name]
    base = parameters(CONFIGS[adapter["base_model_name_or_path"]])
    weights = {key: weight.to(torch.bfloat16) for key, weight in lora_adapters.weights(name, base)}
    write_json(folder / "adapter_config.json", lora_adapters.config_of(adapter))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_head(name: str, folder: Path) -> None:
    """Write every file of an EAGLE head into an existing folder."""
    head = eagle_models.HEADS[name]
    target = CONFIGS[head["target"]]
    config = eagle_models.config_of(head, target)
    shape = (target["vocab_size"], target["hidden_size"])
    last_layer = make_weight("lm_head.weight", shape, 1.0, target, target["vocab_size"])
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weights = eagle_models.weights(head, config, last_layer, random)
    for parameter, weight in weights.items():
        weights[parameter] = weight.to(torch.bfloat16) if weight.is_floating_point() else weight
    write_json(folder / "config.json", {**config, "torch_dtype": "bfloat16"})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_model(name: str, out: str | os.PathLike[str]) -> Path:
    """Create the folder of a model, an adapter or an EAGLE head, unless a complete one exists.

    Raises:
        ValueError: no such model, or ``out`` exists with other content.
    """
    if name not in NAMES:
        raise ValueError(f"no model {name!r}; there are {', '.join(NAMES)}")
    folder = Path(out)
    marker, recipe = folder / "make_model.json", recipe_of(name)
    if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == recipe:
        print(f"{folder}: {name} is there already")
        return folder
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        if name in lora_adapters.ADAPTERS:
            write_adapter(name, unfinished)
        elif name in eagle_models.HEADS:
            write_head(name, unfinished)
        else:
            write_model(CONFIGS[name], unfinished)
        (unfinished / marker.name).write_text(json.dumps(recipe), encoding="utf-8")
        unfinished.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: made {name}, {size / 1e6:.1f} MB")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("out", metavar="OUT", help="folder to create")
    args = parser.parse_args()
    try:
        make_model(args.name, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"make_model: {error}")


if __name__ == "__main__":
    main()
