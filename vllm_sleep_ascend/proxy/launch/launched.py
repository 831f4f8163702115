# SPDX-License-Identifier: Apache-2.0
"""One model's server that the proxy starts, watches and ends."""

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.proxy.config.model import secrets
from vllm_sleep_ascend.proxy.config.models import Entry
from vllm_sleep_ascend.proxy.launch import ports
from vllm_sleep_ascend.proxy.launch.ending import Ending, does_not_end, kill
from vllm_sleep_ascend.proxy.launch.group import Group
from vllm_sleep_ascend.proxy.launch.pauses import Pauses
from vllm_sleep_ascend.proxy.launch.state import Record, State
from vllm_sleep_ascend.proxy.launch.stop_command import StopCommand

logger = logging.getLogger(__name__)

_LOOK_S = 0.1  # seconds between two looks at a server that starts
_KILL_S = 5.0  # that the end of a process may take, which a driver can hold up
_HIDDEN = "***"
_SAYS_MORE = "; the admin port's /status says more"


class _Missed(CallFailed):
    """A server that does not serve; ``details`` are for the operator alone."""

    def __init__(self, what: str, details: str) -> None:
        super().__init__(what)
        self.details = details


class Cancelled(CallFailed):
    """A start that was ended on purpose; nothing is left of it."""


class Launched:
    """The server of ``entry``, which has no process at first.

    moved: called when it has other ports; died: when the process has ended by itself; stuck: when
    SIGKILL does not end it; gone: when nothing is left of it.
    """

    def __init__(self, entry: Entry, state: State, taken: set[int]) -> None:
        self.entry = entry
        self.starts = 0
        self.deaths = 0
        self.error = ""
        """Why there is no server, for the operator; "" if none was missed."""
        self.reason = ""
        """Why the last start has failed, for users: without paths and text of the log."""
        self.failed = False
        """Whether the last start has failed."""
        self.moved: Callable[[], None] = lambda: None
        self.died: Callable[[], None] = lambda: None
        self.stuck: Callable[[], None] = lambda: None
        self.gone: Callable[[], None] = lambda: None
        self.is_stuck = False
        """Whether SIGKILL did not end it, as of a process that waits for its driver."""
        self._state, self._taken = state, taken
        self._group: Group | None = None
        self._stop_command = StopCommand()
        self._record: Record | None = None
        self._starting = self._cancelled = self._closed = False
        self._ending: asyncio.Task[None] | None = None
        self._pauses = Pauses()
        self.port = self.admin_port = 0
        self._choose_ports()

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def door(self) -> str | None:
        """The address of the admin door, if it has one."""
        if self.entry.model.has_admin_port:
            return f"http://127.0.0.1:{self.admin_port}"
        return self.entry.model.admin

    @property
    def log(self) -> str:
        return str(self._state.log(self.name))

    def log_end(self, lines: int) -> str:
        """The last lines of the log, without the keys that the server was given; none of a log from
        before its first start, whose keys may have been others."""
        if not self.starts:
            return ""
        written = self._conceal("\n".join(self._state.last_lines(self.name)))
        return "\n".join(written.rstrip("\n").split("\n")[-lines:])

    @property
    def pid(self) -> int | None:
        return self._group.leader.pid if self._group is not None else None

    def rest_s(self) -> float:
        """Seconds until the next attempt to start it."""
        return self._pauses.rest_s()

    def adopt(self, record: Record) -> bool:
        """Take over the process of an earlier proxy. Returns whether it runs."""
        group = Group(record.leader)
        if not group.is_running():
            return False
        self._group, self._record, self.starts = group, record, 1
        self.port, self.admin_port = record.port, record.admin_port
        self._taken |= {record.port, record.admin_port}
        self._pauses.serves()
        self.moved()
        return True

    def wait_out(self, record: Record) -> None:
        """Count as stuck until the process of an earlier proxy ends, which SIGKILL did not end."""
        group = Group(record.leader)
        self._group, self._record = group, record
        self.is_stuck, self.error = True, does_not_end(self.name, group)
        self._ending = asyncio.create_task(self._clear(group))
        self.stuck()

    @property
    def slept_at(self) -> int:
        """The level at which it may sleep, 0 for none. It is written down, for the next proxy."""
        return self._record.slept_at if self._record is not None else 0

    @slept_at.setter
    def slept_at(self, level: int) -> None:
        if self._record is not None and self._record.slept_at != level:
            self._record = replace(self._record, slept_at=level)
            try:
                self._state.write(self._record)
            except OSError as error:
                logger.warning("the record of %s cannot be written: %s", self.name, error)

    async def start(self, serves: Callable[[], Awaitable[bool]]) -> None:
        """Start it, unless it runs, and wait until it ``serves``.

        Raises:
            Cancelled: by ``cancel``.
            CallFailed: it does not; nothing is left of it.
        """
        self._starting = True
        try:
            if self._cancelled:
                raise Cancelled(self.name)
            if self._group is None:
                if self._closed:
                    raise CallFailed("the proxy ends")
                self._launch()
            await self._comes_up(serves)
        except Exception as error:  # whatever it is, nothing is left
            if not self._cancelled:
                self._note_failure(error)
            await self.end()
            if self.is_stuck and self._group is not None:
                self.error = self.reason = does_not_end(self.name, self._group)
            elif self._cancelled:
                self.failed, self.error = False, ""
                raise Cancelled(f"{self.name} was stopped while it started") from None
            raise CallFailed(self.reason) from None
        finally:
            self._starting = self._cancelled = False
        self.failed, self.error = False, ""
        self._pauses.serves()

    def cancel(self) -> None:
        """End what ``start`` starts, now or once it is called."""
        self._cancelled = True
        if self._group is not None and self._ending is None:
            wait_s = self.entry.model.stop_timeout_s
            self._ending = asyncio.create_task(self._end(self._group, wait_s))

    def _note_failure(self, error: Exception) -> None:
        """The next start waits."""
        known = isinstance(error, CallFailed)
        brief = str(error) if known else f"{self.name} could not be started"
        details = getattr(error, "details", "") if known else f": {error!r}"
        self.error = self._conceal(brief + details)
        self.reason = self._conceal(brief) + (_SAYS_MORE if details else "")
        self._pauses.has_failed()
        self.failed = True
        logger.warning("start: %s", self.error)

    def look(self) -> None:
        """Notice that its process has ended by itself."""
        group = self._group
        if group is None or self._starting or self._ending is not None:
            return
        with contextlib.suppress(OSError):  # of /proc: the next look may tell
            if group.is_running():
                return
            ended = self._obituary(group)
            self.error = self._conceal(str(ended) + ended.details)
            logger.warning("%s", self.error)
            self._has_died(group)

    def _has_died(self, group: Group) -> None:
        self.deaths += 1
        self._pauses.has_died()
        self._ending = asyncio.create_task(self._clean_up(group))
        self.died()

    async def end(self, wait_s: float | None = None) -> None:
        """``stop_command`` or SIGTERM, and SIGKILL after ``wait_s`` seconds to what is left; the
        entry's by default."""
        if self._group is None:
            return
        if self._ending is None:
            if wait_s is None:
                wait_s = self.entry.model.stop_timeout_s
            self._ending = asyncio.create_task(self._end(self._group, wait_s))
        elif wait_s == 0:
            self.hurry()
        await self._ended()

    async def _ended(self, timeout_s: float = float("inf")) -> None:
        """Wait for the end that has begun, unless it does not come."""
        ending, until = self._ending, time.monotonic() + timeout_s
        while ending is not None and not ending.done() and not self.is_stuck:
            if (rest := until - time.monotonic()) <= 0:
                return
            await asyncio.wait({ending}, timeout=min(rest, _LOOK_S))

    def close(self) -> None:
        """From now on it starts no process."""
        self._closed = True

    def hurry(self) -> None:
        """SIGKILL, if it is ending, and less time for its ``stop_command``."""
        if self._group is not None and self._ending is not None:
            self._stop_command.hurry()
            with contextlib.suppress(OSError):  # it gets it later
                self._group.send(signal.SIGKILL)

    async def kill(self, reason: str) -> None:
        """End what does no longer work, as if it had died."""
        group = self._group
        if group is None or self._ending is not None:
            return
        self.error = f"{self.name}: {reason}"
        logger.warning("%s; it gets SIGKILL", self.error)
        if self._starting:
            self._ending = asyncio.create_task(self._clean_up(group))
        else:
            self._has_died(group)
        await self._ended(_KILL_S)

    def _choose_ports(self) -> None:
        self._taken -= {self.port, self.admin_port}
        self.port = ports.free(self._taken)
        self._taken.add(self.port)
        self.admin_port = ports.free(self._taken)
        self._taken.add(self.admin_port)

    def _launch(self) -> None:
        if not (ports.is_free(self.port) and ports.is_free(self.admin_port)):
            self._choose_ports()
            self.moved()
        model = self.entry.model
        command = model.words(self.port, self.admin_port)
        log = self._state.new_log(self.name)
        try:
            group = Group.prepare(command, self.entry.environment(), log)
        finally:
            os.close(log)
        leader = (group.leader.pid, group.leader.started, group.leader.boot)
        try:
            record = Record(
                *(self.name, self.entry.identity, *leader, self.port, self.admin_port),
                stop_command=shlex.join(self._stop_words()),
            )
            self._state.write(record)
        except BaseException:
            group.cancel()
            raise
        self._group, self._record = group, record
        group.go()
        self.starts += 1
        logger.info("%s starts on port %d; its log is %s", self.name, self.port, self.log)

    async def _comes_up(self, serves: Callable[[], Awaitable[bool]]) -> None:
        group, limit = self._group, self.entry.model.start_timeout_s
        assert group is not None
        end = time.monotonic() + limit
        while True:
            with contextlib.suppress(OSError):  # no descriptor is free, which passes
                self.check_ports()
                if await serves() and group.is_running() and self._ending is None:
                    return
                if self._ending is None and not group.is_running():
                    reason = self._obituary(group)
                    self._ending = asyncio.create_task(self._clean_up(group))
                    await self._ended()
                    raise reason
            if self._ending is not None:
                await self._ended()
                raise CallFailed(f"{self.name} was stopped while it started")
            if time.monotonic() > end:
                await self.end()
                raise self._about(f"did not serve within {limit:g} s, and was ended")
            await asyncio.sleep(_LOOK_S)

    def check_ports(self) -> None:
        """
        Raises:
            CallFailed: another user listens there, who would get keys and requests.
        """
        for port in (self.port, *([self.admin_port] if self.entry.model.has_admin_port else [])):
            for user in ports.strangers(port):
                raise CallFailed(f"{self.name}: port {port} is used by user {user}")

    async def _end(self, group: Group, wait_s: float) -> None:
        await self._ending_of(group).terminate(wait_s)
        await self._clear(group)

    async def _clean_up(self, group: Group) -> None:
        """After its leader has died, or instead of an end that it would not notice."""
        await self._ending_of(group).stop(self.entry.model.stop_timeout_s)
        await self._clear(group)

    def _stop_words(self) -> list[str]:
        return self.entry.model.words(self.port, self.admin_port, stop=True)

    def _ending_of(self, group: Group) -> Ending:
        words, environment = self._stop_words(), self.entry.environment()
        return Ending(self.name, group, words, environment, self._state, self._stop_command)

    async def _clear(self, group: Group) -> None:
        """Kill what is left of it, and forget it."""
        if not await kill(group):
            self.is_stuck, self.error = True, does_not_end(self.name, group)
            logger.error("%s", self.error)
            self.stuck()
            await group.gone(kill=True)
        try:
            self._state.forget(self.name)
        except OSError as error:
            logger.warning("the record of %s stays: %s", self.name, error)
        self._group = self._record = self._ending = None
        self.is_stuck = False
        self.gone()

    def _obituary(self, group: Group) -> "_Missed":
        return self._about(group.end())

    def _about(self, what: str) -> "_Missed":
        last = self._state.last_line(self.name) or "nothing"
        details = f": {self.entry.model.shown()} wrote last: {last} (in {self.log})"
        return _Missed(f"{self.name} {what}", details)

    def _conceal(self, text: str) -> str:
        """The text without the keys that the server was given."""
        for secret in (*secrets(self.entry.environment()), *self.entry.model.secrets()):
            text = text.replace(secret, _HIDDEN)
        return text
