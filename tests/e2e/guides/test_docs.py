# SPDX-License-Identifier: Apache-2.0
"""The guides' commands are executed as written, and both languages have the same ones.

``llm`` is the shared engine and ``http://127.0.0.1:8000`` the shared server. Lines that start
something else are run by the tests named here; for ``make demo``, its program is.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, programs
from helpers.engine import few

from vllm_sleep_ascend.config import SleepModeConfig

GUIDES = (ROOT / "docs" / "guide.md", ROOT / "README.md")
TRANSLATIONS = (ROOT / "docs" / "guide.zh.md", ROOT / "README.zh.md")
RUN_ELSEWHERE = {
    "python examples/offline_sleep.py": "tests/e2e/guides/test_examples.py",
    "python examples/rlhf_colocate.py": "tests/e2e/guides/test_examples.py",
    "ray start": "tests/e2e/ranks/test_ray.py",
    "VLLM_SERVER_DEV_MODE=1 vllm serve": "tests/helpers/server.py",
    "SLEEP_ADMIN_KEY=": "tests/e2e/server/test_admin_door.py",
    "curl -H": "tests/e2e/server/test_admin_door.py",
    "vllm-sleep sleep unix:": "tests/e2e/server/test_admin_door.py",
    "vllm-sleep doctor": "tests/package/test_doctor.py",
    "vllm-sleep save": "tests/e2e/engine/test_saved_image.py",
    "vllm serve MODEL --enable-sleep-mode --load-format": "tests/e2e/engine/test_saved_image.py",
    "vllm-sleep switch": "tests/e2e/server/test_cli.py",
    "vllm-sleep-proxy": "tests/e2e/proxy/test_proxy.py",
    "make demo": "tests/e2e/guides/test_examples.py",
    "make test": ".ci/run",
}


def fenced(path: Path) -> list[tuple[str, str]]:
    """Language and text of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.S | re.M)


def blocks(path: Path, language: str) -> list[str]:
    return [text for of, text in fenced(path) if of == language]


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)#]+)\)", path.read_text())


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_commands_of_the_shell(path, server, left_awake):
    ran = 0
    for line in "".join(blocks(path, "bash")).splitlines():
        elsewhere = [test for start, test in RUN_ELSEWHERE.items() if line.startswith(start)]
        if elsewhere:
            assert (ROOT / elsewhere[0]).exists()
            continue
        command, _, expected = line.partition("  # ")
        command = command.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        if command.startswith("curl "):
            command = command.replace("curl ", "curl -s -o /dev/null -w '%{http_code}' ", 1)
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = programs.run(["bash", "-c", command], 120, env=env)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        if command.startswith("curl "):
            assert done.stdout == (expected or "200"), line
        ran += 1
    assert ran >= 2
    assert server.complete()


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_python(path, llm):
    expected = few(llm)
    for block in blocks(path, "python"):
        exec(block, {"LLM": lambda model, **options: llm, "model": "MODEL", "llm": llm})
        assert few(llm) == expected


@pytest.mark.parametrize(("english", "chinese"), zip(GUIDES, TRANSLATIONS, strict=True))
def test_both_languages_have_the_same_code(english, chinese):
    assert fenced(english) == fenced(chinese) != []
    headings = [re.findall(r"^#+ ", path.read_text(), flags=re.M) for path in (english, chinese)]
    assert headings[0] == headings[1]
    targets = [
        sorted(target.replace(".zh.md", ".md") for target in links(path))
        for path in (english, chinese)
    ]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("path", (GUIDES[0], TRANSLATIONS[0]), ids=lambda path: path.name)
def test_the_table_of_options_is_the_configuration(path):
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", path.read_text(), flags=re.M)
    documented = {name: json.loads(default) for name, default in rows}
    options = {name: field.default for name, field in SleepModeConfig.model_fields.items()}
    assert documented == options


def test_links_lead_somewhere():
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    documents = [ROOT / name for name in listed.stdout.splitlines()]
    assert {*GUIDES, *TRANSLATIONS} < set(documents)
    for path in documents:
        for target in links(path):
            assert target.startswith("http") or (path.parent / target).exists(), (path, target)


def test_the_tests_beside_vllms_own_exist():
    named = []
    for line in (ROOT / "docs" / "upstream_tests.md").read_text().splitlines():
        vllms, ours = (line.split("|") + [""] * 3)[1:3]
        file = None
        for part in ours.split(","):
            path, test = re.match(r"\s*([\w/]+\.py)?(?:::(\w+))?", part).groups()
            file = path or file
            tests = re.findall(r"\b(test_\w+)\b(?!\.py)", vllms) if "same name" in part else [test]
            named += [(file, test) for test in tests if file]
    assert len(named) > 40
    for file, test in named:
        text = (ROOT / "tests" / file).read_text()
        assert test is None or f"def {test}(" in text, f"{file}::{test}"
