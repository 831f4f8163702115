# SPDX-License-Identifier: Apache-2.0
"""Names and helpers that tests share."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "build" / "models"
MIB = 1 << 20
GIB = 1 << 30


def make_model(name: str) -> Path:
    """The seeded model of that name, made if it is not there yet."""
    out = MODELS / name
    subprocess.run([sys.executable, ROOT / "examples" / "make_model.py", name, out], check=True)
    return out
