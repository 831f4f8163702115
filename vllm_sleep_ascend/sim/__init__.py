# SPDX-License-Identifier: Apache-2.0
"""Runs programs on a simulated Ascend NPU: the `npu-sim` command and its operators."""
