# SPDX-License-Identifier: Apache-2.0
"""Other checkpoints of the same architecture."""

import shutil
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def other_weights(model: Path, out: Path) -> Path:
    """A copy of the model in which every matrix has its rows in another, seeded order."""
    shutil.copytree(model, out)
    weights = load_file(model / "model.safetensors")
    for name, tensor in weights.items():
        order = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        weights[name] = tensor[torch.randperm(len(tensor), generator=order)]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out
