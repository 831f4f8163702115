# SPDX-License-Identifier: Apache-2.0
"""Which folder may import which: the folders are processes and layers (CONTRIBUTING.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

NAME = "vllm_sleep_ascend"
PACKAGE = ROOT / NAME

BASE = ("config", "policy", "errors", "error_text", "status", "admin_key")  # of all processes
MAY_IMPORT = {
    "memory": BASE,
    "rank": (*BASE, "memory"),
    "engine": (*BASE, "rank.guarded_calls"),  # what it sends to ranks
    "front_end": (*BASE, "engine", "routes"),
    "patches": ("config", "engine", "front_end", "rank.guarded_calls"),
    "native": (*BASE, "memory", "rank", "engine.checks", "engine.kv_cache"),
    "beside": (*BASE, "memory", "rank", "engine.checks", "engine.kv_cache", "patches"),
    "client": ("policy", "status", "doctor", "admin_key"),
    "proxy": ("client", "admin_key", "routes", "status"),
    "doctor": ("_camem", "errors", "memory.host"),
    "weight_transfer": (*BASE, "releases"),
    "releases": (),
    "routes": (),
    "sim": (),
    "__init__": ("beside", "patches", "weight_transfer"),
    **dict.fromkeys(BASE, BASE),
}
ONLY = {"_camem": ("memory", "doctor")}
"""The compiled allocator."""

WITHOUT = {"client": ("vllm", "torch", "torch_npu"), "proxy": ("vllm", "torch", "torch_npu")}


def files(folder: str) -> Iterator[Path]:
    module = PACKAGE / f"{folder}.py"
    yield from [module] if module.exists() else sorted((PACKAGE / folder).rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Imported modules, also inside functions, but not those for type checking only."""
    tree = ast.parse(file.read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(file: Path) -> set[str]:
    return {name.partition(".")[2] for name in imported(file) if name.split(".")[0] == NAME}


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_the_table_has_every_folder_and_module() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py"}
    found |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_layer_imports_those_below_it(folder: str) -> None:
    allowed = (folder, *MAY_IMPORT[folder])
    wrong = {
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files(folder)
        for name in ours(file)
        if not within(name, allowed) and name not in ONLY
    }
    assert not wrong


@pytest.mark.parametrize("module", ONLY)
def test_only_some_layers_import_it(module: str) -> None:
    importing = {
        folder
        for folder in MAY_IMPORT
        for file in files(folder)
        if within(module, tuple(ours(file)))
    }
    assert importing == set(ONLY[module])


@pytest.mark.parametrize(("folder", "heavy"), WITHOUT.items())
def test_the_operator_s_side_needs_neither_vllm_nor_torch(folder: str, heavy: tuple) -> None:
    names = {name.split(".")[0] for file in files(folder) for name in imported(file)}
    assert len(names) > 5
    assert names.isdisjoint(heavy)


def test_no_folder_is_too_large_to_look_over() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    sizes = {
        str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) - 1 for folder in folders
    }
    assert max(sizes.values()) <= 12, sizes


def test_every_folder_and_module_says_what_it_is() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(file.read_text())), file
