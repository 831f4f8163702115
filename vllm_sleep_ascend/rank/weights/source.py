# SPDX-License-Identifier: Apache-2.0
"""Where weights came from. A checkpoint can bring back what level 2 discards, a trainer has to send
it again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

Kind = Literal[
    "checkpoint",
    "trainer",  # a weight update, by whichever backend
    "iterator",  # of reload_weights
    "load_weights",  # of the model, called by a user's code
    "mark_weights_loaded",  # a load that nobody saw
    "dummy",  # vLLM's load format of random weights
]

FIRST_VERSION = "default"
"""vLLM's version of weights to which nobody gave one."""


class WeightsSource:
    """Of one model: ``kind`` and ``path`` (None unless a checkpoint) of the last load that
    succeeded, and the version that its weights have."""

    def __init__(self, model: Any, kind: Kind, path: str | None) -> None:
        self.kind, self.path = kind, path
        self._first = path
        self._given: str | None = None
        self._discarded = False
        self._loading = False
        model.load_weights = self._watched(model.load_weights)

    @property
    def version(self) -> str:
        """As it was given to these weights; else the path of a checkpoint that is not the first."""
        if self._given is not None:
            return self._given
        another = self.path is not None and self.path != self._first
        return str(self.path) if another else FIRST_VERSION

    def give_version(self, version: str) -> None:
        """Note the version of the weights that are there now."""
        self._given = version

    def discarded(self) -> None:
        """Note that the content is gone."""
        self._discarded = True

    def loaded(self, kind: Kind, path: str | None = None) -> None:
        """Note a load. The version that was given belongs to the source that the weights had."""
        if (kind, path) != (self.kind, self.path):
            self._given = None
        self.kind, self.path = kind, path
        self._discarded = False

    def loaded_unseen(self) -> None:
        """Note a load that was not watched; it may have completed one that was."""
        if self._discarded or self.kind in ("checkpoint", "dummy"):
            self.loaded("mark_weights_loaded")

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Inside, the model's ``load_weights`` is part of a load that the caller notes."""
        self._loading = True
        try:
            yield
        finally:
            self._loading = False

    def _watched(self, stock: Callable) -> Callable:
        @wraps(stock)
        def load_weights(*args: Any, **kwargs: Any) -> Any:
            names = stock(*args, **kwargs)
            if not self._loading:
                self.loaded("load_weights")
            return names

        return load_weights
