# SPDX-License-Identifier: Apache-2.0
"""The examples, run as in the guides."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import GIB, MIB, ROOT, browser, page_picture, programs, warm


@pytest.mark.parametrize("in_process", ["0", "1"])
def test_the_offline_example(tiny_model, in_process, tmp_path):
    done = warm.run(
        [ROOT / "examples" / "offline_sleep.py", tiny_model],
        tmp_path / "log",
        seconds=240,
        env={
            **os.environ,
            "NPU_SIM_MACHINE": f"offline-{os.getpid()}",
            "NPU_SIM_HBM_GIB": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": in_process,
        },
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "The output after sleep is the output before it." in done.stdout


def demo(model, log) -> "subprocess.CompletedProcess[str]":
    return programs.run(
        [sys.executable, ROOT / "examples" / "demo.py", model, log],
        240,
        env={
            **os.environ,
            "NPU_SIM_MACHINE": f"demo-{os.getpid()}",
            "NPU_SIM_HBM_GIB": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        },
    )


@pytest.mark.slow
def test_the_demo_shows_the_figures_and_keeps_the_log_in_a_file(tiny_model, tmp_path):
    log = tmp_path / "new" / "demo.log"
    done = demo(tiny_model, log)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == f"The engine's log is in {log}"
    assert len(done.stdout.splitlines()) == 11
    assert "The seconds are the simulator's; they say nothing about an NPU." in done.stdout
    found = re.findall(r"^In use (\w+): +([\d.]+) GiB", done.stdout, flags=re.M)
    in_use = {when: float(gib) for when, gib in found}
    weights = (tiny_model / "model.safetensors").stat().st_size / GIB
    assert weights < in_use["awake"] == in_use["again"]
    assert in_use["asleep"] < 0.01
    backup = re.search(r"^Host memory of the backup: ([\d.]+) GiB$", done.stdout, flags=re.M)
    assert weights < float(backup[1]) < in_use["awake"]
    assert len(re.findall(r"(?:slept|woke) in \d+\.\d\d s$", done.stdout, flags=re.M)) == 2
    texts = re.findall(r"^(?:Before sleep|After waking): (.+)$", done.stdout, flags=re.M)
    assert len(texts) == 2 and texts[0] == texts[1]
    assert "camem: sleep level 1 took" in log.read_text()


@pytest.mark.slow
def test_a_demo_that_fails_shows_the_end_of_the_log(tmp_path):
    log = tmp_path / "demo.log"
    done = demo(tmp_path / "no_model", log)
    assert done.returncode == 1
    *shown, said = done.stderr.splitlines()
    assert said == f"The demo failed. The whole log is in {log}"
    assert any(line.startswith("Traceback") for line in shown)
    assert shown == log.read_text().splitlines()[-30:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_of_the_proxy_and_the_picture_of_its_page(tmp_path):
    with page_picture.demo(tmp_path) as running:
        said = running.said.read_text().splitlines()
        assert said[0] == f"The page:   {running.page}"
        assert (
            said[1] == f"The models: tiny-qwen2, tiny-llama, at http://127.0.0.1:{running.port}/v1"
        )
        assert running.admin.get("/").text.startswith("<!doctype html>")
        for model, other in (page_picture.MODELS, reversed(page_picture.MODELS)):
            running.ask(model)
            assert running.states() == {model: "awake", other: "asleep"}
        if browser.PROGRAM is not None:
            picture = tmp_path / "page.png"
            with browser.Browser(tmp_path) as tab:
                page_picture.take(running, tab, picture)
                assert tab.complaints == []
                rows = tab.text(".card tbody").splitlines()
            committed = (ROOT / "docs" / "page.png").stat().st_size
            assert 20_000 < picture.stat().st_size < 150_000 > committed > 20_000
            assert [row.partition(":")[0] for row in rows].count("tiny-qwen2") >= 2
        assert running.end() == 0
        assert not list((tmp_path / "state").glob("*.json"))  # no server is left


@pytest.mark.slow
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_rlhf_example(tiny_model, devices, tmp_path):
    figures, picture = tmp_path / "figures.json", tmp_path / "memory.png"
    done = programs.run(
        [
            *(sys.executable, ROOT / "examples" / "rlhf_colocate.py", tiny_model),
            *("--tensor-parallel-size", str(devices), "--json", figures, "--plot", picture),
        ],
        500,
        env={
            **os.environ,
            "RAY_worker_niceness": "0",
            "NPU_SIM_MACHINE": f"rlhf-{os.getpid()}",
            "NPU_SIM_DEVICES": str(devices),
            "NPU_SIM_HBM_GIB": "0.5",
        },
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "The updated engine answers as a fresh one with the trained checkpoint." in done.stdout
    assert picture.stat().st_size > 10_000
    run = json.loads(figures.read_text())
    assert [len(tokens) for tokens in run["tokens"]] == [24] * 4
    assert run["rewards"][-1] > run["rewards"][0]

    def used(phase: str) -> list[int]:
        """Memory in use on each device at the end of the phase, for all steps."""
        return [n for p in run["phases"] if p["name"] == phase for n in p["used_bytes"]]

    awake, asleep, updated = used("wake KV cache"), used("sleep"), used("update")
    assert len(awake) == len(updated) == 3 * devices
    assert max(asleep) < 40 * MIB < 128 * MIB < min(awake)
    assert max(updated) < 64 * MIB  # no KV cache yet
    # torch keeps what the first step allocates; after that nothing grows.
    assert max(asleep[2 * devices :]) <= max(asleep[devices : 2 * devices])
