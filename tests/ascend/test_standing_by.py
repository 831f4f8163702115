# SPDX-License-Identifier: Apache-2.0
"""When this package leaves vllm-ascend alone, and when it refuses to take over."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.models import make_model
from helpers.reference import hf_greedy

from vllm_sleep_ascend import beside

OURS, STOCK = beside.WORKER, "vllm_ascend.worker.worker.NPUWorker"

# Prints the worker or the error of each configuration.
CONFIGURE = """
import json, sys
from vllm.engine.arg_utils import EngineArgs

answers = []
for options in json.loads(sys.argv[2]):
    args = EngineArgs(sys.argv[1], **{"enforce_eager": True, "max_model_len": 512, **options})
    try:
        answers.append(args.create_engine_config().parallel_config.worker_cls)
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
print("RESULT", json.dumps(answers))
"""

# The same of `vllm serve`.
SERVE = """
import json, sys
from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

answers = []
for options in json.loads(sys.argv[2]):
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([sys.argv[1], *options])
    args.model = args.model_tag
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        answers.append(config.parallel_config.worker_cls)
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
print("RESULT", json.dumps(answers))
"""

# Starts an engine without sleep mode, and prints every function of ours in vLLM and vllm-ascend.
GENERATE = """
import inspect, json, sys
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

llm = LLM(
    sys.argv[1], dtype="float16", enforce_eager=True, max_model_len=512,
    max_num_batched_tokens=256, kv_cache_memory_bytes=16 << 20,
)
out = llm.generate(
    "Hello", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False
)

import vllm_ascend.worker.worker as stock
from vllm.entrypoints.serve.dev.sleep import api_router
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor.abstract import Executor

owners = (EngineCore, LLMEngine, Executor, LLM, stock.NPUWorker, stock.CaMemAllocator)
places = [member for owner in owners for member in vars(owner).values()]
places += [api_router.attach_router, current_platform.check_and_update_config.__func__]
functions = [place for place in places if inspect.isfunction(place)]
print("RESULT", json.dumps({
    "tokens": list(out[0].outputs[0].token_ids),
    "worker": type(llm.llm_engine.model_executor.driver_worker.worker).__module__,
    "functions": len(functions),
    "changed": [str(f) for f in functions if "vllm_sleep_ascend" in f.__code__.co_filename],
    "ours": sorted(name for name in sys.modules if name.startswith("vllm_sleep_ascend")
                   and not name.startswith("vllm_sleep_ascend.sim")),
}))
"""


def run(script: str, *arguments: object, **env: str) -> tuple[object, str]:
    """The script's result, and its whole output."""
    # Engines of this process had sleep mode; the script's need not have it.
    own = {name: value for name, value in os.environ.items() if name != beside.IN_USE}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**own, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    said = done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, said[-6000:]
    return json.loads(lines[-1].removeprefix("RESULT ")), " ".join(said.split())


def ahead(folder: Path) -> dict[str, str]:
    """An environment in which this folder's packages precede the installed ones."""
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


def test_without_sleep_mode_nothing_is_changed_and_nothing_of_ours_is_loaded(tiny_model):
    found, _ = run(GENERATE, tiny_model)
    assert found["ours"] == ["vllm_sleep_ascend", "vllm_sleep_ascend.beside"]
    assert found["changed"] == []
    assert found["functions"] > 100
    assert found["worker"] == "vllm_ascend.worker.worker"
    assert [found["tokens"]] == hf_greedy(tiny_model, ("Hello",), 8)


def test_sleep_mode_gets_our_worker_and_another_version_a_warning(tiny_model, tmp_path):
    info = tmp_path / "vllm_ascend-0.23.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm_ascend\nVersion: 0.23.1\n")
    points = importlib.metadata.distribution("vllm_ascend").read_text("entry_points.txt")
    (info / "entry_points.txt").write_text(points or "")
    asked = [
        {},
        {"enable_sleep_mode": True, "additional_config": {"sleep_mode": {"chunks": 1}}},
        {"enable_sleep_mode": True},
        {},
    ]
    answers, said = run(CONFIGURE, tiny_model, json.dumps(asked), **ahead(tmp_path))
    assert answers[0] == STOCK
    assert "additional_config['sleep_mode']: chunks=1" in answers[1]
    assert answers[2:] == [OURS, STOCK]
    assert (
        "with vllm_ascend 0.23.0 or 0.23.0.post1, vllm 0.23.0, and this is vllm_ascend 0.23.1"
        in said
    )
    assert "their behaviour was not checked" in said


def test_the_installed_versions_get_no_warning(tiny_model):
    answers, said = run(CONFIGURE, tiny_model, json.dumps([{"enable_sleep_mode": True}]))
    assert answers == [OURS]
    assert "vllm_sleep_ascend was tested with" not in said


def test_the_switch_leaves_sleep_mode_to_vllm_ascend(tiny_model):
    asked = json.dumps([{"enable_sleep_mode": True}])
    answers, said = run(CONFIGURE, tiny_model, asked, VLLM_SLEEP_ASCEND="0")
    assert answers == [STOCK]
    assert "Sleep mode is provided by vllm_sleep_ascend" not in said


def test_engines_that_share_experts_do_not_sleep(tiny_model):
    two, sleeps = {"data_parallel_size": 2}, {"enable_sleep_mode": True}
    asked = json.dumps([two | sleeps, two, {"tensor_parallel_size": 2} | sleeps])
    (refused, *answers), _ = run(CONFIGURE, make_model("tiny-qwen3-moe"), asked)
    assert "with data_parallel_size=2 is not supported" in refused
    assert "tensor_parallel_size=2" in refused
    assert answers == [STOCK, OURS]
    answers, _ = run(CONFIGURE, tiny_model, json.dumps([two | sleeps]))
    assert answers == [OURS]


def test_communicators_are_not_released_under_captured_graphs(tiny_model):
    release = {"sleep_mode": {"release_communicators": True}}
    graphs = {"enable_sleep_mode": True, "enforce_eager": False, "tensor_parallel_size": 2}
    graphs |= {"additional_config": release}
    asked = [
        graphs,
        graphs | {"compilation_config": {"cudagraph_mode": "NONE"}},
        graphs | {"enforce_eager": True},
        graphs | {"additional_config": release | {"enable_sleep_mode_extra_cleanup": True}},
        graphs | {"enable_sleep_mode": False},
        graphs | {"tensor_parallel_size": 1},
    ]
    (refused, *answers), said = run(CONFIGURE, tiny_model, json.dumps(asked))
    assert re.search(
        r"sleep mode with release_communicators and captured graphs \(enforce_eager=False, "
        r"cudagraph_mode=[A-Z_]+\) is not supported: .* Start with enforce_eager=True "
        r"\(--enforce-eager\), or leave out release_communicators, or set",
        refused,
    ), refused
    assert answers == [OURS, OURS, OURS, STOCK, OURS]
    assert "release_communicators has no effect: an engine with one rank has none" in said

    server = ["--enable-sleep-mode", "--tensor-parallel-size", "2", "--max-model-len", "512"]
    server += ["--additional-config", json.dumps(release)]
    (refused,), _ = run(SERVE, tiny_model, json.dumps([server]))
    assert "release_communicators and captured graphs" in refused


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_SLEEP_ASCEND", "false")
    with pytest.raises(ValueError, match="'false': use 0 to leave sleep mode to vllm-ascend"):
        beside.switched_off()


def test_this_vllm_has_all_that_is_replaced_of_it():
    from vllm_sleep_ascend import patches

    every = (*patches.EVERYWHERE, *patches.DEVELOPMENT, *patches.OFFLINE)
    assert patches.problems(every) == []


def changed_vllm_ascend(folder: Path, *changes: tuple[str, str, str]) -> None:
    """The installed one in this folder, with changes: file, text, other text."""
    origin = importlib.metadata.distribution("vllm_ascend").locate_file("vllm_ascend")
    shutil.copytree(str(origin), folder / "vllm_ascend", ignore=shutil.ignore_patterns("*.so"))
    for name, old, new in changes:
        file = folder / "vllm_ascend" / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))


def test_a_parameter_that_a_later_version_lacks_is_tolerated(tiny_model, tmp_path):
    """vllm-ascend for vLLM 0.27 starts an update of weights without an argument."""
    old = "def start_weight_update(self, is_checkpoint_format: bool = True)"
    changed_vllm_ascend(tmp_path, ("worker/worker.py", old, "def start_weight_update(self)"))
    answers, _ = run(
        CONFIGURE, tiny_model, json.dumps([{"enable_sleep_mode": True}]), **ahead(tmp_path)
    )
    assert answers == [OURS]


def test_a_changed_seam_is_an_error_that_names_all_of_it_and_changes_nothing(tiny_model, tmp_path):
    changed_vllm_ascend(
        tmp_path,
        ("worker/worker.py", "def sleep(self, level: int = 1)", "def sleep(self, options)"),
        ("device_allocator/camem.py", "def get_current_usage", "def usage"),
    )
    asked = json.dumps([{"enable_sleep_mode": True}, {}])
    (refused, without), _ = run(CONFIGURE, tiny_model, asked, **ahead(tmp_path))
    assert refused.startswith("SeamError")
    assert "vllm_ascend.worker.worker.NPUWorker.sleep takes (options), not (level)" in refused
    assert "CaMemAllocator.get_current_usage is gone" in refused
    assert "Nothing was changed" in refused
    assert "VLLM_SLEEP_ASCEND=0" in refused
    assert without == STOCK
