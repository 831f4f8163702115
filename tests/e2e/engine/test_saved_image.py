# SPDX-License-Identifier: Apache-2.0
"""An engine saves its weights as an image, and another one starts from it with the same tokens.

What an image holds, what is refused and what faults leave is in tests/package/test_image_*.py,
without engines.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import vllm_sleep
from helpers.engine import engine, few, only_rank, sleep_and_wake, start
from helpers.models import make_model
from helpers.ranks import status
from helpers.reference import hf_few
from helpers.server import MEMORY, SMALL, Server

from vllm_sleep_ascend.errors import ImageError, SleepModeError


def without_weights(model: Path, out: Path) -> Path:
    """The folder of a model with its configuration and its tokenizer alone."""
    return Path(shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors")))


def of_image(directory: Path, **options: object) -> dict[str, Any]:
    """The options of an engine that starts from it."""
    sleep_mode = {"image_dir": str(directory), **options}
    return {
        "enable_sleep_mode": True,
        "load_format": "sleep_image",
        "additional_config": {"sleep_mode": sleep_mode},
    }


@contextmanager
def torn(directory: Path) -> Iterator[None]:
    """Some last bytes of the first rank's file are others meanwhile."""
    path = directory / "rank-0.weights"
    content = path.read_bytes()
    path.write_bytes(content[:-4096] + bytes(byte ^ 1 for byte in content[-4096:]))
    yield
    path.write_bytes(content)


def origin(llm: Any) -> tuple[str, str | None, str]:
    weights = status(llm)[0]["weights"]
    return weights["source"], weights["path"], weights["version"]


def test_an_engine_starts_from_the_image_of_another(tiny_model, other_model, tmp_path) -> None:
    directory, bare = tmp_path / "image", without_weights(tiny_model, tmp_path / "bare")
    with engine(tiny_model, enable_sleep_mode=True) as llm:
        first = few(llm)
        llm.sleep(level=1)
        asleep = r"save_image needs memory that is asleep \(weights\)"
        with pytest.raises(SleepModeError, match=asleep):
            llm.collective_rpc("save_image", args=(str(directory),))
        llm.wake_up()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other_model)})
        llm.reset_prefix_cache()
        expected = few(llm)
        assert expected != first
        llm.collective_rpc("save_image", args=(str(directory),))
        with pytest.raises(ImageError, match=r"image exists; name another directory, or replace"):
            llm.collective_rpc("save_image", args=(str(directory),))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "image"]
        assert few(llm) == expected

    with engine(bare, **of_image(directory, after_level2="reload")) as llm:
        image = ("image", str(directory), str(other_model))
        assert (few(llm), origin(llm)) == (expected, image)
        with torn(directory), pytest.raises(ImageError, match="is not what was written"):
            llm.collective_rpc("reload_weights")
        assert (few(llm), origin(llm)) == (expected, image)
        sleep_and_wake(llm, 1)
        assert few(llm) == expected
        llm.sleep(level=2)
        assert only_rank(llm)["tags"]["weights"]["discarded"] > 0
        llm.wake_up()  # it loads the image
        llm.reset_prefix_cache()
        assert (few(llm), origin(llm)) == (expected, image)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tiny_model)})
        llm.reset_prefix_cache()
        loaded = ("checkpoint", str(tiny_model), str(tiny_model))
        assert (few(llm), origin(llm)) == (first, loaded)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("small-qwen2", {"dtype": "float16", "quantization": "fp8"}),
        ("tiny-qwen3-moe", {"dtype": "float16", "quantization": "fp8"}),
        ("tiny-deepseek-v2-lite", {}),
        ("tiny-deepseek-v2", {"dtype": "float16", "quantization": "fp8"}),
        ("tiny-qwen2", {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}),
        ("tiny-qwen2", {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}),
    ],
)
def test_models_and_ranks(name: str, options: Mapping[str, Any], tmp_path: Path) -> None:
    model, directory = make_model(name), tmp_path / "image"
    bare = without_weights(model, tmp_path / "bare")
    with engine(model, enable_sleep_mode=True, **options) as llm:
        expected = few(llm)
        llm.collective_rpc("save_image", args=(str(directory),))
    with engine(bare, **of_image(directory), **options) as llm:
        assert few(llm) == expected
        for level in (1, 2):
            sleep_and_wake(llm, level)
            assert few(llm) == expected
            assert origin(llm) == ("image", str(directory), "default")
        llm.collective_rpc("save_image", args=(str(directory), True))
        assert few(llm) == expected
    with engine(bare, **of_image(directory), **options) as llm:
        assert few(llm) == expected


@pytest.mark.slow
def test_an_output_layer_that_only_the_checkpoint_tells_of(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The configuration ties it to the input's, and vLLM finds that out by the checkpoint."""
    model, directory = Path(shutil.copytree(tiny_model, tmp_path / "model")), tmp_path / "image"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with engine(model, enable_sleep_mode=True) as llm:
        expected = few(llm)
        llm.collective_rpc("save_image", args=(str(directory),))
    with engine(without_weights(model, tmp_path / "bare"), **of_image(directory)) as llm:
        assert few(llm) == expected == hf_few(tiny_model)


@pytest.mark.slow
def test_an_engine_that_does_not_fit_does_not_start(tiny_model: Path, tmp_path: Path) -> None:
    with engine(tiny_model, enable_sleep_mode=True) as llm:
        llm.collective_rpc("save_image", args=(str(tmp_path / "image"),))
    told = r"dtype is 'float32' in the image and 'bfloat16' here"
    with pytest.raises(ImageError, match=told):
        start(tiny_model, **{**of_image(tmp_path / "image"), "dtype": "bfloat16"})


@pytest.mark.slow
def test_a_server_starts_from_the_image_of_another(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    url, directory = f"http://127.0.0.1:{server.port}", tmp_path / "image"
    expected = server.complete()
    done = vllm_sleep("save", url, str(directory))
    assert f"has saved its weights in {directory}" in done.stdout
    assert (
        "exists; name another directory" in vllm_sleep("save", url, str(directory), code=1).stderr
    )
    vllm_sleep("save", url, str(directory), "--replace")
    assert "an absolute path is needed" in vllm_sleep("save", url, "image", code=1).stderr
    refused = server.http.post("/save_image", json={"dir": str(directory), "replace": "perhaps"})
    assert refused.status_code == 400
    refused = server.http.post("/save_image", json={"dir": str(directory)})
    assert (refused.status_code, refused.json()["error"]["type"]) == (409, "ImageRefusedError")
    assert server.complete() == expected
    options = {"sleep_mode": {"image_dir": str(directory)}}
    with Server(
        without_weights(tiny_model, tmp_path / "bare"),
        *(*SMALL, *MEMORY, "--enable-sleep-mode", "--dtype", "float32"),
        *("--load-format", "sleep_image", "--additional-config", json.dumps(options)),
        log=tmp_path / "log",
        env={"VLLM_SERVER_DEV_MODE": "1"},
    ) as started:
        assert started.complete() == expected
        assert (
            f"weights from image {directory}"
            in vllm_sleep("status", f"http://127.0.0.1:{started.port}").stdout
        )
