# SPDX-License-Identifier: Apache-2.0
"""Answers of ranks, over vLLM's own queues: none is lost, and none stays for the next call."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.v1.executor.multiproc_executor import WorkerProc

from vllm_sleep_ascend.answers import reads_every_answer

SUCCESS = WorkerProc.ResponseStatus.SUCCESS
CHUNK = 4096  # bytes of a queue's slot; a larger answer comes over a socket


@pytest.fixture
def queues():
    """Of two ranks: where they write, and where the executor reads."""
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
    """What is written to it is sent later."""

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
    # Rank 0 takes its time, and meanwhile a look is taken at rank 1, whose mark is there.
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
