# SPDX-License-Identifier: Apache-2.0
"""A trainer's source of weights, as vLLM 0.32 and as vLLM 0.33 has it."""

from functools import cached_property
from types import SimpleNamespace

import pytest
import torch

from vllm_sleep_ascend.releases import full_weights, held_elsewhere

WEIGHTS = {"a": torch.zeros(1), "b": torch.ones(1)}
OWNERS = {"a": None, "b": (1,)}


class Source032:
    def __init__(self, held: list[str] | None) -> None:
        self._held = held

    def metadata(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in WEIGHTS]

    def __iter__(self):
        return iter(WEIGHTS.items())

    def held_names(self) -> list[str] | None:
        return self._held


class Source033:
    @cached_property
    def metadata(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, owners=OWNERS[name]) for name in WEIGHTS]

    def owned_names(self, rank: int) -> list[str]:
        return [m.name for m in self.metadata if m.owners is None or rank in m.owners]

    def iter_full(self):
        yield from WEIGHTS.items()


@pytest.mark.parametrize("source", [Source032(None), Source033()])
def test_all_weights_come_whole_and_anew_each_time(source) -> None:
    for _ in range(2):
        assert list(full_weights(source)) == list(WEIGHTS.items())


@pytest.mark.parametrize(
    ("source", "rank", "missing"),
    [
        (Source032(None), 0, []),
        (Source032(["a"]), 0, ["b"]),
        (Source033(), 0, ["b"]),
        (Source033(), 1, []),
    ],
)
def test_what_other_ranks_hold_alone_is_named(source, rank, missing) -> None:
    assert held_elsewhere(source, rank) == missing
