"""A launcher inside of a run, on a kernel on which something may switch the run's shield off while it lasts."""

from __future__ import annotations

import json

import pytest

from securerun.errors import PolicyError
from securerun.guard.protocol import RUN_ID_VARIABLE
from securerun.options import Options
from securerun.protection import enclosing

RUN = "0123456789ab"


def environment(asked: Options, *, needs_guard: bool) -> dict[str, str]:
    """What the processes of a run with a shield have."""
    terms = enclosing.terms(RUN, asked, shield=True, needs_guard=needs_guard)
    return {RUN_ID_VARIABLE: RUN, enclosing.TERMS_VARIABLE: terms}


@pytest.fixture(params=[True, False], ids=["guard lives", "guard is gone"])
def lives(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the run's guard does; this process is in the run's cgroup."""
    monkeypatch.setattr(enclosing, "_is_in_cgroup_of", lambda run_id: run_id == RUN)
    monkeypatch.setattr(enclosing, "_guard_lives", lambda _: request.param)
    return bool(request.param)


def test_shield_that_lasts_by_itself_is_relied_on_whoever_lives(lives: bool) -> None:
    assert enclosing.find(environment(Options(), needs_guard=False)) is not None


def test_shield_that_may_be_switched_off_is_relied_on_as_long_as_a_guard_looks(lives: bool) -> None:
    assert (enclosing.find(environment(Options(), needs_guard=True)) is not None) is lives


@pytest.mark.parametrize(("scope", "is_enough"), [("auto", False), ("process", True)])
def test_who_insists_on_a_shield_has_one_that_ends_its_job_when_it_is_switched_off(scope: str, is_enough: bool) -> None:
    run = enclosing.Enclosing(RUN, {"shield": True, "needs_guard": True, "scope": scope})
    if is_enough:
        assert enclosing.without_effect(Options(scope="process"), run) == []
    else:
        with pytest.raises(PolicyError, match="not certain to have a shield"):
            enclosing.without_effect(Options(scope="process"), run)


@pytest.mark.parametrize("key", ["require", "/home/me/key"])
def test_who_insists_on_a_key_is_not_content_with_a_run_that_has_none(key: str) -> None:
    with pytest.raises(PolicyError, match="its nodes are not known by a key"):
        enclosing.without_effect(Options(key=key), enclosing.Enclosing(RUN, {"shield": True}))
    run = enclosing.Enclosing(RUN, {"shield": True, "has_key": True, "key": key})
    assert enclosing.without_effect(Options(key=key), run) == []
    other = enclosing.Enclosing(RUN, {"shield": True, "has_key": True})
    assert enclosing.without_effect(Options(key=key), other) == ["--key"]


def test_the_terms_of_a_run_say_whether_it_has_a_key_and_nothing_of_it() -> None:
    said = json.loads(enclosing.terms(RUN, Options(key="/home/me/key"), shield=True, has_key=True))
    assert (said["has_key"], said["key"]) == (True, "/home/me/key")
    assert "has_key" not in json.loads(enclosing.terms(RUN, Options(), shield=True))
