# SPDX-License-Identifier: Apache-2.0
"""HCCL's communicators while a rank sleeps: released, and made again by the wake.

A communicator holds device memory of its own: two buffers of HCCL_BUFFSIZE (200 MiB each unless set
otherwise) for each group of ranks that has exchanged anything, two of P2P_HCCL_BUFFSIZE (20 MiB
each) for each pair of pipeline stages.
HCCL has no call that gives the buffers back and keeps the communicator; HcclCommSuspend only stops
its work. So communicators are destroyed and made anew, and all else stays: torch's process groups
with their stores and streams, vLLM's groups over them, and whatever refers to them.
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
        """Makes the communicator, if there is none and ``init_comm`` says so."""

    def _get_stream_id(self, p2p: bool, peer: int = -1) -> int:
        """-1: there is no communicator."""


def meet(group: dist.ProcessGroup) -> None:
    """Make the communicator of a pipeline's stages now, if they send each other through it.

    With P2P_HCCL_BUFFSIZE=0 torch_npu has no communicators of pairs, and the first message waits
    for every rank of the group. vLLM's third stage comes only once the second has received: they
    would wait for each other.
    """
    if os.environ.get("P2P_HCCL_BUFFSIZE") == "0" and dist.get_world_size(group) > 2:
        _backend(group).get_hccl_comm_name(dist.get_rank(), True)


@dataclass(frozen=True)
class _Used:
    """A process group, and what of it has a communicator on this rank."""

    group: dist.ProcessGroup
    store: dist.Store
    ranks: list[int]
    collective: bool
    peers: list[int]  # ranks of the group with which this one has a communicator of two


class Communicators:
    """The communicators among the ranks of one engine, of which this process is one.

    Every rank makes the same calls at the same time.

    Args:
        held_bytes: tells the device memory that HCCL holds in this process; None: it cannot.
        members: the world's ranks that are the engine. Groups with others stay as they are.
    """

    def __init__(self, held_bytes: Callable[[], int | None], members: range) -> None:
        self._held_bytes, self._members = held_bytes, members
        self._released: list[_Used] = []
        self._begun = False  # a release that can still be taken back

    @property
    def released(self) -> bool:
        """Whether there were communicators, and they are released."""
        return bool(self._released)

    def release(self) -> None:
        """Destroy what there is. Work on the communicators has to be complete, on every rank.

        Memory that HCCL keeps is a warning: the rank sleeps all the same, and its status has it.
        """
        self._begun = True
        self._released = list(self._used())
        kept = [used for used in self._released if not self._frees(used)]
        held = self._held_bytes()
        if kept and held:  # an account that is gone since says nothing
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
        """Destroy it. Whether device memory came free by that: torch_npu does not tell whether
        HcclCommDestroy failed."""
        before = self._held_bytes()
        reinit_process_group(used.group, rebuild_link=True)
        return not before or before != self._held_bytes()

    def destroy(self) -> None:
        """Destroy what came back of what was released."""
        for used in self._released:
            reinit_process_group(used.group, rebuild_link=True)

    def restore(self) -> None:
        """Make again what was released. It may be repeated after every rank has destroyed what an
        attempt left.

        Raises:
            RuntimeError: HCCL's, or another rank did not come within HCCL_CONNECT_TIMEOUT seconds.
        """
        for used in self._released:
            with _bounded(used.store):
                if used.collective:
                    _backend(used.group).get_hccl_comm_name(dist.get_rank(), True)
                for low, high in self._pairs(used):
                    self._greet(used, low, high)

    def forget(self) -> None:
        """What was released is there again, or will be made by its next use."""
        self._released, self._begun = [], False

    def rebuild(self, agreement: Agreement) -> str:
        """Take back a release, if it has begun; returns what failed in that, ``""``: nothing."""
        if not self._begun:
            return ""
        trouble = trouble_of(self.destroy)
        agreement.exchange(None)  # every rank comes here, whatever happened
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
        """In one order for all ranks, so that none waits for one that waits for it."""
        me = dist.get_group_rank(used.group, dist.get_rank())
        return sorted((min(me, peer), max(me, peer)) for peer in used.peers)

    @staticmethod
    def _greet(used: _Used, low: int, high: int) -> None:
        """torch makes the communicator of a pair at its first use. HCCL does nothing for a message
        without elements: no rank waits on its device for another that failed here."""
        token = torch.empty(0, dtype=torch.int8, device=_NPU)
        if dist.get_rank() == used.ranks[low]:
            dist.send(token, used.ranks[high], group=used.group)
        else:
            dist.recv(token, used.ranks[low], group=used.group)


def trouble_of(step: Callable[[], None]) -> str:
    """What kept it from being done, ``""``: nothing."""
    try:
        step()
    except RuntimeError as error:
        return str(error) or type(error).__name__
    return ""


@contextmanager
def _bounded(store: dist.Store) -> Iterator[None]:
    """Ranks first meet in torch's store, which would wait for half an hour."""
    usual = store.timeout  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=connect_timeout_s()))
    try:
        yield
    finally:
        store.set_timeout(usual)


def _backend(group: dist.ProcessGroup) -> _Hccl:
    return cast(_Hccl, group._get_backend(_NPU))
