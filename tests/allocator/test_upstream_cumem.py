# SPDX-License-Identifier: Apache-2.0
"""vLLM's own tests of its allocator and of sleep-mode backends, adapted to ours.

The tests have the same names as vLLM's; docs/upstream_tests.md lists them all.
"""

import gc

import pytest
import torch
from helpers import MIB
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory
from vllm.v1.worker.workspace import WorkspaceManager

import vllm_sleep_ascend
from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import DeviceOutOfMemoryError
from vllm_sleep_ascend.memory import pool
from vllm_sleep_ascend.memory.backend import CamemBackend

SEGMENT = 32 * MIB - 4096  # with torch_npu's padding, a segment of exactly 32 MiB


@pytest.fixture
def backend():
    torch.npu.init()
    torch.npu.empty_cache()
    yield CamemBackend()
    gc.collect()
    pool.release_pools()
    torch.npu.empty_cache()
    assert _camem.allocations() == []


def tensor(tag: str, value: int = 0, size: int = SEGMENT) -> torch.Tensor:
    with pool.use_pool(tag):
        return torch.full((size,), value, dtype=torch.uint8, device="npu")


def mapped(tag: str | None = None) -> int:
    return sum(a["device_bytes"] for a in _camem.allocations() if tag in (None, a["tag"]))


# --- tests/basic_correctness/memory/cumem/test_cumem.py ------------------------------------------


def test_python_error(backend):
    _, total = torch.npu.mem_get_info()
    most = torch.empty(int(total * 0.9), dtype=torch.uint8, device="npu")  # nobody writes to it
    room, _ = torch.npu.mem_get_info()
    first = tensor("weights", 3, int(room * 0.7))
    backend.suspend(level=2)
    other = torch.empty(int(room * 0.7), dtype=torch.uint8, device="npu")
    with pytest.raises(DeviceOutOfMemoryError, match="bytes free and"):
        backend.resume()
    assert mapped() == 0
    del other
    backend.resume()
    assert mapped() >= first.nbytes
    del most


def test_basic_cumem(backend):
    x = torch.full((1024, 1024), 1.0, device="npu")
    with pool.use_pool("weights"):
        y = torch.full((1024, 1024), 1.0, device="npu")
        z = torch.full((1024, 1024), 2.0, device="npu")
    before = mapped()
    assert before >= y.nbytes + z.nbytes
    backend.suspend()
    assert mapped() == 0
    assert torch.all(x == 1)
    backend.resume()
    assert mapped() == before
    assert torch.all(x + y + z == 4)


def test_discard_tags(backend):
    weights, cache = tensor("weights", 1), tensor("kv_cache", 2)
    backend.discard(("kv_cache",))
    assert (mapped("weights"), mapped("kv_cache")) == (32 * MIB, 0)
    assert torch.all(weights == 1)
    backend.resume()
    assert mapped("kv_cache") == 32 * MIB
    cache.fill_(3)
    assert torch.all(cache == 3)
    backend.suspend(level=1)
    backend.resume()
    assert torch.all(weights == 1)


@pytest.mark.parametrize("tag", ["workspace", "runtime"])
def test_selective_wake_restores_internal_tags(backend, tag):
    kept = [tensor(tag, 1), tensor("weights", 2), tensor("kv_cache", 3)]
    backend.suspend(level=1)
    assert mapped() == 0
    backend.resume(tags=["weights"])
    assert (mapped(tag), mapped("weights"), mapped("kv_cache")) == (32 * MIB, 32 * MIB, 0)
    backend.resume(tags=["kv_cache"])
    assert mapped() == 3 * 32 * MIB
    assert len(kept) == 3


def test_workspace_scratch_discarded_on_sleep(backend):
    manager = WorkspaceManager(
        torch.device("npu"), alloc_context=lambda: pool.use_pool("workspace")
    )
    (small,) = manager.get_simultaneous(((SEGMENT,), torch.uint8))
    (scratch,) = manager.get_simultaneous(((2 * SEGMENT + 4096,), torch.uint8))
    address, held = scratch.data_ptr(), mapped("workspace")
    assert held == 96 * MIB
    backend.suspend(level=1)
    assert mapped() == 0
    assert {a["host_bytes"] for a in _camem.allocations() if a["tag"] == "workspace"} == {0}
    backend.resume(tags=["kv_cache"])
    assert mapped("workspace") == held
    assert scratch.data_ptr() == address
    small.fill_(1)
    assert int(scratch.fill_(2).sum(dtype=torch.int64)) == 2 * scratch.numel()
    del small
    (big,) = manager.get_simultaneous(((4 * SEGMENT,), torch.uint8))
    backend.suspend(level=1)
    backend.resume(tags=["weights"])
    assert mapped("workspace") == held - 32 * MIB + 128 * MIB
    assert big.data_ptr() != address
    del big, scratch, manager


@pytest.mark.parametrize("free_x_early", [True, False])
def test_reentered_tag(backend, free_x_early):
    with pool.use_pool("weights"):
        x = [torch.empty(SEGMENT, dtype=torch.uint8, device="npu")]
        if free_x_early:
            x.clear()
    y = tensor("weights", 1)
    x.clear()
    gc.collect()
    with pool.use_pool("weights"):
        pass
    assert mapped() == 32 * MIB
    backend.suspend()
    backend.resume()
    assert torch.all(y == 1)


@pytest.mark.parametrize("level", [1, 2])
def test_runtime_state_survives_sleep(backend, level):
    with pool.use_pool("runtime"):
        state = torch.arange(1 << 20, device="npu")
        with pool.use_pool("kv_cache"):
            cache = torch.zeros(1 << 20, device="npu")
    assert {a["tag"] for a in _camem.allocations()} == {"runtime", "kv_cache"}
    backend.suspend(level=level)
    assert mapped() == 0
    backend.resume(tags=["weights"])
    assert torch.equal(state.cpu(), torch.arange(1 << 20))
    backend.resume(tags=["kv_cache"])
    assert torch.all(cache.fill_(1) == 1)


def test_level2_discards_ordinary_tensor_with_weights_tag(backend):
    """The simulator fills new memory with a pattern, so old content cannot survive by accident."""
    tensors = [tensor("weights", 0x44), tensor("weights", 0x55)]
    addresses = [t.data_ptr() for t in tensors]
    backend.suspend(level=2)
    backend.resume()
    assert [t.data_ptr() for t in tensors] == addresses
    assert not torch.any(tensors[0] == 0x44)
    assert not torch.any(tensors[1] == 0x55)


# --- tests/v1/worker/test_sleep_mode_backend.py --------------------------------------------------


def test_camem_is_the_registered_backend():
    vllm_sleep_ascend.register_general()
    assert SleepModeBackendFactory.get_backend_class("camem") is CamemBackend
    assert issubclass(CamemBackend, SleepModeBackend)


def test_camem_capability_flags():
    assert CamemBackend.is_supported()
    assert CamemBackend.preserves_communicators()
    assert CamemBackend.preserves_compiled_artifacts()
    assert not CamemBackend.preserves_graphs_with_communicators()
    assert not CamemBackend.supports_durable_storage()


def test_suspend_resume_state_transitions(backend):
    assert backend.state() == "RUNNING"
    kept = tensor("weights", 1)
    assert backend.state() == "RUNNING"
    backend.suspend(level=1)
    assert backend.state() == "SUSPENDED"
    backend.resume()
    assert backend.state() == "RUNNING"
    assert torch.all(kept == 1)


def test_unknown_backend_raises():
    with pytest.raises(ValueError, match=r"'does-not-exist'.*camem"):
        SleepModeBackendFactory.get_backend_class("does-not-exist")


def test_duplicate_registration_raises():
    with pytest.raises(ValueError, match="already registered"):
        SleepModeBackendFactory.register_backend("camem", CamemBackend.__module__, "CamemBackend")
