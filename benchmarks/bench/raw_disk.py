# SPDX-License-Identifier: Apache-2.0
"""The sequential speed of a disk: requests of one size, as many in flight as there are threads,
past the page cache."""

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType


class RawDisk:
    """A nameless, preallocated file that is written and read as a whole.

    Attributes:
        threads: with a request each; may be lowered.
    """

    def __init__(self, directory: Path, size: int, block: int, threads: int) -> None:
        self._block, self.threads = block, threads
        self._size = size // block * block
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        os.posix_fallocate(self._file.fileno(), 0, self._size)
        self.direct = self._bypass_page_cache()
        self._buffers = [mmap.mmap(-1, block) for _ in range(threads)]  # aligned to pages
        for buffer in self._buffers:
            buffer.write(os.urandom(block))

    def _bypass_page_cache(self) -> bool:
        import fcntl

        descriptor = self._file.fileno()
        try:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError:
            return False
        return True

    @property
    def path(self) -> str:
        """Under which other processes can open it."""
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def write_gb_s(self) -> float:
        """With everything on the disk at the end."""
        return self._timed(os.pwritev, flush=True)

    def read_gb_s(self) -> float:
        return self._timed(os.preadv, flush=False)

    def _timed(self, call: Callable[..., int], flush: bool) -> float:
        descriptor, block = self._file.fileno(), self._block

        def run(thread: int) -> None:
            buffers = [self._buffers[thread]]
            for offset in range(thread * block, self._size, self.threads * block):
                if call(descriptor, buffers, offset) != block:
                    raise OSError(f"a short request at {offset}")

        start = time.perf_counter()
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(run, range(self.threads)))
        if flush:
            os.fdatasync(descriptor)
        return self._size / 1e9 / (time.perf_counter() - start)

    def __enter__(self) -> "RawDisk":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        for buffer in self._buffers:
            buffer.close()


def drop_page_cache() -> bool:
    """Write back and drop what the page cache holds. False without the right to."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True
