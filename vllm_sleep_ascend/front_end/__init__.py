# SPDX-License-Identifier: Apache-2.0
"""The process of ``LLM`` or of the server: checked input, typed errors, HTTP, metrics."""
