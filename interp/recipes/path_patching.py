"""Path patching: change what one component sends along one path, and nothing else.

Wang et al. 2022, "Interpretability in the wild" (MLPs recomputed along the path); Goldowsky-Dill et al. 2023,
"Localizing model behavior with path patching" (the direct edge: everything else frozen). An edge runs from a sender,
whose output is added to the residual stream, to a receiver, which reads it:

1. the sender's activation is taken from the other run; every attention output is frozen at the base run's value, and
   MLPs are frozen (``mlps="frozen"``) or recomputed (``mlps="recomputed"``);
2. what the receiver would then read is written into the base run, in which everything downstream is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from interp.engine import Cell, CellWrite, Engine, Run
from interp.engine.block_probe import Probe
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError, SiteError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.model import Model
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.pairs import PromptPair
from interp.recipes.choices import LOGITS, MODES, PATH_ABLATIONS, PATH_MLPS
from interp.recipes.mean_activations import Means
from interp.recipes.read_out import LAST, At
from interp.recipes.sweep_loop import WHOLE_SET, Batch, CellRow, CellSource, Subset, SweepLoop
from interp.recipes.targets import as_sites
from interp.results.effects import Effects
from interp.sites import COMPONENTS, EACH, Edge, Site, Sites

SENDERS = ("z", "attn_out", "mlp_out")
RECEIVERS = ("q", "k", "v", "mlp_out", "resid_post")


@in_session
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
    subset: Subset = WHOLE_SET,
    at: At = LAST,
) -> Effects:
    """Measure the effect of every path from a sender to a later receiver, one path at a time.

        interp.path_patch(model, pairs, model.sites("z"))                                   # heads to logits
        interp.path_patch(model, pairs, model.sites("z"), model.sites("q", layers=[9]))     # heads to queries
        interp.path_patch(model, pairs, "z.L5H5", ["k.L6H0", "logits"], mlps="recomputed")

    ``senders``: sites of z (a head), attn_out or mlp_out. ``receivers``: sites of q, k, v (a head's query, key or
    value; k and v per KV head), mlp_out (the input of that MLP), or ``"logits"`` (the final residual stream, which is
    resid_post of the last layer). Positions of both restrict where the path starts and ends ("each": all at once).
    Pairs of sites in which the receiver cannot read the sender are left out. ``mode="noise"`` (as published) sends the
    corrupt activation within the clean run, ``"denoise"`` the clean one within the corrupt run. ``mlps``: see the first
    lines of this module. ``using="zero"`` or ``"mean"`` ablates the edge instead of patching it: the sender sends 0, or
    its mean over all tokens of all clean prompts given. The effect keeps its scale, a share of corrupt − clean.

    Returns one row per (pair, edge): the receiver's site, and the ``sender``. ``at``: where the metric is read, as in
    `interp.patch`. ``subset``: for `interp.sweep`. Raises SiteError, PromptError or InterpError for bad input, before
    the sweep, and where the model cannot be run packed.
    """
    if mode not in MODES or mlps not in PATH_MLPS:
        raise InterpError(f"mode={mode!r}, mlps={mlps!r}: 'noise' or 'denoise', and 'frozen' or 'recomputed' expected")
    if using not in PATH_ABLATIONS or (using != "patch" and mode != "noise"):
        raise InterpError(f"using={using!r}, mode={mode!r}: 'patch', or 'zero' or 'mean' with mode='noise' expected")
    loop = SweepLoop(model, pairs, metric, engine, memory, subset, show_progress, at=at)
    sender_sites, receiver_sites = _at_all_positions(as_sites(senders)), _receivers(model, receivers)
    edges = _edges(loop.runner, sender_sites, receiver_sites)
    for prompt in loop.prompts:
        for site in sender_sites | receiver_sites:
            rows_of(site, prompt)
    sent = _SentActivations(loop.runner, loop.prompts, sender_sites, using)
    intervention = ("path" if using == "patch" else f"ablate {using}, path") + f", MLPs {mlps}"
    return loop.run(
        lambda part: _PathCells(part, edges, mode, mlps == "recomputed", sent),
        intervention,
        mode,
        mlps=mlps,
        sent=using,
    )


class _PathCells(CellSource):
    """The cells of every edge in every pair. ``recompute``: whether MLPs on the way are recomputed."""

    one_at_a_time = True
    runs_per_example = 3

    def __init__(self, loop: SweepLoop, edges: Sequence[Edge], mode: str, recompute: bool, sent: _SentActivations):
        self.runner, self.edges, self.mode, self.sent = loop.runner, edges, mode, sent
        hooks = loop.model.bridge.hook_dict
        # some models have no MLPs
        self.components = [c for c in SENDERS if COMPONENTS[c].hook.format(layer=0) in hooks]
        self.recompute = recompute and "mlp_out" in self.components
        self.title = f"path patching ({mode})"
        self.size = len(edges) * len(loop.prompts)

    def batch(self, loop: SweepLoop, numbers: range) -> Batch:
        """Clean and corrupt run of one pair. Raises InterpError where the model cannot be run packed."""
        prompts = [loop.prompts[i] for i in numbers]
        ids = [row for p in prompts for row in (p.clean, p.corrupt)]
        clean, corrupt = loop.runner.record(ids, self.components, keep_kv=True, read=loop.read_rows(numbers, ids))
        if why := loop.runner.unpackable():  # what receivers would read is computed block by block, on either engine
            raise InterpError(f"path patching needs blocks that can be run packed, and this model's cannot: {why}")
        return loop.scored(numbers, prompts, [clean], [corrupt], "clean" if self.mode == "noise" else "corrupt")

    def rows(self, batch: Batch) -> Iterator[list[CellRow]]:
        """The cells of all edges, some senders at a time."""
        (prompt,), (clean,), (corrupt,), (base,) = batch.prompts, batch.clean_runs, batch.corrupt_runs, batch.runs
        source, (unchanged,) = (self.sent(corrupt), batch.clean) if self.mode == "noise" else (clean, batch.corrupt)
        start = prompt.first_difference if self.sent.using == "patch" else 0
        probe = Probe(self.runner.model, self.runner.frame, base, start)
        for cells in self._cells(probe, source, prompt):
            yield [CellRow(0, edge.receiver, cell, unchanged, sender=edge.sender) for edge, cell in cells]

    def _cells(self, probe: Probe, source: Run, prompt: Encoded) -> Iterator[list[tuple[Edge, Cell | None]]]:
        """Yield the cells of all edges, for as many senders at a time as fit into one batch of the engine."""
        if probe.start == len(prompt):  # the prompts are equal
            yield [(e, None) for e in self.edges]
            return
        probe.check_sums()
        senders = list(dict.fromkeys(e.sender for e in self.edges))
        step = max(1, self.runner.rows_per_batch // (len(prompt) - probe.start))
        for first in range(0, len(senders), step):
            group = set(senders[first : first + step])
            paths = _Paths(probe, source, prompt, self.recompute)
            yield from paths.cells([e for e in self.edges if e.sender in group])


def _receivers(model: Model, receivers: Iterable[Site | str] | Site | str) -> Sites:
    final = Site("resid_post", model.n_layers - 1)
    if isinstance(receivers, Site | str):
        receivers = [receivers]
    return _at_all_positions(as_sites([final if r == LOGITS else r for r in receivers]))


def _at_all_positions(sites: Sites) -> Sites:
    """Return the sites with ``"each"`` read as all positions at once: a path is an edge between components."""
    return Sites(s.at(None) if s.position == EACH else s for s in sites)


def _edges(runner: Engine, senders: Sites, receivers: Sites) -> list[Edge]:
    """Return every edge in which the receiver reads the sender.

    Raises SiteError for sites that cannot be senders or receivers.
    """
    runner.check_sites(senders)
    runner.check_sites(receivers)
    last = runner.model.n_layers - 1
    for sites, allowed, what in ((senders, SENDERS, "sender"), (receivers, RECEIVERS, "receiver")):
        misplaced = next((s for s in sites if s.component not in allowed), None)
        if misplaced is not None:
            raise SiteError(f"{misplaced} cannot be a {what} of a path: {', '.join(allowed)} can")
    misplaced = next((r for r in receivers if r.component == "resid_post" and r.layer != last), None)
    if misplaced is not None:
        raise SiteError(
            f"{misplaced} cannot be a receiver: of the residual stream, only resid_post of the last layer can"
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


class _SentActivations:
    """What senders send: the other run's activations, or zeros or means over all clean prompts instead."""

    def __init__(self, runner: Engine, prompts: Sequence[Encoded], senders: Sites, using: str):
        self.using = using
        self.addresses = list(dict.fromkeys((s.component, s.layer) for s in senders))
        self.means = Means(runner, [p.clean for p in prompts], senders, "mean") if using == "mean" else None

    def __call__(self, run: Run) -> Run:
        if self.using == "patch":
            return run
        acts = {component: dict(layers) for component, layers in run.acts.items()}
        for component, layer in self.addresses:
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
        """Return the rows in which the receiver may read another value, counted from the probe's first."""
        (a, b), (c, d) = rows_of(edge.sender, self.prompt), rows_of(edge.receiver, self.prompt)
        start, stop = max(a, c, self.probe.start), min(b, d)
        return slice(start - self.probe.start, max(start, stop) - self.probe.start)

    def cells(self, edges: Sequence[Edge]) -> Iterator[list[tuple[Edge, Cell | None]]]:
        """Yield cells by receiver layer; None for an edge that changes nothing."""
        n_layers = self.probe.model.n_layers
        senders = list(dict.fromkeys(e.sender for e in edges))
        sent: dict[Site, Tensor] = {}  # what each sender has added to the residual stream so far [rows, d_model]
        for layer in range(n_layers):
            of_layer = [s for s in senders if s.layer == layer]
            added = self._attention(layer, [s for s in of_layer if s.component != "mlp_out"])
            before = list(sent)
            group = before + list(added)
            edges_of_layer = [e for e in edges if e.receiver.layer == layer and e.receiver.component != "resid_post"]
            if group and (edges_of_layer or self.recompute):
                yield from self._through(layer, edges_of_layer, before, sent, added)
            sent |= {s: sent.get(s, 0) + x for s, x in added.items()}
            sent |= {s: self._difference(s, "mlp_out") for s in of_layer if s.component == "mlp_out"}
        final = [e for e in edges if e.receiver.component == "resid_post"]
        if final:
            base = self.base.resid[n_layers][self.probe.start :]
            yield [(e, self._cell(e, base + sent[e.sender])) for e in final]

    def _through(
        self, layer: int, edges: Sequence[Edge], before: list[Site], sent: dict[Site, Tensor], added: dict[Site, Tensor]
    ) -> Iterator[list[tuple[Edge, Cell | None]]]:
        """Yield the cells of edges into one layer; with MLPs recomputed, add the MLP's response to ``sent``."""
        zero = torch.zeros_like(self.base.resid[0][self.probe.start :])
        group = before + list(added)
        delta = torch.stack([sent.get(s, zero) for s in group])
        attention = torch.stack([added.get(s, zero) for s in group])
        components = {e.receiver.component for e in edges} | ({"mlp_out"} if self.recompute else set())
        read = self.probe.block(layer, delta, attention, components)
        number = {s: i for i, s in enumerate(group)}
        cells: list[tuple[Edge, Cell | None]] = []
        for edge in edges:
            values = read[edge.receiver.component][number[edge.sender]]
            of_receiver = values if edge.receiver.head is None else values[:, edge.receiver.head]
            cells.append((edge, self._cell(edge, of_receiver)))
        if cells:
            yield cells
        if self.recompute:
            change = read["mlp_out"] - self.base.acts["mlp_out"][layer][self.probe.start :]
            sent |= {s: sent.get(s, zero) + change[i] for s, i in number.items()}

    def _attention(self, layer: int, senders: Sequence[Site]) -> dict[Site, Tensor]:
        """Return how much each sender changes its layer's attention output [rows, d_model]."""
        heads = [s for s in senders if s.component == "z"]
        out = {s: self._difference(s, "attn_out") for s in senders if s.component == "attn_out"}
        if heads:
            cells = []
            for site in heads:
                start, stop = rows_of(site, self.prompt)
                start = max(start, self.probe.start)
                writes = (CellWrite(site, start, stop, self.source.value(site, start, stop)),) if start < stop else ()
                cells.append(Cell(0, writes))
            base = self.base.acts["attn_out"][layer][self.probe.start :]
            out |= dict(zip(heads, self.probe.attention(layer, cells) - base, strict=True))
        return out

    def _difference(self, site: Site, component: str) -> Tensor:
        """Return source − base of an output that is added to the residual stream, 0 outside the site's rows."""
        assert site.layer is not None
        start, stop = rows_of(site, self.prompt)
        change = self.source.acts[component][site.layer] - self.base.acts[component][site.layer]
        inside = torch.zeros_like(change)
        inside[start:stop] = change[start:stop]
        return inside[self.probe.start :]

    def _cell(self, edge: Edge, value: Tensor) -> Cell | None:
        rows = self.rows(edge)
        if rows.start >= rows.stop:
            return None
        first = self.probe.start
        return Cell(0, (CellWrite(edge.receiver, first + rows.start, first + rows.stop, value[rows]),))
