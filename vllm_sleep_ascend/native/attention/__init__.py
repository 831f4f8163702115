# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention backend for NPUs."""
