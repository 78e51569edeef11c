"""Interventions that are carried out inside attention rather than on its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Edit:
    """What attention is told to do differently. Applied in this order, whatever the order of the arguments:

    1. temperature: the model's logits (with ALiBi, bias and the learned sink) are divided by it. > 0. Two or fewer
       dimensions broadcast over [B, H], three over [B, H, M].
    2. bias: added to the logits, by pair of segments: a log gain, since exp(bias) multiplies the weights before they
       are normalised. Finite; [Sq, Sk] or more dimensions, broadcast over [B, H, Sq, Sk].
    3. knockout: True cuts what the queries of a segment read from the keys of a segment. Bool, [Sq, Sk] or more
       dimensions, broadcast over [B, H, Sq, Sk]. With renormalise=True the cells are hidden before the softmax and
       the others share their weight; with renormalise=False they are zeroed after it, so that only their contribution
       is gone and the row sums to less than 1. lse is then that of the uncut row.
    4. Statistics are taken here.
    5. gate, replacement: out = gate * z + (1 - gate) * replacement, with z = sum_j p_ij v_j. gate: two or fewer
       dimensions broadcast over [B, H], three over [B, H, M]; any real number. replacement: three or fewer dimensions
       broadcast over [B, H, Dv], four over [B, H, M, Dv]. Without replacement: out = gate * z. Without gate, a
       replacement replaces all (gate = 0).

    Every field may differ between batch rows, so that one call carries many interventions. knockout and bias are read
    through `attend`'s q_segments and k_segments. Gradients flow to gate, replacement, temperature and bias.

    report_mass: `attend` also returns mass_before and mass_after, the mass on each key segment without temperature,
    bias and knockout, and with them. Needs k_segments, and a second pass.
    """

    gate: Tensor | None = None
    replacement: Tensor | None = None
    temperature: Tensor | None = None
    bias: Tensor | None = None
    knockout: Tensor | None = None
    renormalise: bool = True
    report_mass: bool = False
