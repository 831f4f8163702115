# SPDX-License-Identifier: Apache-2.0
"""Saved images without an engine, where a call of the file system fails, or is the last one of a
process that is killed. About 19 s, as long again with slow ones.

Interrupted calls are repeated by Python itself (PEP 475); here one fails like any other.
"""

import errno
import fcntl
import json
import os
import select
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from helpers.images import (
    Model,
    assert_filled,
    holds,
    names,
    no_library,
    save,
    two_ranks,
)
from helpers.patience import patience

from vllm_sleep_ascend.errors import ImageError, ImageRefusedError, SleepModeError
from vllm_sleep_ascend.rank.image import folder, saving

OF_OS = (
    "open close mkdir rmdir listdir scandir stat lstat fstat statvfs fsync rename replace unlink "
    "posix_fallocate pwritev preadv posix_fadvise"
)
CALLS = [
    *((os, name) for name in OF_OS.split()),
    *((fcntl, name) for name in ("flock", "fcntl")),
    *((json, "dump"), (Path, "read_bytes"), (folder, "_exchange")),
]
# Without direct requests, with something left over, or with the content on the disk already
SURVIVED = {"fcntl", "posix_fadvise", "scandir", "unlink", "rmdir", "close"}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EINTR)
ROWS = 10
OLD, NEW, NEXT = (Model(seed, ROWS) for seed in (3, 4, 5))

Act = Callable[[str, int], str | None]


@contextmanager
def interposed(act: Act) -> Iterator[Counter[str]]:
    """Counts each of the calls, and calls ``act(name, nth)`` before it, which may raise what it is
    to raise, or return "half" or "nothing" for what it is to transfer. A ``close`` that fails has
    closed, as on Linux."""
    counts: Counter[str] = Counter()

    def instead_of(stock: Callable, name: str) -> Callable:
        def call(*arguments, **more):
            counts[name] += 1
            if name == "close":
                stock(*arguments)
                return act(name, counts[name])
            transfers = act(name, counts[name])
            if transfers == "nothing":
                return 0
            if transfers == "half":
                descriptor, (content,), offset = arguments
                arguments = descriptor, [content[: len(content) // 2]], offset
            return stock(*arguments, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS:
            patch.setattr(owner, name, instead_of(getattr(owner, name), name))
        yield counts


def counted(work: Callable[[], object]) -> list[tuple[str, int]]:
    """Each call of the work, by its name and how many there were."""
    with interposed(lambda name, nth: None) as counts:
        work()
    return [(name, nth + 1) for name, count in counts.items() for nth in range(count)]


@contextmanager
def failing(name: str, nth: int, how: int | str) -> Iterator[None]:
    def act(called: str, number: int) -> str | None:
        if (called, number) != (name, nth):
            return None
        if isinstance(how, int):
            raise OSError(how, os.strerror(how))
        return how

    with interposed(act) as counts:
        yield
    assert counts[name] >= nth, f"{name} was called {counts[name]} times, and {nth} was to fail"


def killed_at(name: str, nth: int, work: Callable[[], object]) -> None:
    """Do the work in a process that is killed before that call."""

    def act(called: str, number: int) -> None:
        if (called, number) == (name, nth):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            with interposed(act):
                work()
        finally:
            os._exit(1)
    end = os.pidfd_open(child)
    ended, _, _ = select.select([end], [], [], 20 * patience())
    os.close(end)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert ended, f"the process that {name} {nth} was to end did not"
    assert os.WIFSIGNALED(status), f"{name} was not called {nth} times"


def faults(calls: list[tuple[str, int]]) -> Iterator[tuple[str, int, int | str]]:
    for name, nth in calls:
        transfers = ("half", "nothing") if name in ("pwritev", "preadv") else ()
        for how in (*ERRORS, *transfers):
            yield name, nth, how


@pytest.fixture
def disk() -> Iterator[Path]:
    """In memory: nothing here depends on the speed of a disk."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


IN_TWO_STEPS = pytest.param(False, marks=pytest.mark.slow)


@pytest.fixture(params=[True, IN_TWO_STEPS], ids=["at once", "in two steps"])
def exchanging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that exchange two names, and those that do not."""
    if not request.param:
        monkeypatch.setattr(folder.ctypes, "CDLL", no_library)


@pytest.mark.parametrize("replaces", [True, False])
def test_each_call_of_a_save_may_fail_once(exchanging, replaces: bool, disk: Path) -> None:
    one, fatal = disk / "one", set[str]()

    def begin() -> None:
        shutil.rmtree(one, ignore_errors=True)
        if replaces:
            save(OLD, one)

    begin()
    calls = counted(lambda: save(NEW, one, replaces))
    for name, nth, how in faults(calls):
        begin()
        where, there = f"{name} {nth}, {how}", NEW
        with failing(name, nth, how):
            try:
                save(NEW, one, replaces)
            except SleepModeError as error:
                there = OLD if replaces else None
                fatal.add(name)
                assert names(disk) == (["one"] if replaces else []), where
                assert str(one.parent) in str(error), where
                if how == errno.ENOSPC:
                    assert "No space left on device; free disk space" in str(error), where
        assert holds(one, there) if there else not one.exists(), where
        save(NEXT, one, replace=True)
        assert holds(one, NEXT) and names(disk) == ["one"], where
    assert fatal == {name for name, _ in calls} - SURVIVED


def test_each_call_of_a_start_may_fail_once(disk: Path) -> None:
    one, fatal = disk / "one", set[str]()
    save(OLD, one)

    def fill() -> None:
        assert_filled(one, OLD, ROWS)

    calls = counted(fill)
    for name, nth, how in faults(calls):
        with failing(name, nth, how):
            try:
                fill()
            except ImageError as error:
                fatal.add(name)
                assert str(one) in str(error), (name, nth, how)
        fill()
    assert fatal == {name for name, _ in calls} - SURVIVED


def test_a_rollback_that_fails_too_loses_no_image(exchanging, disk: Path) -> None:
    """Two faults in a row: another rank gives up, and a call of taking the image back fails."""
    one, fatal = disk / "one", set[str]()

    def begin() -> saving._Attempt:
        shutil.rmtree(one, ignore_errors=True)
        save(OLD, one)
        publisher, other = two_ranks(one)
        publisher.publish()
        assert other.roll_back() == ""
        other.close()
        return publisher

    def end(publisher: saving._Attempt) -> str:
        trouble = publisher.roll_back()
        publisher.close()
        return trouble

    first = begin()
    calls = counted(lambda: end(first))
    for name, nth, how in faults(calls):
        publisher = begin()
        with failing(name, nth, how):
            trouble = end(publisher)
        aside = [path for path in disk.iterdir() if path != one and holds(path, OLD)]
        if trouble:
            fatal.add(name)
            (before,) = aside
            assert trouble.endswith(f"; the image before is in {before}")
        else:
            assert holds(one, OLD) and aside == [], (name, nth, how)
        save(NEXT, one, replace=True)
        assert holds(one, NEXT) and names(disk) == ["one"], (name, nth, how)
    assert {"_exchange", "lstat", "fstat"} <= fatal


@pytest.mark.parametrize("replaces", [True, False])
def test_a_process_killed_at_any_call_of_a_save_loses_no_image(
    exchanging, replaces: bool, disk: Path
) -> None:
    one = disk / "one"
    others = [".one.12345678.saving.kept", ".one.too.12345678.saving"]
    for other in others:
        (disk / other).mkdir()

    def begin() -> None:
        if replaces:
            save(OLD, one, replace=True)
        else:
            shutil.rmtree(one, ignore_errors=True)

    begin()
    calls, left = counted(lambda: save(NEW, one, replaces)), set()
    for name, nth in calls:
        begin()
        killed_at(name, nth, lambda: save(NEW, one, replaces))
        left |= {path.suffix for path in disk.iterdir() if path.name not in (*others, "one")}
        if replaces or one.exists():
            with pytest.raises(ImageRefusedError, match=r"one exists; name another directory"):
                save(NEXT, one)  # which brings back what was aside
            assert holds(one, NEW) or (replaces and holds(one, OLD)), (name, nth)
        save(NEXT, one, replace=True)
        assert holds(one, NEXT) and names(disk) == sorted([*others, "one"]), (name, nth)
    assert {".saving", ".publishing"} <= left
