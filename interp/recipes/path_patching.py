"""Path patching: change what one component sends along one path, and nothing else.

Wang et al. 2022, "Interpretability in the wild" (MLPs recomputed along the path); Goldowsky-Dill et al. 2023,
"Localizing model behavior with path patching" (the direct edge: everything else frozen). An edge runs from a sender,
whose output is added to the residual stream, to a receiver, which reads it:

1. the sender's activation is taken from the other run; every attention output is frozen at the base run's, and MLPs
   are frozen (``mlps="frozen"``) or recomputed (``mlps="recomputed"``);
2. what the receiver would read then is written into the base run, in which everything downstream is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from interp.engine import Cell, Engine, Run, Write
from interp.engine.block_probe import Probe
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError, SiteError
from interp.metrics import Metric, MetricFn, as_metric, logit_diff
from interp.model.model import Model
from interp.prompts.pairs import Encoded, PromptPair, encode_pairs
from interp.recipes.mean_activations import Means
from interp.recipes.sweep_loop import (
    Rows,
    asked_of,
    check_metric,
    chunks,
    evaluate_or_keep,
    provenance_of,
    readout,
    score_runs,
    tell_of_equal,
)
from interp.recipes.targets import as_sites
from interp.results.effects import Effects
from interp.sites import COMPONENTS, EACH, Edge, Site, Sites
from interp.utils.progress import Advance, progress

SENDERS = ("z", "attn_out", "mlp_out")
RECEIVERS = ("q", "k", "v", "mlp_out", "resid_post")
LOGITS = "logits"


def path_patch(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    senders: Iterable[Site | str] | Site | str,
    receivers: Iterable[Site | str] | Site | str = LOGITS,
    metric: Metric | MetricFn | str = logit_diff,
    mode: Literal["noise", "denoise"] = "noise",
    mlps: Literal["frozen", "recomputed"] = "frozen",
    engine: EngineKind = "auto",
    show_progress: bool | None = None,
    *,
    using: Literal["patch", "zero", "mean"] = "patch",
    memory: int | str | None = None,
) -> Effects:
    """The effect of every path from a sender to a later receiver, one at a time.

    ``senders``: sites of z (a head), attn_out or mlp_out. ``receivers``: sites of q, k, v (a head's query, key or
    value; k and v per KV head), mlp_out (the input of that MLP), or ``"logits"`` (the final residual stream, which is
    resid_post of the last layer). Positions of both restrict where the path starts and ends ("each": all at once).
    Pairs of sites in which the receiver cannot read the sender are left out. ``mode="noise"`` (as published) sends the
    corrupt activation within the clean run, ``"denoise"`` the clean one within the corrupt run. ``mlps``: see this
    module's first lines. ``using="zero"`` or ``"mean"`` ablates the edge in place of patching it: the sender sends 0,
    or its mean over all tokens of all clean prompts given. The effect keeps its scale, a share of corrupt − clean.

    Returns one row per (pair, edge): the receiver's site, and the ``sender``. Raises SiteError, PromptError or
    InterpError for bad input, before the sweep, and where the model cannot be run packed.
    """
    if mode not in ("noise", "denoise") or mlps not in ("frozen", "recomputed"):
        raise InterpError(f"mode={mode!r}, mlps={mlps!r}: 'noise' or 'denoise', and 'frozen' or 'recomputed' expected")
    if using not in ("patch", "zero", "mean") or (using != "patch" and mode != "noise"):
        raise InterpError(f"using={using!r}, mode={mode!r}: 'patch', or 'zero' or 'mean' with mode='noise' expected")
    listed = asked_of(model, pairs)
    metric, senders, receivers = as_metric(metric), _whole(as_sites(senders)), _receivers(model, receivers)
    prompts = encode_pairs(listed, model.coder)
    check_metric(metric, prompts, model)
    runner = Engine(model, engine, memory)
    edges = _edges(runner, senders, receivers)
    for prompt in prompts:
        for site in senders | receivers:
            rows_of(site, prompt)
    sweep = _Sweep(runner, metric, edges, mode, mlps == "recomputed", _Ablated(runner, prompts, senders, using))
    rows = Rows(("path" if using == "patch" else f"ablate {using}, path") + f", MLPs {mlps}", mode, metric)
    with progress(f"path patching ({mode})", len(edges) * len(prompts), show_progress) as advance:
        for i, prompt in enumerate(prompts):
            for _ in chunks([prompt], runner, sweep.kept, runs_per_example=3):
                sweep.run(i, prompt, rows, advance)
    recipe = {"mlps": mlps, "sent": using, "engine": runner.describe(), **provenance_of(pairs)}
    return rows.effects(model, listed, **recipe)


class _Sweep:
    """The cells of every edge in a pair. ``recompute``: MLPs on the way; ``sent``: what senders send."""

    def __init__(
        self, runner: Engine, metric: Metric, edges: Sequence[Edge], mode: str, recompute: bool, sent: _Ablated
    ):
        self.runner, self.metric, self.edges, self.mode, self.sent = runner, metric, edges, mode, sent
        hooks = runner.model.bridge.hook_dict
        self.kept = [c for c in SENDERS if COMPONENTS[c].hook.format(layer=0) in hooks]  # some models have no MLPs
        self.recompute = recompute and "mlp_out" in self.kept

    def run(self, number: int, prompt: Encoded, rows: Rows, advance: Advance) -> None:
        """Adds the rows of one pair. Raises InterpError where the model cannot be run packed."""
        runner, metric = self.runner, self.metric
        clean, corrupt = runner.record([prompt.clean, prompt.corrupt], self.kept, keep_kv=True)
        if why := runner.unpackable():  # what receivers would read is computed block by block, on either engine
            raise InterpError(f"path patching needs blocks that can be run packed, and this model's cannot: {why}")
        base, source = (clean, self.sent(corrupt)) if self.mode == "noise" else (corrupt, clean)
        read = readout([prompt], [clean.logits])
        known = [float(score_runs(metric, [r], read)[0]) for r in (clean, corrupt, base)]
        tell_of_equal(metric, known[:1], known[1:2])
        start = prompt.first_difference if self.sent.using == "patch" else 0
        probe = Probe(runner.model, runner.frame, base, start)
        for found in _cells(probe, source, prompt, self.recompute, self.edges, runner.rows_per_batch):
            cells = [cell for _, cell in found]
            values = evaluate_or_keep(runner, metric, [base], cells, [known[2]] * len(cells), read, advance)
            for (edge, _), value in zip(found, values, strict=True):
                rows.add(number, edge.receiver, prompt, known[0], known[1], value, sender=edge.sender)


def _receivers(model: Model, receivers: Iterable[Site | str] | Site | str) -> Sites:
    final = Site("resid_post", model.n_layers - 1)
    if isinstance(receivers, Site | str):
        receivers = [receivers]
    return _whole(as_sites([final if r == LOGITS else r for r in receivers]))


def _whole(sites: Sites) -> Sites:
    """All positions at once where each was meant: a path is an edge between components."""
    return Sites(s.at(None) if s.position == EACH else s for s in sites)


def _edges(runner: Engine, senders: Sites, receivers: Sites) -> list[Edge]:
    """Every pair in which the receiver reads the sender. Raises SiteError for sites that cannot be one or the other."""
    runner.check_sites(senders)
    runner.check_sites(receivers)
    last = runner.model.n_layers - 1
    for sites, allowed, what in ((senders, SENDERS, "sender"), (receivers, RECEIVERS, "receiver")):
        wrong = next((s for s in sites if s.component not in allowed), None)
        if wrong is not None:
            raise SiteError(f"{wrong} cannot be a {what} of a path: {', '.join(allowed)} can")
    wrong = next((r for r in receivers if r.component == "resid_post" and r.layer != last), None)
    if wrong is not None:
        raise SiteError(
            f"{wrong} is no receiver: of the residual stream, only resid_post of the last layer, the logits"
        )
    parallel = "blocks.0.hook_resid_mid" not in runner.model.bridge.hook_dict  # MLPs read what attention reads
    edges = [Edge(s, r) for r in receivers for s in senders if _reads(r, s, parallel)]
    if not edges:
        why = "; its attention and MLPs are parallel: no MLP reads the heads of its own layer" if parallel else ""
        raise SiteError(f"there are no paths: in {runner.model.name} every receiver comes before every sender{why}")
    return edges


def _reads(receiver: Site, sender: Site, parallel: bool) -> bool:
    assert receiver.layer is not None and sender.layer is not None
    if receiver.component == "resid_post":
        return True
    same_layer = not parallel and receiver.component == "mlp_out" and sender.component != "mlp_out"
    return sender.layer < receiver.layer or (same_layer and sender.layer == receiver.layer)


def _cells(
    probe: Probe, source: Run, prompt: Encoded, recompute: bool, edges: Sequence[Edge], rows: int
) -> Iterator[list[tuple[Edge, Cell | None]]]:
    """The cells of all edges in one base run, some senders at a time: ``rows`` go through a block together."""
    if probe.start == len(prompt):  # the prompts are the same
        yield [(e, None) for e in edges]
        return
    probe.check_sums()
    senders = list(dict.fromkeys(e.sender for e in edges))
    step = max(1, rows // (len(prompt) - probe.start))
    for first in range(0, len(senders), step):
        some = set(senders[first : first + step])
        yield from _Paths(probe, source, prompt, recompute).cells([e for e in edges if e.sender in some])


class _Ablated:
    """What senders send: the other run's activations, or zeros, or means over all clean prompts, in its place."""

    def __init__(self, runner: Engine, prompts: Sequence[Encoded], senders: Sites, using: str):
        self.using = using
        self.places = list(dict.fromkeys((s.component, s.layer) for s in senders))
        self.means = Means(runner, [p.clean for p in prompts], senders, "mean") if using == "mean" else None

    def __call__(self, run: Run) -> Run:
        if self.using == "patch":
            return run
        acts = {component: dict(layers) for component, layers in run.acts.items()}
        for component, layer in self.places:
            old = acts[component][layer or 0]
            new = torch.zeros_like(old)
            if self.means is not None:
                mean = self.means.totals[component, layer][0] / self.means.count[0]
                new = mean.to(old).expand_as(old)
            acts[component][layer or 0] = new
        return replace(run, acts=acts)


class _Paths:
    """The cells of all edges within one base run, receiver layer by receiver layer."""

    def __init__(self, probe: Probe, source: Run, prompt: Encoded, recompute: bool):
        self.probe, self.base, self.source = probe, probe.run, source
        self.prompt, self.recompute = prompt, recompute

    def rows(self, edge: Edge) -> slice:
        """Rows in which the receiver may read something else, counted from the probe's first."""
        (a, b), (c, d) = rows_of(edge.sender, self.prompt), rows_of(edge.receiver, self.prompt)
        start, stop = max(a, c, self.probe.start), min(b, d)
        return slice(start - self.probe.start, max(start, stop) - self.probe.start)

    def cells(self, edges: Sequence[Edge]) -> Iterator[list[tuple[Edge, Cell | None]]]:
        """Cells by receiver layer; None for an edge that changes nothing."""
        n_layers = self.probe.model.n_layers
        senders = list(dict.fromkeys(e.sender for e in edges))
        sent: dict[Site, Tensor] = {}  # what each sender has added to the residual stream so far [rows, d_model]
        for layer in range(n_layers):
            here = [s for s in senders if s.layer == layer]
            added = self._attention(layer, [s for s in here if s.component != "mlp_out"])
            before = list(sent)
            group = before + list(added)
            into = [e for e in edges if e.receiver.layer == layer and e.receiver.component != "resid_post"]
            if group and (into or self.recompute):
                yield from self._through(layer, into, before, sent, added)
            sent |= {s: sent.get(s, 0) + x for s, x in added.items()}
            sent |= {s: self._difference(s, "mlp_out") for s in here if s.component == "mlp_out"}
        final = [e for e in edges if e.receiver.component == "resid_post"]
        if final:
            base = self.base.resid[n_layers][self.probe.start :]
            yield [(e, self._cell(e, base + sent[e.sender])) for e in final]

    def _through(
        self, layer: int, into: Sequence[Edge], before: list[Site], sent: dict[Site, Tensor], added: dict[Site, Tensor]
    ) -> Iterator[list[tuple[Edge, Cell | None]]]:
        """Edges into one layer; with MLPs recomputed, what its MLP makes of every sender is added to ``sent``."""
        zero = torch.zeros_like(self.base.resid[0][self.probe.start :])
        group = before + list(added)
        delta = torch.stack([sent.get(s, zero) for s in group])
        attention = torch.stack([added.get(s, zero) for s in group])
        wanted = {e.receiver.component for e in into} | ({"mlp_out"} if self.recompute else set())
        read = self.probe.block(layer, delta, attention, wanted)
        number = {s: i for i, s in enumerate(group)}
        found: list[tuple[Edge, Cell | None]] = []
        for edge in into:
            values = read[edge.receiver.component][number[edge.sender]]
            found.append(
                (edge, self._cell(edge, values if edge.receiver.head is None else values[:, edge.receiver.head]))
            )
        if found:
            yield found
        if self.recompute:
            change = read["mlp_out"] - self.base.acts["mlp_out"][layer][self.probe.start :]
            sent |= {s: sent.get(s, zero) + change[i] for s, i in number.items()}

    def _attention(self, layer: int, senders: Sequence[Site]) -> dict[Site, Tensor]:
        """By how much each sender changes its layer's attention output [rows, d_model]."""
        heads = [s for s in senders if s.component == "z"]
        out = {s: self._difference(s, "attn_out") for s in senders if s.component == "attn_out"}
        if heads:
            cells = []
            for site in heads:
                start, stop = rows_of(site, self.prompt)
                start = max(start, self.probe.start)
                writes = (Write(site, start, stop, self.source.value(site, start, stop)),) if start < stop else ()
                cells.append(Cell(0, writes))
            base = self.base.acts["attn_out"][layer][self.probe.start :]
            out |= dict(zip(heads, self.probe.attention(layer, cells) - base, strict=True))
        return out

    def _difference(self, site: Site, component: str) -> Tensor:
        """Source − base of an output that is added to the residual stream, 0 outside the site's rows."""
        assert site.layer is not None
        start, stop = rows_of(site, self.prompt)
        change = self.source.acts[component][site.layer] - self.base.acts[component][site.layer]
        kept = torch.zeros_like(change)
        kept[start:stop] = change[start:stop]
        return kept[self.probe.start :]

    def _cell(self, edge: Edge, value: Tensor) -> Cell | None:
        rows = self.rows(edge)
        if rows.start >= rows.stop:
            return None
        first = self.probe.start
        return Cell(0, (Write(edge.receiver, first + rows.start, first + rows.stop, value[rows]),))
