"""Where the live view draws over its own lines: in terminals alone, whatever colours are asked for."""

from __future__ import annotations

import io
import os
import pty

import pytest
from rich.console import Console

from pipeline.monitor.live_view import View


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_log_gets_plain_lines_though_colours_are_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    console = Console(file=io.StringIO(), highlight=False)
    assert console.is_terminal
    with View(console) as view:
        view.update({1: {"stage": "train"}})
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert "seed 1: train" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_is_drawn_over_with_and_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    ours, theirs = pty.openpty()
    with open(theirs, "w", encoding="utf-8") as terminal:
        view = View(Console(file=terminal, highlight=False))
        assert view.live is not None
    os.close(ours)
