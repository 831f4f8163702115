# SPDX-License-Identifier: Apache-2.0
"""The seeded models of the tests, and other checkpoints of the same architecture."""

import fcntl
import os
import runpy
import shutil
import zlib
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from helpers import ROOT

MODELS = ROOT / "build" / "models"


@cache
def make_model(name: str) -> Path:
    """The seeded model of that name, created if it does not exist yet."""
    out = MODELS / name
    MODELS.mkdir(parents=True, exist_ok=True)
    with (MODELS / f".{name}.lock").open("w") as lock:  # another process may want it too
        fcntl.flock(lock, fcntl.LOCK_EX)
        _maker()["make_model"](name, out)
    return out


@cache
def _maker() -> dict[str, Any]:
    import torch  # noqa: F401  with torch_npu, which the program does without

    with mock.patch.dict(os.environ):
        return runpy.run_path(str(ROOT / "examples" / "make_model.py"))


def other_weights(model: Path, out: Path) -> Path:
    """A copy of the model with the rows of every matrix in another, seeded order."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out)
    weights = load_file(model / "model.safetensors")
    for name, tensor in weights.items():
        order = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        weights[name] = tensor[torch.randperm(len(tensor), generator=order)]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out
