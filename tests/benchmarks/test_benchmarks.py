# SPDX-License-Identifier: Apache-2.0
"""The benchmarks at toy size on the simulated NPU. Contents are asserted, times are not."""

import json
import shutil
import sys

import pytest
from helpers import GIB, ROOT, programs
from helpers.models import make_model

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, seconds: float = 300) -> str:
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    done = programs.run(command, seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_allocator_benchmark_keeps_all_contents(tmp_path):
    table = run("allocator.py", "--device", "sim", "--cycles", "2", "--out", str(tmp_path))
    result = json.loads((tmp_path / "allocator_sim_toy.json").read_text())
    assert set(result["runs"]) == {"ours", "ours_on_demand", "ours_skip_unchanged"}
    for run_ in result["runs"].values():
        assert run_["contents_kept"]
        assert run_["left_bytes"] == 0
        assert run_["pinned_bytes"] >= run_["weights_bytes"]
    assert "| ours_on_demand" in table


def test_ranks_that_share_a_link_have_it_together(tmp_path):
    arguments = ("--ranks", "1,2", "--cycles", "2", "--out", str(tmp_path))
    run("parallel.py", "--device", "sim", *arguments)
    result = json.loads((tmp_path / "parallel_sim_1_toy.json").read_text())
    assert result["contents_kept"]
    for figures in result["ranks"].values():
        assert figures["sleep_gb_s"] <= 1.01 * result["link_gbps"]
        assert figures["wake_gb_s"] <= 1.01 * result["link_gbps"]


def test_the_switch_between_two_models_keeps_both(tmp_path):
    run("overlap.py", "--device", "sim", "--cycles", "2", "--out", str(tmp_path))
    result = json.loads((tmp_path / "overlap_sim_toy.json").read_text())
    assert result["contents_kept"]
    assert len(result["runs"]["overlapped"]) == 2


def test_the_timeline_shows_where_memory_is_and_when(tmp_path):
    run("timeline.py", "--device", "sim", "--out", str(tmp_path))
    figures, picture = (tmp_path / f"timeline_sim_toy.{kind}" for kind in ("json", "png"))
    result = json.loads(figures.read_text())
    assert result["contents_kept"]
    samples, weights, cache = (result[name] for name in ("samples", "weights_bytes", "kv_bytes"))
    at_the_end = {}
    for phase in result["phases"]:
        number = samples["s"].index(phase["end_s"])
        at_the_end[phase["name"]] = {name: samples[name][number] for name in samples}
    copying = [phase["name"] for phase in result["phases"] if phase["copies_to"]]
    assert copying == ["sleep", "wake weights"]
    awake = at_the_end["awake"]["device"]
    assert awake == at_the_end["awake again"]["device"] >= weights + cache
    assert at_the_end["asleep"]["device"] == 0
    assert weights <= at_the_end["weights awake"]["device"] <= awake - cache
    assert at_the_end["sleep"]["copied"] == at_the_end["wake weights"]["copied"] >= weights
    assert min(samples["host"]) >= weights
    assert samples["s"] == sorted(samples["s"])
    picture.unlink()
    run("timeline.py", "--draw", str(figures))
    assert picture.stat().st_size > 10_000


def test_preparing_beside_a_decode_keeps_the_weights(tmp_path):
    arguments = ("--turns", "1", "--seconds", "0.3", "--out", str(tmp_path))
    run("preparing.py", "--device", "sim", *arguments)  # fails if contents were lost
    ways = json.loads((tmp_path / "preparing_sim_toy.json").read_text())["ways"]
    assert len(ways) == 5 and all(way["steps"] > 1 for way in ways.values())


def test_a_backup_on_disk_keeps_all_contents(tmp_path):
    backups = tmp_path / "backups"
    backups.mkdir()
    arguments = ("--dir", str(backups), "--cycles", "2", "--out", str(tmp_path))
    table = run("disk.py", "--device", "sim", *arguments)
    (figures,) = json.loads((tmp_path / "disk_sim_toy.json").read_text())["runs"].values()
    assert figures["contents_kept"]
    assert all(len(rates) == 2 and min(rates) > 0 for rates in figures["gb_s"].values())
    assert figures["pinned_bytes"] == figures["plain_bytes"] == 0  # awake again
    assert list(backups.iterdir()) == []
    assert "| ours_disk" in table


def test_a_saved_image_and_safetensors_have_the_same_content(tmp_path):
    arguments = ("--dir", str(tmp_path), "--cycles", "2", "--out", str(tmp_path))
    table = run("image.py", "--device", "sim", *arguments)  # fails if contents were lost
    rates = json.loads((tmp_path / "image_sim_toy.json").read_text())["gb_s"]
    reads, writes = {"disk, read", "image", "safetensors"}, {"disk, write", "image, save"}
    assert set(rates) == reads | writes
    assert all(len(of) == 2 and min(of) > 0 for of in rates.values())
    assert "| safetensors" in table


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
def test_threads_and_io_uring_write_and_read_the_same(tmp_path):
    arguments = ("--mib", "128", "--cycles", "1", "--dir", str(tmp_path), "--out", str(tmp_path))
    table = run("disk_requests.py", "--device", "sim", *arguments)
    rates = json.loads((tmp_path / "disk_requests.json").read_text())["gb_s"]
    assert len(rates) == 12 and all(len(of) == 1 and of[0] > 0 for of in rates.values())
    assert "| 16, fio, io_uring |" in table


def test_more_models_that_fit_switch_less(tmp_path):
    table = run("schedule.py", "--hours", "0.2", "--seeds", "2", "--out", str(tmp_path))
    ways = json.loads((tmp_path / "schedule.json").read_text())["ways"]
    fit, lru = ways["fit"], ways["LRU by bytes"]
    one, stop = ways["one at a time (LRU)"], ways["stop and start"]
    assert len({way["requests"] for way in ways.values()}) == 1 and fit["requests"] > 100
    assert lru["most_bytes"] <= 64e9 and lru["most_awake"] > 1
    assert fit["switches"] < one["switches"] and fit["switching_s"] < stop["switching_s"]
    assert fit["most_bytes"] <= 64e9 and fit["most_awake"] > one["most_awake"] == 1
    assert "| fit |" in table


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_closed_loop_over_four_models_loses_only_what_killed_servers_had(tmp_path):
    """Ten minutes, and two for the starts. The script itself fails if anything else is lost."""
    names = ("tiny-qwen2", "tiny-llama", "tiny-gemma2", "tiny-qwen3")
    loop = ("--ways", "sleep and wake", "--seconds", "600", "--clients", "32")
    models = [str(make_model(name)) for name in names]
    run("closed_loop.py", *models, *loop, "--out", str(tmp_path), seconds=1800)
    (figures,) = json.loads((tmp_path / "closed_loop.json").read_text())["ways"].values()
    assert figures["answers"] > 100 and figures["switches"] > 8
    assert figures["most_awake"] == 2 and figures["most_bytes"] <= 0.8 * GIB
    assert 0 < figures["p50_s"] <= figures["p95_s"]
