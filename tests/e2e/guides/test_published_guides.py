# SPDX-License-Identifier: Apache-2.0
"""A client that follows the published guides to sleep mode gets what they promise.

The guides are vllm-ascend's (English, and a later one in Chinese), vLLM's own page, a Russian
introduction and vLLM's experiments. bash and curl run their commands as written; only the model,
the host and the port are replaced.
"""

import json
import os
import sys

import pytest
from helpers import ROOT, programs, warm
from helpers.server import HBM_GIB, MEMORY, SMALL, Server

GUIDE_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
COMPLETION = """
    curl http://localhost:8000/v1/completions \\
        -H "Content-Type: application/json" \\
        -d '{
            "model": "Qwen/Qwen2.5-0.5B-Instruct",
            "prompt": "The future of AI is",
            "max_tokens": 7,
            "temperature": 0
        }'
"""

OFFLINE = """
import os

import torch
from vllm import LLM, SamplingParams
from vllm.utils.mem_constants import GiB_bytes


os.environ["VLLM_USE_MODELSCOPE"] = "True"
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
os.environ["VLLM_ASCEND_ENABLE_NZ"] = "0"

if __name__ == "__main__":
    prompt = "How are you?"

    free, total = torch.npu.mem_get_info()
    print(f"Free memory before sleep: {free / 1024 ** 3:.2f} GiB")
    # record npu memory use baseline in case other process is running
    used_bytes_baseline = total - free
    llm = LLM("Qwen/Qwen2.5-0.5B-Instruct", enable_sleep_mode=True)
    sampling_params = SamplingParams(temperature=0, max_tokens=10)
    output = llm.generate(prompt, sampling_params)

    llm.sleep(level=1)

    free_npu_bytes_after_sleep, total = torch.npu.mem_get_info()
    print(f"Free memory after sleep: {free_npu_bytes_after_sleep / 1024 ** 3:.2f} GiB")
    used_bytes = total - free_npu_bytes_after_sleep - used_bytes_baseline
    # now the memory usage should be less than the model weights
    # (0.5B model, 1GiB weights)
    assert used_bytes < 1 * GiB_bytes

    llm.wake_up()
    output2 = llm.generate(prompt, sampling_params)
    # cmp output
    assert output[0].outputs[0].text == output2[0].outputs[0].text
    print("text:", output2[0].outputs[0].text)
"""


@pytest.fixture
def run(server, left_awake):
    """Run a guide's command against the shared server; returns the answer's JSON, if any."""

    def run(command: str):
        for host in ("http://127.0.0.1:8000", "http://localhost:8000"):
            command = command.replace(host, f"http://127.0.0.1:{server.port}")
        command = command.replace(GUIDE_MODEL, server.model).strip()
        curl = command.replace("curl ", "curl --silent --show-error --fail-with-body ", 1)
        done = programs.run(["bash", "-c", curl], 120)
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return json.loads(done.stdout) if done.stdout else None

    return run


def held(server) -> int:
    """Device bytes of all memory that can sleep."""
    return sum(tag["device"] for tag in server.rank_status()["tags"].values())


def text(answer) -> str:
    return answer["choices"][0]["text"]


def test_the_english_guide(run, server):
    before = text(run(COMPLETION))
    run("curl -X POST http://127.0.0.1:8000/sleep")
    assert run("curl -X POST http://127.0.0.1:8000/is_sleeping") == {"is_sleeping": True}
    assert held(server) == 0
    run("curl -X POST http://127.0.0.1:8000/wake_up")
    assert run("curl -X POST http://127.0.0.1:8000/is_sleeping") == {"is_sleeping": False}
    assert text(run(COMPLETION)) == before


def test_the_chinese_guide(run, server):
    before = text(run(COMPLETION))
    run(
        """curl -X POST http://127.0.0.1:8000/sleep \\
        -H "Content-Type: application/json" \\
        -d '{"level": "1"}'"""
    )
    assert run("curl -X GET http://127.0.0.1:8000/is_sleeping") == {"is_sleeping": True}
    assert held(server) == 0
    assert server.rank_status()["tags"]["weights"]["offloaded"] > 0
    run(
        """curl -X POST http://127.0.0.1:8000/sleep \\
        -H "Content-Type: application/json" \\
        -d '{"level": "2"}'"""
    )
    assert server.rank_status()["tags"]["weights"]["offloaded"] == 0
    assert server.rank_status()["tags"]["weights"]["discarded"] > 0
    run("curl -X POST http://127.0.0.1:8000/wake_up")
    run('curl -X POST "http://127.0.0.1:8000/wake_up?tags=weights"')
    assert run("curl -X GET http://127.0.0.1:8000/is_sleeping") == {"is_sleeping": False}
    # "The content of the weights is cleared": they are loaded before the server is used again.
    server.post("/collective_rpc", json={"method": "reload_weights"})
    server.post("/reset_prefix_cache")
    assert text(run(COMPLETION)) == before


def test_vllms_page_tags_wake_one_after_the_other(run, server):
    before = text(run(COMPLETION))
    run("curl -X POST 'http://127.0.0.1:8000/sleep?level=2'")
    run("curl -X POST 'http://127.0.0.1:8000/wake_up?tags=weights'")
    weights = held(server)
    assert weights > 0
    assert server.rank_status()["tags"]["kv_cache"]["device"] == 0
    # "is_sleeping will report true until all components are awake"
    assert run("curl http://127.0.0.1:8000/is_sleeping") == {"is_sleeping": True}
    server.post("/collective_rpc", json={"method": "reload_weights"})
    run("curl -X POST 'http://127.0.0.1:8000/wake_up?tags=kv_cache'")
    assert run("curl http://127.0.0.1:8000/is_sleeping") == {"is_sleeping": False}
    assert held(server) > weights
    assert text(run(COMPLETION)) == before


def test_the_russian_page_lists_the_calls_of_level_2(run, server):
    before = text(run(COMPLETION))
    run("curl -X POST 'http://127.0.0.1:8000/sleep?level=2'")
    assert held(server) == 0
    assert server.rank_status()["host_backup"] < 1 << 22  # "only small buffers are kept"
    run("curl -X POST http://127.0.0.1:8000/wake_up")
    run(
        "curl -X POST http://127.0.0.1:8000/collective_rpc "
        """-H 'Content-Type: application/json' -d '{"method": "reload_weights"}'"""
    )
    run("curl -X POST http://127.0.0.1:8000/reset_prefix_cache")
    assert text(run(COMPLETION)) == before


@pytest.mark.parametrize(
    "imports",
    ["vllm.utils.mem_constants", pytest.param("vllm.utils", marks=pytest.mark.slow)],
)
def test_the_guides_offline_scripts(tiny_model, tmp_path, imports):
    """The first guide imports ``GiB_bytes`` from ``vllm.utils``, where vLLM no longer has it,
    so its script ends at once, with or without this package. The model is a folder of this machine,
    which ModelScope takes as it is.
    """
    script = tmp_path / "guide.py"
    script.write_text(
        OFFLINE.replace("vllm.utils.mem_constants", imports).replace(GUIDE_MODEL, str(tiny_model))
    )
    env = {**os.environ, "NPU_SIM_MACHINE": f"guide-{os.getpid()}", "OMP_NUM_THREADS": "2"}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    # vLLM decides where models come from when it is imported.
    done = warm.run([script], tmp_path / "log", seconds=300, env=env, cold=True)
    if imports == "vllm.utils":
        assert "cannot import name 'GiB_bytes'" in done.stdout
        return
    assert done.returncode == 0, done.stdout[-4000:]
    assert "text:" in done.stdout


def test_a_server_with_the_environment_of_the_guides(tiny_model, tmp_path):
    """In a new interpreter, because vLLM reads some of the variables when it is imported."""
    exported = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_USE_V1": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_USE_MODELSCOPE": "True",
        "VLLM_ASCEND_ENABLE_NZ": "0",
    }
    env = {"NPU_SIM_MACHINE": f"guide-{os.getpid()}", "NPU_SIM_HBM_GIB": str(HBM_GIB), **exported}
    options = ("--enable-sleep-mode", *SMALL, *MEMORY)
    with Server(tiny_model, *options, log=tmp_path / "log", env=env, cold=True) as server:
        before = server.complete()
        server.post("/sleep")
        assert held(server) == 0
        server.post("/wake_up")
        assert server.complete() == before


def test_the_experiments_take_their_guides_arguments(tmp_path):
    folder = ROOT / "examples" / "sleep_experiments"
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    for line in (
        "online_default.py sleep",
        "online_default.py nosleep",
        "online_fp8.py",
        "online_fp8.py fp8",
        "online_sleep1_nowarm.py sleep1",
        "online_sleep1_nowarm.py nowarmup",
        "online_sleep1_2.py sleep1",
        "online_sleep1_2.py sleep2",
        "online_sleep2_nosleep.py sleep2",
        "online_sleep2_nosleep.py nosleep",
    ):
        log = tmp_path / "out_info.log"
        command = f"python {line} --help > {log} 2>&1"
        env = {**os.environ, "PATH": path}
        done = programs.run(["bash", "-c", command], 60, cwd=folder, env=env)
        assert done.returncode == 0, f"{line}: {log.read_text()}"
        assert "usage:" in log.read_text()
