# SPDX-License-Identifier: Apache-2.0
"""Which server comes up, and which go for it: the proxy's choice, alone and in virtual time."""

import sys
from dataclasses import replace
from typing import Any

import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sleep_ascend.proxy.choice import Choice, Seen, Step, View, choose, surplus
from vllm_sleep_ascend.proxy.config.groups import Group

sys.path.insert(0, str(ROOT / "benchmarks"))
from bench.virtual import Device, Model, Request

NOW, TURN = 1000.0, 10.0


def server(key: int, size: int | None = 10, places: tuple[int, ...] = (0,), **more: Any) -> Seen:
    takes = None if size is None else dict.fromkeys(places, size)
    return Seen(key, f"s{key}", places=frozenset(places), takes=takes, **more)


def off(key: int, size: int | None = 10, waits: float = 1.0, **more: Any) -> Seen:
    """Asleep; its first request has waited for that long."""
    return server(key, size, waits_since=NOW - waits, **more)


def awake(key: int, size: int | None = 10, used: float = 100.0, **more: Any) -> Seen:
    """Idle since; its turn is long over."""
    since = {"awake_since": NOW - 200, "last_used": NOW - used, "served": True}
    return server(key, size, state="awake", **{**since, **more})


def busy(key: int, size: int | None = 10, turn: float = 11.0, **more: Any) -> Seen:
    """Works on a request, awake for that long."""
    return awake(key, size, 0.0, running=1, awake_since=NOW - turn, **more)


def chosen(*servers: Seen, free: int | None = None, **more: Any) -> Choice:
    """With bytes where ``free`` is given, else one at a time."""
    if free is not None:
        more = {"max_awake": None, "free": dict.fromkeys((-1, 0, 1), free), **more}
    return choose(View(NOW, servers, turn_s=TURN, **more))


def steps(*servers: Seen, **more: Any) -> list[tuple[int, tuple[int, ...]]]:
    return [(step.wanted, step.leaving) for step in chosen(*servers, **more).steps]


def test_nobody_is_wanted():
    assert chosen(awake(0), server(1), free=0) == Choice((), None)


# --- One at a time, or a number ------------------------------------------------------------------


def test_the_least_recently_used_goes():
    there = [awake(0, used=5), awake(1, used=7), awake(2, used=6)]
    assert steps(*there, off(3), max_awake=3) == [(3, (1,))]
    assert steps(*there, off(3), max_awake=4) == [(3, ())]


def test_an_idle_one_goes_before_a_busy_one_whose_turn_is_over():
    assert steps(busy(0, turn=100), awake(1, used=1), off(2), max_awake=2) == [(2, (1,))]


def test_an_idle_one_is_waited_for_before_a_busy_one_goes():
    soon = awake(1, used=2, awake_since=NOW - 4, switch_s=3.0)
    assert chosen(busy(0, turn=100), soon, off(2), free=0) == Choice((), 1.0)
    assert steps(busy(0, turn=100), soon, off(2), max_awake=2) == [(2, (1,))]


def test_of_busy_ones_that_with_the_longest_turn_goes():
    assert steps(busy(0, turn=12), busy(1, turn=13), off(2), max_awake=2) == [(2, (1,))]


def test_a_turn_continues():
    assert chosen(busy(0, turn=7), off(1)) == Choice((), 3.0)


def test_a_turn_ends_no_sooner_than_a_request_was_served():
    assert chosen(busy(0, turn=70, served=False), off(1)) == Choice((), None)


def test_those_that_have_waited_longer_come_first():
    assert steps(off(0, waits=1), off(1, waits=2)) == [(1, ())]


def test_a_later_one_takes_nothing_that_an_earlier_one_is_to_get():
    there = (busy(0, places=(0,)), off(1, waits=9, places=(0, 1)), off(2, waits=1, places=(1,)))
    assert steps(*there) == [(1, (0,))]
    assert steps(*there, max_awake=2) == [(1, ())]


def test_devices_do_not_wait_for_each_other():
    there = [busy(0, places=(0,)), busy(1, places=(1,))]
    wanted = [off(2, waits=2, places=(0,)), off(3, places=(1,))]
    assert steps(*there, *wanted) == [(2, (0,)), (3, (1,))]


def test_nobody_goes_until_all_that_have_to_may():
    there = [awake(0, places=(0,)), busy(1, turn=6, places=(1,))]
    assert chosen(*there, off(2, places=(0, 1))) == Choice((), 4.0)


def test_one_that_ends_is_waited_for():
    assert chosen(server(0, state="stopping"), off(1)) == Choice((), None)
    assert chosen(awake(0, leaves=True), off(1)) == Choice((), None)
    assert steps(server(0, state="stopping"), awake(1), off(2), max_awake=2) == []


def test_one_that_starts_is_waited_for():
    assert chosen(server(0, state="starting"), off(1)) == Choice((), None)


def test_one_that_cannot_end_is_said():
    (step,) = chosen(server(0, state="stuck", error="it hangs"), off(1)).steps
    assert step == Step(1, never="it hangs")


def test_one_that_has_to_rest_keeps_nobody_waiting():
    assert steps(awake(0), off(1, waits=9, ready=False), off(2)) == [(2, (0,))]


# --- By bytes ------------------------------------------------------------------------------------


def test_as_many_as_fit_are_awake():
    assert steps(awake(0), busy(1), off(2, 30), free=30) == [(2, ())]
    assert steps(awake(0), busy(1), off(2, 31), free=30) == [(2, (0,))]


def test_no_more_go_than_have_to():
    small, large = awake(0, 10, used=90), awake(1, 40, used=50)
    assert steps(small, large, off(2, 30), free=0) == [(2, (1,))]
    assert steps(small, large, off(2, 10), free=0) == [(2, (0,))]
    assert steps(small, large, off(2, 50), free=0) == [(2, (0, 1))]


def test_one_alone_is_tried_whatever_the_figures_say():
    assert steps(off(0, 50), free=30) == [(0, ())]
    assert steps(awake(1, 10), off(0, 50), free=30) == [(0, (1,))]


def test_one_that_does_not_tell_has_its_devices_to_itself():
    assert steps(awake(0, 1), off(1, None), free=90) == [(1, (0,))]
    assert steps(awake(0, None), off(1, 1), free=90) == [(1, (0,))]
    assert steps(awake(0, None), off(1, None, places=(1,)), free=90) == [(1, ())]
    assert steps(awake(0, 1), off(1, 1), free=90, max_awake=None) == [(1, ())]
    assert steps(awake(0, 1), off(1, 1), max_awake=None) == [(1, (0,))]  # free bytes not known


def test_room_is_kept_for_one_that_waits():
    there = (busy(0, 60, turn=5), off(1, 80, waits=9))
    assert chosen(*there, off(2, 20), free=40) == Choice((Step(2),), 5.0)
    assert chosen(*there, off(2, 30), free=40) == Choice((), 5.0)


def test_a_second_one_gets_others_to_go():
    there = [awake(0, 50, used=9), awake(1, 50, used=8)]
    assert steps(*there, off(2, 50, waits=9), off(3, 50), free=0) == [(2, (0,)), (3, (1,))]


def test_each_device_has_its_bytes():
    wanted = off(2, 20, places=(0, 1))
    there = [awake(0, 20, places=(0,)), awake(1, 20, places=(1,))]
    assert steps(*there, wanted, free={0: 20, 1: 0}.get(0)) == [(2, ())]
    view = View(NOW, [*there, wanted], {0: 20, 1: 0}, max_awake=None)
    assert choose(view).steps == (Step(2, (1,)),)


# --- Who comes and goes first --------------------------------------------------------------------


def test_priority_counts_as_turns_and_switches_of_waiting():
    def first(waits: float, priority: int = 1) -> int:
        others = server(2, switch_s=4.0), busy(3)
        low, high = off(0, waits=15), off(1, waits=waits, priority=priority)
        return steps(*others, low, high)[0][0]

    assert (first(waits=1.5), first(waits=0.5), first(0.5, priority=2)) == (1, 0, 1)


def test_an_idle_one_of_lower_priority_goes_first():
    there = [awake(0, used=9, priority=1), awake(1, used=5), busy(2, priority=-1)]
    assert steps(*there, off(3), max_awake=3) == [(3, (1,))]


def test_an_idle_one_keeps_its_turn_for_as_long_as_its_switch_took():
    def rest(**more: Any) -> float | None:
        idle = awake(0, **{"used": 2, "awake_since": NOW - 4, "switch_s": 3.0, **more})
        choice = chosen(idle, off(1), free=0)
        assert bool(choice.steps) != bool(choice.later_s)
        return choice.later_s

    assert rest() == 1.0
    assert rest(switch_s=30.0) == 6.0  # the rest of its turn
    assert rest(switch_s=2.0) is None
    assert rest(awake_since=NOW - 20) is None
    just_woken = awake(0, used=0, awake_since=NOW, switch_s=9)
    assert chosen(just_woken, off(1, priority=1), free=0).steps
    assert chosen(just_woken, off(1)).steps  # only by bytes


def test_one_goes_for_whose_backup_the_host_has_memory():
    there = [awake(0, used=9, host=50), awake(1, used=5, host=20)]
    assert chosen(*there, off(2), free=0, host_free=40).steps == (Step(2, (1,)),)
    assert chosen(*there, off(2), free=0, host_free=50).steps == (Step(2, (0,)),)
    deep = chosen(*there, off(2, 20), free=0, host_free=60).steps
    assert deep == (Step(2, (0, 1), frozenset({1})),)
    refuses = replace(there[0], deepens=False)
    assert steps(refuses, there[1], off(2), free=0, host_free=10) == [(2, (1,))]


# --- Without a request ---------------------------------------------------------------------------


def test_a_preload_has_idle_ones_go():
    due = server(2, due="preload")
    assert steps(awake(0), due) == [(2, (0,))]
    assert steps(busy(0), due) == []
    assert steps(due) == [(2, ())]
    assert steps(awake(0), due, off(1)) == [(1, (0,))]


def test_one_that_is_due_keeps_no_other_from_coming_up():
    there = [server(key, places=(key,), due="restart") for key in (0, 1)]
    assert steps(*there) == [(0, ()), (1, ())]
    assert steps(server(2, due="preload"), *there) == [(2, ()), (1, ())]  # 0 has no room left


def test_a_restart_has_nobody_go():
    due = server(2, due="restart")
    assert steps(awake(0), due) == []
    assert steps(awake(0), due, max_awake=2) == [(2, ())]


# --- Groups --------------------------------------------------------------------------------------


def group(name: str = "g", **flags: bool) -> Group:
    return Group(name=name, members=("x",), **flags)


def test_of_a_group_that_swaps_one_is_awake():
    swaps = group(swap=True)
    one, other = awake(0, group=swaps, used=1), awake(1, used=9)
    assert steps(one, other, off(2, group=swaps), free=90) == [(2, (0,))]
    assert steps(one, other, off(2), free=90) == [(2, ())]
    assert steps(one, off(2, group=group("h", swap=True)), free=90) == [(2, ())]
    far = awake(0, group=swaps, places=(1,))
    assert steps(far, off(2, group=swaps), free=90) == [(2, (0,))]


def test_for_an_exclusive_group_all_others_go():
    mine, kept = group(exclusive=True), group("k", persistent=True)
    there = [awake(0, group=mine), awake(1, places=(1,)), awake(2, group=kept)]
    assert steps(*there, off(3, group=mine), free=90) == [(3, (1,))]
    assert steps(awake(0, group=mine), off(3), free=90) == [(3, ())]


def test_a_persistent_group_stays():
    kept = group("k", persistent=True)
    there = [awake(0, 50, used=9, group=kept), awake(1, 50, used=5)]
    assert steps(*there, off(2, 50), free=0) == [(2, (1,))]
    (step,) = chosen(*there, off(2, 60), free=0).steps
    assert step.never.startswith("s2 does not fit beside s0, awake in a persistent group; put it")
    assert steps(*there, off(2, 60, group=kept), free=0) == [(2, (0, 1))]
    # It waits for what may come free.
    assert steps(there[0], server(1, 50, state="starting"), off(2, 50), free=0) == []


# --- At the start of the proxy -------------------------------------------------------------------


def test_those_awake_without_room_are_found():
    there = [awake(0, 50), server(1), awake(2, 60), awake(3, 40)]
    assert surplus(View(NOW, there, {0: -50}, max_awake=None)) == [2]
    assert surplus(View(NOW, there, max_awake=1)) == [2, 3]
    assert surplus(View(NOW, [awake(0, None), awake(2)], max_awake=None)) == [2]


def test_those_with_the_better_claim_stay():
    older, newer = awake(0, used=9), awake(1, used=5)
    assert surplus(View(NOW, [older, newer])) == [0]
    assert surplus(View(NOW, [replace(older, priority=1), newer])) == [1]
    kept = replace(older, group=group("k", persistent=True), priority=-1)
    assert surplus(View(NOW, [newer, kept])) == [1]
    assert surplus(View(NOW, [newer, server(2, state="starting")])) == [1]
    beside = View(NOW, [newer, server(2, 40, state="starting")], {0: 20}, max_awake=None)
    assert surplus(beside) == []


# --- In virtual time -----------------------------------------------------------------------------


def test_a_model_of_low_priority_gets_its_turn_under_load():
    models = [Model("a", 60, 1, 1, priority=100), Model("b", 60, 1, 1, priority=100)]
    models.append(Model("c", 60, 1, 1))
    steady = [Request(at / 4, "ab"[at % 2], 1.0) for at in range(4 * 900)]
    outcome = Device(models, 100).serve(sorted([*steady, Request(9.0, "c", 1.0)], key=_at))
    assert len(outcome.waits) == 4 * 900 + 1
    assert outcome.waits_of["c"][0] < 100 * (2 + 2) + 20
    with_other = replace(models[2], priority=100)
    soon = Device([*models[:2], with_other], 100).serve([*steady[:400], Request(99, "c", 1.0)])
    assert soon.waits_of["c"][0] < 20


def test_two_that_fit_do_not_switch():
    models = [Model("a", 50, 1, 1), Model("b", 50, 1, 1), Model("c", 50, 1, 1)]
    both = [Request(at / 2, "ab"[at % 2], 1.0) for at in range(100)]
    outcome = Device(models, 100).serve(both)
    assert (outcome.wakes, outcome.sleeps, outcome.most_bytes) == (2, 0, 100)
    assert Device(models, 100, max_awake=1).serve(both).wakes > 10


def _at(request: Request) -> float:
    return request.at


SECONDS = st.integers(0, 40).map(lambda tenths: tenths / 10)


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[Model], list[Request]]:
    switches = st.builds(
        Model,
        st.just(""),
        st.integers(1, 100),
        sleep_s=SECONDS,
        wake_s=SECONDS,
        priority=st.integers(-2, 2),
        group=st.sampled_from([None, None, group(swap=True), group("h", exclusive=True)]),
        host=st.integers(0, 50),
    )
    models = [
        replace(model, name=str(at))
        for at, model in enumerate(draw(st.lists(switches, min_size=1, max_size=6)))
    ]
    one = st.builds(
        Request, st.integers(0, 60).map(float), st.sampled_from([m.name for m in models]), SECONDS
    )
    return models, sorted(draw(st.lists(one, max_size=60)), key=_at)


@pytest.mark.parametrize("max_awake", [None, 1, 2])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(loads(), st.sampled_from([0.0, 1.0, 2.0, 5.0]))
def test_of_any_load(max_awake, load, turn_s):
    """The device holds what is awake, each request is served in its time, and each turn lasts."""
    models, requests = load
    outcome = Device(models, 100, max_awake, turn_s, host=120).serve(requests)
    assert len(outcome.waits) == len(requests)
    if max_awake is None:
        assert outcome.most_bytes <= 100
    else:
        assert outcome.most_awake <= max_awake
    assert not outcome.broken_turns
    if requests:
        switch_s = max(model.sleep_s + model.wake_s for model in models)
        turn = turn_s + max(r.seconds for r in requests) + len(models) * switch_s
        priorities = [model.priority for model in models]
        before = (len(models) + 1) * (1 + max(priorities) - min(priorities))
        assert max(outcome.waits) <= before * turn + 1e-6
