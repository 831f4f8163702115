# SPDX-License-Identifier: Apache-2.0
"""The options of benchmarks that sleep and wake a model with a KV cache."""

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("npu", "cuda", "sim"), default="npu")
    parser.add_argument("--model", default=None, help="qwen2.5-7b, qwen2.5-14b or toy")
    parser.add_argument("--kv-blocks", type=int, default=None)
    parser.add_argument("--kv-block-mib", type=int, default=None)
    parser.add_argument("--chunk-mib", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None, help="folder for the results")


def fill_in_options(options: argparse.Namespace) -> bool:
    """Set missing options to the device's defaults. Returns whether these are toy sizes."""
    toy = options.device == "sim"
    options.model = options.model or ("toy" if toy else "qwen2.5-7b")
    options.kv_blocks = options.kv_blocks or (2 if toy else 28)
    options.kv_block_mib = options.kv_block_mib or (20 if toy else 1024)
    options.chunk_mib = options.chunk_mib or (4 if toy else 64)
    options.link_mib = 16 if toy else 1024
    return toy
