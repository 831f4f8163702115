# SPDX-License-Identifier: Apache-2.0
"""The common command line of the five experiments, and the servers' options."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from servers import ExperimentFailed, Model

EXAMPLES = Path(__file__).resolve().parent.parent
MAKE_MODEL = EXAMPLES / "make_model.py"
MODELS = EXAMPLES.parent / "build" / "models"
PROMPTS = {"A": "The capital of France is", "B": "A short history of the steam engine:"}


def parser(description: str) -> argparse.ArgumentParser:
    """The options of all experiments."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    help = "a folder, OWNER/NAME of a hub, or a model of make_model.py"
    made.add_argument("--model-a", default="tiny-qwen2", help=help)
    made.add_argument("--model-b", default="tiny-llama", help=help)
    made.add_argument("--port-a", type=int, default=8001)
    made.add_argument("--port-b", type=int, default=8002)
    made.add_argument("--tp-a", type=int, default=1, help="tensor parallel size of A")
    made.add_argument("--tp-b", type=int, default=1, help="tensor parallel size of B")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--tokens", type=int, default=100, help="length of an answer")
    made.add_argument("--max-model-len", type=int, default=1024)
    made.add_argument("--max-num-batched-tokens", type=int, default=512)
    made.add_argument("--gpu-memory-utilization", type=float, default=0.75)
    made.add_argument("--options", default="", help="further options of vllm serve, for both")
    made.add_argument("--server-logs", type=Path, help="folder for the servers' own logs")
    return made


def serve_options(args: argparse.Namespace) -> list[str]:
    """Options of ``vllm serve`` for both models."""
    made = ["--max-model-len", str(args.max_model_len), "--no-enable-prefix-caching"]
    made += ["--max-num-batched-tokens", str(args.max_num_batched_tokens)]
    made += ["--gpu-memory-utilization", str(args.gpu_memory_utilization)]
    return [*made, *shlex.split(args.options)]


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The options that both arms of an experiment must share."""
    names = {"a": args.model_a, "b": args.model_b, "tp_a": args.tp_a, "tp_b": args.tp_b}
    return {**names, "rounds": args.rounds, "tokens": args.tokens}


def models(args: argparse.Namespace, serve: list[str], logs: Path) -> list[Model]:
    """A and B, not started yet.

    Raises:
        ExperimentFailed: a model cannot be created.
    """
    both = (
        ("A", args.model_a, args.port_a, args.tp_a),
        ("B", args.model_b, args.port_b, args.tp_b),
    )
    return [
        Model(
            label,
            prepare(name),
            port,
            [*serve, "--tensor-parallel-size", str(tp)],
            logs / f"server-{port}.log",
            PROMPTS[label],
        )
        for label, name, port, tp in both
    ]


def prepare(name: str) -> str:
    """The model for ``name``; models of make_model.py are created if they are missing."""
    if "/" in name or Path(name).exists():
        return name
    folder = MODELS / name
    if not folder.exists():
        place = folder.relative_to(EXAMPLES.parent)
        print(f"{place} is missing: making it with {MAKE_MODEL.name}", flush=True)
    # In a separate process, because make_model.py sets torch up for the host.
    made = subprocess.run(
        [sys.executable, MAKE_MODEL, name, folder], capture_output=True, text=True
    )
    if made.returncode != 0:
        raise ExperimentFailed(made.stderr.strip())
    return str(folder)
