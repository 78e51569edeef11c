"""Progress: shown when somebody looks, for every call that takes a moment, and moving while a batch runs."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest

import interp
from interp import circuits
from interp.doctor.families.text import tiny_hf
from interp.utils import progress as module
from interp.utils.progress import is_shown, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nothing_is_shown_when_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("patch z", 2, show=False) as advance:
        advance(2)
    with progress("patch z", 2) as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar_after_a_moment_even_if_it_has_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("patch z", 2):
        time.sleep(0.3)
    assert "patch z" in sys.stderr.getvalue() and "0/2" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(module, "PATIENCE", 10.0)
    with progress("patch z", 2) as advance:
        advance(2)
    assert sys.stderr.getvalue() == ""


def test_a_file_gets_a_line_without_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress("patch z", 2, show=True) as advance:
        time.sleep(0.2)
        advance(2)
    assert "patch z" in sys.stderr.getvalue() and "\x1b" not in sys.stderr.getvalue()


def test_only_the_outermost_call_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("outer", 2), progress("inner", 3, show=True) as advance:
        time.sleep(0.2)
        advance(1)
        assert is_shown()
    assert "outer" in sys.stderr.getvalue() and "inner" not in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("outer", 2, show=False), progress("inner", 3, show=True):
        time.sleep(0.1)
        assert not is_shown()
    assert sys.stderr.getvalue() == "" and not is_shown()


def test_shares_of_steps_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("thirds", 7) as advance:
        time.sleep(0.1)
        for _ in range(21):
            advance(1 / 3)
    assert "7/7" in sys.stderr.getvalue()


NOTEBOOK = """
import sys, time, warnings
sys.modules.setdefault("ipywidgets", None)  # as where it is not installed
import interp
from interp.utils import progress as module
module.PATIENCE = module.REDRAW = 0.0
known = interp.zoo.induction()
effects = interp.patch(known.model, known.pairs(8), known.model.sites("z"))
"""


@pytest.mark.slow
def test_a_notebook_gets_one_output_that_is_updated_and_no_escape_codes() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbclient.NotebookClient(notebook, timeout=120).execute()
    outputs = notebook.cells[0].outputs
    bars = [o for o in outputs if o.get("metadata") == module.NOTEBOOK_METADATA]
    titles = [o.data["text/plain"] for o in bars]
    assert len(titles) == 2 and titles[0].startswith("load "), outputs  # one for each long call, drawn again in place
    assert "patch z (denoise): 64 of 64" in titles[1], outputs
    assert "\x1b" not in str(outputs) and [o for o in outputs if o.get("name") == "stderr"] == []


@contextmanager
def counted(moves: list[float], monkeypatch: pytest.MonkeyPatch):
    """Collect what bars are moved by, in place of drawing them."""

    @contextmanager
    def bar(title: str, total: float):
        moves.append(-total)
        yield moves.append

    monkeypatch.setattr(module, "_is_interactive", lambda: True)
    monkeypatch.setattr(module, "_terminal_bar", bar)
    yield
    monkeypatch.undo()


KNOWN = interp.zoo.induction()
PAIRS = KNOWN.pairs(8)
Z = KNOWN.model.sites("z")
CALLS: dict[str, Callable[[], Any]] = {
    "load": lambda: interp.load(tiny_hf("llama"), tokenizer=KNOWN.model.tokenizer),
    "patch": lambda: interp.patch(KNOWN.model, PAIRS, Z),
    "ablate": lambda: interp.ablate(KNOWN.model, PAIRS, Z),
    "statistics": lambda: KNOWN.model.attention_stats(PAIRS),
    "patterns": lambda: KNOWN.model.attention_patterns(PAIRS),
    "behaviour": lambda: interp.tasks.check(KNOWN.model, PAIRS),
    "difference": lambda: interp.mean_difference(
        KNOWN.model, [p.clean for p in PAIRS] * 8, [p.corrupt for p in PAIRS] * 8, "resid_pre.L1"
    ),
    "edges": lambda: circuits.attribute_edges(KNOWN.model, PAIRS),
    "sites": lambda: circuits.attribute_sites(KNOWN.model, PAIRS, Z),
    "atp*": lambda: circuits.atp_star(KNOWN.model, PAIRS, Z),
    "flow": lambda: circuits.flow_scores(KNOWN.model, PAIRS),
    "acdc": lambda: circuits.acdc(KNOWN.model, PAIRS, 0.01),
    "roles": lambda: circuits.name_roles(KNOWN.model, PAIRS, KNOWN.circuit),
    "faithfulness": lambda: circuits.faithfulness(KNOWN.model, PAIRS, KNOWN.circuit, n_random=3),
    "minimality": lambda: circuits.minimality(KNOWN.model, PAIRS, KNOWN.circuit),
    "completeness": lambda: circuits.completeness(KNOWN.model, PAIRS, KNOWN.circuit),
    "screen": lambda: circuits.screen(KNOWN.model, PAIRS, Z, k=2),
    "gates": lambda: circuits.causal_head_gating(KNOWN.model, PAIRS, steps=2, n_seeds=1),
    "pruning": lambda: circuits.prune_edges(KNOWN.model, PAIRS, steps=2),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_long_call_moves_a_bar_more_than_once_and_to_its_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[float] = []
    with counted(moves, monkeypatch):
        CALLS[name]()
    assert moves and moves[0] < 0, "a bar is begun"
    while moves:  # one bar after another: its total, then what it is moved by
        total = -moves.pop(0)
        steps = [moves.pop(0) for _ in range(next((i for i, m in enumerate(moves) if m < 0), len(moves)))]
        assert len([s for s in steps if s > 0]) > 1, f"{name}: one move of {total}"
        assert sum(steps) == pytest.approx(total), name
