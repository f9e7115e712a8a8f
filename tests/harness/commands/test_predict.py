"""What `ssodbench predict` says while it works."""

from __future__ import annotations

import pytest

from harness.commands import predict


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """100 of 400 pictures in the first 10 s: three times as long for the rest; nothing at the end, nor in between."""
    seconds = iter((0.0, 4.0, 10.0, 19.0, 40.0))
    monkeypatch.setattr(predict.time, "monotonic", lambda: next(seconds))
    lines = predict._Lines(400)
    for done in (50, 50, 100, 200):
        lines(done)
    assert capsys.readouterr().err.splitlines() == ["100 of 400 pictures, ETA 0:00:30"]
