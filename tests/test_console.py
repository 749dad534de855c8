"""What securerun says on a standard error that is the caller's own, and may be anything."""

from __future__ import annotations

import io
import sys

import pytest

from securerun.console import say


def test_standard_error_that_the_caller_has_closed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    file.close()
    monkeypatch.setattr(sys, "stderr", file)
    say("the guard died; another has taken over")


def test_what_the_callers_encoding_cannot_hold_is_written_in_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="ascii"))
    say("process 7 of the job is in net_cls:/训练 now")
    assert written.getvalue() == b"securerun: process 7 of the job is in net_cls:/\\u8bad\\u7ec3 now\n"
