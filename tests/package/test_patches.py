# SPDX-License-Identifier: Apache-2.0
"""What is replaced in vLLM exists, is named if it is missing, and is documented.

tests/ascend/test_standing_by.py checks the same for vllm-ascend's version of vLLM.
"""

import inspect
import pkgutil
from types import SimpleNamespace

import pytest
from helpers import ROOT

from vllm_sleep_ascend import patches
from vllm_sleep_ascend.patches import DEVELOPMENT, EVERYWHERE, OFFLINE, Patch, PatchError

ALL = (*EVERYWHERE, *DEVELOPMENT, *OFFLINE)


class Engine:
    """Stands for a class of vLLM."""

    def sleep(self, level: int = 1, mode: str = "abort") -> str:
        return f"stock {level}"

    def wake_up(self, tags: list[str] | None = None) -> None: ...

    def pause(self, *args: object) -> None: ...


def patch(name: str, *parameters: str, since: str = "") -> Patch:
    def ours(stock):
        return lambda self, level=1: f"ours, then {stock(self, level)}"

    return Patch(f"{__name__}:Engine", name, ours, parameters, "", since)


def test_this_vllm_has_all_of_it_with_these_parameters() -> None:
    assert patches.problems(ALL) == []


def test_each_callable_is_replaced_once_and_repeating_it_changes_nothing() -> None:
    places = [(each.owner, each.name) for each in ALL]
    assert len(set(places)) == len(places) > 40
    patches.install_all()
    patches.install(ALL)
    before = [getattr(pkgutil.resolve_name(owner), name) for owner, name in places]
    assert all(hasattr(function, "guarded_by_camem") for function in before)
    patches.install_all()
    patches.install(ALL)
    assert [getattr(pkgutil.resolve_name(owner), name) for owner, name in places] == before


@pytest.mark.parametrize("each", ALL, ids=lambda each: f"{each.owner}.{each.name}")
def test_ours_takes_what_vllm_s_takes(each: Patch) -> None:
    """Parameters by position or by name, as in vLLM; other arguments are passed on."""
    patches.install((each,))
    installed = getattr(pkgutil.resolve_name(each.owner), each.name)
    ours = inspect.signature(installed, follow_wrapped=False).parameters.values()
    stock = [name for name in inspect.signature(installed.__wrapped__).parameters if name != "self"]
    named = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    rest = {p.kind for p in ours}
    assert named == stock[: len(named)]
    by_position = {inspect.Parameter.VAR_POSITIONAL}
    by_both = by_position | {inspect.Parameter.VAR_KEYWORD}
    # vLLM passes the arguments after a method's name by position.
    needed = by_position if each.name.startswith("call_utility") else by_both
    assert rest >= needed or len(named) == len(stock)


def test_what_is_missing_or_different_is_named_and_nothing_is_changed() -> None:
    good = patch("sleep", "level")
    wrong = [
        good,
        patch("doze"),
        patch("wake_up", "level"),
        patch("pause", "mode"),  # accepts any arguments
        patch("release", since="999.0"),  # in a future vLLM
        Patch("vllm.to_come:Engine", "doze", lambda stock: stock, (), "", since="999.0"),
        patch("forget", since="0.1"),
        Patch("vllm.no_such_module:Engine", "sleep", lambda stock: stock, (), ""),
    ]
    before = dict(vars(Engine))
    with pytest.raises(PatchError) as refused:
        patches.install(wrong)
    text = str(refused.value)
    here = f"{__name__}.Engine"
    assert f"{here}.doze is gone" in text
    assert f"{here}.wake_up takes (tags), not (level)" in text
    assert f"{here}.forget is gone" in text
    assert "vllm.no_such_module.Engine.sleep is gone" in text
    assert "pause" not in text and "release" not in text
    assert "None of it was replaced. Install a vLLM that it supports (vllm" in text
    assert dict(vars(Engine)) == before


def test_a_replacement_gets_the_stock_callable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "sleep", Engine.sleep)  # restored afterwards
    to_come = Patch("vllm.to_come:Engine", "doze", lambda stock: stock, (), "", since="999.0")
    patches.install((patch("sleep", "level"), patch("release", since="999.0"), to_come))
    assert Engine().sleep(2) == "ours, then stock 2"
    patches.install((patch("sleep", "level"),))
    assert Engine().sleep(2) == "ours, then stock 2"
    assert not hasattr(Engine, "release")


def test_the_docs_have_the_table() -> None:
    assert patches.table() in (ROOT / "docs/patches.md").read_text()


def test_front_ends_find_the_methods_that_were_added() -> None:
    from vllm.v1.engine.core import EngineCore

    patches.install_all()
    core = SimpleNamespace()
    assert EngineCore.sleep_mode_pending(core) is False
    assert callable(EngineCore.sleep_mode_refusal)
