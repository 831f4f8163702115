# SPDX-License-Identifier: Apache-2.0
"""Saved images of engines without a device."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from vllm_sleep_ascend.errors import ImageError
from vllm_sleep_ascend.rank.agreement import Agreement
from vllm_sleep_ascend.rank.image import saving
from vllm_sleep_ascend.rank.image.filling import Image, image_of

ENGINE = {
    "architecture": ["Qwen2ForCausalLM"],
    "model": {"hidden_size": 64, "num_hidden_layers": 2},
    "vllm": "0.32.0",
    "tensor_parallel_size": 1,
    "dtype": "bfloat16",
    "quantization": None,
}
ORIGIN = {"source": "trainer", "path": None, "version": "step-7"}


class Model(nn.Module):
    """Has one of everything: 21 MB of parameters, a part of one, two names of one, a buffer that no
    checkpoint has, a scalar, an empty one, a transposed one, and a tensor in an attribute."""

    def __init__(self, seed: int, rows: int = 5_000_001) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.large = nn.Parameter(torch.rand(rows, generator=random))
        self.inner = nn.Linear(7, 3)
        self.tied = self.inner.weight
        self.part = nn.Parameter(self.large.data[1000:2000])
        self.turned = nn.Parameter(torch.rand(5, 9, generator=random, dtype=torch.float64).t())
        self.register_buffer("table", torch.rand(33, generator=random).half(), persistent=False)
        self.register_buffer("scale", torch.rand((), generator=random))
        self.empty = nn.Parameter(torch.empty(0))
        self.derived = [torch.rand(11, generator=random), "no tensor"]
        nn.init.uniform_(self.inner.weight, generator=random)
        nn.init.uniform_(self.inner.bias, generator=random)

    def content(self) -> dict[str, torch.Tensor]:
        named = (*self.named_parameters(remove_duplicate=False), *self.named_buffers())
        return {**{name: t.detach().clone() for name, t in named}, "derived": self.derived[0]}

    def content_in_place(self) -> list[torch.Tensor]:
        """Each memory once."""
        own = [p.data for name, p in self.named_parameters() if name != "part"]
        return [*own, *self.buffers(), self.derived[0]]


def parts(
    model: nn.Module,
    missing: tuple[str, ...] = (),
    reason: str | None = None,
    corrupt: bool = False,
    engine: object = ENGINE,
    rank: int = 0,
    ranks: int = 1,
    **origin: Any,
) -> tuple[Any, Any, Any, Any]:
    """The worker, the weights, the hooks and the identity of a rank of an engine without a device,
    whose weights are all of its memory."""
    worker = SimpleNamespace(
        rank=rank,
        device=torch.device("cpu"),
        sleep_mode_backend=SimpleNamespace(ranges=lambda tag: [(0, 1 << 62)]),
        model_runner=SimpleNamespace(get_model=lambda: model),
        get_draft_model=lambda: None,
        parallel_config=SimpleNamespace(world_size=ranks, enable_eplb=False, data_parallel_size=1),
    )
    worker.vllm_config = SimpleNamespace(parallel_config=worker.parallel_config, lora_config=None)
    weights = SimpleNamespace(
        updating=False,
        content=SimpleNamespace(missing=lambda: list(missing), corrupt=corrupt),
        origin=lambda: {**ORIGIN, **origin},
    )
    return worker, weights, SimpleNamespace(image_refusal=lambda: reason), engine


def save(model: nn.Module, directory: Path | str, replace: bool = False, **options: Any) -> None:
    """As the only rank of an engine."""
    worker, *others = parts(model, **options)
    agreement = Agreement(0, 1, 0, 60)
    with mock.patch.object(saving, "wait_for_device"):
        saving.save(worker, agreement, *others, directory=str(directory), replace=replace)


def two_ranks(directory: Path) -> list[saving._Attempt]:
    """Of an engine that replaces an image, and has written its parts."""
    models = [Model(4, 10), Model(5, 10)]
    attempts = [
        saving._Attempt(*parts(model, rank=rank, ranks=2), directory, True)
        for rank, model in enumerate(models)
    ]
    facts = [attempt.facts() for attempt in attempts]
    with mock.patch.object(saving, "wait_for_device"):
        for attempt in attempts:
            attempt.judge(facts)
            attempt.write()
    return attempts


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_filled(directory: Path, source: Model, rows: int = 5_000_001) -> None:
    target = Model(2, rows)
    Image(directory, 0, ENGINE).fill(target)
    for (name, found), expected in zip(
        target.content().items(), source.content().values(), strict=True
    ):
        assert torch.equal(found, expected), name
    image = image_of(target)
    assert image is not None and image.origin == ORIGIN


def holds(directory: Path, source: Model) -> bool:
    """Whether it is a whole image with the content of that small model, also as that of a rank of
    two."""
    target = Model(2, 10)
    try:
        Image(directory, 0, ENGINE).fill(target)
    except ImageError:
        return False
    return torch.equal(target.large, source.large)


def no_library(*_: object, **__: object) -> None:
    """Instead of a C library that can exchange two names."""
