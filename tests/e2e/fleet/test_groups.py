# SPDX-License-Identifier: Apache-2.0
"""Process groups of servers: the gate before the command, and who gets signals."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fleet import runs
from helpers.patience import wait_for
from helpers.warm import kill_group

from vllm_sleep_ascend.proxy.launch import ports
from vllm_sleep_ascend.proxy.launch.group import Group, Leader


def prepare(folder: Path, code: str, **environment: str) -> Group:
    """A group that runs Python code in ``folder``; its output goes to the file ``out``."""
    command = [sys.executable, "-c", f"import os\nos.chdir({str(folder)!r})\n{code}"]
    with open(folder / "out", "ab") as out:
        return Group.prepare(command, {**os.environ, **environment}, out.fileno())


def has_ended(group: Group) -> bool:
    return not group.is_running()


def test_a_command_waits_at_the_gate(tmp_path):
    code = "print(os.getpid(), os.environ['ODD-NAME'], repr(open(0).read()))"
    group = prepare(tmp_path, code, **{"ODD-NAME": "x"})
    assert group.is_running()
    assert (tmp_path / "out").read_text() == ""
    group.go()
    wait_for(lambda: has_ended(group))
    assert (tmp_path / "out").read_text() == f"{group.leader.pid} x ''\n"
    assert group.end() == "has ended with exit code 0"


def test_a_command_has_its_signals_as_at_first(tmp_path):
    """Python, which starts it, ignores some. What else is ignored here, the command ignores too."""
    with open(tmp_path / "out", "ab") as out:
        command = ["grep", "SigIgn", "/proc/self/status"]
        group = Group.prepare(command, dict(os.environ), out.fileno())
    group.go()
    wait_for(lambda: has_ended(group))
    ignored = int((tmp_path / "out").read_text().split()[1], 16)
    assert [ignored >> number - 1 & 1 for number in (signal.SIGPIPE, signal.SIGXFSZ)] == [0, 0]


def test_a_command_whose_gate_does_not_open_never_runs(tmp_path):
    group = prepare(tmp_path, "print('ran')")
    group.cancel()
    assert has_ended(group)
    assert (tmp_path / "out").read_text() == ""


def test_a_command_does_not_run_if_the_proxy_is_killed_before(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from vllm_sleep_ascend.proxy.launch.group import Group\n"
        "group = Group.prepare(['touch', sys.argv[1]], dict(os.environ), 2)\n"
        "print(group.leader.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = tmp_path / "ran"
    killed = subprocess.run([sys.executable, "-c", code, str(ran)], stdout=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL
    pid = int(killed.stdout)
    wait_for(lambda: not runs(pid))
    assert not ran.exists()


FORKS = """
import time
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        open("other", "w").write(str(os.getpid()))
    else:
        open("child", "w").write(str(os.getpid()))
time.sleep(600)
"""


@pytest.fixture
def forked(tmp_path):
    """A group whose leader has a child in it, and one in a group of its own."""
    group = prepare(tmp_path, FORKS)
    group.go()
    pids = []
    try:
        for name in ("child", "other"):
            file = tmp_path / name
            wait_for(lambda file=file: file.exists() and file.read_text())
            pids.append(int(file.read_text()))
        yield group, *pids
    finally:
        for pid in (group.leader.pid, *pids[1:]):
            kill_group(pid)


def test_a_signal_goes_to_the_group_alone(forked):
    group, child, other = forked
    assert group.send(signal.SIGTERM)
    wait_for(lambda: has_ended(group) and not runs(child))
    assert group.end() == "was ended by SIGTERM"
    assert runs(other)
    assert not group.send(signal.SIGTERM)
    assert asyncio.run(group.gone(0))


def test_a_child_outlives_its_leader_until_the_group_is_killed(forked):
    group, child, other = forked
    os.kill(group.leader.pid, signal.SIGKILL)
    wait_for(lambda: has_ended(group))
    again = Group(group.leader)  # as another proxy finds it
    assert has_ended(again)
    assert not asyncio.run(again.gone(0))
    assert runs(child)
    assert asyncio.run(again.gone(60, kill=True))
    assert not runs(child) and runs(other)


MAIN_THREAD_ENDS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
open("ends", "w").close()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_zombie_whose_threads_run_has_not_ended(tmp_path):
    """Its memory and devices are not free yet."""
    group = prepare(tmp_path, MAIN_THREAD_ENDS)
    group.go()
    try:
        stat = Path(f"/proc/{group.leader.pid}/stat")
        wait_for(lambda: stat.read_bytes().rpartition(b")")[2].split()[0] == b"Z")
        assert (tmp_path / "ends").exists(), (tmp_path / "out").read_text()
        again = Group(group.leader)  # as another proxy finds it
        for each in (group, again):
            assert each.is_running()
            assert not asyncio.run(each.gone(0))
        assert asyncio.run(again.gone(60, kill=True))
        assert has_ended(group) and group.end() == "was ended by SIGKILL"
    finally:
        kill_group(group.leader.pid)


def test_a_process_that_may_get_no_signal_is_not_gone(forked, monkeypatch):
    """As another user's in the group."""
    group, child, _ = forked
    pidfd_send = signal.pidfd_send_signal

    def send(descriptor: int, number: int) -> None:
        if f"Pid:\t{child}\n" in Path(f"/proc/self/fdinfo/{descriptor}").read_text():
            raise PermissionError
        pidfd_send(descriptor, number)

    monkeypatch.setattr(signal, "pidfd_send_signal", send)
    assert group.send(signal.SIGTERM)
    wait_for(lambda: has_ended(group))
    assert not asyncio.run(group.gone(0.3, kill=True))
    assert runs(child)
    monkeypatch.undo()
    assert asyncio.run(group.gone(60, kill=True))


@pytest.mark.parametrize("change", [{"started": 1}, {"started": -1}, {"boot": "x"}, {"pid": 1}])
def test_another_process_is_not_the_leader(forked, change):
    group, child, _ = forked
    known = vars(group.leader)
    wrong = Group(
        Leader(**{**known, **{name: known[name] + more for name, more in change.items()}})
    )
    assert has_ended(wrong)
    assert not wrong.send(signal.SIGKILL)
    assert asyncio.run(wrong.gone(0, kill=True))
    assert group.is_running() and runs(child)


def test_ports_are_free_and_not_those_of_outgoing_connections():
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    taken: set[int] = set()
    for _ in range(20):
        port = ports.free(taken)
        assert port not in taken and not low <= port <= high
        assert ports.is_free(port)
        taken.add(port)


def test_two_processes_with_the_same_seed_choose_different_ports():
    """vLLM seeds ``random`` with 0 in each process with an engine."""
    chosen = []
    for _ in range(2):
        random.seed(0)
        chosen.append([ports.free(set()) for _ in range(4)])
    assert chosen[0] != chosen[1]
