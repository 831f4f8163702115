# SPDX-License-Identifier: Apache-2.0
"""Conversations about images, and Hugging Face's greedy answers to them."""

import base64
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

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


WIDE, SMALL, OTHER = Picture(1, 196, 140), Picture(2, 140, 84), Picture(3, 196, 140)
TEXT = "Describe this picture."
QUESTIONS = (
    Question((), TEXT),
    Question((WIDE,), TEXT),
    Question((OTHER,), TEXT),  # as large, so that only its content differs
    Question((WIDE, SMALL), "Compare these two. " * 4),
    Question((SMALL, OTHER, WIDE), "And these?"),
)


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
    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._processor = AutoProcessor.from_pretrained(model)
        self._network = AutoModelForImageTextToText.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._answers: dict[Question, list[int]] = {}

    def answer(self, question: Question) -> list[int]:
        if question not in self._answers:
            images = ({"type": "image", "image": p.image()} for p in question.pictures)
            inputs = self._processor.apply_chat_template(
                _conversation(question, *images),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            tokens = self._network.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            self._answers[question] = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        return self._answers[question]


_network = cache(_Network)


def hf_answers(model: Path, questions: Sequence[Question] = QUESTIONS) -> list[list[int]]:
    return [_network(model).answer(question) for question in questions]
