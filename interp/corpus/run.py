"""`interp.corpus.statistics`: run a model over a corpus, and read the statistics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp.corpus.checked import BLOCK, FileRecord
from interp.corpus.job import blocks_name, spec_of, stretches
from interp.corpus.moments import merge_tables
from interp.corpus.reading import describe_file
from interp.errors import InterpError
from interp.jobs.driver import Options, Outcome, drive
from interp.jobs.store import Store, differences, read_tables
from interp.model.session import in_session
from interp.prompts.special_tokens import BosPolicy
from interp.utils.arguments import is_whole
from interp.utils.damage import reading
from interp.utils.files import PICKLES
from interp.utils.progress import progress

BYTES_PER_PART = 2**19
MANY_BLOCKS = 1000  # half a GB, read in about a second
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class CorpusStatistics:
    """Statistics of every head over a corpus.

    ``outcome``: how the run ended. ``root``: its run directory. ``documents``, ``tokens``: how many were counted; of
    token ids, every 32,768 count as a document. ``left_out``: how many documents (or pieces of long ones, or windows of
    token ids) could not be read and are in no statistic. ``errors``: which, and why; at most the first 1,000.
    """

    table: pd.DataFrame = field(repr=False)
    documents: int
    tokens: int
    errors: list[str] = field(repr=False)
    root: Path
    outcome: Outcome | None = None
    left_out: int = 0

    def frame(self) -> pd.DataFrame:
        """Return one row per layer, head and statistic.

        Columns: count, mean, sample variance, min, max, quantiles.
        """
        return self.table.copy()

    @classmethod
    def read(cls, root: str | Path, outcome: Outcome | None = None) -> CorpusStatistics:
        """Merge the finished parts of a run, in order, in the memory of one part."""
        store = Store.open(root)
        if store.kind != "corpus":
            raise InterpError(f"{root} holds a {store.kind}, not statistics of a corpus")
        with reading(root):
            moments, errors = merge_tables(read_tables(store))
        parts = []
        for name, m in moments.items():
            layer, head = (axis.ravel() for axis in np.indices(m.count.shape))
            has_values = m.count.ravel() > 0
            columns: dict[str, Any] = {"layer": layer, "head": head, "statistic": name, "count": m.count.ravel()}
            columns["mean"] = np.where(has_values, m.mean.ravel(), np.nan)
            columns["variance"] = np.where(m.count > 1, m.m2 / np.maximum(m.count - 1, 1), np.nan).ravel()
            columns |= {
                "min": np.where(has_values, m.min.ravel(), np.nan),
                "max": np.where(has_values, m.max.ravel(), np.nan),
            }
            sketches = [s for row in m.sketch for s in row]
            for q in QUANTILES:
                columns[f"q{q * 100:02.0f}"] = [np.nan if s.is_empty() else s.get_quantile(q) for s in sketches]
            parts.append(pd.DataFrame(columns))
        counts = [store.about(p).get("counts", {}) for p in store.inventory().present]
        table = (
            pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"layer": [], "head": [], "statistic": []})
        )
        documents, tokens, left_out = (sum(c.get(k, 0) for c in counts) for k in ("documents", "tokens", "left_out"))
        return cls(table, documents, tokens, errors, Path(root), outcome, left_out)


@in_session
def statistics(
    model: Any,
    data: Sequence[str | Path] | str | Path,
    out: str | Path | None = None,
    *,
    context: int = 512,
    statistics: dict[str, Any] | None = None,
    bytes_per_part: int = BYTES_PER_PART,
    dtype: str | None = None,
    device: str | None = None,
    bos: BosPolicy | None = None,
    **options: Any,
) -> CorpusStatistics:
    """Stream files through a model, and collect attention statistics of every head.

        statistics = interp.corpus.statistics("smollm2", "corpus.txt", statistics={"entropy": True, "sink": 4})
        statistics.frame()      # one row per layer, head and statistic

    ``model``: a name or folder, as for `interp.load`, or a model object (in this process only). ``data``: text (one
    document per line), .jsonl (key "text") or .npy token ids, of any length. Documents are cut to windows of
    ``context`` tokens; the first position of each window is left out. ``statistics``: fields of `headstats.StatSpec`
    with one number per position. ``bos``: as for `interp.load`. ``options``: as for `interp.Sweep.run` (executor,
    workers, threads, shard).

    The run directory is ``out`` (default ``runs/stats-…``); the same call resumes it. Memory does not grow with the
    corpus. A document that cannot be read costs itself alone: it is in no statistic, and ``left_out`` and ``errors``
    count and name it. Every file is read once at the start, for its checksums, and what a part reads is compared with
    them: if a file is changed, truncated or replaced meanwhile, the remaining parts are left undone and
    ``outcome.code`` is 4. Raises InterpError for bad input, or a run directory of another call.
    """
    paths = [Path(p) for p in ([data] if isinstance(data, str | Path) else data)]
    if not paths:
        raise InterpError("there is no data: give at least one file")
    resolved = [p.resolve() for p in paths]
    if twice := next((p for i, p in enumerate(paths) if resolved[i] in resolved[:i]), None):
        raise InterpError(f"{twice} is given twice: its documents would be counted twice")
    if not is_whole(context, 2) or not is_whole(bytes_per_part, 1):
        raise InterpError(f"context must be at least 2 tokens and bytes_per_part 1, got {context} and {bytes_per_part}")
    spec_of(statistics)
    model_object = None if isinstance(model, str | Path) else model
    load = str(model) if model_object is None else model_object.name
    if model_object is None and load.lower().endswith(PICKLES):
        raise InterpError(f"{load}: pickled weights can run code when they are read, and are refused")
    load_options = {key: value for key, value in (("dtype", dtype), ("device", device)) if value}
    load_options |= {} if bos is None else {"bos": bos}
    records = _describe_files(paths, options.get("show", "auto") == "auto")
    document = {
        "name": f"stats-{Path(load).name}", "load": load, "options": load_options,
        "files": [r.entry for r in records], "context": context, "statistics": statistics,
        "bytes_per_part": bytes_per_part,
    }  # fmt: skip
    short = hashlib.blake2b(json.dumps(document, sort_keys=True).encode(), digest_size=4).hexdigest()
    root = Path(out) if out is not None else Path("runs") / f"{document['name']}-{short}"
    inputs = {blocks_name(r.entry["digest"]): r.blocks for r in records}
    store = Store.create(root, "corpus", document, len(stretches(document)), inputs, "")
    if store.kind != "corpus" or store.document != document:
        changed = "\n".join(differences(store.document, document))
        raise InterpError(f"{root} is another run. What differs:\n{changed}\nChoose another folder")
    models = {} if model_object is None else {"models": {"model": model_object}}
    outcome = drive(store, Options(**models, **options))
    result = CorpusStatistics.read(root, outcome)
    if outcome.code == 0 and not outcome.elsewhere and not result.tokens:
        raise InterpError(f"{', '.join(map(str, paths))}: no document of two tokens or more; there is nothing to count")
    return result


def _describe_files(paths: list[Path], show: bool) -> list[FileRecord]:
    """Read every file once, with a progress bar if that takes more than about a second."""
    n_blocks = sum(p.stat().st_size for p in paths if p.is_file()) // BLOCK
    with progress(
        "Reading every file once", n_blocks if n_blocks > MANY_BLOCKS else 0, None if show else False
    ) as step:
        return [describe_file(p, step) for p in paths]
