"""Attribution of nodes: residual streams, layers' outputs, heads, queries, keys, values, and single neurons.

What patching a site would change, estimated as (source − base) · gradient of the metric at the site:

* ``"atp"``: the gradient in the base run (Nanda 2023; Kramár et al. 2024, arXiv 2403.00745, eq. 4): one backward pass
  for all sites, first order in the change, and blind to saturated attention.
* ``"atp-qk"``: the same, but queries and keys by the exact change of their head's z
  (`interp.circuits.attribution.qk_fix`), as published: what lies before a saturated head still has no gradient through
  it.
* ``"atp-carried"``: the same, and carried on to what queries and keys are made of (ours; the rescale rule of DeepLIFT,
  Shrikumar et al. 2017, on softmax): with δ the difference of a query or key between both runs, its gradient g becomes
  g + (E − g·δ) δ/‖δ‖², E the exact effect. The effects of all that a key reads then add up to E.
* ``"ig-inputs"``: the mean of the gradient over ``steps`` runs in which the token embeddings lie between both prompts'
  (Sundararajan et al. 2017), at shares (k − ½)/steps of the way; the change is that of the site itself. It sums to the
  whole difference of the metric over all positions of the embeddings.
* ``"ig-activations"``: the mean over runs in which the activation at hand lies between both runs', all its heads (or
  neurons) and positions together: ``steps`` passes for each component of each layer. It sums to the effect of patching
  all of them at once.

`atp_star` ranks by |estimate| and adds GradDrop: the estimate is taken anew with the gradient through one layer's
contribution to the residual stream set to zero, for each layer in turn, and the absolute values are averaged, so that
two paths of opposite sign do not hide each other. The estimate with nothing dropped counts as one more (eq. 12 leaves
it out): in a model of few layers a node whose only path passes through all of them would score 0.

Activations and gradients of the hooks that were asked for are held for a batch of tokens (`TOKENS`): memory grows with
positions × d_model × layers, not with the number of sites. No effect of one site on another is formed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.attribution.qk_fix import Rerun, Secants, check_heads_apart
from interp.circuits.capture import capture, capture_calls
from interp.circuits.fitting import without_weight_gradients
from interp.circuits.inputs import TOKENS, token_batches
from interp.engine import Engine
from interp.engine.cells import rows_of
from interp.errors import InterpError, ModelError, SiteError
from interp.metrics import Metric, MetricFn, Readout, as_metric, logit_diff
from interp.model.hooks import hooks
from interp.model.model import Model
from interp.prompts.pairs import Encoded, PromptPair, encode_pairs, listed_prompts
from interp.recipes.inputs import check_metric, expand_sites, provenance_of
from interp.recipes.rows import EffectRows
from interp.recipes.scoring import readout
from interp.recipes.targets import as_sites
from interp.results.effects import SITE_COLUMNS, Effects
from interp.sites import EACH, Site, Sites

Mode = Literal["denoise", "noise"]
NodeMethod = Literal["atp", "atp-qk", "atp-carried", "ig-inputs", "ig-activations"]
METHODS = {
    "atp": "attribution patching (estimate)",
    "atp-qk": "attribution patching, QK fix (estimate)",
    "atp-carried": "attribution patching, QK fix carried on (estimate)",
    "ig-inputs": "integrated gradients on inputs (estimate)",
    "ig-activations": "integrated gradients on activations (estimate)",
}
SPANS = "named spans cannot be ranked: take sites with positions, or with all positions at once"
SiteList = Iterable[Site | str] | Site | str


def attribute_sites(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    sites: SiteList | None = None,
    metric: Metric | MetricFn | str = logit_diff,
    mode: Mode = "denoise",
    *,
    method: NodeMethod = "atp",
    steps: int = 10,
) -> Effects:
    """What `interp.patch` would find at every site, estimated by gradients: see this module's first lines.

    Sites (default: every head) and modes as in `interp.patch`; a neuron is a site of ``mlp_post``. ``patched`` is the
    base run's metric plus the estimate. ``steps``: of integrated gradients. Raises SiteError for resid_mid, whose hook
    does not carry the whole stream, ModelError where the QK fix is not defined, and InterpError for a metric without a
    gradient.
    """
    if method not in METHODS:
        raise InterpError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    job = _Job(model, pairs, sites, metric, mode, steps)
    rows = EffectRows(METHODS[method], mode, job.metric)
    for found in job.estimates(method):
        rows.add(found.example, found.site, found.prompt, *found.known, found.start + float(found.change[0]))
    recipe = {"method": method, "steps": steps if method.startswith("ig") else None, **provenance_of(pairs)}
    return rows.effects(model, job.listed, engine="backward passes", evidence="estimate", **recipe)


def atp_star(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    sites: SiteList | None = None,
    metric: Metric | MetricFn | str = logit_diff,
    mode: Mode = "noise",
    *,
    qk_fix: Literal["carried", "nodes"] | bool = "carried",
    grad_drop: bool = True,
) -> pd.DataFrame:
    """AtP* (Kramár et al. 2024, arXiv 2403.00745): a ranking of sites, with the QK fix and GradDrop.

    One row per site, best first: ``score``, the mean over pairs of |estimate| (with GradDrop: of the mean of
    |estimate| with nothing dropped and with each layer dropped but the site's own), and ``estimate``, the mean of the
    signed estimate without GradDrop; both in the metric's unit. ``qk_fix="nodes"`` (or True) is the published fix, of
    queries and keys alone; ``"carried"`` reaches what they are made of: see this module's first lines. GradDrop takes a
    backward pass per layer and helps where estimates of a single pair cancel; over many pairs it matters little.

    Raises as `attribute_sites`, and InterpError for named spans, or positions that are not in every prompt.
    """
    if qk_fix not in ("carried", "nodes", True, False):
        raise InterpError(f"qk_fix={qk_fix!r}: 'carried', 'nodes' or False expected")
    job = _Job(model, pairs, sites, metric, mode, 1)
    method = "atp-carried" if qk_fix == "carried" else "atp-qk" if qk_fix else "atp"
    keys, scores, signed = [], [], []
    for found in job.estimates(method, grad_drop):
        keys.append((found.site.component, found.site.layer, found.site.head, found.site.position))
        signed.append(found.change[0])
        own = grad_drop and found.site.layer is not None and not found.site.component.startswith("resid")
        scores.append(np.abs(found.change).sum() / (len(found.change) - own))
    table = pd.DataFrame(keys, columns=pd.Index(SITE_COLUMNS)).assign(score=scores, estimate=signed)
    ranked = by_site(table, len(job.listed), {"score": ("score", "mean"), "estimate": ("estimate", "mean")})
    ranked.attrs.update(model.provenance(), method="AtP*", qk_fix=qk_fix, grad_drop=grad_drop, mode=mode)
    return ranked.sort_values("score", ascending=False, ignore_index=True, kind="stable")


def by_site(table: Any, n_prompts: int, columns: dict[str, tuple[str, str]]) -> Any:
    """One row per site of a table with one per (prompt, site). InterpError where sites differ between prompts."""
    if pd.Series([isinstance(p, str) for p in table["position"]]).any():
        raise InterpError(SPANS)
    numbers = {c: table[c].astype("Int64") for c in ("layer", "head", "position")}
    grouped = table.assign(**numbers).groupby(list(SITE_COLUMNS), dropna=False, observed=True, sort=False)
    found = grouped.agg(**columns, n=("component", "size")).reset_index()
    if (found["n"] != n_prompts).any():
        raise InterpError("some positions are not in every prompt: take prompts of one length, or positions='all'")
    return found.drop(columns="n")


@dataclass(frozen=True)
class Estimate:
    """One site on one prompt. ``known``: the metric of the clean and corrupt runs; ``start``: of the base run.

    ``change``: the estimate, then those with each layer's contribution dropped, if they were asked for.
    """

    example: int
    site: Site
    prompt: Encoded
    known: tuple[float, float]
    start: float
    change: Float[np.ndarray, " drops"]


class _Job:
    """What was asked, checked."""

    def __init__(self, model: Model, pairs: Any, sites: Any, metric: Any, mode: str, steps: int) -> None:
        if mode not in ("denoise", "noise"):
            raise InterpError(f"unknown mode {mode!r}: 'denoise' (clean into corrupt) or 'noise' (corrupt into clean)")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise InterpError(f"steps={steps!r}: a whole number from 1 on is expected")
        self.model, self.metric, self.mode, self.steps = model, as_metric(metric), mode, steps
        self.listed = listed_prompts(pairs)
        self.prompts = encode_pairs(self.listed, model.coder)
        check_metric(self.metric, self.prompts, model)
        self.wanted: Sites = model.sites("z") if sites is None else as_sites(sites)
        Engine(model, "naive").check_sites(self.wanted)
        if any(s.component == "resid_mid" for s in self.wanted):
            raise SiteError(
                "resid_mid: its gradient cannot be read at its hook; take resid_pre, or attn_out and mlp_out"
            )
        for prompt in self.prompts:
            for site in self.wanted:
                if site.position != EACH:
                    rows_of(site, prompt)

    def estimates(self, method: str, grad_drop: bool = False) -> Iterator[Estimate]:
        """For every prompt and site, in batches of one length."""
        components = {s.component for s in self.wanted}
        fixed = sorted(components & {"q", "k"}) if method == "atp-qk" else ["k", "q"] * (method == "atp-carried")
        if fixed:
            check_heads_apart(self.model, self.prompts[0].clean, fixed)
        for batch in token_batches(self.prompts, TOKENS):
            here = _Batch(self, [self.prompts[i] for i in batch], fixed, method == "atp-carried", grad_drop)
            for row, i in enumerate(batch):
                prompt = self.prompts[i]
                known = here.known["clean"][row], here.known["corrupt"][row]
                start = known[0] if self.mode == "noise" else known[1]
                for site, change in here.changes(method, row, prompt):
                    yield Estimate(i, site, prompt, known, start, change)


class _Batch:
    """Prompts of one length: both runs' activations, and the estimates of all their sites."""

    def __init__(
        self, job: _Job, prompts: Sequence[Encoded], fixed: Sequence[str], carried: bool, grad_drop: bool
    ) -> None:
        self.job, self.model, self.fixed, self.grad_drop = job, job.model, fixed, grad_drop
        self.prompts = prompts
        self.ids = {run: [getattr(p, run) for p in prompts] for run in ("clean", "corrupt")}
        self.base, self.source = ("corrupt", "clean") if job.mode == "denoise" else ("clean", "corrupt")
        self.names = list(dict.fromkeys(s.hook_name for s in job.wanted))
        self.behind = list(dict.fromkeys(z_of(s) for s in job.wanted if s.component in fixed))
        layers = self.model.attention_layers if carried else ()
        qk = [f"blocks.{i}.attn.hook_{c}" for i in layers for c in "qk"]
        hooked = list(dict.fromkeys([*self.names, *self.behind, *qk, first_hook(self.model)]))
        self.acts, calls = {}, {}
        for run, ids in self.ids.items():
            if fixed:
                with capture_calls(self.model) as calls[run]:
                    self.acts[run] = capture(self.model, ids, hooked)
            else:
                self.acts[run] = capture(self.model, ids, hooked)
        self.rerun = Rerun(self.model.instrument.backend, calls[self.base], calls[self.source]) if fixed else None
        self.secants = Secants(self.rerun, {n: self._difference(n) for n in qk}) if carried and self.rerun else None
        self.read = readout(prompts, list(self.acts["clean"]["logits"]))
        self.known = {run: job.metric(self.acts[run]["logits"], self.read).double().tolist() for run in self.ids}
        if not np.isfinite(list(self.known.values())).all():
            raise InterpError(f"metric {job.metric.name!r} returned NaN or infinity for prompts as they are")
        self.products: dict[tuple[str, str], Tensor] | None = None

    def changes(self, method: str, row: int, prompt: Encoded) -> Iterator[tuple[Site, Float[np.ndarray, " drops"]]]:
        """Every site of one prompt, with its estimates."""
        if self.products is None:
            self.products = self._products(method)
        for site in expand_sites(self.job.wanted, prompt):
            found = self.products[site.hook_name, _reach(site)][:, row]
            start, stop = (0, 1) if _reach(site) == "all" else rows_of(site, prompt)
            found = found[:, start:stop] if site.head is None else found[:, start:stop, site.head]
            yield site, found.sum(1).numpy()

    def _products(self, method: str) -> dict[tuple[str, str], Tensor]:
        """By hook and reach: estimates [drops, batch, position, (heads or neurons)], float64 on the CPU.

        Positions are summed already where all of them are patched at once.
        """
        reaches = list(dict.fromkeys((s.hook_name, _reach(s)) for s in self.job.wanted))
        found: dict[tuple[str, str], list[Tensor]] = {r: [] for r in reaches}
        for grads in self._gradients(method):
            for name, reach in reaches:
                found[name, reach].append(self._product(name, reach, grads))
        return {r: torch.stack(parts) for r, parts in found.items()}

    def _product(self, name: str, reach: str, grads: dict[str, Tensor]) -> Tensor:
        component, layer = name.rpartition("hook_")[2], name.split(".")[1] if "." in name else "0"
        if component in self.fixed and name.endswith(f"attn.hook_{component}"):
            found = self._through_softmax(component, int(layer), reach, grads[_z(int(layer))])
        else:
            found = self._difference(name) * grads[name]
            found = found if component == "post" else found.sum(-1)  # neurons are one number wide
        found = found.double().cpu()
        return found.sum(1, keepdim=True) if reach == "all" else found

    def _through_softmax(self, component: str, layer: int, reach: str, grads: Tensor) -> Tensor:
        """Estimates for queries or keys [batch, position, heads], given the gradient at z."""
        assert self.rerun is not None
        if component == "q":
            return (self.rerun.queries(layer) * grads).sum(-1)
        heads = self.model.n_kv_heads
        if reach == "each":
            return self.rerun.each_key(layer, grads)
        n = grads.shape[1]
        if reach == "all":
            found = (self.rerun.keys(layer, 0, n) * grads).sum(-1)
            return found.unflatten(2, (heads, -1)).sum(3)
        out = torch.zeros(*grads.shape[:2], heads, device=grads.device, dtype=grads.dtype)
        for row, prompt in enumerate(self.prompts):  # a named stretch: filed under its first position
            start, stop = rows_of(Site("k", layer, 0, reach), prompt)
            found = (self.rerun.keys(layer, start, stop, row) * grads[row : row + 1]).sum(-1)
            out[row, start] = found.unflatten(2, (heads, -1)).sum((1, 3))[0]
        return out

    def _gradients(self, method: str) -> Iterator[dict[str, Tensor]]:
        """Gradients by hook; then, if asked for, those with each layer's contribution dropped."""
        names = list(dict.fromkeys([*self.names, *self.behind]))
        steps = self.job.steps
        shares = [(k - 0.5) / steps for k in range(1, steps + 1)]
        if method == "ig-inputs":
            runs = (self._backward(names, self._between(first_hook(self.model), x)) for x in shares)
            yield _mean(runs, steps)
        elif method == "ig-activations":
            whole: dict[str, Tensor] = {}
            for name in names:
                whole |= _mean((self._backward([name], self._between(name, x)) for x in shares), steps)
            yield whole
        else:
            drops, ids = range(self.model.n_layers) if self.grad_drop else (), self.ids[self.base]
            metric = self.job.metric
            yield from backward(self.model, ids, names, metric, self.read, drops=drops, secants=self.secants)

    def _backward(self, names: Sequence[str], override: tuple[str, Any]) -> dict[str, Tensor]:
        ids = self.ids[self.base]
        return next(backward(self.model, ids, names, self.job.metric, self.read, override=override))

    def _difference(self, name: str) -> Tensor:
        return self.acts[self.source][name] - self.acts[self.base][name]

    def _between(self, name: str, share: float) -> tuple[str, Any]:
        a, b = self.acts[self.base][name], self.acts[self.source][name]
        return name, lambda x, hook: torch.lerp(a, b, share).requires_grad_()


def _mean(runs: Iterable[dict[str, Tensor]], n: int) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for grads in runs:
        total = {name: g / n + total[name] if total else g / n for name, g in grads.items()}
    return total


def _reach(site: Site) -> str:
    """Which positions a site changes: ``"all"``, ``"each"`` (single ones), or the name of a span."""
    return "all" if site.position is None else site.position if isinstance(site.position, str) else "each"


def _z(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def z_of(site: Site) -> str:
    """The hook of z in the layer of a site."""
    return _z(site.layer or 0)


def first_hook(model: Model) -> str:
    """Where token embeddings enter."""
    return "hook_embed" if "hook_embed" in model.bridge.hook_dict else "blocks.0.hook_resid_pre"


def backward(
    model: Model,
    ids: Sequence[Sequence[int]],
    names: Sequence[str],
    metric: Metric,
    read: Readout,
    *,
    override: tuple[str, Any] | None = None,
    drops: Sequence[int] = (),
    secants: Secants | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the metric, summed over a batch of one length, at some hooks; one forward.

    First the plain ones, then for each layer in ``drops`` those without what flows through the layer's attention and
    MLP output. ``override``: a hook that sets an activation; ``secants``: what turns slopes into secants on the way.
    InterpError for a metric without a gradient.
    """
    kept: dict[str, Tensor] = {}
    dropped: list[int] = []

    def branch(name: str) -> tuple[str, Any]:
        def hook(x: Tensor, hook: Any) -> Tensor:
            kept[name] = x.clone()
            return kept[name]

        return name, hook

    def gate(layer: int) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor | None:
            if not x.requires_grad:
                return None
            x = x.clone()
            x.register_hook(lambda g: torch.zeros_like(g) if layer in dropped else g)
            return x

        return hook

    pairs: list[tuple[str, Any]] = [(first_hook(model), lambda x, hook: x.detach().requires_grad_())]
    pairs += [] if override is None else [override]
    pairs += map(branch, names)
    pairs += [] if secants is None else secants.hooks()
    for layer in drops:
        writes = [f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"]
        writes = [w for w in writes if w in model.bridge.hook_dict]
        if not writes:
            raise ModelError(f"{model.name}: what layer {layer} writes has no hook: take grad_drop=False")
        pairs += [(name, gate(layer)) for name in writes]
    with without_weight_gradients(model), torch.enable_grad(), hooks(model, *pairs):
        total = metric(model.last_logits(torch.tensor([list(p) for p in ids], device=model.device)), read).sum()
    if not total.requires_grad:
        raise InterpError(f"metric {metric.name!r} has no gradient: attribution needs one")
    for layers in ([], *([x] for x in drops)):
        dropped[:] = layers
        last = not drops or layers == [drops[-1]]
        found = torch.autograd.grad(total, list(kept.values()), materialize_grads=True, retain_graph=not last)
        yield dict(zip(kept, found, strict=True))
