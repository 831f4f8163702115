# SPDX-License-Identifier: Apache-2.0
"""What stock vLLM needs to run on an NPU with torch_npu alone: plain PyTorch, no kernels."""
