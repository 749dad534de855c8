"""The man pages: what scripts/man_pages.py makes of the tables, and what man reads."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from checkout import CHECKOUT

from securerun.guard import log
from securerun.guard.limits import SitePolicy
from securerun.options import OPTIONS
from securerun.protection import ways

PAGES = CHECKOUT / "docs/man"


def read(name: str) -> str:
    """A page as a reader of it sees it, without what makes letters bold."""
    _require_mandoc()
    return subprocess.run(
        ["mandoc", "-T", "utf8", "-O", "width=1000", PAGES / name], check=True, capture_output=True, text=True
    ).stdout


def _require_mandoc() -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed; scripts/setup.sh test installs it")


def test_pages_are_those_of_the_tables() -> None:
    render = runpy.run_path(str(CHECKOUT / "scripts/man_pages.py"))["render"]
    there = {path.name: path.read_text(encoding="utf-8") for path in PAGES.iterdir()}
    assert there == render(), "run scripts/man_pages.py"


@pytest.mark.parametrize("page", sorted(PAGES.iterdir()), ids=lambda page: page.name)
def test_man_finds_nothing_wrong_with_a_page(page: Path) -> None:
    _require_mandoc()
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", page], check=False, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() + done.stderr.splitlines() if "missing date" not in line]
    assert not said


def test_every_option_and_every_limit_is_on_its_page() -> None:
    page = _plain(read("securerun.1"))
    assert [option.synopsis for option in OPTIONS if option.synopsis not in page or option.variable not in page] == []
    page = _plain(read("securerun-guard.8"))
    assert [name for name in SitePolicy.__dataclass_fields__ if f"{name} = " not in page] == []
    for word in ("RUN_ID", "USER", "PEERS", str(ways.SOCKET), str(log.FILE)):
        assert word in page


def _plain(text: str) -> str:
    """Text without overstruck letters, which are bold on a terminal (x, backspace, x)."""
    kept: list[str] = []
    for character in text:
        if character == "\b":
            kept.pop()
        else:
            kept.append(character)
    return "".join(kept)
