# SPDX-License-Identifier: Apache-2.0
"""``vllm-sleep doctor``: whether sleep mode can work on this machine, before an engine runs.

Nothing here imports vLLM, torch or torch_npu, and the process that prints the report calls no
AscendCL: a child process (``child.py``) probes the device, so that a probe that hangs or crashes is
one line of the report.
"""
