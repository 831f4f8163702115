# SPDX-License-Identifier: Apache-2.0
"""Code shared by tests, by subject."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
GIB = 1 << 30
