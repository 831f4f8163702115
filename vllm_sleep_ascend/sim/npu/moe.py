# SPDX-License-Identifier: Apache-2.0
"""Operators of a mixture of experts."""

KERNELS: dict = {}
