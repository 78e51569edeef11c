"""`interp.Sweep`: sweeps from Python, as `interp sweep` runs them from the shell."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from interp.errors import InterpError
from interp.jobs.audit import Audit
from interp.jobs.driver import Options, Outcome, drive
from interp.jobs.frozen import FrozenFiles
from interp.jobs.receipts import Inventory
from interp.jobs.store import Store, differences, torn
from interp.results.effects import Effects
from interp.sweep.config import Config, config_text, parse, parse_toml
from interp.utils.files import digest_of, inside, write_file

RUNS = Path("runs")


class Sweep:
    """A sweep and its run directory.

        sweep = interp.Sweep("sweep.toml")      # or a dict of the same shape, or TOML text with line breaks
        print(sweep.plan())
        outcome = sweep.run(executor="local", workers=2)
        sweep.table(by=["recipe", "layer", "head"])

    ``out``: the run directory, default ``runs/NAME`` next to the config. Nothing is written before `run`. The run
    directory of another config is refused, with the difference. ``models``: model objects to use instead of loading
    models, by name; such a sweep runs in this process.
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
        if os.path.lexists(self.root / "run.json") and not torn(self.root):  # a torn one is replaced by the first run
            self._check_same(Store.open(self.root))

    @classmethod
    def open(cls, root: str | Path, *, models: dict[str, Any] | None = None) -> Sweep:
        """Open the sweep of a run directory.

        InterpError if it is none, or made by a newer interp.
        """
        store = Store.open(root)
        if store.kind != "sweep":
            raise InterpError(
                f"{root} holds statistics of a {store.kind}, not a sweep: statistics.csv is their table, and the "
                "`interp stats` command that started them resumes them"
            )
        return cls(parse(store.document), store.root, models=models)

    @property
    def store(self) -> Store:
        """The run directory. InterpError before the first `run`."""
        return Store.open(self.root)

    def _check_same(self, store: Store) -> Store:
        """Return the run directory. InterpError if it belongs to another config."""
        if store.kind != "sweep" or store.header["digest"] != self.config.digest:
            changed = "\n".join(differences(store.document, self.config.document))
            raise InterpError(
                f"{self.root} is a run of another config. What changed since:\n{changed}\nRun it under another name or "
                "--out, or undo the change"
            )
        if store.n_parts != len(self.config.parts):
            raise InterpError(
                f"{self.root} has {store.n_parts} parts and its config {len(self.config.parts)}: it was edited"
            )
        return store

    def create(self) -> Store:
        """Return the run directory; create it if it does not exist."""
        from interp.sweep.effects_job import input_name

        if os.path.lexists(self.root / "run.json") and not torn(self.root):
            return self._mend_inputs(self._check_same(Store.open(self.root)))
        inputs = {}
        for task in self.config.tasks:
            if task.pairs is not None:
                name = input_name(task)
                inside(self.root, f"inputs/{name}")
                inputs[name] = self.config.file_of(task).read_bytes()
        return self._check_same(
            Store.create(self.root, "sweep", self.config.document, len(self.config.parts), inputs, self.text)
        )

    def _mend_inputs(self, store: Store) -> Store:
        """Replace copies of prompt files that are missing or damaged, where the file itself is still the same."""
        from interp.sweep.effects_job import input_name

        files = FrozenFiles(self.root)
        for task in self.config.tasks:
            if task.pairs is None or self.config.folder is None:  # opened from the run directory alone
                continue
            name = f"inputs/{input_name(task)}"
            copy, source = files.get(name), self.config.file_of(task)
            if copy is not None and digest_of(copy) == task.pairs_digest:
                continue
            with contextlib.suppress(OSError):
                content = source.read_bytes()
                if digest_of(content) == task.pairs_digest:
                    if copy is not None:
                        files.put_aside(name, f"it is not the copy of {source} that the run began with")
                    write_file(self.root / name, content)
        return store

    def plan(self, workers: int = 1) -> Any:
        """Estimate the cost (`interp.sweep.plan.SweepPlan`).

        Loads the models, and runs no cell.
        """
        from interp.sweep.plan import plan

        return plan(self.config, workers, self.models)

    def run(self, **options: Any) -> Outcome:
        """Run or resume the sweep.

        Returns its outcome, whose ``code`` is the exit code of the command.

        ``options``: those of `interp.jobs.driver.Options` (executor, workers, threads, shard, …).
        """
        return drive(self.create(), Options(models=self.models, **options))

    def status(self) -> Inventory:
        """Return which parts exist and which are damaged, by their names and sizes."""
        return self.store.inventory()

    def dataset(self) -> Any:
        """Return the finished parts as a pyarrow dataset, to be read lazily.

        Every part is compared with its checksum, its number and the run's config, weights and prompts before; its
        pages once more when they are read. InterpError for a part that does not belong to the run.
        """
        import pyarrow.dataset as ds

        store = self.store
        audit = Audit(store)
        files = [str(part.path) for _, part in audit.all()]
        if not files:
            raise InterpError(f"{self.root} has no finished part yet")
        for line in audit.notes():
            store.report(line)
        scan = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        return ds.dataset(files, format=ds.ParquetFileFormat(default_fragment_scan_options=scan))

    def table(self, by: Sequence[str] = ("model", "task", "recipe", "sites", "layer", "head")) -> pd.DataFrame:
        """Return means of ``effect`` and ``raw`` by some columns.

        ``n`` is the number of finished cells that a mean covers.

        Read lazily. Cells that failed, or whose effect is NaN (clean and corrupt score the same), do not count. For
        intervals over examples use `effects`.
        """
        from pyarrow.dataset import field

        data = self.dataset()
        if unknown := [c for c in by if c not in data.schema.names]:
            raise InterpError(f"no column {unknown[0]!r}; columns: {', '.join(data.schema.names)}")
        has_effect = field("effect").is_valid() & ~field("effect").is_nan()
        table = data.to_table(columns=[*by, "effect", "raw"], filter=has_effect)
        grouped = table.group_by(list(by)).aggregate([("effect", "mean"), ("raw", "mean"), ("effect", "count")])
        names = {"effect_mean": "effect", "raw_mean": "raw", "effect_count": "n"}
        return grouped.to_pandas().rename(columns=names).sort_values(list(by)).reset_index(drop=True)

    def effects(self) -> dict[str, Effects]:
        """Return the finished cells as `Effects`, checksums verified.

        There is one `Effects` for each model × task × recipe × sites.
        """
        from interp.sweep.export import effects_by_combination

        return effects_by_combination(self.store)

    def failures(self) -> pd.DataFrame:
        """Return the cells without a number, with the reason in the column ``error``."""
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
        """Write the whole table as one .parquet, .csv or .html file; return its path."""
        from interp.sweep.export import export

        return export(self.store, Path(target), format)

    def merge(self, *others: str | Path) -> dict[str, int]:
        """Copy parts from other run directories of the same config; return how many.

        Parts with other weights, another dtype or other prompts are refused, before anything is copied. The counts are
        ``taken`` (copied), ``there`` (existed already) and ``missing``.
        """
        from interp.jobs.merge import merge

        return merge(self.store, [Store.open(o) for o in others])
