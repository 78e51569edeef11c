"""`interp circuit`: find, prune, test, name and write a circuit.

Heavy modules are imported with the model.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from interp.circuits.choices import EdgeMethod, Selection
from interp.cli.options import RunOptions
from interp.errors import InterpError
from interp.metrics import METRICS as ALL_METRICS

if TYPE_CHECKING:
    from interp.circuits.circuit import Circuit
    from interp.model.model import Model

METRICS = tuple(name for name, metric in ALL_METRICS.items() if metric.differentiable)
METHODS = (*get_args(EdgeMethod), "flow", "acdc")


def circuit(
    model: Annotated[str, typer.Option(help="smollm2 (embedded), a hub id, a local model folder or a .gguf file.")] = (
        "smollm2"
    ),
    task: Annotated[str | None, typer.Option(help="Prompts of a task: ioi, induction, …  Default: ioi.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Custom pairs instead of a task: a .csv or .jsonl file.")] = None,
    n: Annotated[int, typer.Option(help="Prompts of the task.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "eap-ig-inputs",
    edges: Annotated[int, typer.Option(help="Edges before pruning; for acdc: at the start.")] = 200,
    selection: Annotated[str, typer.Option(help="top; greedy: backwards from the logits, always connected.")] = "top",
    threshold: Annotated[float, typer.Option(help="acdc: an edge stays if the metric (KL) gets worse by this.")] = 0.01,
    steps: Annotated[int, typer.Option(help="Steps of integrated gradients.")] = 5,
    metric: Annotated[str, typer.Option(help=f"{', '.join(METRICS)}: what is attributed and measured.")] = (
        "logit_diff"
    ),
    roles: Annotated[bool, typer.Option("--roles", help="Name heads by evidence: some forwards per head.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 (the default), bfloat16, float16 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (the default), cuda, cuda:1, mps, …")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where to write the circuit: a .json file.")] = None,
) -> None:
    """Find a circuit, measure its faithfulness, and write it.

    Edges are scored, and the best on paths to the logits are kept.

    Prints the strongest edges, and the circuit's faithfulness (edges outside carry the corrupt prompt's activation)
    next to that of random circuits of its size, on the prompts on which the circuit was found.
    """
    if method not in METHODS or selection not in get_args(Selection):
        raise InterpError(f"--method {method} --selection {selection}: one of {', '.join(METHODS)}; top or greedy")
    if metric not in METRICS:
        raise InterpError(f"--metric {metric}: one of {', '.join(METRICS)}; attribution needs a gradient")
    if edges < 1 or steps < 1 or seed < 0 or not 0 < threshold < float("inf"):
        raise InterpError(
            f"--edges {edges} --steps {steps} --seed {seed} --threshold {threshold:g}: at least 1 edge and 1 step, a "
            "seed from 0 on, and a threshold above 0 expected"
        )
    _check_out(out)
    run = RunOptions(model=model, task=task, pairs=pairs, n=n, seed=seed, dtype=dtype, device=device)
    run.check()
    loaded = run.load_model()
    from interp.circuits.topology import architecture

    prompts = run.prompts(loaded)
    size = len(architecture(loaded))
    if edges > size:
        raise InterpError(f"--edges {edges}: {loaded.name} has {size}")
    result = _find_circuit(loaded, prompts, metric, method, edges, selection, threshold, steps)
    from interp import circuits

    if roles:
        result = circuits.name_roles(loaded, prompts, result, metric)
    faithful = circuits.faithfulness(loaded, prompts, result, metric, n_random=10, seed=seed)
    table: Any = result.frame()
    typer.echo(table.iloc[table["score"].abs().argsort()[::-1]].head(20).to_string(index=False))
    typer.echo(f"{result!r}")
    interval = f"[{faithful.lo:.3f}, {faithful.hi:.3f}]" if len(faithful.whole) > 1 else "(one pair: no interval)"
    typer.echo(
        f"faithfulness {faithful.value:.3f} {interval}; random circuits of its size: "
        f"{faithful.random.mean():z.3f}, at most {faithful.random.max():z.3f}"
    )
    if out is not None:
        typer.echo(f"wrote {result.write(out)}")


def _check_out(out: Path | None) -> None:
    """Raise InterpError, before anything is loaded, if the file cannot be written."""
    if out is None:
        return
    if out.suffix != ".json" or not out.absolute().parent.is_dir():
        raise InterpError(f"--out {out}: a .json file in a folder that exists expected")
    try:
        with TemporaryFile(dir=out.absolute().parent):
            pass
    except OSError as e:
        raise InterpError(f"--out {out}: no file can be written there ({e.strerror})") from None


def _find_circuit(
    model: Model, prompts: Any, metric: str, method: str, edges: int, selection: str, threshold: float, steps: int
) -> Circuit:
    """Score edges, and select a circuit."""
    from interp import circuits

    if method == "flow":
        scores = circuits.flow_scores(model, prompts)
    else:
        scoring: Any = "eap-ig-inputs" if method == "acdc" else method
        scores = circuits.attribute_edges(model, prompts, metric, scoring, steps=steps)
    select = scores.greedy if selection == "greedy" else scores.top
    if method == "acdc":
        return circuits.acdc(model, prompts, threshold, start=select(edges, prune=False))
    return select(edges, prune=True)
