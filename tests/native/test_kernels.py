# SPDX-License-Identifier: Apache-2.0
"""The replacements have the kernels' parameters, because vLLM passes arguments by name."""

import importlib
import inspect

import pytest
import torch

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


def test_top_k_and_top_p_run_where_triton_is(monkeypatch):
    """As beside Triton for Ascend: vLLM then calls its Triton kernel on every device."""
    from vllm.v1.sample.ops import topk_topp_sampler

    from vllm_sleep_ascend.native import kernels

    for module in (kernels, topk_topp_sampler):
        monkeypatch.setattr(module, "HAS_TRITON", True)
    for name in ("apply_top_k_top_p_pytorch", "apply_top_k_top_p_triton"):
        stock = getattr(topk_topp_sampler, name, None)
        monkeypatch.setattr(topk_topp_sampler, name, stock, raising=False)
    monkeypatch.setattr(kernels, "_done", False)
    monkeypatch.setattr(kernels, "register_kernels", lambda _: None)
    kernels.replace_triton_kernels()
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [4.0, 1.0, 1.0, 1.0]])
    left = topk_topp_sampler.apply_top_k_top_p(
        logits.clone(), torch.tensor([2, 4]), torch.tensor([1.0, 0.5])
    )
    inf = float("inf")
    assert left.tolist() == [[-inf, 3.0, 2.0, -inf], [4.0, -inf, -inf, -inf]]
