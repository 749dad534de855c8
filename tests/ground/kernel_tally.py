"""A plugin of pytest's: one JSON object a line for each test that ended, so that a run that is cut short is not lost.

KERNEL_TALLY=FILE pytest -p kernel_tally ...
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test at its call, or where it came to none; an error at its end counts as well."""
    if report.when != "call" and report.passed:
        return
    why = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        why = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        why = str(report.longrepr).strip().splitlines()[-1] if report.longrepr else ""
    outcome = "error" if report.failed and report.when != "call" else report.outcome
    line = {"test": report.nodeid, "outcome": outcome, "why": why[:300], "seconds": round(report.duration, 2)}
    with Path(os.environ["KERNEL_TALLY"]).open("a") as file:
        file.write(json.dumps(line) + "\n")
