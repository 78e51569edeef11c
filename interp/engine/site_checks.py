"""Check, before any work, that a model has the sites of a sweep and that they can be set."""

from __future__ import annotations

from collections.abc import Sequence

from interp.engine.packed_forward import find_other_mixer
from interp.errors import SiteError
from interp.model.model import Model
from interp.sites import COMPONENTS, Site


def check_sites(model: Model, sites: Sequence[Site]) -> None:
    """Raise SiteError for the first site that the model lacks or that means something else in it."""
    if not sites:
        raise SiteError("there are no sites to sweep: pass e.g. model.sites('z')")
    hook_names = model.bridge.hook_dict
    heads = {"query": model.n_heads, "kv": model.n_kv_heads}
    if any(s.spec.heads == "neuron" for s in sites):
        heads["neuron"] = model.n_neurons
    for site in sites:
        _check_numbers(model, site, heads.get(COMPONENTS[site.component].heads or "", 0))
        model.check_axes(site.component)
        if site.hook_name not in hook_names:
            elsewhere = model.layers_with(site.component)
            where = f"; of its layers, {', '.join(map(str, elsewhere))} have it" if elsewhere else ""
            raise SiteError(f"site {site}: {model.name} has no {site.component!r} ({site.hook_name}){where}")
        if site.component == "resid_mid" and site.layer is not None and not _attention_alone(model, site.layer):
            raise SiteError(
                f"site {site}: block {site.layer} of {model.name} adds more than attention before its MLP, "
                "so that 'resid_mid' cannot be set: use 'resid_pre' or 'resid_post'"
            )
    try:
        with ResultHooks(model, any(s.component == "result" for s in sites)):
            pass
    except NotImplementedError:
        raise SiteError(
            f"TransformerLens has no per-head 'result' of the attention of {model.name}: patch 'z', which the "
            "output projection maps to it"
        ) from None


def _check_numbers(model: Model, site: Site, n_heads: int) -> None:
    """Raise SiteError for a layer or head that the model does not have."""
    if site.layer is not None and not 0 <= site.layer < model.n_layers:
        raise SiteError(f"site {site}: the model has layers 0 to {model.n_layers - 1}")
    if site.head is not None and not 0 <= site.head < n_heads:
        unit = "neuron" if site.spec.heads == "neuron" else "head"
        has = f"has {unit}s 0 to {n_heads - 1} in this model" if n_heads else f"has no {unit}s in this model"
        raise SiteError(f"site {site}: {site.component!r} {has}")


def _attention_alone(model: Model, layer: int) -> bool:
    """Whether resid_mid is the sum of resid_pre and the attention's output.

    It is set through that output.
    """
    return f"blocks.{layer}.hook_attn_out" in model.bridge.hook_dict and find_other_mixer(model, layer) is None


class ResultHooks:
    """Turns on TransformerLens' per-head results while a 'result' site needs them."""

    def __init__(self, model: Model, needed: bool):
        self.bridge, self.needed = model.bridge, needed
        self.before = bool(getattr(model.bridge.cfg, "use_attn_result", False))

    def __enter__(self) -> None:
        if self.needed and not self.before:
            self.bridge.set_use_attn_result(True)

    def __exit__(self, *_: object) -> None:
        if self.needed and not self.before:
            self.bridge.set_use_attn_result(False)
