# SPDX-License-Identifier: Apache-2.0
"""Engines of vllm-ascend that tests share."""

import os

# Before vLLM is imported.
os.environ.setdefault("VLLM_ASCEND_ENABLE_NZ", "0")  # as its guide to sleep mode sets it
