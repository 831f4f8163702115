# SPDX-License-Identifier: Apache-2.0
"""Shared code of the benchmarks."""
