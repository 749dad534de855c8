"""What this host has not is a reason to skip, and in CI one to fail."""

from __future__ import annotations

import pytest
from lacking import Lacking, needed, skipped_where_lacking


def test_what_needs_a_program_that_is_not_there_is_skipped_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-program not found"), skipped_where_lacking():
        needed("no-such-program")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(Lacking, match="no-such-program not found"), skipped_where_lacking():
        needed("no-such-program")


def test_what_fails_for_another_reason_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(RuntimeError, match="a fault"), skipped_where_lacking():
        raise RuntimeError("a fault")
