"""The suite hears of guards that died, also where another took over before anybody noticed."""

from __future__ import annotations

from pathlib import Path

from checkout import CHECKOUT
from guards_log import GuardsLog


def test_a_guards_defect_is_told_once_and_another_checkouts_is_not(tmp_path: Path) -> None:
    path = tmp_path / "securerun.log"
    line = "2026-11-29T01:00+0000 securerun-guard[7]: run 606846d6f8df: a defect of securerun's: KeyError: 7 (line 9 of"
    path.write_text(f"{line} {CHECKOUT}/securerun/linux/processes.py)\n")
    log = GuardsLog(path)
    assert log.defects() == []
    with path.open("a") as file:
        file.write(f"{line} {CHECKOUT}/securerun/guard/watch.py)\n")
        file.write(f"{line} /another/checkout/securerun/guard/watch.py)\n")
        file.write(f"{line} /usr/lib/python3/json/decoder.py)\n")
    assert [defect.rpartition(" ")[2] for defect in log.defects()] == [
        f"{CHECKOUT}/securerun/guard/watch.py)",
        "/usr/lib/python3/json/decoder.py)",
    ]
    assert log.defects() == []


def test_where_nobody_logged_yet_there_is_no_defect(tmp_path: Path) -> None:
    assert GuardsLog(tmp_path / "none").defects() == []
