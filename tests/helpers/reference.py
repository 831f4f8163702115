# SPDX-License-Identifier: Apache-2.0
"""The expected tokens: Hugging Face's greedy tokens on the CPU."""

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Change = Callable[[torch.nn.Module], None]

MAX_NUM_BATCHED_TOKENS = 256
"""For the engines under test. One prompt is longer, so that its prefill is chunked."""

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
FEW = PROMPTS[:3]
"""Enough to see which weights an engine serves."""
FEW_TOKENS = 8


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


@torch.no_grad()
def round_weights(network: torch.nn.Module) -> None:
    """To 8 bits, as the engine does."""
    from vllm_sleep_ascend.native.int8 import linear, quantize

    for name, weight in network.named_parameters():
        if "_proj" in name and weight.dim() > 1:
            levels, scale = quantize(weight)
            identity = torch.eye(weight.shape[-1]).expand(*weight.shape[:-2], -1, -1)
            rounded = torch.stack([linear(*x) for x in _matrices(identity, levels, scale)])
            weight.copy_(rounded.transpose(-1, -2).view_as(weight))


def _matrices(
    identity: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor
) -> Iterator[tuple[Any, ...]]:
    many = levels.dim() == 3
    for i in range(levels.shape[0] if many else 1):
        eye, matrix, steps = (t[i] if many else t for t in (identity, levels, scale))
        yield eye, matrix, None, steps


class _Network:
    """A Hugging Face model and its cached answers."""

    def __init__(self, model: Path, change: Change | None) -> None:
        # Only eager attention supports soft caps.
        self._network = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        if change is not None:
            change(self._network)
        self._tokenizer = tokenizer(model)
        self._answers: dict[str, list[int]] = {}
        self._rounded: torch.nn.Module | None = None

    def answer(self, prompt: str, n: int) -> list[int]:
        known = self._answers.get(prompt, [])
        if len(known) < n:
            ids = self._tokenizer(prompt, return_tensors="pt").input_ids
            tokens = self._network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            known = self._answers[prompt] = tokens[0, ids.shape[1] :].tolist()
        return known[:n]

    @torch.no_grad()
    def lead_and_rounding(self, prompt: str, answer: Sequence[int]) -> tuple[float, float]:
        """The most that the best logit is above that of a token of ``answer``, and the standard
        deviation of what bfloat16 changes in a logit on this processor."""
        if self._rounded is None:
            self._rounded = copy.deepcopy(self._network).bfloat16()
        ids = self._tokenizer(prompt, return_tensors="pt").input_ids
        whole = torch.cat((ids, torch.tensor([answer])), 1)
        logits, rounded = (
            network(whole).logits[0, ids.shape[1] - 1 : -1].float()
            for network in (self._network, self._rounded)
        )
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        return (logits.amax(1) - chosen).max().item(), (logits - rounded).std().item()


_network = cache(_Network)


def hf_greedy(
    model: str | os.PathLike[str],
    prompts: Sequence[str] = PROMPTS,
    n: int = 24,
    change: Change | None = None,
) -> list[list[int]]:
    """``n`` greedy tokens of each prompt, one by one, end-of-text included.

    ``change`` changes the model's weights first.
    """
    network = _network(Path(model), change)
    return [network.answer(prompt, n) for prompt in prompts]


def assert_greedy(
    model: str | os.PathLike[str],
    answers: Sequence[Sequence[int]],
    prompts: Sequence[str] = PROMPTS,
    change: Change | None = None,
) -> None:
    """Each token has the best logit after those before it, or one that is less than four standard
    deviations of the rounding to 16 bits below it.

    Of two logits that are nearly equal, the better one depends on rounding, and rounding on the
    processor.
    """
    network = _network(Path(model), change)
    for prompt, answer in zip(prompts, answers, strict=True):
        lead, rounding = network.lead_and_rounding(prompt, answer)
        assert lead < 4 * rounding, f"after {prompt[:40]!r}, the best logit is not chosen"


def hf_few(model: str | os.PathLike[str], change: Change | None = None) -> list[list[int]]:
    """A few tokens of a few prompts, enough to distinguish weights."""
    return hf_greedy(model, FEW, FEW_TOKENS, change)
