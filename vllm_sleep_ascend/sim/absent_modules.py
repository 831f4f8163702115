# SPDX-License-Identifier: Apache-2.0
"""Stubs for modules that vllm-ascend imports only for models that are not simulated.

The torchvision wheel for this torch is built for CUDA. Names can be imported; calling one fails.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

ABSENT = ("torchvision",)


class _Named(type):
    """A name in an absent module. It has every attribute and cannot be called."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _named(f"{cls.__qualname__}.{name}")

    def __call__(cls, *arguments: object, **named: object) -> None:
        raise RuntimeError(f"{cls.__qualname__} is not available on the simulated NPU")


def _named(path: str) -> type:
    return _Named(path, (), {"__qualname__": path, "__module__": path.split(".")[0]})


class _AbsentModule(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _named(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Make the absent modules importable."""
    sys.meta_path.append(_Finder())
