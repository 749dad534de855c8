"""What is skipped where torch is not installed: what says so, and nothing else; and nothing where it is."""

from __future__ import annotations

import sys

import pytest
import torchless

_MISSING = f"securerun: {sys.executable} has no module torch.distributed; install torch there: pip install torch"


@pytest.mark.parametrize("said", [_MISSING, "ModuleNotFoundError: No module named 'torch'"])
def test_what_misses_torch_is_skipped_where_there_is_none(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchless.skip_if_missed(said)
    monkeypatch.setattr(torchless, "IS_WITHOUT_TORCH", True)
    with pytest.raises(pytest.skip.Exception):
        torchless.skip_if_missed(said)


@pytest.mark.parametrize("said", ["", "No module named 'torchless'", "securerun: torch cannot be imported"])
def test_what_fails_for_another_reason_is_not_skipped(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchless, "IS_WITHOUT_TORCH", True)
    torchless.skip_if_missed(said)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [("E   ModuleNotFoundError: No module named 'torch'", "skipped"), ("E   SyntaxError: invalid syntax", "failed")],
)
def test_module_that_imports_torch_is_skipped_with_its_reason(
    said: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else pytest runs none of the other modules either."""
    monkeypatch.setattr(torchless, "IS_WITHOUT_TORCH", True)
    report = pytest.CollectReport("tests/test_options.py", "failed", said, None)
    torchless.skip_modules_that_import_it(report)
    assert report.outcome == outcome
    assert ("needs torch" in str(report.longrepr)) == (outcome == "skipped")
