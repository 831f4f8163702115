# SPDX-License-Identifier: Apache-2.0
"""The allocator through torch: tensors that sleep and wake on a simulated NPU."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from helpers import MIB
from helpers.machine import LAUNCHER, USUAL_MACHINE

from vllm_sleep_ascend import _camem
from vllm_sleep_ascend.errors import DeviceOutOfMemoryError
from vllm_sleep_ascend.memory import pool
from vllm_sleep_ascend.sim import control

OFFLOAD = {"weights": "offload", "kv_cache": "discard"}


@pytest.fixture(autouse=True)
def clean():
    """Every test starts and ends with an empty allocator and the same device memory."""
    torch.npu.init()
    torch.npu.empty_cache()
    _camem.configure(chunk_bytes=4 * MIB, keep_host_backup=True, copy_threads=2, host_threads=2)
    before = used()
    yield
    gc.collect()
    pool.release_pools()
    torch.npu.empty_cache()
    assert _camem.allocations() == []
    assert _camem.pinned_host_bytes() == 0
    assert used() == before


def used() -> int:
    free, total = torch.npu.mem_get_info()
    return total - free


def empty(mib: int) -> torch.Tensor:
    """A tensor with its own segment of exactly that size, given torch_npu's padding."""
    return torch.empty(mib * MIB - 4096, dtype=torch.uint8, device="npu")


def weights(mib: int = 12, seed: int = 0) -> torch.Tensor:
    with pool.use_pool("weights"):
        tensor = empty(mib).view(torch.int32)
    generator = torch.Generator().manual_seed(seed)
    tensor.copy_(torch.randint(-(2**31), 2**31 - 1, tensor.shape, generator=generator))
    return tensor


def kv_cache(mib: int = 20) -> torch.Tensor:
    with pool.use_pool("kv_cache"):
        return empty(mib).fill_(7)


def test_sleep_frees_the_device_and_wake_brings_the_weights_back():
    before = used()
    tensor, cache = weights(), kv_cache()
    content, address = tensor.cpu(), tensor.data_ptr()
    assert used() - before == 32 * MIB
    torch.npu.synchronize()

    report = _camem.sleep(OFFLOAD)
    assert used() == before
    assert report["tags"]["weights"]["offloaded"] == 12 * MIB
    assert report["tags"]["kv_cache"]["discarded"] == 20 * MIB
    assert _camem.pinned_host_bytes() == 12 * MIB  # exact: no rounding up to a power of two

    report = _camem.wake(["weights", "kv_cache"])
    assert report["tags"]["weights"]["restored"] == 12 * MIB
    assert report["tags"]["kv_cache"]["remapped"] == 20 * MIB
    assert used() - before == 32 * MIB
    assert tensor.data_ptr() == address
    assert torch.equal(tensor.cpu(), content)
    cache.fill_(1)
    assert int(cache.sum(dtype=torch.int64)) == cache.numel()


def test_tags_wake_one_by_one():
    before = used()
    tensor, cache = weights(), kv_cache()
    content = tensor.cpu()
    _camem.sleep(OFFLOAD)
    _camem.wake(["weights"])
    assert used() - before == 12 * MIB
    assert torch.equal(tensor.cpu(), content)
    _camem.wake(["kv_cache"])
    assert used() - before == 32 * MIB
    cache.zero_()


def test_what_sleeps_or_is_awake_stays_so():
    tensor = weights()
    content = tensor.cpu()
    assert _camem.wake(["weights"])["tags"] == {}
    _camem.sleep(OFFLOAD)
    assert _camem.sleep(OFFLOAD)["tags"] == {}
    _camem.wake(["weights"])
    assert torch.equal(tensor.cpu(), content)


def test_discarding_what_was_offloaded_drops_the_backup():
    tensor = weights()
    _camem.sleep(OFFLOAD)
    report = _camem.sleep({"weights": "discard"})
    assert report["tags"]["weights"]["discarded"] == 12 * MIB
    assert _camem.pinned_host_bytes() == 0
    assert _camem.wake(["weights"])["tags"]["weights"]["remapped"] == 12 * MIB
    tensor.zero_()


def test_the_backup_is_kept_for_the_next_sleep_or_given_back():
    tensor = weights()
    _camem.sleep(OFFLOAD)
    _camem.wake(["weights"])
    assert _camem.pinned_host_bytes() == 12 * MIB
    taken = control.call_count("aclrtMallocHost")
    _camem.sleep(OFFLOAD)
    assert control.call_count("aclrtMallocHost") == taken
    _camem.configure(chunk_bytes=4 * MIB, keep_host_backup=False, copy_threads=2, host_threads=2)
    _camem.wake(["weights"])
    assert _camem.pinned_host_bytes() == 0
    del tensor


def test_changed_weights_are_backed_up_again():
    tensor = weights(seed=1)
    _camem.sleep(OFFLOAD)
    _camem.wake(["weights"])
    changed = tensor.cpu() + 1
    tensor.add_(1)
    torch.npu.synchronize()
    _camem.sleep(OFFLOAD)
    _camem.wake(["weights"])
    assert torch.equal(tensor.cpu(), changed)


def test_a_wake_without_room_says_how_much_is_missing_and_can_be_repeated():
    tensor = weights(mib=100)
    content = tensor.cpu()
    _camem.sleep(OFFLOAD)
    free, _ = torch.npu.mem_get_info()
    neighbour = empty((free - 60 * MIB) // MIB)
    asleep = used()
    with pytest.raises(DeviceOutOfMemoryError, match=r"bytes free and \d+ are needed") as caught:
        _camem.wake(["weights"])
    assert caught.value.needed_bytes == 100 * MIB
    assert caught.value.free_bytes <= 60 * MIB
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert used() == asleep
    del neighbour
    torch.npu.empty_cache()
    _camem.wake(["weights"])
    assert torch.equal(tensor.cpu(), content)


def test_a_wake_waits_for_room_as_long_as_it_may():
    tensor = weights(mib=100)
    content = tensor.cpu()
    _camem.sleep(OFFLOAD)
    free, _ = torch.npu.mem_get_info()
    code = (
        "import sys, torch, torch_npu; "
        f"x = torch.empty({free - 40 * MIB}, dtype=torch.uint8, device='npu'); "
        "torch.npu.synchronize(); print('taken', flush=True); sys.stdin.read()"
    )
    neighbour = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert neighbour.stdout.readline() == "taken\n"
        with pytest.raises(DeviceOutOfMemoryError):
            _camem.wake(["weights"], 0.2)
        threading.Timer(0.5, neighbour.kill).start()
        _camem.wake(["weights"], 30.0)
    finally:
        neighbour.kill()
        neighbour.wait()
    assert torch.equal(tensor.cpu(), content)


def test_memory_that_torch_no_longer_uses_is_given_back_at_once():
    before = used()
    with pool.use_pool("weights"):
        scratch = empty(50)
        tensor = empty(12).fill_(1)
        del scratch
    assert used() - before == 12 * MIB
    report = _camem.sleep(OFFLOAD)
    assert report["tags"]["weights"]["offloaded"] == 12 * MIB
    _camem.wake(["weights"])
    assert used() - before == 12 * MIB
    assert int(tensor.sum(dtype=torch.int64)) == tensor.numel()


def test_tensors_freed_while_asleep_leave_nothing():
    tensor = weights()
    _camem.sleep(OFFLOAD)
    del tensor
    pool.release_pools()
    assert _camem.allocations() == []
    assert _camem.pinned_host_bytes() == 0


def test_the_inner_pool_wins_and_the_outer_tag_returns():
    with pool.use_pool("runtime"):
        outer = empty(12)
        with pool.use_pool("kv_cache"):
            inner = empty(14)
        after = empty(20)
    tags = {a["address"]: a["tag"] for a in _camem.allocations()}
    assert tags[inner.data_ptr()] == "kv_cache"
    assert tags[after.data_ptr()] == "runtime"
    assert tags[outer.data_ptr()] == "runtime"


def test_an_allocation_that_does_not_fit_is_torchs_out_of_memory_error():
    _, total = torch.npu.mem_get_info()
    with pytest.raises(torch.OutOfMemoryError), pool.use_pool("weights"):
        torch.empty(2 * total, dtype=torch.uint8, device="npu")
    assert weights().sum().device.type == "npu"


@pytest.mark.parametrize("variable", ["PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_pause_inside_a_pool(variable):
    code = (
        "import torch, torch_npu\n"
        "from vllm_sleep_ascend import _camem\nfrom vllm_sleep_ascend.memory import pool\n"
        "with pool.use_pool('weights'):\n"
        "    x = torch.ones((20 << 20) - 4096, dtype=torch.uint8, device='npu')\n"
        "torch.npu.synchronize()\n"
        "before = torch.npu.mem_get_info()[0]\n"
        "_camem.sleep({'weights': 'offload'})\n"
        "print((torch.npu.mem_get_info()[0] - before) >> 20)\n"
    )
    # With an older CANN, torch_npu reserves addresses without a context, which is refused.
    environment = {**os.environ, **USUAL_MACHINE, variable: "expandable_segments:True"}
    done = subprocess.run(
        [*LAUNCHER, "python", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == "20"


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_expandable_segments_switched_on_at_run_time_are_noticed():
    done = run(
        "import torch, torch_npu\n"
        "from vllm_sleep_ascend.memory import pool\n"
        "torch.npu.set_device(0)\n"
        "torch.npu.memory._set_allocator_settings('expandable_segments:True')\n"
        "with pool.use_pool('weights'):\n"
        "    x = torch.ones(20 << 20, dtype=torch.uint8, device='npu')\n"
    )
    assert done.returncode == 1
    assert "SleepModeError" in done.stderr
    assert "were not allocated by sleep mode and cannot sleep" in done.stderr
    assert "Leave expandable_segments out of the allocator settings" in done.stderr


def test_a_backup_that_does_not_fit_into_host_memory_is_refused_before_anything_is_copied():
    """Unwritten device memory costs the simulated machine nothing, but a backup would."""
    done = run(
        "from helpers import allocator\n"
        "from vllm_sleep_ascend import _camem\n"
        "from vllm_sleep_ascend.errors import HostOutOfMemoryError\n"
        "allocator.start()\n"
        "allocator._hooks.camem_malloc(64 << 30, 0, None)\n"
        "try:\n"
        "    _camem.sleep({'default': 'offload'})\n"
        "except HostOutOfMemoryError as error:\n"
        "    assert error.needed_bytes == 64 << 30 > error.free_bytes > 0\n"
        "    print(error)\n"
        "print(_camem.pinned_host_bytes(), _camem.allocations()[0]['state'])\n",
        NPU_SIM_HBM_GIB="65",
        NPU_SIM_MACHINE=f"large-{os.getpid()}",
    )
    assert done.returncode == 0, done.stderr
    assert "free host memory, or use level 2" in done.stdout
    assert "everything is as it was" in done.stdout
    assert done.stdout.split()[-2:] == ["0", "mapped"]


def test_an_unknown_action_is_refused_before_anything_happens():
    tensor = weights()
    with pytest.raises(ValueError, match="unknown action 'drop'; one of keep, offload, discard"):
        _camem.sleep({"weights": "drop"})
    assert int(tensor[0]) == int(tensor[0].cpu())


@pytest.mark.slow
def test_1000_cycles_leave_no_trace():
    tensor, cache = weights(mib=12), kv_cache(mib=12)
    content = tensor.cpu()
    figures = []
    for cycle in range(1000):
        _camem.sleep(OFFLOAD)
        _camem.wake(["weights", "kv_cache"])
        if cycle in (0, 999):
            counters = control.counters()
            figures.append((used(), _camem.pinned_host_bytes(), counters))
    assert figures[0] == figures[1]
    assert torch.equal(tensor.cpu(), content)
    del cache
