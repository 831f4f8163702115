# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own library, which imports.

What it ships links CANN libraries that are not simulated and does not load. Its operators are
defined with torch_npu's (``npu``), and where `make setup-ascend` has built its sleep-mode
allocator, the module has that.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

LIBRARY = "vllm_ascend.vllm_ascend_C"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != LIBRARY:
            return None
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        allocator = Path(sys.prefix) / "camem" / f"vllm_ascend_C{suffix}"
        if allocator.exists():
            return importlib.util.spec_from_file_location(name, allocator)
        return importlib.machinery.ModuleSpec(name, self)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """From now on, the library can be imported."""
    sys.meta_path.insert(0, _Finder())
