"""Verdicts on families, and their table.

`interp doctor --architectures` prints it, and docs/models.md shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape

import pandas as pd

from interp.doctor.families.text import FAMILIES
from interp.doctor.matrix import attention, heads, outputs
from interp.doctor.matrix.case import ALLOWED, DoesNotApply, FamilyCase
from interp.errors import InterpError

CHECKS: dict[str, Callable[[FamilyCase], float]] = {
    "logits": outputs.logits,
    "left padding": outputs.left_padding,
    "right padding": outputs.right_padding,
    "packed": outputs.packed,
    "cache": outputs.cached,
    "generate": outputs.generation,
    "hooks": attention.hooks,
    "edits": attention.edits,
    "heads": heads.heads,
    "gradients": attention.gradients,
    "statistics": attention.statistics,
    "calls": attention.calls,
}


@dataclass(frozen=True)
class Verdict:
    """Result of one check.

    ``gap``: largest relative difference; ``note``: why it failed or does not apply.
    """

    check: str
    gap: float = 0.0
    note: str = ""
    applies: bool = True

    @property
    def passed(self) -> bool:
        """Whether the check succeeded or does not apply."""
        return not self.applies or self.gap <= ALLOWED

    def __str__(self) -> str:
        return ("✓" if self.passed else "✗") if self.applies else "–"


def run_check(case: FamilyCase, name: str) -> Verdict:
    """Run one check of one family.

    Any exception in it becomes a failed verdict with its message.
    """
    try:
        return Verdict(name, CHECKS[name](case))
    except DoesNotApply as reason:
        return Verdict(name, note=str(reason), applies=False)
    except Exception as error:
        return Verdict(name, float("inf"), f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class FamilyRow:
    """All verdicts on one family."""

    family: str
    model: str
    features: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(v.passed for v in self.verdicts)

    def markdown(self) -> str:
        """One line of the table in docs/models.md."""
        cells = (self.family, self.model, ", ".join(self.features) or "plain", *map(str, self.verdicts))
        return f"| {' | '.join(cells)} |"


def examine_family(family: str, case: FamilyCase | None = None) -> FamilyRow:
    """Run every check of a family, on ``case`` if its models are built already."""
    case = case or FamilyCase(family)
    verdicts = tuple(run_check(case, name) for name in CHECKS)
    return FamilyRow(family, type(case.eager).__name__, tuple(case.features()), verdicts)


@dataclass(frozen=True)
class Matrix:
    """Verdicts on many families; prints itself as a table."""

    rows: tuple[FamilyRow, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(row.passed for row in self.rows)

    def frame(self) -> pd.DataFrame:
        """One row per family and check: passed, applies, gap and note.

        ``gap`` is the largest relative difference.
        """
        return pd.DataFrame(
            {"family": r.family, "model": r.model, "check": v.check, "passed": v.passed, "applies": v.applies,
             "gap": v.gap, "note": v.note}
            for r in self.rows
            for v in r.verdicts
        )  # fmt: skip

    def markdown(self) -> str:
        """The table that docs/models.md shows."""
        return "\n".join([*header(), *(row.markdown() for row in self.rows)])

    def __repr__(self) -> str:
        return f"Matrix({len(self.rows)} families, {sum(not r.passed for r in self.rows)} failed; print it to read it)"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        width = max([len("family"), *(len(r.family) for r in self.rows)])
        lines = [f"{'family':<{width}}  {'  '.join(CHECKS)}  largest difference"]
        for row in self.rows:
            cells = "  ".join(f"{v!s:^{len(v.check)}}" for v in row.verdicts)
            lines.append(f"{row.family:<{width}}  {cells}  {max(v.gap for v in row.verdicts):.0e}")
        families: dict[tuple[str, str, str], list[str]] = {}  # by check, mark and note
        for row in self.rows:
            for v in row.verdicts:
                if v.note:
                    families.setdefault((v.check, str(v), v.note), []).append(row.family)
        notes = [f"{check} {mark}  {note}: {', '.join(names)}" for (check, mark, note), names in families.items()]
        return "\n".join([*lines, *notes])


def header() -> list[str]:
    """The two header lines of the table in Markdown."""
    names = ("family", "model", "attention", *CHECKS)
    return [f"| {' | '.join(names)} |", f"|---|---|---|{':-:|' * len(CHECKS)}"]


def architectures(families: Iterable[str] | None = None, say: Callable[[str], object] | None = None) -> Matrix:
    """Examine the named families (default: all).

    ``say`` is called after each.
    """
    rows = []
    for family in FAMILIES if families is None else families:
        if family not in FAMILIES:
            raise InterpError(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")
        rows.append(examine_family(family))
        if say is not None:
            say(f"{family}: {'ok' if rows[-1].passed else 'FAILED'}")
    return Matrix(tuple(rows))
