# SPDX-License-Identifier: Apache-2.0
"""One OpenAI-compatible port in front of several vLLM servers that take turns on one device.

python -m vllm_sleep_ascend.proxy http://127.0.0.1:8001 http://127.0.0.1:8002 --port 8000
"""
