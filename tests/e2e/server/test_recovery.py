# SPDX-License-Identifier: Apache-2.0
"""A call of the device fails in a running server: it answers with the reason and continues."""

import pytest
from helpers.faults import DRIVER_ERROR, OUT_OF_MEMORY, set_faults

pytestmark = pytest.mark.usefixtures("left_awake")

RESIDENT = ("weights", "kv_cache")


def asleep(server) -> set[str]:
    """The tags without device memory, by the worker's own figures."""
    tags = server.rank_status()["tags"]
    return {tag for tag in RESIDENT if tags[tag]["device"] == 0}


@pytest.fixture
def text(server):
    return server.complete()


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("aclrtUnmapMem:1:507899", "AclError", "aclrtUnmapMem failed with 507899"),
        ("aclrtUnmapMem:2:507899", "AclError", "aclrtUnmapMem failed with 507899"),
    ],
)
def test_a_failed_sleep_leaves_the_server_awake(server, faults, text, level, fault, kind, words):
    set_faults(faults, fault)
    answer = server.http.post(f"/sleep?level={level}")
    set_faults(faults, "")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (503, kind)
    assert words in error["message"]
    assert "can be repeated" in error["message"]
    assert not server.is_sleeping()
    assert asleep(server) == set()
    assert server.complete() == text

    server.post("/sleep?level=1")
    assert asleep(server) == set(RESIDENT)
    server.post("/wake_up")
    assert server.complete() == text


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("aclrtMapMem:1:507899", "AclError", "aclrtMapMem failed with 507899"),
        ("aclrtMapMem:2:507899", "AclError", "aclrtMapMem failed with 507899"),
        ("aclrtMemcpyAsync:1:507899", "AclError", "aclrtMemcpyAsync failed with 507899"),
        ("aclrtMallocPhysical:2:207001", "DeviceOutOfMemoryError", "bytes free on the device"),
    ],
)
def test_a_failed_wake_leaves_the_server_asleep_and_loses_nothing(
    server, faults, text, fault, kind, words
):
    server.post("/sleep")
    set_faults(faults, fault)
    answer = server.http.post("/wake_up")
    set_faults(faults, "")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (503, kind)
    assert words in error["message"]
    assert "rank 0: wake failed" in error["message"]
    assert "can be repeated" in error["message"]
    assert server.is_sleeping()
    assert asleep(server) == set(RESIDENT)

    assert server.post("/wake_up")["status"] == "awake"
    assert asleep(server) == set()
    assert server.complete() == text


def test_health_is_not_affected(server, faults, text):
    set_faults(faults, f"aclrtUnmapMem:1:{DRIVER_ERROR}")
    assert server.http.post("/sleep").status_code == 503
    assert server.http.get("/health").status_code == 200
    set_faults(faults, "")
    server.post("/sleep")
    assert server.http.get("/health").status_code == 200
    set_faults(faults, f"aclrtMallocPhysical:1:{OUT_OF_MEMORY}")
    assert server.http.post("/wake_up?tags=weights").status_code == 503
    assert server.http.get("/health").status_code == 200
    set_faults(faults, "")
    server.post("/wake_up")
    assert server.complete() == text


def test_50_cycles_leave_the_same_figures(server, text):
    figures = []
    for cycle in range(50):
        server.post(f"/sleep?level={1 + cycle % 2}")
        server.post("/wake_up?tags=weights")
        if cycle % 2:
            server.post("/collective_rpc", json={"method": "reload_weights"})
        server.post("/wake_up")
        if cycle in (9, 49):
            status = server.rank_status()
            figures.append((status["free"], status["tags"]))
    assert figures[0] == figures[1]
    server.post("/reset_prefix_cache")
    assert server.complete() == text
