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
