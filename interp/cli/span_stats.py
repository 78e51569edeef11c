"""`interp stats --by span`: attention statistics of prompts in a file, from span to span."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from interp.cli.options import bos_policy, check_choice
from interp.errors import InterpError

BY = ("token", "span", "sentence")
SUFFIXES = (".parquet", ".csv")


def write_by_span(
    model: str, data: list[Path], out: Path | None, by: Any, spans: str | None, statistics: dict[str, Any] | None, *,
    dtype: str | None, device: str | None, bos: str | None, of_corpora: dict[str, bool],
) -> None:  # fmt: skip
    """Measure the prompts of some files, and write the table of their spans into one file.

    ``of_corpora``: options that runs over a corpus alone have, and whether they are given. Raises InterpError for bad
    input, before the model is loaded.
    """
    check_choice("--by", by, BY)
    if unread := [name for name, is_given in of_corpora.items() if is_given]:
        raise InterpError(f"--by {by}: {unread[0]} is of runs over a corpus, without --by")
    target = out or Path(f"{by}s.parquet")
    if target.suffix not in SUFFIXES or target.is_dir():
        raise InterpError(f"--out {target}: the name of a .parquet or .csv file expected")
    from interp.corpus.job import requested_spec
    from interp.model.load_model import load
    from interp.prompts.files import read_prompts, read_texts
    from interp.utils.files import result_file

    spec = requested_spec(statistics)
    policy = bos_policy(bos)
    prompts: list[Any] = []
    for file in data:
        prompts += read_prompts(file) if file.suffix.lower() in (".csv", ".jsonl", ".json") else read_texts(file)
    names = None if spans is None else [name.strip() for name in spans.split(",") if name.strip()]
    stats = load(model, dtype=dtype, device=device, bos=policy).attention_stats(prompts, spec, by=by, spans=names)
    if target.suffix == ".parquet":
        stats.write(target)
    else:
        with result_file(target) as file:
            file.write(stats.frame().to_csv(index=False).encode())
    typer.echo(f"{len(stats)} prompt(s), spans {', '.join(stats.spans)}; wrote {target}")
