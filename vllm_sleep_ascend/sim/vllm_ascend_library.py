# SPDX-License-Identifier: Apache-2.0
"""Makes vllm-ascend's compiled library importable.

The shipped library links CANN libraries that are not simulated, so it cannot be loaded. ``npu``
defines its operators. If `make setup-ascend` has built vllm-ascend's own sleep-mode allocator, the
module contains it.
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
    """Make the library importable."""
    sys.meta_path.insert(0, _Finder())
