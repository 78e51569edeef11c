"""`interp.Sweep`: the same from Python as `interp sweep` from the shell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from interp.errors import InterpError
from interp.jobs.driver import Options, Outcome, drive
from interp.jobs.store import Inventory, Store, differences
from interp.results.effects import Effects
from interp.sweep.config import Config, config_text, parse, parse_toml
from interp.utils.files import inside

RUNS = Path("runs")


class Sweep:
    """A sweep and its run directory.

        sweep = interp.Sweep("sweep.toml")      # or a dict of the same shape, or TOML text with line breaks
        print(sweep.plan())
        outcome = sweep.run(executor="local", workers=2)
        sweep.table(by=["recipe", "layer", "head"])

    ``out``: the run directory, default ``runs/NAME`` beside the config. Nothing is written before `run`. A run
    directory of another config is refused, with the difference. ``models``: model objects to use in place of loading,
    by name; such a sweep runs in this process.
    """

    def __init__(
        self,
        config: str | Path | dict[str, Any] | Config,
        out: str | Path | None = None,
        *,
        models: dict[str, Any] | None = None,
    ):
        self.text, folder = "", Path()
        if isinstance(config, Config):
            self.config = config
        elif isinstance(config, dict):
            self.config = parse(config, folder=folder)
        elif isinstance(config, str) and "\n" in config:
            self.text, self.config = config, parse_toml(config)
        else:
            self.text, folder = config_text(config), Path(config).parent
            self.config = parse_toml(self.text, str(config), folder)
        self.root = Path(out) if out is not None else folder / RUNS / self.config.name
        self.models = models
        if (self.root / "run.json").exists():
            self._same(Store.open(self.root))

    @classmethod
    def open(cls, root: str | Path, *, models: dict[str, Any] | None = None) -> Sweep:
        """The sweep of a run directory. InterpError if it is none, or made by a newer interp."""
        store = Store.open(root)
        if store.kind != "sweep":
            raise InterpError(
                f"{root} holds no sweep but statistics of a {store.kind}: statistics.csv is their table, and the "
                "`interp stats` command that began them goes on with them"
            )
        return cls(parse(store.document), store.root, models=models)

    @property
    def store(self) -> Store:
        """The run directory. InterpError before the first `run`."""
        return Store.open(self.root)

    def _same(self, store: Store) -> Store:
        if store.kind != "sweep" or store.header["digest"] != self.config.digest:
            changed = "\n".join(differences(store.document, self.config.document))
            raise InterpError(
                f"{self.root} is a run of another config. What changed since:\n{changed}\nRun it under another name or "
                "--out, or take the change back"
            )
        if store.n_parts != len(self.config.parts):
            raise InterpError(
                f"{self.root} has {store.n_parts} parts and its config {len(self.config.parts)}: it was edited"
            )
        return store

    def create(self) -> Store:
        """The run directory, made if it is not there."""
        from interp.sweep.effects_job import input_name

        if (self.root / "run.json").exists():
            return self._same(Store.open(self.root))
        inputs = {}
        for task in self.config.tasks:
            if task.pairs is not None:
                name = input_name(task)
                inside(self.root, f"inputs/{name}")
                inputs[name] = self.config.file_of(task).read_bytes()
        return self._same(
            Store.create(self.root, "sweep", self.config.document, len(self.config.parts), inputs, self.text)
        )

    def plan(self, workers: int = 1) -> Any:
        """What it will cost (`interp.sweep.plan.SweepPlan`); loads the models, and runs no cell."""
        from interp.sweep.plan import plan

        return plan(self.config, workers, self.models)

    def run(self, **options: Any) -> Outcome:
        """Run, or go on with, the sweep; see `interp.jobs.driver.Options`. The outcome's ``code`` is the exit code."""
        return drive(self.create(), Options(models=self.models, **options))

    def status(self) -> Inventory:
        """Which parts are there, and which are damaged, by a look at names and sizes."""
        return self.store.inventory()

    def dataset(self) -> Any:
        """The finished parts as a pyarrow dataset: read lazily, page checksums verified."""
        import pyarrow.dataset as ds

        scan = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        files = [str(self.store.path(p)) for p in sorted(self.status().present)]
        if not files:
            raise InterpError(f"{self.root} has no finished part yet")
        return ds.dataset(files, format=ds.ParquetFileFormat(default_fragment_scan_options=scan))

    def table(self, by: Sequence[str] = ("model", "task", "recipe", "sites", "layer", "head")) -> pd.DataFrame:
        """Mean ``effect`` and ``raw`` of the finished cells by some columns, and how many cells went in: ``n``.

        Read lazily. Cells that failed, or whose effect is NaN (clean and corrupt score the same), do not count. For
        intervals over examples take `effects`.
        """
        from pyarrow.dataset import field

        data = self.dataset()
        if unknown := [c for c in by if c not in data.schema.names]:
            raise InterpError(f"no column {unknown[0]!r}; columns: {', '.join(data.schema.names)}")
        kept = field("effect").is_valid() & ~field("effect").is_nan()
        table = data.to_table(columns=[*by, "effect", "raw"], filter=kept)
        grouped = table.group_by(list(by)).aggregate([("effect", "mean"), ("raw", "mean"), ("effect", "count")])
        names = {"effect_mean": "effect", "raw_mean": "raw", "effect_count": "n"}
        return grouped.to_pandas().rename(columns=names).sort_values(list(by)).reset_index(drop=True)

    def effects(self) -> dict[str, Effects]:
        """The finished cells as `Effects`, one for each model × task × recipe × sites; checksums verified."""
        from interp.sweep.export import effects_by_combination

        return effects_by_combination(self.store)

    def failures(self) -> pd.DataFrame:
        """The cells without a number, with their reason."""
        from pyarrow.dataset import field

        columns = [
            "model",
            "task",
            "recipe",
            "sites",
            "seed",
            "part",
            "example",
            "component",
            "layer",
            "head",
            "position",
            "error",
        ]
        return self.dataset().to_table(columns=columns, filter=field("error").is_valid()).to_pandas()

    def export(self, target: str | Path, format: str | None = None) -> Path:
        """The whole table as one .parquet, .csv or .html file."""
        from interp.sweep.export import export

        return export(self.store, Path(target), format)

    def merge(self, *others: str | Path) -> dict[str, int]:
        """Take over parts of other run directories of the same config; returns how many."""
        from interp.jobs.merge import merge

        return merge(self.store, [Store.open(o) for o in others])
