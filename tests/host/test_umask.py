"""The umask: only ever stricter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from securerun.errors import PolicyError
from securerun.host.umask import parse, stricter, tighten


@pytest.fixture
def own_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(
    ("current", "requested", "expected"),
    [
        (0o022, 0o027, 0o027),
        (0o000, 0o027, 0o027),
        (0o077, 0o027, 0o077),
        (0o002, 0o077, 0o077),
        (0o050, 0o027, 0o077),
        (0o777, 0o027, 0o777),
    ],
)
def test_a_stricter_umask_of_the_users_stays(current: int, requested: int, expected: int) -> None:
    assert stricter(current, requested) == expected


@pytest.mark.parametrize(("text", "mask"), [("0027", 0o027), ("027", 0o027), ("27", 0o027), ("0o077", 0o077)])
def test_octal_as_people_write_it(text: str, mask: int) -> None:
    assert parse(text) == mask


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0022", ["umask 0022", "others read, others execute", "write 0027"]),
        ("0000", ["group write, others read, others write, others execute"]),
        ("0007", ["group write", "write 0027"]),
        ("0026", ["others execute"]),
        ("0740", ["others read", "write 0767"]),
        ("0028", ["'0028'", "octal", "write 0027"]),
        ("1027", ["'1027'", "0000-0777"]),
        ("u=rwx", ["'u=rwx'", "octal"]),
        ("-027", ["'-027'"]),
        ("0_27", ["'0_27'"]),
        ("", ["''"]),
    ],
)
def test_a_weak_umask_is_refused_by_name(text: str, words: list[str]) -> None:
    with pytest.raises(PolicyError) as error:
        parse(text, "SECURERUN_UMASK")
    assert str(error.value).startswith("SECURERUN_UMASK: ")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.usefixtures("own_umask")
def test_tighten_sets_the_umask_of_this_process() -> None:
    assert tighten("0027") == 0o027
    assert tighten("0077") == 0o077
    assert tighten("0027") == 0o077
    assert os.umask(0o077) == 0o077


@pytest.mark.usefixtures("own_umask")
def test_a_refused_umask_changes_nothing() -> None:
    with pytest.raises(PolicyError):
        tighten("0002")
    assert os.umask(0o022) == 0o022
