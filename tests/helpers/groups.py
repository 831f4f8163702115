# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that orders tests and distributes them in groups over two processes."""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest

# The longest groups start first, so that all processes end at about the same time.
LONGEST = (
    "tests/sim/test_simulator.py",
    "tests/allocator/test_faults.py",
    "tests/e2e/ranks/test_parallel.py",
    "tests/e2e/ranks/test_data_parallel.py",
    "tests/e2e/proxy",
    "tests/e2e/guides/test_experiments.py",
    "tests/e2e/guides/test_examples.py",
    "tests/e2e/ranks/test_communicators.py",
    "tests/e2e/server/test_server.py",
    "tests/e2e/ranks/test_ray.py",
    "tests/e2e/engine/test_pause_modes.py",
)


def group_of(nodeid: str) -> str:
    """The tests of a group run in one process, because they share costly fixtures.

    A group is a file, or all tests of the proxy, which share servers.
    """
    file = nodeid.partition("::")[0]
    return "tests/e2e/proxy" if file.startswith("tests/e2e/proxy/") else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {group: number for number, group in enumerate(LONGEST)}

    def place(item: pytest.Item) -> tuple[bool, int]:
        # Engines leave a little memory behind, and tests of the allocator count all of it.
        return "e2e" in item.path.parts, first.get(group_of(item.nodeid), len(first))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        """If a process crashes, its test fails and the rest of its group runs in another one."""

        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

        def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
            super().add_node_collection(node, collection)
            if node not in self.registered_collections:
                node.shutdown()  # it collected different tests

        def remove_node(self, node: Any) -> str | None:
            if self.collection is None:
                self.registered_collections.pop(node, None)
            tests = self.assigned_work[node].values()
            crashed = next(
                (name for group in tests for name, done in group.items() if not done), None
            )
            if crashed is not None:
                # Otherwise xdist would run it again and again.
                self.assigned_work[node][group_of(crashed)][crashed] = True
            super().remove_node(node)
            return crashed

        def _reschedule(self, node: Any) -> None:
            if node not in self.registered_collections:
                return  # it has not collected yet
            with contextlib.suppress(OSError):  # it has crashed, and is about to be removed
                super()._reschedule(node)
                # A process starts its last known test only after it gets another or a shutdown.
                while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
                    super()._reschedule(node)

    config.option.loadscopereorder = False  # keep the order of collection
    return Groups(config, log)
