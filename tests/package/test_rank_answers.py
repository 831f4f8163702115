# SPDX-License-Identifier: Apache-2.0
"""Answers of ranks over vLLM's own queues: none is lost, and none is left for the next call."""

import inspect
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

from vllm_sleep_ascend.engine import rank_answers
from vllm_sleep_ascend.engine.rank_answers import reads_every_answer
from vllm_sleep_ascend.errors import RankGoneError
from vllm_sleep_ascend.rank.guarded_calls import GuardedCall

SUCCESS, FAILURE = WorkerProc.ResponseStatus.SUCCESS, WorkerProc.ResponseStatus.FAILURE
CHUNK = 4096  # bytes of a queue's slot; a larger answer uses a socket


@pytest.fixture
def queues():
    """The queues of two ranks: where they write, and where the executor reads."""
    writers = [MessageQueue(1, 1, max_chunk_bytes=CHUNK) for _ in range(2)]
    readers = []
    for writer in writers:
        readers.append(MessageQueue.create_from_handle(writer.export_handle(), 0))
        waiting = threading.Thread(target=readers[-1].wait_until_ready)
        waiting.start()
        writer.wait_until_ready()
        waiting.join()
    yield writers, readers
    for queue in (*readers, *writers):
        queue.shutdown()


class SlowSocket:
    """Sends what is written to it later."""

    def __init__(self, socket: Any, delay_s: float) -> None:
        self._socket, self._delay_s = socket, delay_s

    def send_multipart(self, parts: list, **kwargs: Any) -> None:
        time.sleep(self._delay_s)
        self._socket.send_multipart(parts, **kwargs)


def test_a_large_answer_that_comes_after_its_mark_is_waited_for(queues) -> None:
    writers, readers = queues
    writers[1].local_socket = SlowSocket(writers[1].local_socket, 2.0)
    large = "x" * 10 * CHUNK

    def answer(rank: int, delay_s: float, result: str) -> None:
        time.sleep(delay_s)
        writers[rank].enqueue((SUCCESS, result))

    @reads_every_answer
    def collective_rpc(executor: Any, method: str) -> list[str]:
        return [queue.dequeue()[1] for queue in executor.response_mqs]

    config = SimpleNamespace(additional_config={}, model_config=None)
    executor = SimpleNamespace(is_failed=False, response_mqs=readers, vllm_config=config)
    # Rank 0 is slow; meanwhile rank 1 is checked, whose slot is already marked.
    ranks = [
        threading.Thread(target=answer, args=arguments)
        for arguments in ((0, 3.0, "first"), (1, 0.0, large))
    ]
    for rank in ranks:
        rank.start()
    assert collective_rpc(executor, "save_sharded_state") == ["first", large]
    for rank in ranks:
        rank.join()
    writers[0].enqueue((SUCCESS, "next"))
    writers[1].enqueue((SUCCESS, "next"))
    assert collective_rpc(executor, "save_sharded_state") == ["next", "next"]


Work = Callable[[int, str], str]  # a rank's answer to a method


class Executor(SimpleNamespace):
    """vLLM's calls to ranks, which are threads here."""

    collective_rpc = reads_every_answer(inspect.unwrap(MultiprocExecutor.collective_rpc))

    def shutdown(self) -> None:
        self.response_mqs = []


@contextmanager
def executor(queues: Any, work: Work) -> Iterator[Executor]:
    writers, readers = queues
    calls: list[Queue] = [Queue() for _ in writers]

    def serve(rank: int) -> None:
        while call := calls[rank].get():
            method, _, _, output_rank = call
            if isinstance(method, bytes):
                method = str(pickle.loads(method))
            try:
                answer = SUCCESS, work(rank, method)
            except RuntimeError as error:
                answer = FAILURE, str(error)
            if output_rank in (None, rank):
                writers[rank].enqueue(answer)

    def broadcast(call: Any) -> None:
        for waiting in calls:
            waiting.put(call)

    ranks = [threading.Thread(target=serve, args=(rank,)) for rank in range(len(writers))]
    for rank in ranks:
        rank.start()
    config = {"sleep_mode": {"rank_timeout_s": 1}}
    yield Executor(
        is_failed=False,
        failure_callback=None,
        futures_queue=deque(),
        response_mqs=readers,
        rpc_broadcast_mq=SimpleNamespace(enqueue=broadcast),
        vllm_config=SimpleNamespace(
            additional_config=config,
            model_config=SimpleNamespace(enable_nccl_comm_suspend=False),
            parallel_config=SimpleNamespace(enable_fault_tolerance=False),
        ),
    )
    broadcast(None)
    for rank in ranks:
        rank.join()


@pytest.mark.parametrize("slow", [(0,), (1,), (0, 1)])
def test_answers_that_come_after_the_timeout_are_of_no_other_call(queues, slow) -> None:
    late = threading.Semaphore(0)

    def work(rank: int, method: str) -> str:
        if rank in slow and method == "slow":
            late.acquire()
        return f"{method} {rank}"

    with executor(queues, work) as ranks:

        def times_out(*timeout: float, **options: Any) -> None:
            with pytest.raises(TimeoutError, match="slow timed out"):
                ranks.collective_rpc("slow", *timeout, **options)
            late.release(len(slow))

        for again in range(2):
            for _ in range(again + 1):
                times_out(timeout=0.1)
            assert ranks.collective_rpc("weights_content") == [
                "weights_content 0",
                "weights_content 1",
            ]
        times_out(0.1)
        step = {"unique_reply_rank": 1, "non_block": True, "timeout": 5}
        steps = [ranks.collective_rpc(f"step {n}", **step) for n in range(2)]
        assert ranks.collective_rpc("sleep") == ["sleep 0", "sleep 1"]
        assert [step.result() for step in steps] == ["step 0 1", "step 1 1"]
        if 1 in slow:
            times_out(timeout=0.1, unique_reply_rank=1)
            assert ranks.collective_rpc("sleep") == ["sleep 0", "sleep 1"]


def repeated(call: Callable[[], Any]) -> Any:
    """The result of a call, repeated until the busy rank has answered."""
    while True:
        try:
            return call()
        except RankGoneError as error:
            assert "rank 1 has not answered an earlier call" in str(error)


def test_a_rank_that_loads_long_after_anothers_error_does_not_hang(queues, monkeypatch) -> None:
    monkeypatch.setattr(rank_answers, "_ABORT_S", 0)
    hangs = threading.Event()

    def work(rank: int, method: str) -> str:
        if rank == 0 and method != "sleep":
            raise RuntimeError("no such file")
        if rank == 1 and method in ("reload_weights", "load"):
            time.sleep(2.5)
        if rank == 1 and method == "anything_else":
            hangs.wait()
        return f"{method} {rank}"

    with executor(queues, work) as ranks:
        for method in ("reload_weights", GuardedCall("reload_weights")):
            with pytest.raises(RuntimeError, match="no such file"):
                ranks.collective_rpc(method)
            assert ranks.collective_rpc("sleep") == ["sleep 0", "sleep 1"]
        for method, timeout in (("reload_weights", 1), ("load", 0.5)):
            with pytest.raises(RuntimeError, match="no such file"):  # and has the time of the call
                ranks.collective_rpc(method, timeout=timeout)
            assert repeated(lambda: ranks.collective_rpc("sleep")) == ["sleep 0", "sleep 1"]
        with pytest.raises(RankGoneError, match=r"rank 1 hangs.*within 1 s.*no such file"):
            ranks.collective_rpc("anything_else")
        hangs.set()
        assert ranks.is_failed


def test_after_a_timeout_a_rank_that_hangs_is_named_in_bounded_time(queues, monkeypatch) -> None:
    monkeypatch.setattr(rank_answers, "_ABORT_S", 0)
    hangs = threading.Event()
    ran: list[str] = []

    def work(rank: int, method: str) -> str:
        if rank == 1 and method == "hang":
            hangs.wait()
        if rank == 0:
            ran.append(method)
        if method == "fail" and rank == 0:
            raise RuntimeError("no such thing")
        return f"{method} {rank}"

    with executor(queues, work) as ranks:
        with pytest.raises(TimeoutError, match="hang timed out"):
            ranks.collective_rpc("hang", timeout=0.1)
        step = {"unique_reply_rank": 0, "non_block": True}
        for method, options in (("sleep", {}), ("reload_weights", {}), ("step", step)):
            with pytest.raises(RankGoneError, match="rank 1 has not answered an earlier call"):
                ranks.collective_rpc(method, **options)
        assert ran == ["hang"]  # nothing was sent
        with pytest.raises(RuntimeError, match="no such thing"):
            ranks.collective_rpc("fail", timeout=5)
        for _ in range(2, rank_answers._MOST_OWED):
            with pytest.raises(TimeoutError, match="next timed out"):
                ranks.collective_rpc("next", timeout=0.1)
        with pytest.raises(RankGoneError, match="rank 1 has not answered"):
            ranks.collective_rpc("next", timeout=0.1)
        hangs.set()
        assert ranks.collective_rpc("sleep") == ["sleep 0", "sleep 1"]
        assert not ranks.is_failed
