# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a host need together, of its memory and of its disks."""

import pytest

from vllm_sleep_ascend.errors import DiskError, HostOutOfMemoryError
from vllm_sleep_ascend.rank.host_budget import DiskNeed, HostNeed, check_together

HERE, NEIGHBOUR, ELSEWHERE = ("boot", "here"), ("boot", "neighbour"), ("other", "elsewhere")
ENOUGH = 1000


def on_disk(rank, needed, free, host=HERE, device=1) -> HostNeed:
    return HostNeed(rank, host, 0, ENOUGH, DiskNeed(f"/disk{device}", device, needed, free))


def test_ranks_whose_backups_fit_together_may_sleep():
    check_together([on_disk(0, 60, 100), on_disk(1, 40, 100)])
    check_together([on_disk(0, 60, 100), on_disk(1, 60, 100, device=2)])
    check_together([on_disk(0, 60, 100), on_disk(1, 60, 100, host=ELSEWHERE)])
    check_together([on_disk(0, 60, 100), HostNeed(1, HERE, 60, 100)])


@pytest.mark.parametrize("host", [HERE, NEIGHBOUR])
def test_a_disk_that_is_short_for_all_ranks_of_a_machine_is_named(host):
    with pytest.raises(DiskError, match="Nothing was touched") as refused:
        check_together([on_disk(0, 60, 110), on_disk(1, 50, 109, host=host)])
    text = str(refused.value)
    assert "the backups of ranks 0, 1 on host here need 60 + 50 = 110 bytes in /disk1" in text
    assert "together and 109 are free; free disk space, choose another backup_dir" in text
    assert (refused.value.needed_bytes, refused.value.free_bytes) == (110, 109)


def test_a_host_that_is_short_of_memory_is_named():
    with pytest.raises(HostOutOfMemoryError, match=r"need 60 \+ 50 = 110 bytes of host memory"):
        check_together([HostNeed(0, HERE, 60, 110), HostNeed(1, HERE, 50, 109)])
    check_together([HostNeed(0, HERE, 60, 110), HostNeed(1, NEIGHBOUR, 60, 110)])


@pytest.mark.parametrize("moves", [False, True])
def test_backups_that_are_safe_on_disk_are_not_to_be_discarded(moves):
    with pytest.raises(HostOutOfMemoryError) as refused:
        check_together([HostNeed(rank, HERE, 60, 110, moves=moves) for rank in (0, 1)])
    assert ("or leave the backups on disk" in str(refused.value)) == moves
    assert ("or use level 2" in str(refused.value)) != moves
