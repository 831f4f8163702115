# SPDX-License-Identifier: Apache-2.0
"""Conversations about images, and Hugging Face's greedy answers to them."""

import base64
import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import gelu, linear

TOKENS = 16


class Picture(NamedTuple):
    """A seeded image with large coloured spots."""

    seed: int
    width: int
    height: int

    def image(self) -> Image.Image:
        spots = np.random.default_rng(self.seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        size = (self.width, self.height)
        return Image.fromarray(spots).resize(size, Image.Resampling.BICUBIC)

    def url(self) -> str:
        """The image in a request over HTTP."""
        file = io.BytesIO()
        self.image().save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class Question(NamedTuple):
    pictures: tuple[Picture, ...]
    text: str


WIDE, FLAT, OTHER = Picture(1, 196, 140), Picture(2, 252, 112), Picture(3, 196, 140)
TEXT = "Describe this picture."
QUESTIONS = (
    Question((), TEXT),
    Question((WIDE,), TEXT),
    Question((OTHER,), TEXT),  # as large, so that only its content differs
    Question((WIDE, FLAT), "Compare these two. " * 4),
    Question((FLAT, OTHER, WIDE), "And these?"),
)


def options_of(model: Path) -> dict[str, Any]:
    """Options of an engine, for images alone."""
    if model.name == "tiny-phi3v":  # its processor comes with it
        return {"limit_mm_per_prompt": {"image": 3}, "trust_remote_code": True}
    return {"limit_mm_per_prompt": {"image": 3, "video": 0}}


def ask(llm: Any, questions: Sequence[Question] = QUESTIONS, n: int = TOKENS) -> list[list[int]]:
    """``n`` greedy tokens of each answer, in one batch, end-of-text included."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    conversations = [
        _conversation(
            question,
            *({"type": "image_pil", "image_pil": p.image()} for p in question.pictures),
        )
        for question in questions
    ]
    answers = llm.chat(conversations, params, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def messages(question: Question) -> list[dict[str, Any]]:
    """The question for ``/v1/chat/completions``."""
    urls = ({"url": picture.url()} for picture in question.pictures)
    return _conversation(question, *({"type": "image_url", "image_url": url} for url in urls))


def _conversation(question: Question, *images: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*images, {"type": "text", "text": question.text}]}]


class _Network:
    """A model of Transformers'."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._processor = AutoProcessor.from_pretrained(model)
        self._network = AutoModelForImageTextToText.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def answer(self, question: Question) -> list[int]:
        images = ({"type": "image", "image": p.image()} for p in question.pictures)
        inputs = self._processor.apply_chat_template(
            _conversation(question, *images),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = self._network.generate(**inputs, max_new_tokens=TOKENS, **GREEDY)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()


class _Phi3V:
    """Phi-3-vision, which Transformers does not have, from the parts that it has."""

    def __init__(self, model: Path) -> None:
        from safetensors.torch import load_file
        from transformers import (
            AutoConfig,
            AutoProcessor,
            CLIPVisionConfig,
            CLIPVisionModel,
            Phi3ForCausalLM,
        )

        self._processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
        eager = {"attn_implementation": "eager"}
        self._text = Phi3ForCausalLM(AutoConfig.from_pretrained(model, dtype="float32", **eager))
        shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        patches = {"image_size": 336, "patch_size": 14, "num_hidden_layers": 1}
        self._tower = CLIPVisionModel(CLIPVisionConfig(**shape, **patches, **eager))
        weights = {n: w.float() for n, w in load_file(model / "model.safetensors").items()}
        root = "model.vision_embed_tokens."
        text = {name: weight for name, weight in weights.items() if not name.startswith(root)}
        self._text.load_state_dict(text)
        tower = f"{root}img_processor.vision_model."
        found = {n.removeprefix(tower): w for n, w in weights.items() if n.startswith(tower)}
        missing, unknown = self._tower.load_state_dict(found, strict=False)
        assert not unknown, unknown
        assert all("post_layernorm" in name for name in missing), missing
        self._whole, self._row = weights[f"{root}glb_GN"], weights[f"{root}sub_GN"]
        first, second = (
            [weights[f"{root}img_projection.{layer}.{kind}"] for kind in ("weight", "bias")]
            for layer in (0, 2)
        )
        self._project = lambda x: linear(gelu(linear(x, *first)), *second)

    @torch.no_grad()
    def answer(self, question: Question) -> list[int]:
        numbers = range(1, len(question.pictures) + 1)
        text = "".join(f"<|image_{number}|>\n" for number in numbers) + question.text
        images = [picture.image() for picture in question.pictures]
        inputs = self._processor(f"<|user|>\n{text}<|end|>\n<|assistant|>\n", images)
        ids = inputs["input_ids"]
        embeddings = self._text.get_input_embeddings()(ids)
        if images:
            seen = map(self._see, inputs["pixel_values"], inputs["image_sizes"].tolist())
            embeddings[ids == 32044] = torch.cat(list(seen))
        tokens = self._text.generate(inputs_embeds=embeddings, max_new_tokens=TOKENS, **GREEDY)
        return tokens[0].tolist()

    def _see(self, pixels: torch.Tensor, size: list[int]) -> torch.Tensor:
        """An image's embeddings: its tiles, a separator, and the whole as one tile."""
        rows, columns = (length // 336 for length in size)
        features = self._tower(pixels[: rows * columns + 1], output_hidden_states=True)
        patches = features.hidden_states[-1][:, 1:].unflatten(1, (24, 24))
        tiles = patches[1:].unflatten(0, (rows, columns))
        grid = tiles.permute(0, 2, 1, 3, 4).reshape(24 * rows, 24 * columns, 1024)
        parts = [self._lines(grid), self._whole[0], self._lines(patches[0])]
        return self._project(torch.cat(parts))

    def _lines(self, patches: torch.Tensor) -> torch.Tensor:
        """Four patches in a square become a token, and a separator ends each row of them."""
        squares = patches.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).transpose(1, 2)
        merged = squares.flatten(2)
        return torch.cat([merged, self._row[0].expand(len(merged), -1, -1)], 1).flatten(0, 1)


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@cache
def _network(model: Path) -> _Network | _Phi3V:
    kind = json.loads((model / "config.json").read_text())["model_type"]
    return (_Phi3V if kind == "phi3" else _Network)(model)


@cache
def _answer(model: Path, question: Question) -> list[int]:
    return _network(model).answer(question)


def hf_answers(model: Path, questions: Sequence[Question] = QUESTIONS) -> list[list[int]]:
    """Transformers' answers."""
    return [_answer(model, question) for question in questions]
