# SPDX-License-Identifier: Apache-2.0
"""Saved images without an engine: what they hold, and what is refused. About 2 s."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.images import ENGINE, Model, assert_filled, save
from torch import nn

from vllm_sleep_ascend.errors import ImageError
from vllm_sleep_ascend.rank.image import identity, manifest, pieces, tensors
from vllm_sleep_ascend.rank.image.filling import Image
from vllm_sleep_ascend.rank.image.pieces import PIECE
from vllm_sleep_ascend.rank.weights.load import Snapshot, WeightLoad
from vllm_sleep_ascend.rank.weights.parameters import own_parameters


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(1)


@pytest.fixture(scope="module")
def image(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def test_a_load_that_fails_is_rolled_back_with_buffers_and_derived_tensors(copied: Path) -> None:
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
    load.roll_back()
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
