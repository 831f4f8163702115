# SPDX-License-Identifier: Apache-2.0
"""The replacements have the kernels' parameters, because vLLM passes arguments by name."""

import importlib
import inspect

import pytest
import torch  # noqa: F401  before torch_npu, which torch loads by itself

pytest.importorskip("torch_npu", exc_type=ImportError, reason="needs CANN or the simulator")


def test_parameters_are_the_kernels():
    from vllm_sleep_ascend.native.kernels import KERNELS

    for name, ours in KERNELS.items():
        parts = name.split(".")
        at = next(i for i, part in enumerate(parts) if part[0].isupper() or part.endswith("kernel"))
        kernel = importlib.import_module(".".join(parts[:at]))
        for part in parts[at:]:
            kernel = getattr(kernel, part)
        # In a process that made a worker it is registered already, with the kernel's names.
        names = getattr(kernel, "arg_names", None)
        names = names or list(inspect.signature(getattr(kernel, "func", kernel)).parameters)
        assert list(inspect.signature(ours).parameters) == list(names), name
