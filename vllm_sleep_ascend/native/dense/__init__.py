# SPDX-License-Identifier: Apache-2.0
"""Norms, activations and rotary embedding by torch_npu's operators, one launch each.

vLLM's own versions are plain PyTorch, several launches each. They stay for what an operator does
not take, and for operators that this device or its CANN does not have.
"""
