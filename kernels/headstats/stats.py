"""The table of statistics: the one place where a statistic is defined.

Every row gives the formula on the full pattern (`dense`), which the reference backend runs and against which every
other backend is tested. To add a statistic, add one row to
`STATISTICS`: `StatSpec` and `AttentionStats` get a field from it, the reference and blocked backends compute it, and
the tests over the table cover it. A faster form for blocked tiles (`blocked.statistics.FAST`), for the compiled backend
or for Triton is optional.

One rule holds for all statistics: they describe the weights p_ij that multiply the values, after mask, bias and
softcap and before the gate. A learned sink takes mass from the row (sum_j p_ij < 1) but is not a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped


@dataclass
class Pattern:
    """An attention pattern, or the part with all keys visible to some queries.

    It may have any leading dimensions.
    """

    p: Float[Tensor, "*lead m n"]  # weights, 0 where hidden
    scores: Float[Tensor, "*lead m n"]  # logits after scale, softcap, bias and edits; -1e30 or less where hidden
    log_p: Float[Tensor, "*lead m n"]  # ln p, accurate also where p underflows; 0 where hidden
    visible: Bool[Tensor, "*#lead m n"]
    distance: Float[Tensor, "m n"]  # i + N - M - j, in tokens
    key_rank: Int[Tensor, "*#lead #m n"]  # 0, 1, ... over the real keys from the left; N for padded keys
    real_query: Bool[Tensor, "*#lead m #n"]
    v: Float[Tensor, "*#lead n Dv"]
    z: Float[Tensor, "*lead m Dv"]  # sum_j p_ij v_j
    first_key: int  # index of the first key of this part
    key_segment: Int[Tensor, "*#lead n"] | None
    n_segments: int
    targets: Int[Tensor, "*#lead m T"] | None
    features: Float[Tensor, "*#lead n F"] | None


class TopK(NamedTuple):
    """The k largest weights of each row, largest first.

    Weight 0 and index -1 where fewer keys are visible.
    """

    values: Float[Tensor, "B H M k"]
    indices: Int[Tensor, "B H M k"]


Value = int | bool | tuple[int, int]  # the value of a statistic in StatSpec
Result = Tensor | TopK


@dataclass(frozen=True)
class Statistic:
    """One row of the table.

    axis: "query" for a statistic of each query, [B, H, M, ...]; "key" for one of each key, [B, H, N].
    shape: shape of the result.
    empty: the value for a query that sees no key, or for a key that no query counts for.
    dense: (pattern, the value in StatSpec) -> statistic. For axis="key" it returns, by `reduce`, the sum ("mean") or
        the maximum ("max") over the pattern's queries, or a sum whose square root is the result ("norm"). The sum of
        a mean is divided by the number of queries that `among` counts.
    among: (cells visible to a real query, distances, value) -> cells that count, for axis="key".
    default: the value in StatSpec(); None: computed when the argument that it needs is given.
    full: the value in StatSpec.all().  It also decides which values StatSpec accepts: a switch, a count or a range.
    count: for a statistic with a number, what the number counts.
    argument: the argument of `attend` that the statistic needs, if it needs one.
    """

    name: str
    axis: Literal["query", "key"]
    unit: str
    range: str
    definition: str
    source: str
    dense: Callable[[Pattern, Any], Result]
    empty: float = 0
    default: Value | None = False
    full: Value | None = True
    count: str = ""
    argument: str | None = None
    shape: str = "B H M"
    reduce: Literal["mean", "max", "norm"] = "mean"
    among: Callable[[Tensor, Tensor, Any], Tensor] = lambda seen, distance, value: seen


def _entropy(a: Pattern, _) -> Tensor:
    return -(a.p * a.log_p).sum(-1)


def _entropy_normalised(a: Pattern, _) -> Tensor:
    most = a.visible.sum(-1).to(a.p.dtype).clamp_min(1).log()
    return torch.where(most > 0, _entropy(a, _) / most.clamp_min(0.5), 0.0)  # the smallest nonzero value is ln 2


def _argmax(a: Pattern, _) -> Tensor:
    n = a.scores.shape[-1]
    keys = torch.arange(n, device=a.scores.device)
    best = a.scores.amax(-1, keepdim=True)
    first = torch.where(a.visible & (a.scores == best), keys, n).amin(-1)  # ties go to the leftmost key
    return torch.where((first == n) | a.p.isnan().any(-1), -1, first + a.first_key)


def _max_prob(a: Pattern, _) -> Tensor:
    return a.p.amax(-1)


def _topk(a: Pattern, k: int) -> TopK:
    short = max(0, k - a.p.shape[-1])
    order = a.scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]  # stable: ties go to the leftmost key
    seen = a.visible.expand(a.p.shape).gather(-1, order)
    values = a.p.gather(-1, order)
    indices = torch.where(seen & ~values.isnan(), order + a.first_key, -1)
    pad = torch.nn.functional.pad
    return TopK(pad(values, (0, short)), pad(indices, (0, short), value=-1))


def _effective(a: Pattern, _) -> Tensor:
    squares = a.p.square().sum(-1)
    return torch.where(squares == 0, 0.0, a.p.sum(-1).square() / squares.clamp_min(torch.finfo(a.p.dtype).tiny))


def _distance_var(a: Pattern, _) -> Tensor:
    mass = a.p.sum(-1).clamp_min(torch.finfo(a.p.dtype).tiny)
    mean = (a.p * a.distance).sum(-1) / mass
    return (a.p * (a.distance - mean[..., None]).square()).sum(-1) / mass


def _at_distance(a: Pattern, d: int) -> Tensor:
    return (a.p * (a.distance == d)).sum(-1)


def _segments(a: Pattern, _) -> Tensor:
    assert a.key_segment is not None  # validated: requested only with k_segments
    return a.p @ segment_members(a.key_segment, a.n_segments, a.p.dtype)


def segment_members(ids: Int[Tensor, "*lead n"], n_segments: int, dtype: torch.dtype) -> Float[Tensor, "*lead n S"]:
    """Return 1 where a key is in a segment, else 0."""
    return (ids[..., None] == torch.arange(n_segments, device=ids.device)).to(dtype)


def _segment_value_norms(a: Pattern, _) -> Tensor:
    assert a.key_segment is not None  # validated
    return a.p @ (segment_members(a.key_segment, a.n_segments, a.p.dtype) * a.v.norm(dim=-1, keepdim=True))


def _segment_outputs(a: Pattern, _) -> Tensor:
    assert a.key_segment is not None  # validated
    inside = segment_members(a.key_segment, a.n_segments, a.p.dtype).mT[..., None, :]  # S, one query for all, n
    return ((a.p[..., None, :, :] * inside) @ a.v[..., None, :, :]).transpose(-3, -2)


def _targets(a: Pattern, _) -> Tensor:
    assert a.targets is not None  # validated: requested only with targets
    n = a.p.shape[-1]
    columns = (a.targets - a.first_key).expand(*a.p.shape[:-1], -1)
    inside = (a.targets >= 0) & (columns >= 0) & (columns < n)  # a key outside the part is not visible
    if n == 0:
        return a.p.new_zeros(columns.shape)
    return torch.where(inside, a.p.gather(-1, columns.clamp(0, n - 1)), 0.0)


def _key_features(a: Pattern, _) -> Tensor:
    assert a.features is not None  # validated: requested only with key_features
    return a.p @ a.features


def _within(seen: Tensor, distance: Tensor, horizon: tuple[int, int]) -> Tensor:
    return seen & (distance >= horizon[0]) & (distance <= horizon[1])


def _of_real(a: Pattern) -> Tensor:
    return torch.where(a.real_query, a.p, 0.0)  # a product would let NaN of a padded query through


def _fai(a: Pattern, horizon: tuple[int, int]) -> Tensor:
    return torch.where(_within(a.real_query, a.distance, horizon), a.p, 0.0).sum(-2)


SPANS = "Attention Illuminates LLM Reasoning (arXiv 2510.13554)"
GU = "Gu et al. 2024, When Attention Sink Emerges"
KOBAYASHI = "Kobayashi et al. 2020, Attention is Not Only a Weight"
STATISTICS: tuple[Statistic, ...] = (
    Statistic(
        "entropy", "query", "nats", "[0, ln n_visible]", "-sum_j p_ij ln p_ij", "Shannon 1948", _entropy, default=True
    ),
    Statistic(
        "entropy_normalised", "query", "none", "[0, 1]",
        "entropy / ln(number of visible keys); 0 where one key is visible", "", _entropy_normalised,
    ),
    Statistic("max_prob", "query", "probability", "[0, 1]", "max_j p_ij", "", _max_prob, default=True),
    Statistic(
        "argmax", "query", "key index", "-1 ... N-1", "the leftmost j with the largest p_ij", "", _argmax,
        empty=-1, default=True,
    ),
    Statistic(
        "topk", "query", "probability, key index", "[0, 1], -1 ... N-1",
        "(values, indices) of the k largest p_ij, largest first, ties from the left (topk=k); 0 and -1 where fewer "
        "keys are visible", "", _topk, default=0, full=8, count="the number of keys", shape="B H M k",
    ),
    Statistic(
        "participation", "query", "probability", "[0, 1]", "sum_j p_ij^2", "inverse participation ratio",
        lambda a, _: a.p.square().sum(-1),
    ),
    Statistic(
        "effective_keys", "query", "keys", "[1, n_visible]",
        "(sum_j p_ij)^2 / sum_j p_ij^2: 1 / participation where the row sums to 1",
        "inverse participation ratio", _effective,
    ),
    Statistic(
        "distance", "query", "tokens", "[1-M, N-1]", "sum_j p_ij (i + N - M - j); never negative when causal",
        f"head span, {SPANS}, Eq. 7", lambda a, _: (a.p * a.distance).sum(-1), default=True,
    ),
    Statistic(
        "distance_var", "query", "tokens^2", "[0, (N-1)^2 / 4]",
        "variance of i + N - M - j under p_ij / sum_j p_ij", "", _distance_var,
    ),
    Statistic(
        "waad", "query", "tokens", "[0, W]",
        "windowed average attention distance: sum_j p_ij min(|i + N - M - j|, W) (waad=W; published W = 10)",
        f"{SPANS}, Eq. 9; the absolute value is ours, for keys to the right",
        lambda a, w: (a.p * a.distance.abs().clamp(max=w)).sum(-1), default=0, full=10,
        count="the distance at which to clip",
    ),
    Statistic(
        "sink", "query", "probability", "[0, 1]", "sum of p_ij over the first k real keys of the row (sink=k)",
        f"after {GU}", lambda a, k: (a.p * (a.key_rank < int(k))).sum(-1), default=4, full=4,
        count="the number of leading keys",
    ),
    Statistic(
        "diagonal", "query", "probability", "[0, 1]", "p_ij at j = i + N - M, the query's own position", "",
        lambda a, _: _at_distance(a, 0),
    ),
    Statistic(
        "previous", "query", "probability", "[0, 1]", "p_ij at j = i + N - M - 1, the position before the query",
        "previous-token score, Olsson et al. 2022", lambda a, _: _at_distance(a, 1),
    ),
    Statistic(
        "local", "query", "probability", "[0, 1]",
        "sum of p_ij over |i + N - M - j| < w (local=w); w counts the query's own position", "",
        lambda a, w: (a.p * (a.distance.abs() < w)).sum(-1), default=0, full=8,
        count="the window, which counts the query's own position",
    ),
    Statistic(
        "segments", "query", "probability", "[0, 1]", "sum of p_ij over the keys j with k_segments[j] = s", "",
        _segments, default=None, full=None, argument="k_segments", shape="B H M S",
    ),
    Statistic(
        "targets", "query", "probability", "[0, 1]", "p_ij at j = targets[i, t]; 0 for target -1", "",
        _targets, default=None, full=None, argument="targets", shape="B H M T",
    ),
    Statistic(
        "key_features", "query", "of the feature", "of the feature", "sum_j p_ij key_features[j, f]", "",
        _key_features, default=None, full=None, argument="key_features", shape="B H M F",
    ),
    Statistic(
        "value_norm", "query", "of v", "[0, max_j norm(v_j)]", "Euclidean norm of sum_j p_ij v_j, before the gate",
        f"after {KOBAYASHI}", lambda a, _: a.z.norm(dim=-1),
    ),
    Statistic(
        "segment_value_norms", "query", "of v", "[0, max_j norm(v_j)]",
        "sum of p_ij norm(v_j) over the keys j with k_segments[j] = s; norm is Euclidean", f"after {KOBAYASHI}",
        _segment_value_norms, full=None, argument="k_segments", shape="B H M S",
    ),
    Statistic(
        "segment_outputs", "query", "of v", "of v",
        "partial outputs: sum of p_ij v_j over the keys j with k_segments[j] = s, before the gate", "",
        _segment_outputs, full=None, argument="k_segments", shape="B H M S Dv",
    ),
    Statistic(
        "received", "key", "probability", "[0, 1]", "mean of p_ij over the real queries i that can see key j",
        f"alpha_k of {GU}", lambda a, _: _of_real(a).sum(-2), shape="B H N",
    ),
    Statistic(
        "received_max", "key", "probability", "[0, 1]", "largest p_ij over the real queries i that can see key j", "",
        lambda a, _: _of_real(a).amax(-2), shape="B H N", reduce="max",
    ),
    Statistic(
        "fai", "key", "probability", "[0, 1]",
        "future attention influence: mean of p_ij over the real queries i that can see key j with "
        "lo <= i + N - M - j <= hi (fai=(lo, hi); published (10, 100)); 0 where there is none",
        f"{SPANS}, Eq. 10; the value of an empty horizon is not published", _fai,
        full=(10, 100), shape="B H N", among=_within,
    ),
    Statistic(
        "column_norm", "key", "none", "[0, sqrt(M)]", "sqrt(sum of p_ij^2 over the real queries i)",
        "hardness of Han et al. 2023, HyperAttention", lambda a, _: _of_real(a).square().sum(-2),
        shape="B H N", reduce="norm",
    ),
)  # fmt: skip
BY_NAME = {s.name: s for s in STATISTICS}
ARGUMENT = {s.name: s.argument for s in STATISTICS if s.argument is not None}


def tensors(result: Result) -> tuple[Tensor, ...]:
    """Return the tensors of a statistic: one, or values and indices."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def from_tensors(names: Iterable[str], flat: Iterable[Tensor]) -> dict[str, Result]:
    """Group a flat list of tensors into the named statistics.

    The list holds what `tensors` returned for each of them in turn.
    """
    remaining = iter(flat)
    results: dict[str, Result] = {}
    for name in names:
        first = next(remaining)
        results[name] = TopK(first, next(remaining)) if name == "topk" else first
    return results


def broadcast_rows(rows: Shaped[Tensor, "*lead"], x: Shaped[Tensor, "*lead *rest"]) -> Shaped[Tensor, "*lead #rest"]:
    """Reshape values of queries to broadcast against a statistic with further axes."""
    return rows.reshape(*rows.shape, *[1] * (x.dim() - rows.dim()))


def map_tensors(result: Result, f: Callable[[Tensor], Tensor]) -> Result:
    """Apply `f` to the tensors of a statistic."""
    return f(result) if isinstance(result, Tensor) else TopK(*map(f, result))


def table() -> str:
    """Return STATISTICS as a Markdown table, as the README shows it."""
    lines = ["| statistic | shape | definition | unit | range | if empty |", "| --- | --- | --- | --- | --- | --- |"]
    for s in STATISTICS:
        mark = " †" if s.default is None else " *" if s.default else ""
        empty = "0, −1" if s.name == "topk" else f"{s.empty:g}".replace("-", "−")
        text = s.definition + (f" ({s.source})" if s.source else "")
        cells = (f"`{s.name}`{mark}", s.shape, text.replace("|", "\\|"), s.unit, s.range, empty)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
