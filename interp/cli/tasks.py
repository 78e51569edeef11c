"""`interp tasks`: list tasks, and check which of them a model does.

Heavy modules are imported with the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.errors import InterpError, TaskError


def tasks(
    names: Annotated[
        list[str] | None, typer.Argument(help="Tasks, with options: needle:tokens=2048. Default: all.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Check what this model does: smollm2, a hub id, a local folder or a .gguf file.")
    ] = None,
    n: Annotated[int, typer.Option(help="Prompts of each task.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    split: Annotated[str | None, typer.Option(help="train or test. Default: everything.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Also write the table to this .csv file.")] = None,
) -> None:
    """List the tasks; with --model, check which of them the model does.

    The check reports accuracy and logit difference on clean prompts.

    Accuracy is the share of prompts whose answer is preferred to the foil: chance is 50%. Also printed: how many words
    the tokenizer lacks, and how many pairs did not align. If a task cannot be made, the reason is printed.
    """
    from interp.tasks import TASKS, task

    selected = {name: task(name) for name in names or TASKS}
    if out is not None and (out.suffix != ".csv" or not out.parent.is_dir()):
        raise InterpError(f"--out {out}: a .csv file in a folder that exists expected")
    if out is not None and model is None:
        raise InterpError("--out writes the table of what a model does: give --model too")
    if model is None:
        for name, one in selected.items():
            typer.echo(f"{name:16} {one.about} [{', '.join(one.names)}]")
        return
    if n < 1 or split not in (None, "train", "test"):
        raise InterpError(f"--n {n} --split {split}: n of at least 1, and train or test expected")
    from interp.model.load_model import load

    loaded, rows = load(model), []
    typer.echo(
        f"{'task':16} {'n':>4} {'accuracy':>9} {'logit diff':>11} {'95% interval':>16} {'lacking':>8} {'refused':>8}"
    )
    for name, one in selected.items():
        row = {"task": name, **_row(loaded, one, n, seed, split)}
        rows.append(row)
        typer.echo(_line(row))
    if out is not None:
        import pandas as pd

        from interp.utils.files import result_file

        with result_file(out) as file:
            file.write(pd.DataFrame(rows).to_csv(index=False).encode())
        typer.echo(f"wrote {out}")


def _row(model: Any, task: Any, n: int, seed: int, split: str | None) -> dict[str, Any]:
    """Return a task's row of the table."""
    from interp.tasks import check

    try:
        pairs = task(model, n, seed, **({} if split is None else {"split": split}))
    except TaskError as error:
        return {"refusal": str(error)}
    behaviour = check(model, pairs)
    low, high = behaviour.interval
    return {
        "n": behaviour.n, "accuracy": behaviour.accuracy, "logit_diff": behaviour.mean_logit_diff, "low": low,
        "high": high, "lacking": len(pairs.dropped), "refused": sum(pairs.refused.values()), "refusal": "",
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    """Format a row of the table."""
    if row["refusal"]:
        return f"{row['task']:16} {row['refusal']}"
    interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
    return (
        f"{row['task']:16} {row['n']:>4} {row['accuracy']:>9.1%} {row['logit_diff']:>11.2f} {interval:>16} "
        f"{row['lacking']:>8} {row['refused']:>8}"
    )
