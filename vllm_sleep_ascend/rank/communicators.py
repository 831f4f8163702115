# SPDX-License-Identifier: Apache-2.0
"""Releases HCCL's communicators while a rank sleeps, and creates them again at the wake.

A communicator holds device memory: two buffers of HCCL_BUFFSIZE (200 MiB each by default) for each
group of ranks that has communicated, and two of P2P_HCCL_BUFFSIZE (20 MiB each) for each pair of
pipeline stages. HCCL has no call that frees the buffers and keeps the communicator; HcclCommSuspend
only stops its work. So communicators are destroyed and created again. Everything else stays:
torch's process groups with their stores and streams, vLLM's groups over them, and all references to
them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch_npu.distributed import reinit_process_group
from vllm.logger import init_logger

from vllm_sleep_ascend.config import connect_timeout_s
from vllm_sleep_ascend.rank.agreement import Agreement

logger = init_logger(f"vllm.{__name__}")

_NPU = torch.device("npu")


class _Hccl(Protocol):
    """torch_npu's backend of a process group."""

    def get_hccl_comm_name(self, rank: int, init_comm: bool) -> str:
        """Creates the communicator if it does not exist and ``init_comm`` is set."""

    def _get_stream_id(self, p2p: bool, peer: int = -1) -> int:
        """-1 if there is no communicator."""


def meet(group: dist.ProcessGroup) -> None:
    """Create the common communicator of a pipeline's stages now, if messages use it.

    With P2P_HCCL_BUFFSIZE=0 torch_npu has no communicators of pairs, and the first message needs
    every rank of the group. vLLM's third stage arrives only after the second one has received, so
    they would deadlock.
    """
    if os.environ.get("P2P_HCCL_BUFFSIZE") == "0" and dist.get_world_size(group) > 2:
        _backend(group).get_hccl_comm_name(dist.get_rank(), True)


@dataclass(frozen=True)
class _Used:
    """A process group and its communicators on this rank."""

    group: dist.ProcessGroup
    store: dist.Store
    ranks: list[int]
    collective: bool
    peers: list[int]  # ranks with which this one has a communicator of two


class Communicators:
    """The communicators among the ranks of this process's engine.

    Every rank makes the same calls at the same time.

    Args:
        held_bytes: returns the device memory that HCCL holds in this process, or None if unknown.
        members: the engine's ranks in the world. Groups with other ranks are left unchanged.
    """

    def __init__(self, held_bytes: Callable[[], int | None], members: range) -> None:
        self._held_bytes, self._members = held_bytes, members
        self._released: list[_Used] = []
        self._begun = False  # a release that can still be rolled back

    @property
    def released(self) -> bool:
        """Whether communicators are released now."""
        return bool(self._released)

    def release(self) -> None:
        """Destroy the communicators. Their work must have completed on every rank.

        If HCCL keeps memory, it logs a warning: the rank sleeps anyway, and its status shows it.
        """
        self._begun = True
        self._released = list(self._used())
        kept = [used for used in self._released if not self._frees(used)]
        held = self._held_bytes()
        if kept and held:  # otherwise the accounting is not available
            logger.warning(
                "HCCL kept memory of %d of %d groups of ranks whose communicators were destroyed "
                "(ranks %s), and holds %d bytes of the device while this rank sleeps. Its log may "
                "have the cause; a restart of the engine gives it back.",
                len(kept),
                len(self._released),
                "; ".join(", ".join(map(str, used.ranks)) for used in kept),
                held,
            )

    def _frees(self, used: _Used) -> bool:
        """Destroy it, and return whether device memory was freed: torch_npu does not report a
        failing HcclCommDestroy."""
        before = self._held_bytes()
        reinit_process_group(used.group, rebuild_link=True)
        return not before or before != self._held_bytes()

    def destroy(self) -> None:
        """Destroy the released communicators that exist again."""
        for used in self._released:
            reinit_process_group(used.group, rebuild_link=True)

    def restore(self) -> None:
        """Create the released communicators again. It can be retried after every rank has destroyed
        what an attempt has left.

        Raises:
            RuntimeError: from HCCL, or another rank was not there within HCCL_CONNECT_TIMEOUT s.
        """
        for used in self._released:
            with _bounded(used.store):
                if used.collective:
                    _backend(used.group).get_hccl_comm_name(dist.get_rank(), True)
                for low, high in self._pairs(used):
                    self._greet(used, low, high)

    def forget(self) -> None:
        """The release is over: communicators exist again, or their next use creates them."""
        self._released, self._begun = [], False

    def rebuild(self, agreement: Agreement) -> str:
        """Roll back a release that has begun; returns what failed, or ``""``."""
        if not self._begun:
            return ""
        trouble = trouble_of(self.destroy)
        agreement.exchange(None)  # every rank gets here, also after a failure
        if not trouble:
            trouble = trouble_of(self.restore)
        if any(agreement.exchange(trouble)):
            trouble = trouble or trouble_of(self.destroy)
        self.forget()
        return trouble and f"communicators are made again by their next use, not now: {trouble}"

    def _used(self) -> Iterator[_Used]:
        for group, (backend, store) in distributed_c10d._world.pg_map.items():
            ranks = sorted(distributed_c10d._world.pg_group_ranks[group])
            if "hccl" not in str(backend) or len(ranks) == 1 or not set(ranks) <= {*self._members}:
                continue
            streams = _backend(group)._get_stream_id
            me = dist.get_group_rank(group, dist.get_rank())
            used = _Used(
                group,
                store,
                ranks,
                collective=streams(False) != -1,
                peers=[p for p in range(len(ranks)) if p != me and streams(True, p) != -1],
            )
            if used.collective or used.peers:
                yield used

    @staticmethod
    def _pairs(used: _Used) -> list[tuple[int, int]]:
        """Pairs in the same order on all ranks, so that they cannot deadlock."""
        me = dist.get_group_rank(used.group, dist.get_rank())
        return sorted((min(me, peer), max(me, peer)) for peer in used.peers)

    @staticmethod
    def _greet(used: _Used, low: int, high: int) -> None:
        """Create the communicator of a pair, as torch does at its first use. The message is empty,
        so that no rank waits on its device for another one that has failed here."""
        token = torch.empty(0, dtype=torch.int8, device=_NPU)
        if dist.get_rank() == used.ranks[low]:
            dist.send(token, used.ranks[high], group=used.group)
        else:
            dist.recv(token, used.ranks[low], group=used.group)


def trouble_of(step: Callable[[], None]) -> str:
    """Run it, and return why it failed, or ``""``."""
    try:
        step()
    except RuntimeError as error:
        return str(error) or type(error).__name__
    return ""


@contextmanager
def _bounded(store: dist.Store) -> Iterator[None]:
    """Limit the wait in torch's store, where ranks first meet, which is half an hour by default."""
    usual = store.timeout  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=connect_timeout_s()))
    try:
        yield
    finally:
        store.set_timeout(usual)


def _backend(group: dist.ProcessGroup) -> _Hccl:
    return cast(_Hccl, group._get_backend(_NPU))
