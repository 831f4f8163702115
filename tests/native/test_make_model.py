# SPDX-License-Identifier: Apache-2.0
"""The model maker: the same model every time, and never a partial one."""

import subprocess
import sys

import pytest
import torch  # noqa: F401  with torch_npu, which the program does without
from helpers import ROOT
from safetensors import safe_open

SCRIPT = ROOT / "examples" / "make_model.py"
sys.path.insert(0, str(SCRIPT.parent))


def run(*args):
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True)


def test_the_same_name_gives_the_same_model(tmp_path):
    from make_model import make_model

    one, two = (make_model("tiny-qwen2", tmp_path / name) for name in ("a", "b"))
    files = sorted(f.name for f in one.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(files)
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert sum(f.stat().st_size for f in one.iterdir()) < 10e6
    with safe_open(one / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("model.embed_tokens.weight").shape == (2048, 128)


def test_a_complete_model_is_reused(tmp_path, capsys):
    from make_model import make_model

    def said(name):
        make_model(name, out)
        return capsys.readouterr().out

    out = tmp_path / "m"
    assert "made tiny-llama" in run("tiny-llama", out).stdout
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert "is there already" in said("tiny-llama")
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert "made tiny-qwen2" in said("tiny-qwen2")


def test_a_model_is_made_again_when_its_processor_has_changed(tmp_path, capsys, monkeypatch):
    import make_model

    out = tmp_path / "m"
    for said in ("made", "is there already"):
        make_model.make_model("tiny-phi3v", out)
        assert said in capsys.readouterr().out
    for part, files in (
        ("code", {"processing_phi3_v.py": "# other"}),
        ("processor_files", {"processor_config.json": {"num_crops": 3}}),
    ):
        monkeypatch.setattr(make_model.vision_models, part, lambda config, files=files: files)
        make_model.make_model("tiny-phi3v", out)
        assert "made tiny-phi3v" in capsys.readouterr().out
    assert (out / "processing_phi3_v.py").read_text() == "# other"
    assert '"num_crops": 3' in (out / "processor_config.json").read_text()


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    import make_model

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(make_model, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        make_model.make_model("tiny-qwen2", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_remedy(tmp_path, monkeypatch):
    from make_model import main

    done = run("tiny-qwen", tmp_path / "m")
    assert done.returncode == 1
    assert "no model 'tiny-qwen'; there are tiny-qwen2, " in done.stderr
    (tmp_path / "mine").write_text("x")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "tiny-qwen2", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds something else; name a new folder"):
        main()
    assert (tmp_path / "mine").read_text() == "x"


def test_an_adapter_is_made_for_its_model(tmp_path):
    from make_model import make_model

    one, two = (make_model("tiny-qwen2-lora", tmp_path / name) for name in ("a", "b"))
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (one, two)]
    assert weights[0] == weights[1]
    with safe_open(one / "adapter_model.safetensors", "pt") as halves:
        assert len(halves.keys()) == 2 * 7 * 4  # A and B of seven matrices in four layers
        module = "base_model.model.model.layers.3.self_attn.k_proj"
        assert halves.get_tensor(f"{module}.lora_A.weight").shape == (8, 128)
        assert halves.get_tensor(f"{module}.lora_B.weight").shape == (64, 8)


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-smolvlm"])
def test_a_vision_model_has_the_parameters_of_published_ones(name):
    from helpers.models import make_model
    from transformers import AutoModelForImageTextToText

    _, loaded = AutoModelForImageTextToText.from_pretrained(
        make_model(name), output_loading_info=True
    )
    assert not any(loaded.values()), loaded
