"""Circuit methods compared on IOI: which method ranks edges best.

    python experiments/ioi_circuit.py run [METHOD …] [--seconds 280]     run methods one after the other, resumable
    python experiments/ioi_circuit.py table                              write results/ioi_circuit.json and .md

Claim (MIB, Hanna et al. 2024): EAP-IG ranks edges better than EAP and than exact patching of single edges.

Edges are scored on `TRAIN` pairs. CPR, CMD and faithfulness are measured on `TEST` other pairs, with counterfactual
ablation and the logit difference, as in MIB.

Result (results/ioi_circuit.md; CMD, lower is better): EAP-IG 0.014, ACDC among the edges that EAP-IG ranks first 0.015,
EAP 0.019, path patching of every edge alone 0.036, AtP of nodes 0.096.

Null: edges drawn at random have a CMD of 0.71 to 0.75. A second baseline ranks edges by the size of what senders
change: 0.75.

The work of a method is divided into pieces: scores of some pairs, then circuits by signed or absolute scores. Each
piece runs in its own process, whose resident memory is measured from the moment the model is loaded. A finished piece
is saved in `--work` and is not run again. With ``--seconds``, no further piece starts after that time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from resource_meter import ResourceMeter

import interp
from interp.circuits import (
    EdgeScores,
    acdc_sweep,
    attribute_edges,
    attribute_sites,
    curve,
    flow_scores,
    magnitude_scores,
    random_scores,
)
from interp.circuits.evaluation.evaluator import Evaluator
from interp.circuits.topology import architecture
from interp.model.prompt_provenance import hash_of_prompts
from interp.prompts.pairs import encode_pairs
from interp.sites import Edge
from interp.utils.provenance import now, versions

HERE = Path(__file__).parent
TRAIN, TEST = 32, 100
THREADS = 2
Scorer = Callable[[Any, Any], EdgeScores]


@dataclass(frozen=True)
class Method:
    """A method that scores edges, and how its work is divided."""

    score: Scorer
    what: str
    chunk: int = TRAIN  # pairs that are scored in one process
    pairs: int = TRAIN  # pairs in all
    signed: bool = True  # scores distinguish helpful edges from harmful ones; if not, both rankings are the same


def by_gradients(method: Any) -> Scorer:
    """Return edge attribution with the five steps of MIB."""
    return lambda model, pairs: attribute_edges(model, pairs, method=method, steps=5, show_progress=False)


def by_nodes(method: Any) -> Scorer:
    """Return scores of edges from scores of nodes: the weaker of both ends.

    The best n edges are then the edges among the best nodes.
    """

    def score(model: Any, pairs: Any) -> EdgeScores:
        graph = architecture(model)
        effects = attribute_sites(model, pairs, interp.Sites(graph.senders), mode="noise", method=method, steps=5)
        table = effects.frame().groupby(["component", "layer", "head"], dropna=False, observed=True)["raw"].mean()
        node_scores = {}
        for (component, layer, head), raw in table.items():
            node_scores[component, int(layer), None if str(head) in ("nan", "<NA>") else int(head)] = float(raw)
        sends = np.array([node_scores[s.component, s.layer, s.head] for s in graph.senders])
        numbers = graph.sender_number
        # k and v of a group score as its head with the largest score; the logits are always in the circuit
        fed = [[sends[numbers[s]] for s in graph.fed_by(r)] for r in graph.receivers]
        reads = np.array([max(f, key=abs) if f else np.inf for f in fed])
        weaker = np.where(np.abs(sends[None]) < np.abs(reads[:, None]), sends[None], reads[:, None])
        return EdgeScores(graph, weaker, {**model.provenance(), "method": f"nodes, {method}", "mode": "noise"})

    return score


def by_path_patching(model: Any, pairs: Any) -> EdgeScores:
    """Score every edge exactly, by path patching.

    The corrupt activation of the sender is patched along this edge alone in the clean run.

    `interp.path_patch` takes heads and MLPs as senders. Edges from the input are removed in the model run as a circuit.
    """
    graph = architecture(model)
    total = np.zeros(graph.allowed.shape)
    senders = [s for s in graph.senders if s != graph.input]
    table = interp.path_patch(model, pairs, senders, graph.receivers, mode="noise", show_progress=False).frame()
    change = (table["patched"] - table["clean"]) / len(pairs)
    columns = ("sender", "component", "layer", "head")
    for sender, component, layer, head, x in zip(*(table[c] for c in columns), change, strict=True):
        receiver = interp.Site(component, int(layer), None if str(head) in ("nan", "<NA>") else int(head))
        total[graph.place(Edge(interp.Site.parse(sender), receiver))] += x
    evaluate = Evaluator(model, pairs, "logit_diff", "counterfactual")
    rows = np.flatnonzero(graph.allowed[:, 0])
    masks = np.repeat(graph.allowed[None], len(rows), axis=0)
    masks[np.arange(len(rows)), rows, 0] = False
    total[rows, 0] = (evaluate.many(masks, evaluate.start(graph.allowed)) - evaluate.whole).mean(1)
    recipe = {"method": "path patching, edge by edge", "mode": "noise", "metric_direction": 1, "evidence": "exact"}
    return EdgeScores(graph, total, {**model.provenance(), **recipe})


SCREENED = 706  # 1% of the edges
# Nats of KL from the whole model. With the logit difference, ACDC would remove the edges that work against the answer
# and leave a circuit several times as confident as the model.
THRESHOLDS = (0.001, 0.003, 0.01)


def by_acdc(model: Any, pairs: Any) -> EdgeScores:
    """Run ACDC at several thresholds from the `SCREENED` best edges of EAP-IG.

    An edge scores the largest threshold at which it stays. Ties, and the edges that never stay, are ranked by EAP-IG.
    """
    screened = attribute_edges(model, pairs, steps=5, show_progress=False).helpful()
    start = screened.top(SCREENED, prune=False)
    sweep = acdc_sweep(model, pairs, THRESHOLDS, "kl", start=start, show_progress=False)
    level = np.searchsorted(np.sort(THRESHOLDS), np.nan_to_num(sweep.matrix), side="right")
    size = 1 + 2 * np.nanmax(np.abs(screened.matrix))
    # an edge that ACDC keeps is helpful, and ranks above all edges that it removes
    matrix = np.where(level > 0, level * size + np.abs(screened.matrix), screened.matrix)
    return EdgeScores(sweep.graph, matrix, {**sweep.provenance, "ties": "EAP-IG"})


METHODS: dict[str, Method] = {
    "eap": Method(by_gradients("eap"), "EAP (Syed et al. 2023)"),
    "eap-ig-inputs": Method(by_gradients("eap-ig-inputs"), "EAP-IG, inputs, 5 steps (Hanna et al. 2024)", 16),
    "eap-ig-activations": Method(
        by_gradients("eap-ig-activations"), "EAP-IG, activations, 5 steps (a pass for each node and step)", 4, 8
    ),
    "path-patching": Method(
        by_path_patching, "path patching, exact, each edge alone (Goldowsky-Dill et al. 2023)", 1, 4
    ),
    "acdc": Method(
        by_acdc,
        f"ACDC at {len(THRESHOLDS)} thresholds (Conmy et al. 2023) among the {SCREENED} edges (1%) that EAP-IG ranks "
        "first; behind what it keeps, EAP-IG's order",
        4,
        4,
    ),
    "eap-ig-inputs-4": Method(by_gradients("eap-ig-inputs"), "the same EAP-IG, from as few pairs", 4, 4),
    "clean-corrupted": Method(by_gradients("clean-corrupted"), "gradients at clean and corrupt"),
    "atp-nodes": Method(by_nodes("atp"), "AtP of nodes; an edge scores as the weaker of its ends"),
    "flow": Method(lambda m, p: flow_scores(m, p), "information-flow routes (Ferrando & Voita 2024)", 8, signed=False),
    "magnitude": Method(lambda m, p: magnitude_scores(m, p), "baseline: size of what senders change", signed=False),
    **{
        f"random-{seed}": Method(lambda m, p, s=seed: random_scores(m, s), "baseline: drawn at random", signed=False)
        for seed in range(3)
    },
}


# ---------------------------------------------------------------- pieces


def load_pairs(model: interp.Model) -> tuple[list[Any], list[Any]]:
    """Return pairs to score on, shortest first, and other pairs to measure on.

    No prompt is in both.
    """
    train, test = (list(interp.tasks.ioi(model, n=n, seed=s)) for n, s in ((TRAIN, 1), (TEST, 2)))
    seen = {p.clean for p in train} | {p.corrupt for p in train}
    assert not seen & ({p.clean for p in test} | {p.corrupt for p in test}), "a prompt is in both splits"
    return sorted(train, key=lambda p: len(model.coder.encode(p.clean))), test


def pieces(name: str) -> list[str]:
    """Return the names of the pieces of a method, in order."""
    method = METHODS[name]
    scores = [f"score-{i}" for i in range(-(-method.pairs // method.chunk))]
    return [*scores, "curve-absolute", *(["curve-signed"] if method.signed else [])]


def run_piece(name: str, what: str, work: Path) -> None:
    """Run one piece in this process and write its result."""
    torch.set_num_threads(THREADS)
    model = interp.load("smollm2")
    train, test = load_pairs(model)
    kind, _, which = what.partition("-")
    if kind == "score":
        method, i = METHODS[name], int(which)
        pairs = train[: method.pairs][i * method.chunk : (i + 1) * method.chunk]
        with ResourceMeter() as meter:
            scores = method.score(model, pairs)
        facts: dict[str, Any] = {"n": len(pairs), "provenance": scores.provenance}
        np.savez_compressed(work / f"{what}.npz", matrix=scores.matrix)
    else:
        scores = mean_scores(model, work)
        with ResourceMeter() as meter:
            result = curve(model, test, scores, ranking=which, using="counterfactual")  # type: ignore[arg-type]
        facts = {
            "cpr": result.cpr, "cmd": result.cmd, "curve": result.frame().to_dict("records"), "recipe": result.recipe,
            "whole": float(result.whole.mean()), "empty": float(result.empty.mean()),
        }  # fmt: skip
    record = {**facts, **meter.facts(), "made": now(), "device": str(model.device), "dtype": str(model.dtype)}
    (work / f"{what}.json").write_text(json.dumps(record, indent=1, default=str))


def mean_scores(model: interp.Model, work: Path) -> EdgeScores:
    """Return the mean of a method's scores over all pairs."""
    records = sorted(work.glob("score-*.json"))
    facts = [json.loads(p.read_text()) for p in records]
    matrices = [np.load(p.with_suffix(".npz"))["matrix"] for p in records]
    mean = np.average(matrices, axis=0, weights=[f["n"] for f in facts])
    graph = architecture(model)
    return EdgeScores(graph, np.where(graph.allowed, mean, np.nan), facts[0]["provenance"])


def run(names: list[str], root: Path, only: str, seconds: float | None) -> None:
    """Run the unfinished pieces of some methods, each in its own process.

    Only pieces whose names begin with ``only`` are run.
    """
    begun = time.monotonic()
    for name in names:
        work = root / name
        work.mkdir(parents=True, exist_ok=True)
        for what in pieces(name):
            if (work / f"{what}.json").exists() or not what.startswith(only):
                continue
            if seconds is not None and time.monotonic() - begun > seconds:
                print("not finished: run the same command again", flush=True)
                return
            at = time.monotonic()
            subprocess.run([sys.executable, __file__, "piece", name, what, "--work", str(root)], check=True)
            print(f"{name} {what}: {time.monotonic() - at:.0f} s", flush=True)
    print("done", flush=True)


# ---------------------------------------------------------------- table


def table_row(name: str, work: Path) -> dict[str, Any] | None:
    """Return the results of one method, without unfinished curves.

    None if its scores are not finished.
    """
    finished = {w: json.loads((work / f"{w}.json").read_text()) for w in pieces(name) if (work / f"{w}.json").exists()}
    scores = [x for what, x in finished.items() if what.startswith("score")]
    if len(scores) < sum(what.startswith("score") for what in pieces(name)):
        return None
    absolute = finished.get("curve-absolute", {})
    signed = finished.get("curve-signed", {}) if METHODS[name].signed else absolute
    return {
        "method": name, "what": METHODS[name].what, "scored_on": sum(s["n"] for s in scores),
        "cpr": signed.get("cpr"), "cmd": absolute.get("cmd"), "seconds": sum(s["seconds"] for s in scores),
        "load": max(s.get("load", 0.0) for s in scores),
        "peak_mib": max(s["peak_mib"] for s in scores), "loaded_mib": max(s["loaded_mib"] for s in scores),
        "curve_absolute": absolute.get("curve"), "curve_signed": signed.get("curve"),
        "whole": absolute.get("whole"), "empty": absolute.get("empty"), "recipe": absolute.get("recipe"),
        "made": max(x["made"] for x in finished.values()),
    }  # fmt: skip


def table(root: Path, out: Path) -> None:
    """Write the finished results as JSON and Markdown."""
    rows = [r for name in METHODS if (r := table_row(name, root / name)) is not None]
    if not rows:
        sys.exit(f"nothing is finished in {root}: run methods first")
    model = interp.load("smollm2")
    train, test = load_pairs(model)
    result = {
        "command": f"python experiments/ioi_circuit.py run {' '.join(r['method'] for r in rows)}",
        "made": now(), "model": model.provenance(), "device": str(model.device), "threads": THREADS,
        "versions": versions(), "edges": len(architecture(model)),
        "train": {"n": TRAIN, "seed": 1, "prompts": hash_of_prompts(train, encode_pairs(train, model.coder))},
        "test": {"n": TEST, "seed": 2, "prompts": hash_of_prompts(test, encode_pairs(test, model.coder))},
        "rows": rows,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    text = markdown(result)
    out.with_suffix(".md").write_text(text)
    print(text)


def markdown(result: dict[str, Any]) -> str:
    """Return the table as Markdown."""

    def interval(x: list[float] | None) -> str:
        return "not run" if x is None else f"{x[0]:.3f} [{x[1]:.3f}, {x[2]:.3f}]"

    def busy(r: dict[str, Any]) -> str:
        """Return a mark if the machine did other work when scoring ended."""
        return r"\*" if r["load"] > THREADS + 0.5 else ""

    def at(r: dict[str, Any], size: float) -> str:
        if r["curve_absolute"] is None:
            return "–"
        return next(f"{c['faithfulness']:.2f}" for c in r["curve_absolute"] if abs(c["size"] - size) < 1e-9)

    lines = [
        "# Circuits of indirect object identification",
        "",
        f"SmolLM2-135M-Instruct, {result['edges']:,} edges; scores from {TRAIN} pairs (fewer where the table says so), "
        f"circuits measured on {TEST} other pairs: counterfactual ablation, logit difference. CPR (higher is better) "
        "ranks edges by signed score, CMD (lower is better) and f by absolute score; 95% bootstrap intervals over "
        "examples. Seconds and peak resident memory are those of scoring, "
        f"{result['threads']} threads of {result['device']}, torch {result['versions']['torch']}.",
        "",
        "| method | pairs | CPR ↑ | CMD ↓ | f at 1% | f at 5% | f at 20% | seconds | peak, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(result["rows"], key=lambda r: (r["cmd"] or [np.inf])[0]):
        lines.append(
            f"| {r['method']}: {r['what']} | {r['scored_on'] if 'random' not in r['method'] else '–'} | "
            f"{interval(r['cpr'])} | {interval(r['cmd'])} | {at(r, 0.01)} | {at(r, 0.05)} | {at(r, 0.2)} | "
            f"{r['seconds']:.1f}{busy(r)} | {r['peak_mib']:,.0f} |"
        )
    loaded = max(r["loaded_mib"] for r in result["rows"])
    if any(busy(r) for r in result["rows"]):
        lines += ["", r"\* The machine did other work at the time, so the seconds are too many."]
    lines += ["", f"The loaded model alone is resident in {loaded:,.0f} MiB.", f"Made by `{result['command']}`.", ""]
    return "\n".join(lines)


def main() -> None:
    """Run pieces, or write the table of finished results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "piece", "table"])
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(METHODS)}; default: all")
    parser.add_argument(
        "--work", type=Path, default=HERE.parent / "results" / "ioi_circuit", help="folder of finished pieces"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ioi_circuit")
    parser.add_argument(
        "--only",
        choices=["", "score", "curve"],
        default="",
        help="run only the scoring, which is timed, or only the curves",
    )
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args()
    if options.verb == "piece":
        name, what = options.names
        run_piece(name, what, options.work / name)
        return
    if wrong := set(options.names) - set(METHODS):
        parser.error(f"unknown methods: {', '.join(sorted(wrong))}; choose from {', '.join(METHODS)}")
    if options.verb == "run":
        run(options.names or list(METHODS), options.work, options.only, options.seconds)
    else:
        table(options.work, options.out)


if __name__ == "__main__":
    main()
