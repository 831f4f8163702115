# SPDX-License-Identifier: Apache-2.0
"""Saved images without an engine: what they hold, what is refused, and what failures leave."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vllm_sleep_ascend.errors import ImageError, ImageRefusedError
from vllm_sleep_ascend.rank.agreement import Agreement
from vllm_sleep_ascend.rank.image import folder, identity, manifest, pieces, saving, tensors
from vllm_sleep_ascend.rank.image.filling import Image, check_same, image_of
from vllm_sleep_ascend.rank.image.pieces import PIECE
from vllm_sleep_ascend.rank.weights.load import Snapshot, WeightLoad
from vllm_sleep_ascend.rank.weights.parameters import own_parameters

ENGINE = {
    "architecture": ["Qwen2ForCausalLM"],
    "model": {"hidden_size": 64, "num_hidden_layers": 2},
    "vllm": "0.32.0",
    "tensor_parallel_size": 1,
    "dtype": "bfloat16",
    "quantization": None,
}
ORIGIN = {"source": "trainer", "path": None, "version": "step-7"}


class Model(nn.Module):
    """Has one of everything: 21 MB of parameters, a part of one, two names of one, a buffer that no
    checkpoint has, a scalar, an empty one, a transposed one, and a tensor in an attribute."""

    def __init__(self, seed: int, rows: int = 5_000_001) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.large = nn.Parameter(torch.rand(rows, generator=random))
        self.inner = nn.Linear(7, 3)
        self.tied = self.inner.weight
        self.part = nn.Parameter(self.large.data[1000:2000])
        self.turned = nn.Parameter(torch.rand(5, 9, generator=random, dtype=torch.float64).t())
        self.register_buffer("table", torch.rand(33, generator=random).half(), persistent=False)
        self.register_buffer("scale", torch.rand((), generator=random))
        self.empty = nn.Parameter(torch.empty(0))
        self.derived = [torch.rand(11, generator=random), "no tensor"]
        nn.init.uniform_(self.inner.weight, generator=random)
        nn.init.uniform_(self.inner.bias, generator=random)

    def content(self) -> dict[str, torch.Tensor]:
        named = (*self.named_parameters(remove_duplicate=False), *self.named_buffers())
        return {**{name: t.detach().clone() for name, t in named}, "derived": self.derived[0]}

    def content_in_place(self) -> list[torch.Tensor]:
        """Each memory once."""
        own = [p.data for name, p in self.named_parameters() if name != "part"]
        return [*own, *self.buffers(), self.derived[0]]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(1)


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "wait_for_device", lambda: None)


def parts(
    model: nn.Module,
    missing: tuple[str, ...] = (),
    reason: str | None = None,
    corrupt: bool = False,
    engine: object = ENGINE,
    rank: int = 0,
    ranks: int = 1,
    **origin: Any,
) -> tuple[Any, Any, Any, Any]:
    """The worker, the weights, the hooks and the identity of a rank of an engine without a device,
    whose weights are all of its memory."""
    worker = SimpleNamespace(
        rank=rank,
        device=torch.device("cpu"),
        sleep_mode_backend=SimpleNamespace(ranges=lambda tag: [(0, 1 << 62)]),
        model_runner=SimpleNamespace(get_model=lambda: model),
        get_draft_model=lambda: None,
        parallel_config=SimpleNamespace(world_size=ranks, enable_eplb=False, data_parallel_size=1),
    )
    worker.vllm_config = SimpleNamespace(parallel_config=worker.parallel_config, lora_config=None)
    weights = SimpleNamespace(
        updating=False,
        content=SimpleNamespace(missing=lambda: list(missing), corrupt=corrupt),
        origin=lambda: {**ORIGIN, **origin},
    )
    return worker, weights, SimpleNamespace(image_refusal=lambda: reason), engine


def save(model: nn.Module, directory: Path | str, replace: bool = False, **options: Any) -> None:
    """As the only rank of an engine."""
    worker, *others = parts(model, **options)
    agreement = Agreement(0, 1, 0, 60)
    saving.save(worker, agreement, *others, directory=str(directory), replace=replace)


def two_ranks(directory: Path) -> list[saving._Attempt]:
    """Of an engine that replaces an image, and has written its parts."""
    models = [Model(4, 10), Model(5, 10)]
    attempts = [
        saving._Attempt(*parts(model, rank=rank, ranks=2), directory, True)
        for rank, model in enumerate(models)
    ]
    facts = [attempt.facts() for attempt in attempts]
    for attempt in attempts:
        attempt.judge(facts)
        attempt.write()
    return attempts


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_filled(directory: Path, source: Model, rows: int = 5_000_001) -> None:
    target = Model(2, rows)
    Image(directory, 0, ENGINE).fill(target)
    for (name, found), expected in zip(
        target.content().items(), source.content().values(), strict=True
    ):
        assert torch.equal(found, expected), name
    image = image_of(target)
    assert image is not None and image.origin == ORIGIN


@pytest.fixture(scope="module")
def image(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "wait_for_device", lambda: None)
        directory = tmp_path_factory.mktemp("images") / "one"
        save(model, directory)
    return directory


@pytest.fixture
def copied(image: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image, tmp_path / "copy"))


# --- What an image holds --------------------------------------------------------------------------


def test_every_tensor_comes_back_and_shared_memory_is_there_once(model: Model, image: Path) -> None:
    assert sorted(path.name for path in image.iterdir()) == [
        *("image.json", "rank-0.json", "rank-0.weights")
    ]
    rank = json.loads((image / "rank-0.json").read_text())
    alone = 4 * 5_000_001 + 4 * 21 + 4 * 3 + 8 * 45 + 2 * 33 + 4 + 4 * 11
    assert alone <= rank["bytes"] <= alone + 512 * 7
    assert (image / "rank-0.weights").stat().st_size == -(-rank["bytes"] // 4096) * 4096
    assert len(rank["sha256"]) == 3
    large, part = rank["tensors"]["large"], rank["tensors"]["part"]
    assert part["offset"] == large["offset"] + 4000
    assert rank["tensors"]["tied"]["offset"] == rank["tensors"]["inner.weight"]["offset"]
    assert rank["tensors"]["empty"]["bytes"] == 0
    assert_filled(image, model)


def test_without_direct_requests_and_with_short_ones_the_bytes_are_the_same(
    model: Model, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hindered(call: Any) -> Any:
        def transfer(descriptor: int, blocks: list[memoryview], offset: int) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return call(descriptor, [blocks[0][: 3 << 20]], offset)

        return transfer

    monkeypatch.setattr(os, "pwritev", hindered(os.pwritev))
    monkeypatch.setattr(os, "preadv", hindered(os.preadv))
    save(model, tmp_path / "short")
    written = (tmp_path / "short/rank-0.weights").read_bytes()
    assert written == (image / "rank-0.weights").read_bytes()
    assert_filled(tmp_path / "short", model)


def test_a_model_whose_tied_memory_came_apart_gets_both(tmp_path: Path) -> None:
    save(Model(1, 10), tmp_path / "image")
    target = Model(2, 10)
    target.tied = nn.Parameter(target.tied.detach().clone())
    Image(tmp_path / "image", 0, ENGINE).fill(target)
    assert torch.equal(target.tied, target.inner.weight)
    assert torch.equal(target.tied, Model(1, 10).tied)


def test_parameters_take_the_strides_of_the_image_at_a_start_alone(tmp_path: Path) -> None:
    source = Model(1, 10)
    source.turned = nn.Parameter(source.turned.detach().contiguous())
    save(source, tmp_path / "one")
    target = Model(2, 10)
    image = Image(tmp_path / "one", 0, ENGINE)
    image.fill(target)
    assert torch.equal(target.turned, source.turned)
    assert target.turned.is_contiguous() and not Model(2, 10).turned.is_contiguous()
    target.turned = Model(2, 10).turned
    with pytest.raises(ImageError, match=r"turned \(float64 9x5 stride 5x1 .* stride 1x9 format"):
        image.reopened().fill(target)


# --- What does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vllm": "0.33.0"}, r"vllm is '0\.32\.0' in the image and '0\.33\.0' here \(install"),
        ({"tensor_parallel_size": 2}, r"tensor_parallel_size is 1 in the image and 2 here"),
        ({"dtype": "float16"}, r"dtype is 'bfloat16' in the image and 'float16' here"),
        ({"quantization": "fp8"}, r"quantization is None in the image and 'fp8' here"),
        ({"architecture": ["Other"]}, r"architecture is \['Qwen2ForCausalLM'\] in the image"),
        (
            {"model": {"hidden_size": 64, "num_hidden_layers": 3}},
            r"configuration, in the image and here: num_hidden_layers 2 and 3 \(start with",
        ),
    ],
)
def test_another_engine_is_refused_by_name(image: Path, changed: dict, message: str) -> None:
    with pytest.raises(ImageError, match=f"{image} does not fit this engine: .*{message}"):
        Image(image, 0, {**ENGINE, **changed})


def test_other_tensors_are_refused_by_name_before_anything_is_filled(image: Path) -> None:
    target = Model(2, 10)
    del target.scale
    target.extra = nn.Parameter(torch.zeros(3))
    before = target.content()
    told = (
        r"the engine has no scale; the image has no extra; the kind of tensor differs, in the "
        r"image and here: large \(float32 5000001 stride 1 format -1 and float32 10 stride 1"
    )
    with pytest.raises(ImageError, match=told):
        Image(image, 0, ENGINE).fill(target)
    assert all(map(torch.equal, before.values(), target.content().values()))


def test_memory_that_is_shared_here_alone_is_refused(tmp_path: Path) -> None:
    apart = Model(1, 10)
    apart.tied = nn.Parameter(apart.tied.detach().clone())
    save(apart, tmp_path / "image")
    with pytest.raises(ImageError, match=r"(inner.weight|tied) and (inner.weight|tied) share"):
        Image(tmp_path / "image", 0, ENGINE).fill(Model(2, 10))


def test_derived_tensors_that_the_image_lacks_are_refused_by_name_at_a_start(
    tmp_path: Path,
) -> None:
    save(Model(1, 10), tmp_path / "one")
    target = Model(2, 10)
    target.more = {"scales": torch.ones(2)}
    with pytest.raises(ImageError, match=r"the image has no more.scales\. Start with"):
        Image(tmp_path / "one", 0, ENGINE).fill(target)
    del target.more
    image = Image(tmp_path / "one", 0, ENGINE)
    image.fill(target)
    target.cache = torch.ones(2)  # not of a load
    image.fill(target)
    assert torch.equal(target.cache, torch.ones(2))


def test_a_parameter_with_a_part_keeps_its_strides_and_is_refused(tmp_path: Path) -> None:
    def square(*, turned: bool) -> nn.Module:
        model = nn.Module()
        content = torch.rand(8, 8)
        model.whole = nn.Parameter(content.t() if turned else content)
        model.part = nn.Parameter(content[2:4])
        return model

    save(square(turned=False), tmp_path / "one")
    target = square(turned=True)
    with pytest.raises(ImageError, match=r"the kind of tensor differs, .*: whole \(float32 8x8"):
        Image(tmp_path / "one", 0, ENGINE).fill(target)
    assert target.whole.data_ptr() + 64 == target.part.data_ptr()


# --- What is damaged ------------------------------------------------------------------------------


def test_a_torn_piece_is_named_and_nothing_of_it_is_copied(copied: Path) -> None:
    with (copied / "rank-0.weights").open("r+b") as file:
        file.seek(PIECE + 12345)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    target = Model(2)
    before = target.large.detach().clone()
    told = rf"rank-0.weights is not what was written: {PIECE} bytes at offset {PIECE} have the SHA"
    with pytest.raises(ImageError, match=told):
        Image(copied, 0, ENGINE).fill(target)
    offset = json.loads((copied / "rank-0.json").read_text())["tensors"]["large"]["offset"]
    of_piece = slice((PIECE - offset) // 4 + 1, (2 * PIECE - offset) // 4)
    assert torch.equal(target.large[of_piece], before[of_piece])


def test_a_load_that_fails_is_taken_back_with_buffers_and_derived_tensors(copied: Path) -> None:
    target = Model(2)
    image = Image(copied, 0, ENGINE)
    image.fill(target)
    with torch.no_grad():
        for tensor in target.content_in_place():
            tensor.add_(1)
    before = {name: tensor.clone() for name, tensor in target.content().items()}
    with (copied / "rank-0.weights").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    own = [parameter for _, parameter in own_parameters(target)]
    content: Any = SimpleNamespace(spoil=lambda prefix: pytest.fail("it was lost"))
    config: Any = SimpleNamespace()
    load = WeightLoad(content, "", target, config, True, Snapshot(own), begun=True)
    load.besides = Snapshot(image.besides(target, own))
    assert load.besides.bytes < 1000
    with pytest.raises(ImageError, match="is not what was written"):
        image.reopened().fill(target)
    load.take_back()
    for name, tensor in target.content().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part["tensors"]["large"].update(offset=1 << 40), "large has 40 bytes at"),
        (
            lambda part: part["tensors"]["large"].update(offset=-1),
            "large has 40 bytes at offset -1",
        ),
        (lambda part: part["tensors"]["large"].update(offset="0"), "of large it does not say kind"),
        (lambda part: part["tensors"]["large"].update(stride=["1"]), "the strides of large"),
        (lambda part: part["sha256"].append("0"), "it has 2 checksums for"),
        (lambda part: part.update(tensors=[]), "it is no JSON with bytes, sha256, tensors"),
        (lambda part: part["weights"].clear(), "it does not say where the weights came from"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    directory = tmp_path / "one"
    save(Model(3, 10), directory)
    part = json.loads((directory / "rank-0.json").read_text())
    change(part)
    (directory / "rank-0.json").write_text(json.dumps(part))
    head = json.loads((directory / "image.json").read_text())
    head["manifests"]["rank-0.json"] = manifest.checksum(directory / "rank-0.json")
    (directory / "image.json").write_text(json.dumps(head))
    with pytest.raises(ImageError, match=message):
        Image(directory, 0, ENGINE)


def test_a_derived_tensor_between_the_elements_of_a_parameter_is_kept(tmp_path: Path) -> None:
    model, content = nn.Module(), torch.arange(64.0).view(8, 8)
    model.left, model.right = nn.Parameter(content[:, :4]), content[:, 4:]
    save(model, tmp_path / "one")
    image = Image(tmp_path / "one", 0, ENGINE)
    kept = Snapshot(image.besides(model, [model.left]))
    before = content.clone()
    content.zero_()
    kept.restore()
    assert torch.equal(content, before)


def test_a_short_file_a_missing_one_and_manifests_that_were_changed(copied: Path) -> None:
    weights, rank, head = (copied / n for n in ("rank-0.weights", "rank-0.json", "image.json"))
    size = weights.stat().st_size
    os.truncate(weights, size - 4096)
    with pytest.raises(ImageError, match=rf"rank-0.weights has {size - 4096} bytes instead of"):
        Image(copied, 0, ENGINE).fill(Model(2))
    weights.unlink()
    with pytest.raises(ImageError, match=r"rank-0.weights could not be opened: No such file"):
        Image(copied, 0, ENGINE).fill(Model(2))
    with pytest.raises(ImageError, match=r"nothing for rank 1, only rank-0.json"):
        Image(copied, 1, ENGINE)
    rank.write_text(rank.read_text().replace("step-7", "step-8"))
    with pytest.raises(ImageError, match=r"rank-0.json is not what was written: .* save the image"):
        Image(copied, 0, ENGINE)
    whole = head.read_text()
    head.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(ImageError, match=r"image.json has the format 2, and this .* reads 1"):
        Image(copied, 0, ENGINE)
    head.write_text(whole[:100])
    with pytest.raises(ImageError, match=r"image.json is damaged"):
        Image(copied, 0, ENGINE)
    head.unlink()
    with pytest.raises(ImageError, match=r"is no saved image, or not a whole one"):
        Image(copied, 0, ENGINE)
    with pytest.raises(ImageError, match=r"image.json could not be read: No such file"):
        Image(copied / "nowhere", 0, ENGINE)


# --- What is not saved ----------------------------------------------------------------------------


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


def no_library(*_: object, **__: object) -> None:
    """Instead of a C library that can exchange two names."""


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev", "fsync", "mkdir", "rename"])
def test_a_disk_that_fails_leaves_the_image_that_was_there(
    call: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Model(3, 10)
    save(other, tmp_path / "one")
    before = (tmp_path / "one/rank-0.weights").read_bytes()
    new = Model(4, 10)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        if call == "rename":
            patch.setattr(folder.ctypes, "CDLL", no_library)
        with pytest.raises(ImageError, match=r"No space left on device; free disk space"):
            save(new, tmp_path / "one", replace=True)
        with pytest.raises(ImageError, match=r"No space left on device"):
            save(new, tmp_path / "two")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert (tmp_path / "one/rank-0.weights").read_bytes() == before


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
        assert ranks[number].take_back() == ""
        ranks[number].close()
    assert names(tmp_path) == ["one"]
    assert_filled(tmp_path / "one", Model(3, 10), rows=10)


def test_a_rank_that_has_given_up_cannot_be_published(tmp_path: Path) -> None:
    save(Model(3, 10), tmp_path / "one")
    publisher, other = two_ranks(tmp_path / "one")
    assert other.take_back() == ""
    with pytest.raises(
        ImageError, match=r"saving has no rank-0.json any more: another rank has given up"
    ):
        publisher.publish()
    assert publisher.take_back() == ""
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
    assert publisher.take_back() == ""
    assert names(tmp_path) == ["moved", "one"]
    assert names(tmp_path / "one") == ["of.something"]


def save_and_stop(directory: str, pipe: Any) -> None:
    """In a process that is to be killed: replace two images, and stop once the weights of one are
    written, and between the two renames of the other."""

    def stop(*_: object) -> None:
        pipe.send("stopped")
        threading.Event().wait()

    def write(path: Path, content: Any) -> None:
        stop() if ".one." in str(path) else stock(path, content)

    def rename(path: Path, to: Path) -> Path:
        stop() if re.fullmatch(r"\.two\.[0-9a-f]{8}\.publishing", path.name) else None
        os.rename(path, to)
        return to

    stock, manifest.write = manifest.write, write
    saving.wait_for_device = lambda: None
    folder.ctypes.CDLL, Path.rename = no_library, rename
    for name in ("one", "two"):
        path = Path(directory) / name
        threading.Thread(target=save, args=(Model(3, 10), path, True), daemon=True).start()
    threading.Event().wait()


def test_an_image_that_was_aside_when_a_process_ended_gets_its_name_back(tmp_path: Path) -> None:
    save(Model(6, 10), tmp_path / "aside")
    (tmp_path / "aside").rename(tmp_path / ".one.12345678.replaced")
    with pytest.raises(ImageRefusedError, match=r"one exists; name another directory"):
        save(Model(4, 10), tmp_path / "one")
    assert names(tmp_path) == ["one"]
    assert_filled(tmp_path / "one", Model(6, 10), rows=10)


@pytest.mark.slow
def test_a_killed_process_loses_no_image_and_leaves_what_the_next_removes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        save(Model(6, 10), directory)
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=save_and_stop, args=(str(tmp_path), theirs))
    process.start()
    theirs.close()
    try:
        assert [mine.recv(), mine.recv()] == ["stopped", "stopped"]
    finally:
        process.kill()
        process.join()
    found = {re.sub(r"[0-9a-f]{8}", "WORD", path.name): path for path in tmp_path.iterdir()}
    assert set(found) == {"one", ".one.WORD.saving", ".two.WORD.replaced", ".two.WORD.publishing"}
    assert names(found[".one.WORD.saving"]) == ["rank-0.weights"]
    others = [".one.12345678.saving.kept", ".one.too.12345678.saving"]
    for name in others:
        (tmp_path / name).mkdir()
    for directory in (one, two):
        with pytest.raises(ImageRefusedError, match=r"exists; name another directory"):
            save(Model(4, 10), directory)
        assert_filled(directory, Model(6, 10), rows=10)
        save(Model(4, 10), directory, replace=True)
        assert_filled(directory, Model(4, 10), rows=10)
    assert names(tmp_path) == [*others, "one", "two"]


# --- Names and options ----------------------------------------------------------------------------


def config(load_format: str = "sleep_image", image_dir: str | None = "/images/one", **more: Any):
    options = {} if image_dir is None else {"image_dir": image_dir}
    uva, prefetch = SimpleNamespace(cpu_offload_gb=0), SimpleNamespace(offload_group_size=0)
    parts = {
        "additional_config": {"sleep_mode": options},
        "load_config": SimpleNamespace(load_format=load_format),
        "lora_config": None,
        "parallel_config": SimpleNamespace(enable_eplb=False, data_parallel_size=1),
        "offload_config": SimpleNamespace(uva=uva, prefetch=prefetch),
    }
    return SimpleNamespace(**{**parts, **more})


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (config(image_dir=None), "load_format='sleep_image' needs the option image_dir"),
        (config("auto"), "image_dir='/images/one' needs --load-format sleep_image"),
        (config(image_dir="images/one"), "image_dir='images/one': .* an absolute path"),
        (config(lora_config=object()), "not supported with LoRA adapters"),
        (
            config(parallel_config=SimpleNamespace(enable_eplb=True, data_parallel_size=1)),
            "not supported with enable_eplb",
        ),
        (
            config(parallel_config=SimpleNamespace(enable_eplb=False, data_parallel_size=2)),
            "not supported with data_parallel_size=2",
        ),
        (
            config(
                offload_config=SimpleNamespace(
                    uva=SimpleNamespace(cpu_offload_gb=1),
                    prefetch=SimpleNamespace(offload_group_size=0),
                )
            ),
            "not supported with offloaded weights",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        identity.check_start(made)


def test_speculation_without_a_model_starts_the_model_from_the_image() -> None:
    from vllm_sleep_ascend.rank.image.loader import is_draft

    model, draft = object(), object()
    ngram = SimpleNamespace(draft_model_config=model, target_model_config=model)
    eagle = SimpleNamespace(draft_model_config=draft, target_model_config=model)
    of: Any = [SimpleNamespace(speculative_config=config) for config in (None, ngram, eagle)]
    assert [is_draft(config, model) for config in of] == [False, False, False]
    assert is_draft(of[2], draft)


def test_an_engine_whose_configuration_cannot_be_written_down_has_a_reason() -> None:
    reason = identity.identity_or_reason(SimpleNamespace(model_config=None, parallel_config=None))
    assert isinstance(reason, str) and "cannot be written down" in reason


def test_a_rank_without_tensors_has_an_empty_file(tmp_path: Path) -> None:
    save(nn.Module(), tmp_path / "one")
    assert (tmp_path / "one/rank-0.weights").stat().st_size == 0
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "one").iterdir()} == {0o600}
    Image(tmp_path / "one", 0, ENGINE).fill(nn.Module())


def test_starts_from_an_image_and_from_a_checkpoint_may_be() -> None:
    identity.check_start(config())
    identity.check_start(config("auto", None))


def test_parts_of_a_file_cover_each_span_once() -> None:
    data = torch.arange(3 * PIECE // 8)
    memory = tensors.held(data)
    offsets, spans, size = tensors.laid_out({"a": memory, "b": tensors.held(data[7:9])})
    assert (offsets, size) == ({"a": 0, "b": 56}, 3 * PIECE)
    parts = pieces._parts(spans, size)
    assert [[(start, part.nbytes) for start, part in piece] for piece in parts] == [
        [(0, PIECE)],
        [(0, PIECE)],
        [(0, PIECE)],
    ]
