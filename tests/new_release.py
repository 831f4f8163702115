# SPDX-License-Identifier: Apache-2.0
"""What no longer holds of the vLLM and torch_npu in this environment: the list with which taking in
a release starts (``make next``).

    npu-sim python tests/new_release.py <vLLM's source distribution>
"""

import ast
import importlib
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm_sleep_ascend"
OF_ANOTHER_VLLM = ("beside", "sim")  # folders that import vllm-ascend's
ASLEEP = re.compile(r"enable_sleep_mode|sleep_mode|\bsleep\((level|mode)=|wake_up\(|/sleep\b")
CANN = re.compile(r"^(acl|Hccl|Msprof|rt[A-Z]|ge[A-Z])")


def replaced_callables() -> Iterator[str]:
    """That are missing, or take other parameters."""
    from vllm_sleep_ascend.patches import DEVELOPMENT, EVERYWHERE, OFFLINE, problems

    yield from problems((*EVERYWHERE, *DEVELOPMENT, *OFFLINE))


def imports() -> Iterator[str]:
    """Of vLLM's and torch_npu's names, wherever they stand, that fail."""
    for file in sorted(PACKAGE.rglob("*.py")):
        where = file.relative_to(PACKAGE)
        if where.parts[0] in OF_ANOTHER_VLLM:
            continue
        for node in _unguarded(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                if node.module.split(".")[0] not in ("vllm", "torch_npu"):
                    continue
                for alias in node.names:
                    if not _can_import(node.module, alias.name):
                        yield f"{where}:{node.lineno}: from {node.module} import {alias.name}"


def _unguarded(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes outside ``try``, which has another way if an import fails."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.Try):
            yield child
            yield from _unguarded(child)


def _can_import(module: str, name: str) -> bool:
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


def symbols() -> Iterator[str]:
    """Of CANN that torch_npu's libraries need, and the simulated toolkit lacks."""
    import torch_npu

    toolkit = Path(os.environ["ASCEND_HOME_PATH"])
    there = set().union(*(_symbols(lib, "--defined-only") for lib in toolkit.glob("lib64/*.so")))
    library = Path(torch_npu.__file__).parent / "lib" / "libtorch_npu.so"
    for name in sorted(_symbols(library, "--undefined-only") - there):
        if CANN.match(name):
            yield f"{library.name} needs {name}"


def _symbols(library: Path, which: str) -> set[str]:
    listed = subprocess.run(
        ["nm", "-D", which, library], check=True, capture_output=True, text=True
    ).stdout
    return {line.split()[-1].partition("@")[0] for line in listed.splitlines()}


def sleep_tests(distribution: Path) -> Iterator[str]:
    """Of vLLM's that docs/upstream_tests.md does not name."""
    documented = set(re.findall(r"\w+", (ROOT / "docs" / "upstream_tests.md").read_text()))
    with tarfile.open(distribution) as archive:
        for member in archive:
            path = Path(*Path(member.name).parts[1:])
            if path.parts[:1] != ("tests",) or not path.name.startswith("test_"):
                continue
            file = archive.extractfile(member)
            text = file.read().decode() if file is not None and path.suffix == ".py" else ""
            if ASLEEP.search(text):
                for name in _sleep_tests_in(text):
                    if name not in documented:
                        yield f"{path}::{name}"


def _sleep_tests_in(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and node.name.startswith("test_"):
            source = ast.get_source_segment(text, node) or ""
            if ASLEEP.search(source):
                yield node.name


def main(distribution: str) -> int:
    """Print the list; 1 if there is anything in it."""
    held = True
    names = ("vllm", "torch", "torch_npu")
    print("What no longer holds of", ", ".join(f"{name} {version(name)}" for name in names))
    for title, found in (
        ("Replaced callables", replaced_callables()),
        ("Imports", imports()),
        ("Symbols of CANN", symbols()),
        (
            "vLLM's sleep tests without a row in docs/upstream_tests.md",
            sleep_tests(Path(distribution)),
        ),
    ):
        lines = list(found)
        held = held and not lines
        print(f"  {title}: {len(lines) or 'nothing'}")
        for line in lines:
            print(f"    {line}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
