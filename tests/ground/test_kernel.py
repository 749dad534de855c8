"""What tests need of the kernel: a lack of it is a reason, and nothing else is; and how long tests wait."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys

import kernel
import patience
import pytest
from checkout import CHECKOUT, GROUND
from kernel import Need

# What a kernel calls itself, in whichever way it is asked.
VERSION = re.compile(r"uname\(|platform\.(release|version)|/proc/version|osrelease")
SKIPS = re.compile(r"\bskip(if)?\(")


def failing(error: OSError) -> Need:
    def ask() -> None:
        raise error

    return Need("thing that is asked for", ask)


def test_what_the_kernel_answers_is_the_reason_to_skip() -> None:
    need = failing(OSError(errno.EINVAL, os.strerror(errno.EINVAL)))
    with pytest.raises(pytest.skip.Exception) as skipped:
        kernel.require(need)
    assert str(skipped.value) == "this kernel has no thing that is asked for (Invalid argument)"


def test_what_the_kernel_has_is_asked_for_once_and_skips_nothing() -> None:
    asked = []
    need = Need("thing that is asked for", lambda: asked.append("once"))
    for _ in range(3):
        kernel.require(need)
    assert asked == ["once"]


def test_what_this_process_may_not_ask_is_no_word_about_the_kernel() -> None:
    kernel.require(failing(PermissionError(errno.EPERM, os.strerror(errno.EPERM))))


@pytest.mark.usefixtures("root_and_tools")
def test_each_need_can_be_asked_for_and_leaves_nothing() -> None:
    """What Linux 6.18 has every one of; an older kernel says what it lacks."""
    needs = [each for each in vars(kernel).values() if isinstance(each, Need)]
    assert len(needs) > 5
    before = os.listdir("/proc/self/fd")
    for need in needs:
        lack = kernel.lack_of(need)
        assert not lack or re.fullmatch(r"this kernel has no [^\n]+ \([^\n]+\)", lack), lack
    assert os.listdir("/proc/self/fd") == before


def test_no_test_is_skipped_by_the_version_of_the_kernel() -> None:
    wrong = []
    for path in (CHECKOUT / "tests").rglob("*.py"):
        statements = path.read_text(encoding="utf-8").split("\n\n")
        wrong += [f"{path}: {text}" for text in statements if VERSION.search(text) and SKIPS.search(text)]
    assert not wrong


def test_nobody_waits_longer_unless_it_is_asked_for() -> None:
    show = "import patience, subprocess; patience.wait_for_programs_as_patiently(); print(patience.patient(2.0))"
    for given, expected in (("", "2.0"), ("1", "2.0"), ("0.1", "2.0"), ("10", "20.0")):
        env = {"PATH": os.defpath, "PYTHONPATH": str(GROUND), "SECURERUN_TESTS_PATIENCE": given}
        done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, env=env, check=True)
        assert done.stdout.strip() == expected
    assert os.environ.get("SECURERUN_TESTS_PATIENCE") or patience.FACTOR == 1
