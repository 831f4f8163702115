# SPDX-License-Identifier: Apache-2.0
"""vllm-ascend's own sleep-mode allocator, where `make setup-ascend` has built it.

The library that vllm-ascend ships links CANN libraries that are not simulated and does not load.
Its allocator module alone gets the allocator's part of that library instead, so that what follows
from the library's absence, no custom operators, stays as it is.
"""

import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

LIBRARY = "vllm_ascend.vllm_ascend_C"


@contextmanager
def with_its_library(module: ModuleType) -> Iterator[None]:
    """While the body of vllm-ascend's ``camem`` runs, its library is the allocator's part."""
    path = Path(sys.prefix) / "camem" / f"vllm_ascend_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if LIBRARY in sys.modules or not path.exists():
        yield
        return
    spec = importlib.util.spec_from_file_location(LIBRARY, path)
    assert spec is not None and spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    sys.modules[LIBRARY] = library
    try:
        yield
    finally:
        del sys.modules[LIBRARY]
