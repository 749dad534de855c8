"""The kernel matrix' cells, judgements and page, without a machine."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import kernel_cells
import kernel_page
import pytest
from checkout import CHECKOUT
from kernel_lab import LabError, own_kernel
from kernel_matrix import RESULTS, Trial, chosen, keep, kernel_of, parse
from kernel_trial import No, Seen, judgement, what_became_of_the_shield

VERSIONS = CHECKOUT / "docs/versions.md"


def test_the_page_is_what_the_kept_results_make() -> None:
    assert kernel_page.PAGE.read_text() == kernel_page.page(RESULTS), "scripts/kernels.sh --page writes it"


def test_every_no_of_the_page_leads_to_its_explanation(tmp_path: Path) -> None:
    cell = kernel_cells.parse_cell("5.10/amd64/v1")
    parts = {
        "truth": {"ok": True, "says": "no shield: net_cls or net_prio is in use; 3 of 9"},
        "two": {"ok": False, "says": "status [1, 0] | and more"},
        "tests": {"ok": True, "says": "5 passed, 0 failed, 2 skipped; skipped 2: needs an owner, Linux 5.12"},
    }
    _keep(tmp_path, cell, parts)
    page = kernel_page.page(tmp_path)
    (row,) = (line for line in page.splitlines() if line.startswith("| 5.10<br>"))
    references = re.findall(r"no(?:\*\*)? \[(\d)\]", row)
    assert references == ["1", "2"]
    assert "5 passed, 0 failed, 2 skipped [3]" in row
    assert re.findall(r"^(\d)\. ", page, re.MULTILINE) == ["1", "2", "3"]
    assert "8520e224f547" in page and "status [1, 0] \\| and more" in page


def test_a_part_that_was_not_tried_is_told_from_one_that_does_not_apply(tmp_path: Path) -> None:
    for name in ("6.1/amd64/v2", "6.1/amd64/systemd-v1"):
        _keep(tmp_path, kernel_cells.parse_cell(name), {"one": {"ok": True, "says": "status"}})
    rows = [row.split(" | ") for row in kernel_page.page(tmp_path).splitlines() if row.startswith("| 6.1<br>")]
    assert [(row.count("-"), row.count("not yet")) for row in rows] == [(2, 7), (0, 9)]


def test_a_part_that_is_run_again_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    cell = kernel_cells.parse_cell("6.1/arm64/hybrid")
    _keep(tmp_path, cell, {"left": {"ok": True, "says": "first"}, "one": {"ok": False, "says": "first"}})
    _keep(tmp_path, cell, {"one": {"ok": True, "says": "again"}})
    parts = json.loads((tmp_path / cell.file_name).read_text())["parts"]
    assert {name: part["says"] for name, part in parts.items()} == {"one": "again", "left": "first"}
    assert all(part["date"] and part["commit"] for part in parts.values())


def test_cells_are_found_by_pattern_and_a_kernel_of_ones_own_has_all_grounds(tmp_path: Path) -> None:
    assert {str(cell) for cell in chosen(["6.1/*/v2"], {}, "amd64")} == {"6.1/amd64/v2", "6.1/arm64/v2"}
    own = {"4.19": tmp_path}
    assert [str(cell) for cell in chosen([], own, "arm64")] == [f"4.19/arm64/{name}" for name in kernel_cells.GROUNDS]
    with pytest.raises(ValueError, match="write KERNEL/amd64"):
        kernel_cells.parse_cell("5.10/sparc/v1")


def test_kernel_as_a_program_runs_commands_and_is_no_cell_of_the_table() -> None:
    cell = kernel_cells.parse_cell("5.10/um/v2")
    assert cell.is_program and cell.processor == "amd64"
    assert cell not in kernel_cells.all_cells()
    with pytest.raises(LabError, match="no cell matches"):
        chosen([str(cell)], {}, "amd64")
    with pytest.raises(LabError, match="there is no kernel 4.4"):
        kernel_of(kernel_cells.parse_cell("4.4/um/v2"), {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run"], "--run takes a cell and a command"),
        (["--run", "6.12/amd64/v2"], "--run takes a cell and a command"),
        (["--parts", "truth,lft", "6.12/amd64/v2"], "there is no part lft; there are truth, "),
        (["--torch", "all"], "there is no part all; there are truth, "),
        (["--parts", ""], "nothing is to be tried"),
    ],
)
def test_what_there_is_not_is_said_before_a_machine_is_booted(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert words in capsys.readouterr().err


def test_options_may_stand_between_a_cell_and_its_command() -> None:
    options = parse(["--run", "5.10/amd64/v2", "--torch=", "--seconds", "1500", "uname -a"])
    assert (options.cells, options.torch, options.seconds) == (["5.10/amd64/v2", "uname -a"], (), 1500)


@pytest.mark.parametrize("there", [[], ["vmlinuz"], ["release"]])
def test_a_directory_that_is_no_kernel_is_refused_in_a_line(tmp_path: Path, there: list[str]) -> None:
    for name in there:
        (tmp_path / name).touch()
    with pytest.raises(LabError, match=f"in {tmp_path}; it needs vmlinuz, release"):
        own_kernel(tmp_path, "amd64")


@pytest.mark.parametrize("pair", ["3.9", "3.9:", ":2.1", "3.9:2", "3.12:2.1", "3.9:2.1:2.6", "--help"])
def test_no_pair_of_python_and_torch_that_cannot_be_gets_a_line_of_the_page(pair: str) -> None:
    before = VERSIONS.read_text()
    command = [str(CHECKOUT / "scripts/torches.sh"), pair]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"{pair} is no pair" in done.stderr, done
    assert VERSIONS.read_text() == before


def test_a_machine_is_asked_only_for_what_it_has() -> None:
    whole = Trial(torch=("one", "two"))
    plain = whole.of(kernel_cells.parse_cell("5.10/arm64/v1"))
    assert "socket" not in plain.parts and "net_cls" in plain.parts and list(plain.torch) == ["one"]
    assert "socket" in whole.of(kernel_cells.parse_cell("5.10/amd64/systemd-v1")).parts


@pytest.mark.parametrize(
    ("status", "outcomes", "words"),
    [
        (1, ["passed", "failed"], "1 passed, 1 failed, 0 skipped: test_1"),
        (1, ["passed", "error"], "1 passed, 1 failed"),
        (None, ["passed"], "and then 60 s were over"),
        (2, ["passed"], "pytest ended with status 2"),
    ],
)
def test_a_failure_a_timeout_and_an_early_end_of_the_tests_are_a_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None, outcomes: list[str], words: str
) -> None:
    monkeypatch.setattr("kernel_trial.OUT", tmp_path)
    (tmp_path / "pytest").write_text("its last words\n")
    with pytest.raises(No, match=re.escape(words)):
        judgement(_tally(tmp_path, outcomes), status, 60)


def test_passed_and_skipped_tests_are_a_yes_with_the_reasons(tmp_path: Path) -> None:
    assert judgement(_tally(tmp_path, ["passed", "skipped", "skipped"]), 0, 60) == (
        "1 passed, 0 failed, 2 skipped; skipped 2: no such map here"
    )


@pytest.mark.parametrize(
    ("seen", "errors"),
    [
        (Seen(9, 1, 0.1, False), "run a: every TCP port closed to all others by shield"),
        (Seen(9, 1, 0.1, True), "run a: scope ports: every other port"),
        (Seen(9, 1, 9.0, False), "run a: scope ports: every other port"),
        (Seen(0, 0, 0.0, False), "run a: every TCP port closed to all others by shield"),
        (Seen(9, 0, 0.0, False), "nothing of the kind"),
    ],
)
def test_what_a_stranger_gets_against_the_words_of_the_start_is_a_no(seen: Seen, errors: str) -> None:
    with pytest.raises(No):
        seen.require_kept(errors)


_START = "run a: every TCP port of this job closed to all others by shield"
_END = "run a: the shield holds no more: net_cls came into use; scope is ports now: each port is closed"


def test_shield_that_was_switched_off_is_a_yes_where_log_record_and_report_say_so(tmp_path: Path) -> None:
    says = what_became_of_the_shield(f"{_START}\n{_END}", ["net_cls came into use"], json.dumps([_START, _END]))
    assert "switched off" in says
    assert what_became_of_the_shield(_START, [], json.dumps([_START])) == "the shield held"
    _keep(tmp_path, kernel_cells.parse_cell("5.10/arm64/v1"), {"net_cls": {"ok": True, "says": f"{says}; 8 of 10"}})
    page = kernel_page.page(tmp_path)
    assert "yes, by the port chains [1]" in page and re.search(r"^1\. .*8520e224f547", page, re.MULTILINE)


@pytest.mark.parametrize(
    ("errors", "recorded", "report"),
    [
        (f"{_START}\n{_END}", [], _END),
        (f"{_START}\n{_END}", ["net_cls came into use"], _START),
        (_START, ["net_cls came into use"], _START),
        (_START, [], _END),
    ],
)
def test_end_of_a_shield_that_not_all_of_log_record_and_report_say_is_a_no(
    errors: str, recorded: list[str], report: str
) -> None:
    with pytest.raises(No):
        what_became_of_the_shield(errors, recorded, report)


def _tally(place: Path, outcomes: list[str]) -> Path:
    tally = place / "tally"
    lines = ({"test": f"test_{n}", "outcome": one, "why": "no such map here"} for n, one in enumerate(outcomes))
    tally.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return tally


def _keep(place: Path, cell: kernel_cells.Cell, parts: dict[str, dict[str, Any]]) -> None:
    keep(place, cell, {"release": "5.10.0-1", "machine": "x86_64", "parts": parts}, "0123abc")
