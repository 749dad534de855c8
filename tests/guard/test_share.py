"""Who can ask for work without end gets a share of a processor."""

from __future__ import annotations

import pytest

from securerun.guard.share import Share


def test_share_is_some_seconds_at_once_and_then_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    share = Share(1.0, 0.2)
    assert share.pause_after(0.6) == 0 and share.pause_after(0.4) == 0
    assert share.pause_after(0.1) == pytest.approx(0.5)
    now[0] += 0.5
    assert share.pause_after(0.0) == 0
    assert share.pause_after(1.0) == pytest.approx(5.0)
    now[0] += 3600
    assert share.pause_after(1.0) == 0 and share.pause_after(0.2) == pytest.approx(1.0)
