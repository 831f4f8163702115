# SPDX-License-Identifier: Apache-2.0
"""Defines torchvision's compiled operators where its wheel cannot load them.

PyPI's wheel for x86-64 is linked with CUDA. Beside a CPU build of torch its library does not load,
and `import torchvision` fails at the first operator that it wants to extend. What vision models
need of it, its transforms, is plain torch. The operators are only declared: calling one fails.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = tuple(
    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")
)


@contextmanager
def around_import(module: ModuleType) -> Iterator[None]:
    """For `imports.hook`: declare the operators before torchvision's own modules run."""
    if not _loads(Path(str(module.__file__)).parent):
        _declare()
    yield


def _loads(package: Path) -> bool:
    for library in package.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            return False
    return True


def _declare() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept.append(library)


_kept: list[torch.library.Library] = []  # what a library defines goes with it
