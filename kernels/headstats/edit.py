"""`Edit`: interventions inside attention rather than on its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Counterfactual = Literal["uniform", "reversed", "shuffled", "random", "identity"]


@dataclass(frozen=True, eq=False)
class Edit:
    """Changes to an attention call.

    They act in this order, whatever the order of the arguments:

    1. pattern_from=(q2, k2): the heads of pattern_heads take their pattern from q2 and k2, which have the shapes of q
       and k (with a prefix, k2 replaces the own part); values stay.
    2. logit_factor, logit_raise: with z = softcap(scale q.k), z becomes factor * z, and the result becomes
       z + raise * |z|: before ALiBi, bias and mask. A factor is not a temperature of the row: where z < 0, a
       factor > 1 lowers a weight.
    3. temperature: the model's logits (with ALiBi, bias and the learned sink) are divided by it. > 0.
    4. bias: added to the logits. It is a log gain, since exp(bias) multiplies the weights before they are normalised.
    5. With renormalise=True, gain (>= 0) multiplies the weights and knockout cuts cells before the softmax, so that
       the other cells share what is lost: log(gain) is added, and cells of gain 0 and cut cells are hidden.
    6. counterfactual: the weights of the heads of counterfactual_heads are replaced by another distribution over the
       keys that the query sees (see below).
    7. With renormalise=False, gain multiplies the weights p and knockout zeroes them after the softmax: rows need not
       sum to 1, and lse is that of the row before.
    8. take, give, keep_fraction: cells of take keep that fraction of their weight. What they lose goes to the cells of
       give in the same row, in proportion to their weights. The row's sum stays. A row that sees no cell of give is not
       changed. keep_fraction: from 0 (all weight is taken) to 1 (no effect, for heads and rows that do not change).
    9. Statistics are computed here.
    10. gate, replacement: out = gate * z + (1 - gate) * replacement, with z = sum_j p_ij v_j. gate: any real number.
       Without replacement: out = gate * z. Without gate, a replacement replaces all (gate = 0).

        edit = headstats.Edit(knockout=cut, gate=gate)  # cut: bool [Sq, Sk]; gate: [H] or [B, H, M]
        headstats.attend(q, k, v, q_segments=ids, k_segments=ids, edit=edit)

    logit_factor, logit_raise, bias, gain, knockout, take and give are tables over (segment of the query, segment of
    the key). They are [Sq, Sk] or have more dimensions, are broadcast over [B, H, Sq, Sk], and are read through
    `attend`'s q_segments and k_segments. Id -1 is in no segment, and no table applies to it. knockout, take and give
    are bool, the others floating and finite. temperature, gate and keep_fraction: two or fewer dimensions broadcast
    over [B, H], three over [B, H, M]; keep_fraction may be a plain number. replacement: three or fewer dimensions
    broadcast over [B, H, Dv], four over [B, H, M, Dv]. pattern_heads, counterfactual_heads: bool [H], [B, H] or
    [B, H, M], None = all heads. Every field except counterfactual, seed and the flags may differ between batch rows, so
    that one call carries many interventions.

    counterfactual, with n the number of keys that the query sees and m = sum_j p_ij, which is 1 without a learned sink:

        =========  ==========================================  ====================================================
        .          renormalise=True: the row keeps its sum m   renormalise=False
        =========  ==========================================  ====================================================
        uniform    m / n                                       1 / N
        reversed   (max_j p_ij - p_ij), normalised to m;       max_j p_ij - p_ij
                   a row of equal weights stays
        shuffled   the row's own weights, permuted             the same
        random     u_ij in (0, 1), normalised to m             u_ij / sum over all N keys of u_ij, seen or not
        identity   m at the query's own position, else 0       1 at the query's own position, else 0
        =========  ==========================================  ====================================================

    u and the permutation depend only on a hash of (seed, batch row, head, position of the query, key)
    (edits/hash_noise.py). They are the same on every backend, for every split of the work, and for a query decoded
    alone. The permutation follows the hash: of the visible keys, the k-th from the left gets the weight of the key with
    the k-th smallest hash. An identity row whose own position is not visible has no weight at all.

    rows: the queries on which all of this acts, bool [M] or [B, M]; the others are computed as without an edit.
    phase: "prompt" or "decoding": only the queries at positions (i + N - M, padding included) below prompt_length, or
    only the others. prompt_length is an int, or one for each batch row as [B]. Without prompt_length, a call with M = N
    is prompt and one with M < N is decoding; where this is undecidable (M > N, or a shared prefix) it must be given.

    report_mass: `attend` also returns mass_before and mass_after, the mass on each key segment without steps 1 to 8 and
    with them. This needs k_segments, and a second pass.

    Gradients flow to q2, k2 and all floating fields. (A renormalised gain of 0 has no gradient: a gain that requires
    grad and is 0 somewhere is refused.)
    """

    gate: Tensor | None = None
    replacement: Tensor | None = None
    temperature: Tensor | None = None
    bias: Tensor | None = None
    knockout: Tensor | None = None
    renormalise: bool = True
    report_mass: bool = False
    logit_factor: Tensor | None = None
    logit_raise: Tensor | None = None
    gain: Tensor | None = None
    take: Tensor | None = None
    give: Tensor | None = None
    keep_fraction: Tensor | float | None = None
    counterfactual: Counterfactual | None = None
    counterfactual_heads: Tensor | None = None
    seed: int = 0
    pattern_from: tuple[Tensor, Tensor] | None = None
    pattern_heads: Tensor | None = None
    rows: Tensor | None = None
    phase: Literal["prompt", "decoding"] | None = None
    prompt_length: Tensor | int | None = None


# Fields that are tables over pairs of segments.
TABLES = ("logit_factor", "logit_raise", "bias", "gain", "knockout", "take", "give")
