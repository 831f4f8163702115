# SPDX-License-Identifier: Apache-2.0
"""The Ray executor: one engine over two nodes, each with its own simulated NPU."""

import os
import sys
from pathlib import Path

import pytest
from helpers.ray_cluster import RayCluster

TESTS = Path(__file__).with_name("on_ray.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_over_two_nodes(tiny_model, record_property) -> None:
    # Workers import the functions that tests send.
    path = os.pathsep.join((str(TESTS.parent), os.environ["PYTHONPATH"]))
    with RayCluster({"PYTHONPATH": path, "NPU_SIM_HBM_GIB": "1"}) as cluster:
        record_property("separate_networks", cluster.network.separate)
        print("each node has", "a network of its own" if cluster.network.separate else "the host's")
        machines = ",".join(cluster.environment(node)["NPU_SIM_MACHINE"] for node in range(2))
        done = cluster.run(
            0,
            [sys.executable, "-m", "pytest", TESTS, "-x", "-q", "-p", "no:cacheprovider"],
            timeout=800,
            RAY_NODES=machines,
        )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "4 passed" in done.stdout
