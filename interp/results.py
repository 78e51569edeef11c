"""Read back whatever a run left in a folder."""

from __future__ import annotations

from pathlib import Path

from interp.attention import AttentionStats
from interp.effects import Effects
from interp.errors import InterpError


def read_results(path: Path) -> dict[str, Effects | AttentionStats]:
    """Every results file of a folder (or one file) by its name: effects in the order made, then statistics.

    Raises InterpError if there is none.
    """
    if not path.exists():
        raise InterpError(f"{path} does not exist: give the folder that a run wrote to")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    found: dict[str, Effects | AttentionStats] = {}
    for file in files:
        try:
            found[file.stem] = Effects.read(file)
        except InterpError:
            found[file.stem] = AttentionStats.read(file)
    if not found:
        raise InterpError(f"{path} holds no .parquet results")
    made = {name: str(result.provenance.get("created", "")) for name, result in found.items()}
    return dict(sorted(found.items(), key=lambda item: (isinstance(item[1], AttentionStats), made[item[0]])))
