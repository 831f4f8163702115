# SPDX-License-Identifier: Apache-2.0
"""What a model should answer: Hugging Face's greedy tokens on the CPU."""

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Change = Callable[[torch.nn.Module], None]

MAX_NUM_BATCHED_TOKENS = 256
"""Of the engines under test; one prompt is longer, so that its prefill comes in chunks."""

PROMPTS = (
    "Hello",
    "import os\nimport sys\n",
    "The quick brown fox jumps over the lazy dog.",
    "def main(argv):\n    parser = argparse.ArgumentParser()",
    "1 + 1 =",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 3,
    "Once upon a time, in a land far away, there lived a programmer who wrote only comments. " * 4,
    "".join(f"Line {i} says that {i * 7919 % 101} is its number.\n" for i in range(60)),
)


@cache
def tokenizer(model: str | os.PathLike[str]):
    return AutoTokenizer.from_pretrained(model)


@torch.no_grad()
def merge(adapter: Path, network: torch.nn.Module) -> None:
    """Add a LoRA adapter's products to the weights."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    halves = load_file(adapter / "adapter_model.safetensors")
    parameters = dict(network.named_parameters())
    for key in (key for key in halves if ".lora_A." in key):
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        a, b = halves[key], halves[key.replace(".lora_A.", ".lora_B.")]
        weight = parameters[name]
        weight += (b.to(weight.dtype) @ a.to(weight.dtype)) * config["lora_alpha"] / config["r"]


@cache
def _hf_greedy(
    model: Path, prompts: tuple[str, ...], n: int, dtype: torch.dtype, change: Change | None
) -> tuple[tuple[int, ...], ...]:
    # Eager attention: the one that knows soft caps.
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, attn_implementation="eager"
    ).eval()
    if change is not None:
        change(network)
    answers = []
    for prompt in prompts:
        ids = tokenizer(model)(prompt, return_tensors="pt").input_ids
        tokens = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(tuple(tokens[0, ids.shape[1] :].tolist()))
    return tuple(answers)


def hf_greedy(
    model: str | os.PathLike[str],
    prompts: Sequence[str] = PROMPTS,
    n: int = 24,
    dtype: torch.dtype = torch.float32,
    change: Change | None = None,
) -> list[list[int]]:
    """Greedy tokens of ``prompts``, each alone, ``n`` of each, end-of-text included; after
    ``change`` of the model's weights."""
    answers = _hf_greedy(Path(model), tuple(prompts), n, dtype, change)
    return [list(answer) for answer in answers]


def vllm_greedy(llm, prompts: Sequence[str] = PROMPTS, n: int = 24, **kwargs) -> list[list[int]]:
    """The same of an engine, all prompts in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    answers = llm.generate(list(prompts), params, use_tqdm=False, **kwargs)
    return [list(answer.outputs[0].token_ids) for answer in answers]
