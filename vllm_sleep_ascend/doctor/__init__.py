# SPDX-License-Identifier: Apache-2.0
"""``vllm-sleep doctor``: whether sleep mode can work on this machine, before an engine runs.

Nothing here imports vLLM, torch or torch_npu. A child process (``child.py``) calls AscendCL and
probes the device, so a probe that hangs or crashes becomes one line of the report.
"""
