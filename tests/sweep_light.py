"""A run whose parts take milliseconds, to be killed in: its own worker, and its own driver.

python tests/sweep_light.py drive RUN '{"workers": 2}'     a driver (exit code as of `interp sweep run`)
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from interp.jobs import kinds
from interp.jobs.store import Store

kinds.JOBS["light"] = "sweep_light:LightJob"
sys.path.insert(0, str(Path(__file__).parent))
COMMAND = (sys.executable, __file__)


class LightJob:
    """Numbers that follow from the part's number."""

    def __init__(self, document: dict[str, Any], shelf: Any):
        self.document = document
        self.seconds = float(shelf.get("inputs/seconds") or 0.01)  # not in the config: it decides no number

    def compute(self, part: int) -> Any:
        time.sleep(self.seconds)
        rng = np.random.default_rng(part)
        rows = self.document["rows"]
        table = pa.table({"part": np.full(rows, part), "x": rng.normal(size=rows)})
        return SimpleNamespace(table=table, failed=0, about={}, note={})


def make(root: Path, parts: int = 40, rows: int = 50, seconds: float = 0.01) -> Store:
    inputs = {} if seconds == 0.01 else {"seconds": str(seconds).encode()}
    return Store.create(root, "light", {"name": "light", "rows": rows, "parts": parts}, parts, inputs, "")


def contents(store: Store) -> dict[str, bytes]:
    """What decides: every part's bytes."""
    return {p.name: p.read_bytes() for p in sorted((store.root / "parts").iterdir())}


def main() -> int:
    if sys.argv[1] == "drive":
        from interp.errors import InterpError
        from interp.jobs.driver import Options, drive

        options = json.loads(sys.argv[3])
        limit = options.pop("largest_file", None)
        if limit is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            chosen = {"show": "json", "executor": "local", "extra": {"command": COMMAND}, **options}
            return drive(Store.open(sys.argv[2]), Options(**chosen)).code
        except InterpError as error:
            print(error, file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    from interp.jobs.worker import main as worker

    return worker(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
