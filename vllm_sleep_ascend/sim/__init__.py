# SPDX-License-Identifier: Apache-2.0
"""Running on a simulated Ascend NPU: the `npu-sim` command and its operators."""
