"""Read back whatever a run left in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from interp.errors import InterpError
from interp.results.attention_patterns import AttentionPatterns
from interp.results.attention_stats import AttentionStats
from interp.results.effects import Effects

Result = Any  # Effects, AttentionStats, AttentionPatterns or Circuit


def read_results(path: Path) -> dict[str, Result]:
    """Every results file of a folder (or one file) by its name: effects in the order made, then attention, circuits.

    Raises InterpError if there is none.
    """
    if not path.exists():
        raise InterpError(f"{path} does not exist: give the folder that a run wrote to")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix != ".json" else []
    circuits = [p for p in (sorted(path.glob("*.json")) if path.is_dir() else [path]) if _is_circuit(p)]
    found: dict[str, Result] = {file.stem: _read(file) for file in files}
    if circuits:
        from interp.circuits import Circuit

        found |= {file.stem: Circuit.read(file) for file in circuits}
    if not found:
        raise InterpError(f"{path} holds no .parquet results and no circuits")
    made = {name: str(result.provenance.get("created", "")) for name, result in found.items()}
    return dict(sorted(found.items(), key=lambda item: (not isinstance(item[1], Effects), made[item[0]])))


def _is_circuit(file: Path) -> bool:
    if file.suffix != ".json":
        return False
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("format") == "interp.Circuit"


def _read(file: Path) -> Result:
    """One file by the kind that its header names. InterpError, about statistics, for anything else."""
    for kind in (Effects, AttentionPatterns):
        try:
            return kind.read(file)
        except InterpError:
            continue
    return AttentionStats.read(file)
