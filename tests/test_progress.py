"""Progress bars: shown when somebody looks, and no more than a line where they cannot move."""

from __future__ import annotations

import warnings

import pytest

from interp.utils.progress import progress


def test_jupyter_without_widgets_gets_a_line_and_no_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("interp.utils.progress.find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with progress("patch z", 2, show=True) as advance:
            advance(2)
    assert "patch z" in capsys.readouterr().err


def test_nothing_is_shown_when_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("patch z", 2, show=False) as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")
