# SPDX-License-Identifier: Apache-2.0
"""Installing with and without CANN, with and without the compiled allocator, and from a source
distribution."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
from helpers import ROOT, programs

INSTALL = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet")
WITHOUT_DEVICE = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


@pytest.fixture
def sources(tmp_path):
    """A copy of the sources, so that the installed package is not changed."""
    copy = tmp_path / "sources"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".[!c]*", ".ci", "build", "*.so", "*.egg-info", "__pycache__"
        ),
    )
    return copy


def install(sources, **environment):
    """Where to is one of pip's own variables: PIP_TARGET, or PIP_PYTHON for an environment."""
    return subprocess.run(
        [*INSTALL, sources],
        env={**os.environ, **WITHOUT_DEVICE, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("home", "problem"),
    [("", "ASCEND_HOME_PATH is not set"), ("/nowhere", "ASCEND_HOME_PATH=/nowhere has no")],
)
def test_without_cann_the_error_names_the_ways_out(sources, tmp_path, home, problem):
    done = install(sources, PIP_TARGET=str(tmp_path / "site"), ASCEND_HOME_PATH=home)
    assert done.returncode != 0
    assert problem in done.stderr
    assert "source CANN's set_env.sh, or build the simulated toolkit" in done.stderr
    assert "COMPILE_CUSTOM_KERNELS=0 installs without sleep mode" in done.stderr


def test_an_unknown_choice_is_refused(sources, tmp_path):
    done = install(sources, PIP_TARGET=str(tmp_path / "site"), COMPILE_CUSTOM_KERNELS="yes")
    assert done.returncode != 0
    assert "COMPILE_CUSTOM_KERNELS=yes is neither 0 nor 1" in done.stderr


@pytest.mark.slow
def test_without_the_allocator_vllm_runs_and_sleep_mode_says_how_to_build(
    sources, tmp_path, tiny_model
):
    site = tmp_path / "site"
    done = install(sources, PIP_TARGET=str(site), COMPILE_CUSTOM_KERNELS="0", ASCEND_HOME_PATH="")
    assert done.returncode == 0, done.stderr
    assert not list(site.glob("vllm_sleep_ascend/_camem*.so"))
    page = "vllm_sleep_ascend/proxy/http/page"
    files = {path.name for path in (sources / page).iterdir() if path.suffix != ".py"}
    assert {"index.html", "page.js", "style.css", "texts.json"} < files
    assert files <= {path.name for path in (site / page).iterdir()}
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        # The development install would still find its own compiled allocator.
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "from vllm import LLM, SamplingParams\n"
        "import vllm_sleep_ascend\n"
        f"assert vllm_sleep_ascend.__file__.startswith({str(site)!r})\n"
        f"options = dict(model={str(tiny_model)!r}, max_model_len=256,\n"
        "               max_num_batched_tokens=256, gpu_memory_utilization=0.2)\n"
        "try:\n"
        "    LLM(**options, enable_sleep_mode=True)\n"
        "except ValueError as error:\n"
        "    print('REFUSED', error)\n"
        "out = LLM(**options).generate('Hello', SamplingParams(temperature=0, max_tokens=4))\n"
        "print('TOKENS', len(out[0].outputs[0].token_ids))\n"
    )
    done = programs.run(
        [sys.executable, script],
        180,
        env={
            **os.environ,
            "PYTHONPATH": f"{site}:{os.environ['PYTHONPATH']}",
            "NPU_SIM_MACHINE": f"setup-{os.getpid()}",
        },
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "COMPILE_CUSTOM_KERNELS=1 pip install" in done.stdout
    assert "TOKENS 4" in done.stdout


def source_distribution(sources: Path, folder: Path) -> Path:
    """Made without CANN."""
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, sources],
        env={**os.environ, **WITHOUT_DEVICE, "ASCEND_HOME_PATH": ""},
        capture_output=True,
        check=True,
    )
    (made,) = folder.glob("*.tar.gz")
    return made


def test_a_source_distribution_has_every_file_and_nothing_that_was_built(sources, tmp_path):
    ours = {path.relative_to(sources) for path in sources.rglob("*") if path.is_file()}
    with tarfile.open(source_distribution(sources, tmp_path / "dist")) as archive:
        packed = {Path(*Path(file.name).parts[1:]) for file in archive if file.isfile()}
    assert ours <= packed
    added = {path for path in packed - ours if not path.parts[0].endswith(".egg-info")}
    assert added == {Path("PKG-INFO"), Path("setup.cfg")}


@pytest.mark.slow  # it compiles the allocator
def test_in_a_clean_environment_the_source_distribution_installs_and_sleeps(sources, tmp_path):
    made = source_distribution(sources, tmp_path / "dist")
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    # torch, vLLM and the build tools are those of this environment. Its own editable install of
    # this package is not found through such a file.
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    done = install(made, PIP_PYTHON=str(python), COMPILE_CUSTOM_KERNELS="1", PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    (site / "sleeps.py").write_text(
        "import vllm_sleep_ascend._camem\n"
        f"assert vllm_sleep_ascend._camem.__file__.startswith({str(site)!r})\n"
        "import torch\n"
        "from vllm_sleep_ascend import memory\n"
        "with memory.region('weights'):\n"
        "    weights = torch.arange(8 << 20, device='npu')\n"
        "memory.sleep()\n"
        "assert memory.status()['weights']['device'] == 0\n"
        "memory.wake()\n"
        "assert torch.equal(weights.cpu(), torch.arange(8 << 20))\n"
        "print('SLEPT')\n"
    )
    environment = {
        **os.environ,
        "NPU_SIM_MACHINE": f"setup-{os.getpid()}",
        # As CANN's set_env.sh sets it.
        "PYTHONPATH": f"{os.environ['ASCEND_HOME_PATH']}/python/site-packages",
    }
    done = subprocess.run(
        [python, site / "sleeps.py"], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split()[-1:] == ["SLEPT"], done.stdout + done.stderr
