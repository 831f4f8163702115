# SPDX-License-Identifier: Apache-2.0
"""The files of examples/deploy fit the programs that read them, and what they say of ours is so."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import promql_parser
import pytest
import yaml
from helpers import ROOT
from prometheus_client.metrics_core import Metric

from vllm_sleep_ascend.proxy.metrics import Metrics

DEPLOY = ROOT / "examples/deploy"
BIN = Path(sys.executable).parent

KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICE = COMPOSE["services"]["vllm-sleep"]


@pytest.mark.parametrize(
    "resource", KUBERNETES, ids=lambda r: f"{r['kind']} {r['metadata']['name']}"
)
def test_kubernetes_knows_every_field(resource):
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_compose_knows_every_field():
    """The model of Compose's specification leaves out what it does not know."""
    known = compose_spec.ComposeSpecification(**COMPOSE)
    read = known.model_dump(mode="json", exclude_unset=True, by_alias=True)
    assert _sorted(read) == _sorted(COMPOSE)


def _sorted(value: Any) -> Any:
    """Lists that Compose takes as sets have no order."""
    if isinstance(value, dict):
        return {key: _sorted(item) for key, item in value.items()}
    if isinstance(value, list):
        return sorted(map(_sorted, value), key=repr)
    return value


def test_the_container_has_the_devices_and_mounts_of_the_build_instructions():
    told = (ROOT / "COMPILE.md").read_text()
    told = told[told.index("docker run --device") :].partition("```")[0]
    assert set(re.findall(r"--device (\S+)", told)) == set(SERVICE["devices"])
    mounts = {volume.removesuffix(":ro") for volume in SERVICE["volumes"] if volume[0] == "/"}
    assert set(re.findall(r"-v (\S+)", told)) == mounts
    assert "--ulimit memlock=-1" in told
    assert SERVICE["ulimits"] == {"memlock": -1}


MODELS = {
    "kubernetes": next(r for r in KUBERNETES if r["kind"] == "ConfigMap")["data"]["models.yaml"],
    "compose": COMPOSE["configs"]["models.yaml"]["content"].replace("$$", "$"),
}


def _programs() -> Iterator[tuple[str, list[str]]]:
    for resource in KUBERNETES:
        if resource["kind"] == "Deployment":
            (container,) = resource["spec"]["template"]["spec"]["containers"]
            yield resource["metadata"]["name"], container["args"]
    yield "compose", SERVICE["command"]


@pytest.mark.parametrize("models", MODELS.values(), ids=MODELS)
def test_the_proxy_takes_their_models(models, tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text(models)
    done = _run(BIN / "vllm-sleep-proxy", "--config", path, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command", [args for _, args in _programs()], ids=[n for n, _ in _programs()]
)
def test_the_programs_know_their_options(command):
    program, *args = command
    options = [arg.partition("=")[0] for arg in args if arg.startswith("--")]
    told = _run(
        BIN / program,
        *(args[:1] if program == "vllm" else ()),
        "--help=all" if program == "vllm" else "--help",
    ).stdout
    assert options
    assert [option for option in options if not re.search(rf"{option}\b", told)] == []


def test_systemd_takes_the_unit(tmp_path):
    """It names unknown keys and does not fail."""
    unit = tmp_path / "vllm-sleep-proxy.service"
    text = (DEPLOY / unit.name).read_text()
    unit.write_text(text.replace("/opt/vllm-sleep/bin", str(BIN)))
    verify = shutil.which("systemd-analyze")
    assert verify, "install systemd"
    done = _run(verify, "verify", unit)
    assert (done.returncode, done.stderr) == (0, "")


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


def _names(families: list[Metric]) -> set[str]:
    suffixes = {"counter": ["_total"], "histogram": ["_bucket"]}
    return {f.name + suffix for f in families for suffix in suffixes.get(f.type, [""])}


def _used(expression: Any) -> Iterator[str]:
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression.name
    for name in ("expr", "vector_selector", "lhs", "rhs"):
        if (part := getattr(expression, name, None)) is not None:
            yield from _used(part)
    for part in getattr(expression, "args", ()):
        yield from _used(part)


def test_the_dashboard_shows_every_metric_and_no_other():
    from prometheus_client import REGISTRY

    from vllm_sleep_ascend.front_end.metrics import SleepModeGauges

    SleepModeGauges("model")
    ours = {n for n in _names(list(REGISTRY.collect())) if n.startswith("vllm:sleep_mode")}
    ours |= _names(list(Metrics().registry.collect()))
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    shown = [
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in _used(promql_parser.parse(target["expr"].replace("$__rate_interval", "5m")))
    ]
    assert set(shown) - ours == {"vllm:engine_sleep_state"}, "a gauge of vLLM's"
    assert ours <= set(shown)
