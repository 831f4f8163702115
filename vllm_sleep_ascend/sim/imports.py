# SPDX-License-Identifier: Apache-2.0
"""Import hooks: code that runs before and after a module's body."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

Around = Callable[[ModuleType], AbstractContextManager[None]]


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, around: Around) -> None:
        self.loader, self.around = loader, around

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with self.around(module):
            self.loader.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, hooks: dict[str, Around]) -> None:
        self.hooks = hooks

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.hooks:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _Loader(spec.loader, self.hooks[name])
        return spec


def hook(hooks: dict[str, Around]) -> None:
    """Execute each named module inside its context manager, which is called with the module."""
    sys.meta_path.insert(0, _Finder(hooks))
