# SPDX-License-Identifier: Apache-2.0
"""How the processes of a server end: by its ``stop_command`` or SIGTERM, and SIGKILL later."""

import asyncio
import logging
import os
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_sleep_ascend.client.calls import CallFailed
from vllm_sleep_ascend.proxy.config.model import STOP_S
from vllm_sleep_ascend.proxy.config.models import Entry
from vllm_sleep_ascend.proxy.launch.group import Group
from vllm_sleep_ascend.proxy.launch.state import Record, State
from vllm_sleep_ascend.proxy.launch.stop_command import StopCommand

logger = logging.getLogger(__name__)

_STUCK_S = 30.0  # after SIGKILL, until processes count as stuck
_GRACE_S = 3.0  # from SIGTERM on, also if a stop_command has used up all the time
_RETRY_S = 0.1  # until the next attempt to send a signal


@dataclass(frozen=True)
class Ending:
    """The end of the server ``name``, whose processes are ``group``.

    words: of its ``stop_command``; empty if it has none.
    environment: that of the ``stop_command``, whose output goes to the server's log in ``state``.
    """

    name: str
    group: Group
    words: Sequence[str]
    environment: Mapping[str, str]
    state: State
    stop_command: StopCommand = field(default_factory=StopCommand)

    async def terminate(self, wait_s: float) -> bool:
        """``stop_command`` or SIGTERM, and wait. Returns whether there was anything to end."""
        until = time.monotonic() + wait_s
        found = await self.stop(wait_s)
        while not found:
            try:
                found = self.group.send(signal.SIGTERM)
                break
            except OSError as error:  # of /proc
                logger.warning("%s gets no SIGTERM yet: %s", self.name, error)
                await asyncio.sleep(_RETRY_S)
        rest_s = max(until - time.monotonic(), min(wait_s, _GRACE_S))
        if found and not await self.group.gone(rest_s):
            logger.warning("%s did not end within %g s; it gets SIGKILL", self.name, wait_s)
        return found

    async def stop(self, wait_s: float) -> bool:
        """Run the ``stop_command``. Returns whether there is one that has succeeded."""
        if not self.words:
            return False
        try:
            log = self.state.same_log(self.name)
            reason = await self.stop_command.run(self.words, self.environment, log, wait_s)
        except OSError as error:
            reason = f"has no log: {error.strerror}"
        if reason:
            logger.warning("%s: its stop_command %s; its log may say more", self.name, reason)
        return not reason


async def kill(group: Group) -> bool:
    """SIGKILL to what is left. Returns whether nothing is left; if not, it is stuck."""
    return await group.gone(_STUCK_S, kill=True)


async def end_stray(record: Record, entry: Entry | None, state: State) -> bool:
    """End the process of an earlier proxy, with its group. Returns whether there was one.

    Args:
        entry: the present one of its name.

    Raises:
        CallFailed: it does not end.
    """
    words = shlex.split(record.stop_command)
    environment = entry.environment() if entry is not None else os.environ
    wait_s = entry.model.stop_timeout_s if entry is not None else STOP_S
    group = Group(record.leader)
    if not await Ending(record.name, group, words, environment, state).terminate(wait_s):
        return False
    if not await kill(group):
        raise CallFailed(does_not_end(record.name, group))
    return True


def does_not_end(name: str, group: Group) -> str:
    """The error of a server that is stuck."""
    return f"{name}: process {group.leader.pid} does not end, also by SIGKILL; see its driver"
