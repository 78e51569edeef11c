"""Read all results that a run wrote into a folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from interp.errors import InterpError
from interp.results.attention_patterns import AttentionPatterns
from interp.results.attention_stats import AttentionStats
from interp.results.effects import Effects
from interp.results.parquet import kind_of_parquet

log = logging.getLogger("interp")

Result = Any  # Effects, AttentionStats, AttentionPatterns or Circuit


def read_results(path: Path) -> dict[str, Result]:
    """Read every results file of a folder, or one file, by its name.

    Effects come first, then attention and circuits.

    Within each group the order is that of creation. Raises InterpError if there are no results.
    """
    if not path.exists():
        raise InterpError(f"{path} does not exist: pass the folder that a run wrote to")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix != ".json" else []
    circuits = [p for p in (sorted(path.glob("*.json")) if path.is_dir() else [path]) if _is_circuit(p)]
    results: dict[str, Result] = {file.stem: _read(file) for file in _shown(files, path.is_dir())}
    if circuits:
        from interp.circuits import Circuit

        results |= {file.stem: Circuit.read(file) for file in circuits}
    if not results:
        raise InterpError(f"{path} holds no .parquet results and no circuits")
    created = {name: str(result.provenance.get("created", "")) for name, result in results.items()}
    return dict(sorted(results.items(), key=lambda item: (not isinstance(item[1], Effects), created[item[0]])))


def _shown(files: list[Path], is_folder: bool) -> list[Path]:
    """Return the files that a page can show. Raises InterpError if the only one that was named is not among them."""
    shown = []
    for file in files:
        if kind_of_parquet(file) != "span_stats":
            shown.append(file)
            continue
        why = f"{file} holds statistics by span, which the page does not show: interp.plots.span_map draws them"
        if not is_folder:
            raise InterpError(why)
        log.warning("%s", why)
    return shown


def _is_circuit(file: Path) -> bool:
    """Return whether a file begins as `Circuit.write` begins it. Other JSON files are not read."""
    if file.suffix != ".json":
        return False
    try:
        with open(file, "rb") as opened:
            return b'"interp.Circuit"' in opened.read(256)
    except OSError:
        return False


def _read(file: Path) -> Result:
    """Read one file by the kind that its header names."""
    kinds = {"effects": Effects, "attention_patterns": AttentionPatterns}
    return kinds.get(kind_of_parquet(file), AttentionStats).read(file)
