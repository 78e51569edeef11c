"""Ablation by the mean of a layer's other heads (V-SEAM, arXiv 2509.14837)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from interp.engine import CellWrite
from interp.engine.cells import rows_of
from interp.errors import InterpError, SiteError
from interp.prompts.coder import Encoded
from interp.recipes.targets import Target
from interp.sites import Site


def check_other_heads(plan: Iterable[Sequence[Target]], n_heads: int) -> None:
    """Raise SiteError for sites other than heads' ``z``, InterpError where a layer has no other head left."""
    for target in dict.fromkeys(t for targets in plan for t in targets):
        ablated: dict[int | None, set[int | None]] = {}
        for site in target.sites:
            if site.component != "z":
                raise SiteError(f"site {site}: using='other_heads' replaces a head's z, so it takes sites of z only")
            ablated.setdefault(site.layer, set()).add(site.head)
        for layer, heads in ablated.items():
            if len(heads) < n_heads:
                continue
            raise InterpError(
                f"using='other_heads': all {n_heads} heads of layer {layer} are ablated together"
                if n_heads > 1
                else "using='other_heads': the layers of this model have 1 head, so there is no other"
            )


def other_heads_writes(sites: Sequence[Site], prompt: Encoded, n_heads: int) -> list[CellWrite]:
    """Return the writes that give every site the mean z of the heads of its layer that are not ablated there.

    A head counts as ablated at the tokens of its own site.
    """
    ranges = [(site, *rows_of(site, prompt)) for site in sites]
    edges = sorted({edge for _, *rows in ranges for edge in rows})
    writes = []
    for start, stop in pairwise(edges):  # between two edges, the same heads are ablated in every row
        here = dict.fromkeys(s.at(None) for s, first, last in ranges if first <= start and stop <= last)
        for site in here:
            ablated = {s.head for s in here if s.layer == site.layer}
            others = tuple(head for head in range(n_heads) if head not in ablated)
            writes.append(CellWrite(site, start, stop, None, "mean", others))
    return writes
