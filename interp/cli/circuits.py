"""`interp circuit`: find, prune, test, name and write a circuit.

Heavy modules are imported with the model.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from interp.circuits.choices import EdgeMethod, Selection
from interp.cli.options import (
    BosOption,
    CountOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    PairsOption,
    RunOptions,
    SeedOption,
    TaskOption,
    check_choice,
    exits_when_interrupted,
    offer,
)
from interp.errors import InterpError
from interp.metrics import METRICS as ALL_METRICS

if TYPE_CHECKING:
    from interp.circuits.circuit import Circuit
    from interp.circuits.evaluation.faithfulness import Faithfulness
    from interp.model.model import Model

SELECTIONS = get_args(Selection)
METRICS = tuple(
    name for name, m in ALL_METRICS.items() if m.differentiable and m.over == "position" and not m.reads_run
)
DEFAULT_EDGES = 200
METHODS = (*get_args(EdgeMethod), "flow", "acdc")


def circuit(
    model: ModelOption = "smollm2",
    task: TaskOption = None,
    pairs: PairsOption = None,
    n: CountOption = None,
    split: Annotated[
        bool,
        typer.Option(
            "--split",
            help="Measure on other prompts than those on which the circuit is found: on the test split of the task, "
            "with as many prompts; with --pairs, on the second half of the file.",
        ),
    ] = False,
    seed: SeedOption = 0,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.", autocompletion=offer(*METHODS))] = (
        "eap-ig-inputs"
    ),
    edges: Annotated[
        int | None,
        typer.Option(
            help="Edges before pruning; for acdc: at the start. Default: 200, or half if there are fewer than 400."
        ),
    ] = None,
    selection: Annotated[
        str,
        typer.Option(
            help="top; greedy: backwards from the logits, always connected.", autocompletion=offer(*SELECTIONS)
        ),
    ] = "top",
    threshold: Annotated[float, typer.Option(help="acdc: an edge stays if the metric (KL) gets worse by this.")] = 0.01,
    steps: Annotated[int, typer.Option(help="Steps of integrated gradients.")] = 5,
    metric: Annotated[
        str,
        typer.Option(help=f"{', '.join(METRICS)}: what is attributed and measured.", autocompletion=offer(*METRICS)),
    ] = "logit_diff",
    roles: Annotated[bool, typer.Option("--roles", help="Name heads by evidence: some forwards per head.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    bos: BosOption = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where to write the circuit: a .json file.")] = None,
) -> None:
    """Find a circuit, measure its faithfulness, and write it.

    Edges are scored, and the best on paths to the logits are kept.

    Prints the strongest edges, and the circuit's faithfulness (edges outside carry the corrupt prompt's activation)
    next to that of random circuits of its size: on the prompts on which the circuit was found, or with --split on
    others.
    """
    _check_search(method, selection, metric, DEFAULT_EDGES if edges is None else edges, steps, threshold)
    _check_out(out)
    run = RunOptions(model=model, task=task, pairs=pairs, n=n, seed=seed, dtype=dtype, device=device, bos=bos)
    run.check()
    if split:
        run.check_split()
    loaded = run.load_model()
    from interp.circuits.topology import architecture

    prompts, others = run.split_prompts(loaded) if split else (run.prompts(loaded), None)
    size = len(architecture(loaded))
    edges = max(1, min(DEFAULT_EDGES, size // 2)) if edges is None else edges
    if edges > size:
        raise InterpError(f"--edges {edges}: {loaded.name} has {size} edges")
    with exits_when_interrupted():
        result = _find_circuit(loaded, prompts, metric, method, edges, selection, threshold, steps)
        from interp import circuits

        if roles:
            result = circuits.name_roles(loaded, prompts, result, metric)
        measured = prompts if others is None else others
        faithful = circuits.faithfulness(loaded, measured, result, metric, n_random=10, seed=seed)
    _print_circuit(result, faithful, held_out=others is not None)
    if out is not None:
        typer.echo(f"wrote {result.write(out)}")


def _print_circuit(circuit: Circuit, faithful: Faithfulness, held_out: bool) -> None:
    """Print the strongest edges, and the faithfulness with its recipe."""
    from interp.circuits.evaluation.faithfulness import random_text
    from interp.circuits.evaluation.scale import recipe_text

    table: Any = circuit.frame()
    typer.echo(table.iloc[table["score"].abs().argsort()[::-1]].head(20).to_string(index=False))
    typer.echo(f"{circuit!r}")
    n = len(faithful.whole)
    interval = f"[{faithful.lo:.3f}, {faithful.hi:.3f}]" if n > 1 else "(one pair: no interval)"
    which = "held out" if held_out else "the same on which it was found; --split measures on others"
    typer.echo(f"faithfulness {faithful.value:.3f} {interval}; random circuits of its size: "
               f"{random_text(faithful.random, faithful.recipe)}")  # fmt: skip
    typer.echo(f"  {recipe_text(faithful.recipe, n)}, {which}")


def _check_search(method: str, selection: str, metric: str, edges: int, steps: int, threshold: float) -> None:
    """Raise InterpError, before anything is loaded, for options of the search that cannot be used."""
    check_choice("--method", method, METHODS)
    check_choice("--selection", selection, SELECTIONS)
    check_choice("--metric", metric, METRICS)
    if edges < 1 or steps < 1 or not 0 < threshold < float("inf"):
        raise InterpError(
            f"--edges {edges} --steps {steps} --threshold {threshold:g}: at least 1 edge and 1 step, and a threshold "
            "above 0 expected"
        )


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
