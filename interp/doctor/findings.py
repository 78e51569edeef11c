"""What an examination of a model found, as a report."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import pandas as pd


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``passed`` is None for information that cannot fail."""

    section: str
    item: str
    passed: bool | None
    value: str


@dataclass(frozen=True)
class Examination:
    """The findings on one model; prints itself as a report."""

    title: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(f.passed is not False for f in self.findings)

    def frame(self) -> pd.DataFrame:
        """One row per finding: section, item, passed (empty for information), value."""
        return pd.DataFrame(
            [(f.section, f.item, f.passed, f.value) for f in self.findings],
            columns=["section", "item", "passed", "value"],
        )

    def __repr__(self) -> str:
        failed = sum(f.passed is False for f in self.findings)
        return f"Examination({self.title}: {len(self.findings)} findings, {failed} failed; print it to read them)"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        lines, width = [self.title], max(len(f.item) for f in self.findings)
        for section in dict.fromkeys(f.section for f in self.findings):
            lines += ["", section]
            for f in self.findings:
                if f.section == section:
                    mark = {True: "✓", False: "✗", None: " "}[f.passed]
                    lines.append(f"  {mark} {f.item:<{width}}  {f.value}")
        return "\n".join([*lines, "", "all checks passed" if self.passed else "SOME CHECKS FAILED"])
