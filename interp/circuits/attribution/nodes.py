"""Attribution of nodes: streams, layers' outputs, heads, q, k, v, and neurons.

The effect of patching a site is estimated as (source − base) · gradient of the metric at the site:

* ``"atp"``: the gradient in the base run (Nanda 2023; Kramár et al. 2024, arXiv 2403.00745, eq. 4). One backward pass
  serves all sites. The estimate is first order in the change, and blind to saturated attention.
* ``"atp-qk"``: the same, except that queries and keys are estimated by the exact change of their head's z
  (`interp.circuits.attribution.qk_fix`), as published. Nodes before a saturated head still have no gradient through it.
* ``"atp-carried"``: the same, with the fix carried on to the nodes that queries and keys are computed from (our
  addition; the rescale rule of DeepLIFT, Shrikumar et al. 2017, on softmax). With δ the difference of a query or key
  between the two runs and E its exact effect, its gradient g becomes g + (E − g·δ) δ/‖δ‖². The effects of everything
  that a key reads then add up to E.
* ``"ig-inputs"``: the mean of the gradient over ``steps`` runs in which the token embeddings are interpolated between
  the two prompts (Sundararajan et al. 2017), at shares (k − ½)/steps of the way; the change is that of the site itself.
  Over all positions of the embeddings, the estimates sum to the whole difference of the metric.
* ``"ig-activations"``: the mean over runs in which the site's own activation is interpolated between the two runs, all
  its heads (or neurons) and positions together: ``steps`` passes for each component of each layer. The estimates sum to
  the effect of patching all of them at once.

`atp_star` ranks by |estimate| and adds GradDrop: the estimate is repeated with the gradient through one layer's
contribution to the residual stream set to zero, for each layer in turn, and the absolute values are averaged, so that
two paths of opposite sign do not hide each other. The estimate with nothing dropped also counts in the average (eq. 12
leaves it out); otherwise, in a model of few layers, a node whose only path passes through all of them would score 0.

Activations and gradients of the hooks that are read are held for a batch of tokens (`TOKENS`): memory grows with
positions × d_model × layers, not with the number of sites. No effect of one site on another is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.attribution.hook_gradients import Override, first_hook, hook_gradients
from interp.circuits.attribution.qk_fix import Rerun, Secants, check_heads_apart
from interp.circuits.attribution.slope import check_slope
from interp.circuits.capture import capture, capture_calls
from interp.circuits.choices import NodeMethod
from interp.circuits.inputs import TOKENS, Pairs, token_batches
from interp.engine import Engine
from interp.engine.cells import rows_of
from interp.errors import InterpError, SiteError
from interp.metrics import Metric, MetricFn, as_metric, logit_diff
from interp.model.model import Model
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.pairs import encode_pairs, listed_prompts
from interp.recipes.choices import MODES
from interp.recipes.inputs import check_metric, expand_sites, provenance_of
from interp.recipes.patching import Mode
from interp.recipes.rows import EffectRows
from interp.recipes.scoring import readout
from interp.recipes.targets import as_sites
from interp.results.effects import SITE_COLUMNS, Effects
from interp.sites import EACH, Site, Sites
from interp.utils.arguments import check_whole
from interp.utils.progress import Advance, progress

METHODS: dict[NodeMethod, str] = {
    "atp": "attribution patching (estimate)",
    "atp-qk": "attribution patching, QK fix (estimate)",
    "atp-carried": "attribution patching, QK fix carried on (estimate)",
    "ig-inputs": "integrated gradients on inputs (estimate)",
    "ig-activations": "integrated gradients on activations (estimate)",
}
SPANS = "named spans cannot be ranked: use sites with positions, or with all positions at once"
SiteList = Iterable[Site | str] | Site | str


@in_session
def attribute_sites(
    model: Model,
    pairs: Pairs,
    sites: SiteList | None = None,
    metric: Metric | MetricFn | str = logit_diff,
    mode: Mode = "denoise",
    *,
    method: NodeMethod = "atp",
    steps: int = 10,
) -> Effects:
    """Estimate by gradients the effects that `interp.patch` would measure.

    The module docstring describes the methods. Sites (default: every head) and modes are those of `interp.patch`; a
    neuron is a site of ``mlp_post``. ``patched`` is the base run's metric plus the estimate. ``steps`` is the number of
    steps of integrated gradients. Raises SiteError for resid_mid, whose hook does not carry the whole stream,
    ModelError if the QK fix is not defined for the model, and InterpError for a metric without a gradient.
    """
    if method not in METHODS:
        raise InterpError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    job = _SiteAttribution(model, pairs, sites, metric, mode, steps)
    rows = EffectRows(METHODS[method], mode, job.metric)
    with progress(f"attribute sites ({method})", len(job.prompts)) as advance:
        for e in job.estimates(method, advance=advance):
            rows.add(e.example, e.site, e.prompt, e.clean, e.corrupt, e.base + float(e.changes[0]))
    recipe = {"method": method, "steps": steps if method.startswith("ig") else None, **provenance_of(pairs)}
    recipe |= model.head_axes.told(rows.columns["component"])
    return rows.effects(model, job.pairs, job.prompts, engine="backward passes", evidence="estimate", **recipe)


@in_session
def atp_star(
    model: Model,
    pairs: Pairs,
    sites: SiteList | None = None,
    metric: Metric | MetricFn | str = logit_diff,
    mode: Mode = "noise",
    *,
    qk_fix: Literal["carried", "nodes"] | bool = "carried",
    grad_drop: bool = True,
) -> pd.DataFrame:
    """Rank sites by AtP*, with the QK fix and GradDrop.

    Method: Kramár et al. 2024 (arXiv 2403.00745). Table with one row per site, best first. ``score`` is the mean over
    pairs of |estimate|; with GradDrop, of the mean of |estimate| with nothing dropped and with each layer dropped
    except the site's own. ``estimate`` is the mean of the signed estimate without GradDrop. Both are in the metric's
    unit. ``qk_fix="nodes"`` (or True) is the published fix, of queries and keys alone; ``"carried"`` extends it to the
    nodes that they are computed from, as the module docstring says. GradDrop takes one backward pass per layer. It
    helps where the estimates of a single pair cancel; over many pairs it matters little.

    Raises the errors of `attribute_sites`, and InterpError for named spans or positions that are not in every prompt.
    """
    if qk_fix not in ("carried", "nodes", True, False):
        raise InterpError(f"qk_fix={qk_fix!r}: expected 'carried', 'nodes' or False")
    job = _SiteAttribution(model, pairs, sites, metric, mode, 1)
    method: NodeMethod = "atp-carried" if qk_fix == "carried" else "atp-qk" if qk_fix else "atp"
    keys, scores, signed = [], [], []
    with progress("AtP*", len(job.prompts)) as advance:
        for e in job.estimates(method, grad_drop, advance):
            keys.append((e.site.component, e.site.layer, e.site.head, e.site.position))
            signed.append(e.changes[0])
            own_layer = grad_drop and e.site.layer is not None and not e.site.component.startswith("resid")
            scores.append(np.abs(e.changes).sum() / (len(e.changes) - own_layer))
    table = pd.DataFrame(keys, columns=pd.Index(SITE_COLUMNS)).assign(score=scores, estimate=signed)
    ranked = by_site(table, len(job.pairs), {"score": ("score", "mean"), "estimate": ("estimate", "mean")})
    ranked.attrs.update(model.provenance(), method="AtP*", qk_fix=qk_fix, grad_drop=grad_drop, mode=mode)
    ranked.attrs.update(model.head_axes.told(table["component"]))
    return ranked.sort_values("score", ascending=False, ignore_index=True, kind="stable")


def by_site(table: Any, n_prompts: int, columns: dict[str, tuple[str, str]]) -> Any:
    """Aggregate a table of (prompt, site) rows by site.

    Raises InterpError if sites differ between prompts.
    """
    if pd.Series([isinstance(p, str) for p in table["position"]]).any():
        raise InterpError(SPANS)
    numbers = {c: table[c].astype("Int64") for c in ("layer", "head", "position")}
    grouped = table.assign(**numbers).groupby(list(SITE_COLUMNS), dropna=False, observed=True, sort=False)
    aggregated = grouped.agg(**columns, n=("component", "size")).reset_index()
    if (aggregated["n"] != n_prompts).any():
        raise InterpError("some positions are not in every prompt: use prompts of one length, or positions='all'")
    return aggregated.drop(columns="n")


@dataclass(frozen=True)
class Estimate:
    """One site on one prompt.

    ``clean``, ``corrupt``, ``base``: the metric of these runs. ``changes``: the estimate, then (with GradDrop) the
    estimates with each layer's contribution dropped.
    """

    example: int
    site: Site
    prompt: Encoded
    clean: float
    corrupt: float
    base: float
    changes: Float[np.ndarray, " drops"]


class _SiteAttribution:
    """The checked arguments of an attribution, and its estimates."""

    def __init__(
        self, model: Model, pairs: Pairs, sites: SiteList | None, metric: Metric | MetricFn | str, mode: Mode,
        steps: int,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise InterpError(f"unknown mode {mode!r}: 'denoise' (clean into corrupt) or 'noise' (corrupt into clean)")
        check_whole(1, steps=steps)
        self.model, self.metric, self.mode, self.steps = model, as_metric(metric), mode, steps
        self.pairs = listed_prompts(pairs)
        self.prompts = encode_pairs(self.pairs, model.coder)
        check_metric(self.metric, self.prompts, model)
        self.sites: Sites = model.sites("z") if sites is None else as_sites(sites)
        Engine(model, "naive").check_sites(self.sites)
        if any(s.component == "resid_mid" for s in self.sites):
            raise SiteError(
                "resid_mid: its gradient cannot be read at its hook; use resid_pre, or attn_out and mlp_out"
            )
        for prompt in self.prompts:
            for site in self.sites:
                if site.position != EACH:
                    rows_of(site, prompt)

    def estimates(
        self, method: NodeMethod, grad_drop: bool = False, advance: Advance = lambda n: None
    ) -> Iterator[Estimate]:
        """Yield the estimates of every prompt and site, in batches of one length."""
        fixed = self._fixed_components(method)
        if fixed:
            check_heads_apart(self.model, self.prompts[0].clean, fixed)
        for members in token_batches(self.prompts, TOKENS):
            prompts = [self.prompts[i] for i in members]
            batch = _SiteBatch(self, prompts, fixed, method == "atp-carried", grad_drop)
            if method.startswith("atp"):
                logits = {run: acts["logits"] for run, acts in batch.acts.items()}
                check_slope(self.metric, logits[batch.base], logits[batch.source], batch.read, batch.base)
            for row, (i, prompt) in enumerate(zip(members, prompts, strict=True)):
                clean, corrupt = batch.scores["clean"][row], batch.scores["corrupt"][row]
                base = clean if self.mode == "noise" else corrupt
                for site, changes in batch.changes(method, row, prompt):
                    yield Estimate(i, site, prompt, clean, corrupt, base, changes)
                advance(1)

    def _fixed_components(self, method: NodeMethod) -> list[str]:
        """The components whose effects the QK fix replaces: among q and k."""
        fixed = ["k", "q"] if method == "atp-carried" else []
        if method == "atp-qk":
            fixed = sorted({s.component for s in self.sites} & {"q", "k"})
        if "k" in fixed and self.model.instrument.edited is not None:
            raise InterpError(
                "the QK fix computes the effect of single keys from scores that know no attention edit: inside "
                "model.edited, use qk_fix=False or method='atp'"
            )
        return fixed


class _SiteBatch:
    """Prompts of one length: activations of both runs, and all sites' estimates."""

    def __init__(
        self, job: _SiteAttribution, prompts: Sequence[Encoded], fixed: Sequence[str], carried: bool, grad_drop: bool
    ) -> None:
        self.job, self.model, self.fixed, self.grad_drop = job, job.model, fixed, grad_drop
        self.prompts = prompts
        self.ids = {run: [getattr(p, run) for p in prompts] for run in ("clean", "corrupt")}
        self.base, self.source = ("corrupt", "clean") if job.mode == "denoise" else ("clean", "corrupt")
        self.names = list(dict.fromkeys(s.hook_name for s in job.sites))
        self.z_names = list(dict.fromkeys(_z_hook(s.layer or 0) for s in job.sites if s.component in fixed))
        layers = self.model.attention_layers if carried else ()
        qk = [f"blocks.{i}.attn.hook_{c}" for i in layers for c in "qk"]
        hook_names = list(dict.fromkeys([*self.names, *self.z_names, *qk, first_hook(self.model)]))
        self.acts, calls = {}, {}
        for run, ids in self.ids.items():
            with capture_calls(self.model) if fixed else nullcontext() as calls[run]:
                self.acts[run] = capture(self.model, ids, hook_names)
        self.rerun = Rerun(self.model.instrument.backend, calls[self.base], calls[self.source]) if fixed else None
        self.secants = Secants(self.rerun, {n: self._difference(n) for n in qk}) if carried and self.rerun else None
        self.read = readout(prompts, list(self.acts["clean"]["logits"]))
        self.scores = {run: job.metric(self.acts[run]["logits"], self.read).double().tolist() for run in self.ids}
        if not np.isfinite(list(self.scores.values())).all():
            raise InterpError(f"metric {job.metric.name!r} returned NaN or infinity for the unmodified prompts")
        self.products: dict[tuple[str, str], Tensor] | None = None

    def changes(
        self, method: NodeMethod, row: int, prompt: Encoded
    ) -> Iterator[tuple[Site, Float[np.ndarray, " drops"]]]:
        """Yield every site of one prompt with its estimates."""
        if self.products is None:
            self.products = self._products(method)
        for site in expand_sites(self.job.sites, prompt):
            products = self.products[site.hook_name, _reach(site)][:, row]
            start, stop = (0, 1) if _reach(site) == "all" else rows_of(site, prompt)
            products = products[:, start:stop] if site.head is None else products[:, start:stop, site.head]
            yield site, products.sum(1).numpy()

    def _products(self, method: NodeMethod) -> dict[tuple[str, str], Tensor]:
        """Estimates by hook and reach, float64 on the CPU.

        Each is [drops, batch, position, (heads or neurons)]. Positions that are all patched at once are already summed.
        """
        reaches = list(dict.fromkeys((s.hook_name, _reach(s)) for s in self.job.sites))
        products: dict[tuple[str, str], list[Tensor]] = {r: [] for r in reaches}
        for grads in self._gradients(method):
            for name, reach in reaches:
                products[name, reach].append(self._product(name, reach, grads))
        return {r: torch.stack(parts) for r, parts in products.items()}

    def _product(self, name: str, reach: str, grads: dict[str, Tensor]) -> Tensor:
        """The estimates at one hook, [batch, position, (heads or neurons)]."""
        component, layer = name.rpartition("hook_")[2], name.split(".")[1] if "." in name else "0"
        if component in self.fixed and name.endswith(f"attn.hook_{component}"):
            product = self._through_softmax(component, int(layer), reach, grads[_z_hook(int(layer))])
        else:
            product = self._difference(name) * grads[name]
            product = product if component == "post" else product.sum(-1)  # a neuron is a scalar: nothing to sum
        product = product.double().cpu()
        return product.sum(1, keepdim=True) if reach == "all" else product

    def _through_softmax(self, component: str, layer: int, reach: str, grads: Tensor) -> Tensor:
        """Estimates for q or k [batch, position, heads], given the gradient at z."""
        assert self.rerun is not None
        if component == "q":
            return (self.rerun.queries(layer) * grads).sum(-1)
        heads = self.model.n_kv_heads
        if reach == "each":
            return self.rerun.each_key(layer, grads)
        n = grads.shape[1]
        if reach == "all":
            effects = (self.rerun.keys(layer, 0, n) * grads).sum(-1)
            return effects.unflatten(2, (heads, -1)).sum(3)
        out = torch.zeros(*grads.shape[:2], heads, device=grads.device, dtype=grads.dtype)
        for row, prompt in enumerate(self.prompts):  # a named span: stored at its first position
            start, stop = rows_of(Site("k", layer, 0, reach), prompt)
            effects = (self.rerun.keys(layer, start, stop, row) * grads[row : row + 1]).sum(-1)
            out[row, start] = effects.unflatten(2, (heads, -1)).sum((1, 3))[0]
        return out

    def _gradients(self, method: NodeMethod) -> Iterator[dict[str, Tensor]]:
        """Yield gradients by hook.

        With GradDrop, the gradients with each layer's contribution dropped follow.
        """
        names = list(dict.fromkeys([*self.names, *self.z_names]))
        steps = self.job.steps
        shares = [(k - 0.5) / steps for k in range(1, steps + 1)]
        if method == "ig-inputs":
            runs = (self._gradients_at(names, self._interpolate(first_hook(self.model), x)) for x in shares)
            yield _mean(runs, steps)
        elif method == "ig-activations":
            by_hook: dict[str, Tensor] = {}
            for name in names:
                by_hook |= _mean((self._gradients_at([name], self._interpolate(name, x)) for x in shares), steps)
            yield by_hook
        else:
            drops, ids = range(self.model.n_layers) if self.grad_drop else (), self.ids[self.base]
            metric = self.job.metric
            yield from hook_gradients(self.model, ids, names, metric, self.read, drops=drops, secants=self.secants)

    def _gradients_at(self, names: Sequence[str], override: Override) -> dict[str, Tensor]:
        ids = self.ids[self.base]
        return next(hook_gradients(self.model, ids, names, self.job.metric, self.read, override=override))

    def _difference(self, name: str) -> Tensor:
        return self.acts[self.source][name] - self.acts[self.base][name]

    def _interpolate(self, name: str, share: float) -> Override:
        """Set an activation to a share of the way from the base run to the source run."""
        a, b = self.acts[self.base][name], self.acts[self.source][name]
        return name, lambda x, hook: torch.lerp(a, b, share).requires_grad_()


def _mean(runs: Iterable[dict[str, Tensor]], n: int) -> dict[str, Tensor]:
    """Mean of n sets of gradients, by hook."""
    total: dict[str, Tensor] = {}
    for grads in runs:
        total = {name: g / n + total[name] if total else g / n for name, g in grads.items()}
    return total


def _reach(site: Site) -> str:
    """The positions that a site covers.

    ``"all"``, ``"each"`` (a single one), or the name of a span.
    """
    return "all" if site.position is None else site.position if isinstance(site.position, str) else "each"


def _z_hook(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"
