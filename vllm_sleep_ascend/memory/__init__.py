# SPDX-License-Identifier: Apache-2.0
"""Device memory of one process that can sleep: torch's pools, vLLM's backend, what is held."""
