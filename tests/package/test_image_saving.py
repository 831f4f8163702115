# SPDX-License-Identifier: Apache-2.0
"""Saving an image without an engine: what is refused, and what is there instead. About 1 s.

Calls of the file system fail, or are the last ones of a killed process, in test_image_faults.py.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.images import ENGINE, Model, assert_filled, names, no_library, save, two_ranks

from vllm_sleep_ascend.errors import ImageError, ImageRefusedError
from vllm_sleep_ascend.rank.image import folder
from vllm_sleep_ascend.rank.image.filling import Image, check_same


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(1)


def test_bad_input_is_refused_before_anything_is_touched(model: Model, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/of.something").touch()
    with pytest.raises(ValueError, match=r"dir='images/one': an absolute path is needed"):
        save(model, "images/one")
    with pytest.raises(ImageError, match=r"full exists; name another directory, or replace"):
        save(model, tmp_path / "full")
    with pytest.raises(ImageError, match=r"full exists and is no saved image, which alone"):
        save(model, tmp_path / "full", replace=True)
    with pytest.raises(ImageError, match=r"nowhere is no directory; create it"):
        save(model, tmp_path / "nowhere/one")
    with pytest.raises(ImageError, match=r"2 parameters have no content \(a, b\)"):
        save(model, tmp_path / "one", missing=("a", "b"))
    with pytest.raises(ImageRefusedError, match=r"not supported with vllm-ascend"):
        save(model, tmp_path / "one", reason="vllm-ascend; leave it out")
    with pytest.raises(ImageRefusedError, match=r"the weights were found to be corrupt"):
        save(model, tmp_path / "one", corrupt=True)
    with pytest.raises(ImageRefusedError, match=r"cannot be written down; save its checkpoint"):
        save(model, tmp_path / "one", engine="it cannot be written down; save its checkpoint")
    with pytest.raises(ImageError, match=r"File name too long; choose a shorter name"):
        save(model, tmp_path / ("n" * 250))
    draft = {"source": "trainer", "path": None}
    with pytest.raises(ImageError, match=r"the draft model's weights \(source: trainer\)"):
        save(model, tmp_path / "one", draft=draft)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["of.something"]


def test_space_is_looked_at_before_anything_is_written(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20480))
    with pytest.raises(ImageError, match=r"ranks 0 need \d+ bytes in .* 20480 are free") as caught:
        save(model, tmp_path / "one")
    assert caught.value.needed_bytes > 4 * 5_000_001 and caught.value.free_bytes == 20480
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at_once", [True, False])
def test_an_image_is_replaced(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(folder.ctypes, "CDLL", no_library)
    save(Model(3, 10), tmp_path / "one")
    save(Model(4, 10), tmp_path / "one", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    target = Model(2, 10)
    Image(tmp_path / "one", 0, ENGINE).fill(target)
    assert torch.equal(target.large, Model(4, 10).large)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_ranks_that_give_up_after_they_have_published_leave_the_image_before(
    at_once: bool, order: Sequence[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(folder.ctypes, "CDLL", no_library)
    save(Model(3, 10), tmp_path / "one")
    ranks = two_ranks(tmp_path / "one")
    for rank in ranks:
        rank.publish()
    both = ["image.json", "rank-0.json", "rank-0.weights", "rank-1.json", "rank-1.weights"]
    assert names(tmp_path / "one") == both
    for number in order:
        assert ranks[number].roll_back() == ""
        ranks[number].close()
    assert names(tmp_path) == ["one"]
    assert_filled(tmp_path / "one", Model(3, 10), rows=10)


def test_a_rank_that_has_given_up_cannot_be_published(tmp_path: Path) -> None:
    save(Model(3, 10), tmp_path / "one")
    publisher, other = two_ranks(tmp_path / "one")
    assert other.roll_back() == ""
    with pytest.raises(
        ImageError, match=r"saving has no rank-0.json any more: another rank has given up"
    ):
        publisher.publish()
    assert publisher.roll_back() == ""
    assert names(tmp_path) == ["one"]
    assert_filled(tmp_path / "one", Model(3, 10), rows=10)
    for rank in (publisher, other):
        rank.close()


def test_two_ranks_that_are_done_have_replaced_the_image(tmp_path: Path) -> None:
    save(Model(3, 10), tmp_path / "one")
    ranks = two_ranks(tmp_path / "one")
    for step in ("publish", "finish", "close"):
        for rank in ranks:
            getattr(rank, step)()
    assert names(tmp_path) == ["one"]
    first = Image(tmp_path / "one", 0, ENGINE)
    second = Image(tmp_path / "one", 1, ENGINE)
    check_same((first.id, None, second.id), tmp_path / "one")
    with pytest.raises(ImageError, match=r"has parts of several images .* copy the directory"):
        check_same((first.id, "another-2"), tmp_path / "one")
    target = Model(2, 10)
    second.fill(target)
    assert torch.equal(target.large, Model(5, 10).large)


def test_what_is_there_instead_of_the_image_that_was_to_be_replaced_stays(tmp_path: Path) -> None:
    save(Model(3, 10), tmp_path / "one")
    publisher, _ = two_ranks(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "moved")
    (tmp_path / "one").mkdir()
    (tmp_path / "one/of.something").touch()
    with pytest.raises(ImageError, match=r"one is not the image any more that was there when"):
        publisher.publish()
    assert publisher.roll_back() == ""
    assert names(tmp_path) == ["moved", "one"]
    assert names(tmp_path / "one") == ["of.something"]


def test_an_image_that_was_aside_when_a_process_ended_gets_its_name_back(tmp_path: Path) -> None:
    save(Model(6, 10), tmp_path / "aside")
    (tmp_path / "aside").rename(tmp_path / ".one.12345678.replaced")
    with pytest.raises(ImageRefusedError, match=r"one exists; name another directory"):
        save(Model(4, 10), tmp_path / "one")
    assert names(tmp_path) == ["one"]
    assert_filled(tmp_path / "one", Model(6, 10), rows=10)


def test_what_is_not_whole_is_not_brought_back(tmp_path: Path) -> None:
    (tmp_path / ".one.12345678.replaced").mkdir()
    (tmp_path / ".one.12345678.replaced/rank-0.weights").touch()
    save(Model(4, 10), tmp_path / "one")
    assert names(tmp_path) == ["one"]
    assert_filled(tmp_path / "one", Model(4, 10), rows=10)


@pytest.mark.parametrize("replaces", [True, False])
def test_what_another_engine_has_published_meanwhile_stays(replaces: bool, tmp_path: Path) -> None:
    one, more = tmp_path / "one", ""
    if replaces:
        save(Model(3, 10), one)
    publisher, _ = two_ranks(one)
    publisher.publish()
    save(Model(6, 10), one, replace=True)
    trouble = publisher.roll_back()
    publisher.close()
    if replaces:
        (before,) = (path for path in tmp_path.iterdir() if path.suffix == ".replaced")
        assert_filled(before, Model(3, 10), rows=10)
        more = f"; the image before is in {before}"
    assert trouble == f"{one} is another image by now, and stays as it is{more}"
    assert_filled(one, Model(6, 10), rows=10)
    assert len(names(tmp_path)) == 1 + replaces


def test_what_could_not_be_removed_is_named_and_goes_with_the_next_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(Model(3, 10), tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(folder.shutil, "rmtree", lambda *_, **__: None)
        save(Model(4, 10), tmp_path / "one", replace=True)
    left, one = names(tmp_path)
    assert left.endswith(".off") and one == "one"
    assert f"{tmp_path / left} could not be removed" in caplog.text
    save(Model(5, 10), tmp_path / "one", replace=True)
    assert names(tmp_path) == ["one"]
