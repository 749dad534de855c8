"""Where the kernel takes only the program that judges by headers, whoever relies on the shield is told of it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import kernel
import pytest
from checkout import CHECKOUT
from hosts import Host

from securerun.firewall import shield
from securerun.firewall.shield_program import HEADER_PROGRAM, PROGRAMS
from securerun.preflight import abilities

EXEC = "import sys; sys.path.insert(0, sys.argv.pop(1)); from securerun.ctl.app import main; sys.exit(main())"


@pytest.fixture
def of_an_old_kernel(tmp_path: Path) -> Path:
    """A securerun that has but one program, as if the kernel took no other."""
    package = tmp_path / "securerun"
    shutil.copytree(CHECKOUT / "securerun", package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "firewall/shield_program.py").open("a") as module:
        module.write("\nPROGRAMS = (HEADER_PROGRAM,)\n")
    return tmp_path


def test_only_the_program_for_old_kernels_promises_less() -> None:
    assert [program for program in PROGRAMS if program.shortfall] == [HEADER_PROGRAM]


def test_a_start_line_says_what_the_shield_of_an_old_kernel_does_not_promise(
    node: Host, of_an_old_kernel: Path
) -> None:
    is_old = bool(kernel.lack_of(kernel.SOCKETS_IN_PROGRAMS))
    told = {}
    for place in (CHECKOUT, of_an_old_kernel):
        words = [sys.executable, "-c", EXEC, str(place), "exec", "--peers", "10.77.0.2", "--", "true"]
        told[place] = node.run(words, check=True).stderr
    assert ("header filter on" in told[CHECKOUT]) is is_old
    assert told[CHECKOUT].count(HEADER_PROGRAM.shortfall) == is_old
    assert "header filter on" in told[of_an_old_kernel]
    assert told[of_an_old_kernel].count(HEADER_PROGRAM.shortfall) == 1


def test_doctor_says_so_too(node: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shield, "PROGRAMS", (HEADER_PROGRAM,))
    found = abilities._shield()
    assert found.works and HEADER_PROGRAM.shortfall in found.what
