# SPDX-License-Identifier: Apache-2.0
"""The operator's side, over HTTP: it imports neither vLLM nor torch."""
