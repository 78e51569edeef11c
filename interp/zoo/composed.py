"""Hand-set models whose heads read each other.

They do indirect objects, two-hop lookup and comparison of numbers. Besides the planted parts, every layer has inert
heads and MLP neurons: they read everything, but write only where nothing reads, and to all logits alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING, Literal

from interp.errors import TaskError
from interp.prompts.pairs import PromptPair
from interp.sites import Site, Sites
from interp.zoo.known import Known, answers_and_foils, positions_of, spans_of
from interp.zoo.tokenizer import BOS, LETTERS, SPECIALS, SYLLABLES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DUPLICATE, INHIBITION, MOVER = Site("z", 0, 1), Site("z", 1, 2), Site("z", 2, 0)
PREVIOUS, FIRST_HOP, SECOND_HOP = Site("z", 0, 1), Site("z", 1, 2), Site("z", 2, 1)
TENS, UNITS, COMPARE = Site("z", 0, 1), Site("z", 0, 2), Site("mlp_out", 1)

_END = "?"
_PLAIN = LETTERS
_NAMES = tuple(s.upper() for s in SYLLABLES[:36])
_CLAUSE = 6  # words of the first clause, which names both people

_WORDS = (*LETTERS, *SYLLABLES[:44])
_FACTS = 4

_DIGITS = tuple("0123456789")
_NUMBER = 3  # position of the tens; the units follow


def ioi(*, corruption: Literal["swap", "abc"] = "swap", dtype: torch.dtype | None = None) -> Known:
    """Build a circuit for indirect object identification (Wang et al. 2022).

    It answers "… A … B … A … ?" → " B". Three layers of four heads with MLPs. L0H1 (*duplicate token*), at a name,
    attends to an earlier occurrence of it and writes which name occurs twice. L1H2 (*inhibition*), at the end, attends
    to the position of a repeated name (k) and copies which name that is (v). L2H0 (*name mover*), at the end, attends
    to the names of the first clause except the one that inhibition marks in its query as to be avoided (q), and copies
    the name. Names are upper-case.

    ``corruption="swap"``: the second mention becomes the other person's name, so that answer and foil change roles; one
    chain of edges carries that, and each has effect 1 in both directions. ``"abc"``: it becomes a third name, and the
    model is undecided between two. Inhibition then loses its place (k) as well as its content (v): the corrupt state of
    either breaks the clean run, and the clean state of one alone does not restore the corrupt run. At most 36 pairs.
    """
    import torch

    from interp.zoo.planted import SOFT_MATCH, SOFT_SINK, Planted

    if corruption not in ("swap", "abc"):
        raise TaskError(f"zoo.ioi: corruption must be 'swap' or 'abc', got {corruption!r}")
    words = (*_PLAIN, *_NAMES, _END)
    n, n_ctx, m = len(SPECIALS) + len(words), 16, len(_NAMES)
    channels = {"tok": n, "pos": n_ctx, "twice": m, "avoid": m, "out": n, "junk": 32, "shift": 1}
    build = Planted("ioi", words, channels, n_layers=3, n_heads=4, d_head=m + n_ctx + 1, d_mlp=32, dtype=dtype)
    one, everyone = torch.eye(n), torch.eye(m)
    name = torch.stack([one[build.ids[w]] for w in _NAMES])  # [name, token]
    bos, asks = one[build.ids[BOS]][None], one[build.ids[_END]][None]
    late = torch.zeros(1, n_ctx)
    late[0, _CLAUSE + 1 :] = 1.0
    build.plant(  # the dimensions: names, positions, the sink
        0, 1, q={"tok": SOFT_MATCH * name, "pos": -SOFT_MATCH / 2 * _shift(torch.eye(n_ctx), m)},
        q_bias=_at(m + n_ctx, SOFT_SINK),
        k={"tok": torch.cat([name, torch.zeros(n_ctx, n), bos]), "pos": _shift(torch.eye(n_ctx), m)},
        v={"tok": name}, o={"twice": everyone},
    )  # fmt: skip
    build.plant(  # the dimensions: a repeated name, the sink
        1, 2, q={"tok": SOFT_MATCH * asks}, q_bias=_at(1, SOFT_SINK),
        k={"twice": torch.ones(1, m), "tok": _shift(bos, 1)}, v={"twice": everyone}, o={"avoid": everyone},
    )  # fmt: skip
    build.plant(  # the dimensions: names to avoid, any name of the first clause, the sink
        2, 0, q={"avoid": -SOFT_MATCH / 2 * everyone, "tok": _shift(SOFT_MATCH * asks, m)},
        q_bias=_at(m + 1, SOFT_SINK),
        k={"tok": torch.cat([name, name.sum(0, keepdim=True), bos]), "pos": _shift(-late, m)},
        v={"tok": name}, o={"out": name},
    )  # fmt: skip
    build.fill()
    carries = ["resid_pre.L0 -> q.L0H1", "z.L0H1 -> v.L1H2", "z.L1H2 -> q.L2H0", "z.L2H0 -> resid_post.L2"]
    holds = ["resid_pre.L0 -> k.L0H1", "resid_pre.L0 -> v.L0H1", "resid_pre.L0 -> q.L1H2", "resid_pre.L0 -> q.L2H0"]
    holds += ["resid_pre.L0 -> k.L2H0", "resid_pre.L0 -> v.L2H0"]
    (carries if corruption == "abc" else holds).append("z.L0H1 -> k.L1H2")
    return Known(
        "ioi", build.bridge, Sites([DUPLICATE, INHIBITION, MOVER]),
        lambda k, rng: _ioi_pairs(k, rng, corruption), _ioi_resid, _ioi_attends, len(_NAMES),
        carries=carries, holds=holds,
        roles={"z.L0H1": "duplicate token", "z.L1H2": "inhibition", "z.L2H0": "name mover"},
    )  # fmt: skip


def _ioi_pairs(n: int, rng: Random, corruption: str) -> list[PromptPair]:
    """Six words with two names, three words with one: "… A … B … A … ?"."""
    pairs = []
    for i, (receiver, actor) in enumerate(answers_and_foils(_NAMES, n, rng)):
        words = [*rng.sample(_PLAIN, _CLAUSE + 3), _END]
        first, second = sorted(rng.sample(range(_CLAUSE), 2))
        io, s1 = (first, second) if i % 2 == 0 else (second, first)
        s2 = rng.randrange(_CLAUSE, _CLAUSE + 3)
        words[io], words[s1], words[s2] = receiver, actor, actor
        third = rng.choice([w for w in _NAMES if w not in (receiver, actor)])
        corrupt = list(words)
        corrupt[s2] = receiver if corruption == "swap" else third
        spans = spans_of(words, {"IO": io + 1, "S1": s1 + 1, "S2": s2 + 1, "END": len(words)})
        pairs.append(PromptPair(" ".join(words), " ".join(corrupt), f" {receiver}", f" {actor}", spans))
    return pairs


def _ioi_resid(pair: PromptPair) -> Sites:
    words = pair.clean.split()
    s2 = max(i for i, w in enumerate(words, 1) if w.isupper())
    return positions_of([s2, s2, len(words), len(words)])


def _ioi_attends(pair: PromptPair) -> Mapping[Site, list[int]]:
    words, end = pair.clean.split(), len(pair.clean.split())
    names = [i for i, w in enumerate(words) if w.isupper()]
    s1 = words.index(words[names[2]])
    io = next(i for i in names if i not in (s1, names[2]))
    duplicate = [0] * (end + 1)
    duplicate[names[2] + 1] = s1 + 1
    return {DUPLICATE: duplicate, INHIBITION: [0] * end + [names[2] + 1], MOVER: [0] * end + [io + 1]}


def two_hop(*, dtype: torch.dtype | None = None) -> Known:
    """Build a two-hop lookup with grouped queries.

    It reads facts "x y", "y z" among others, then answers "x" → " z". Three layers of four heads (two key/value heads)
    with MLPs. L0H1 (*previous token*), at the second word of each fact, writes its first. L1H2 (*first hop*), at the
    end, finds the fact of the last word and copies its second word, y. L2H1 (*second hop*) looks up y in turn and
    copies z. The other head of each group shares keys and values with the planted one, and is inert. In the corrupt
    prompt a word that occurs nowhere else replaces one word, in turn from pair to pair: x at the end, x or y in the
    first fact, y or z in the second; the model is then undecided. At most 48 pairs.
    """
    import torch

    from interp.zoo.planted import SOFT_MATCH, SOFT_SINK, Planted

    n, n_ctx = len(SPECIALS) + len(_WORDS), 16
    channels = {"tok": n, "pos": n_ctx, "previous": n, "middle": n, "out": n, "junk": 32, "shift": 1}
    build = Planted(
        "two_hop", _WORDS, channels, n_layers=3, n_heads=4, n_kv_heads=2, d_head=n, d_mlp=32, dtype=dtype
    )  # fmt: skip
    words, bos = torch.eye(n), torch.eye(n)[build.ids[BOS]]
    words[: len(SPECIALS)] = 0
    back = torch.zeros(n_ctx, n_ctx)  # [key position, query position]
    for query in range(n_ctx):  # second words of facts stand at even positions
        back[query - 1 if query and query % 2 == 0 else 0, query] = 1.0
    keys = {"previous": words, "tok": torch.diag(bos)}
    build.plant(
        0, 1, q={"pos": SOFT_MATCH * back}, k={"pos": torch.eye(n_ctx)}, v={"tok": words}, o={"previous": words}
    )  # fmt: skip
    build.plant(
        1, 2, q={"tok": SOFT_MATCH * words}, q_bias=SOFT_SINK * bos, k=keys, v={"tok": words}, o={"middle": words}
    )  # fmt: skip
    build.plant(
        2, 1, q={"middle": SOFT_MATCH * words}, q_bias=SOFT_SINK * bos, k=keys, v={"tok": words}, o={"out": words}
    )  # fmt: skip
    build.fill()
    return Known(
        "two_hop", build.bridge, Sites([PREVIOUS, FIRST_HOP, SECOND_HOP]), _two_hop_pairs, _two_hop_resid,
        _two_hop_attends, 48,
        carries=(
            "resid_pre.L0 -> v.L0H0", "z.L0H1 -> k.L1H1", "resid_pre.L0 -> q.L1H2", "resid_pre.L0 -> v.L1H1",
            "z.L1H2 -> q.L2H1", "z.L0H1 -> k.L2H0", "resid_pre.L0 -> v.L2H0", "z.L2H1 -> resid_post.L2",
        ),
        holds=("resid_pre.L0 -> q.L0H1", "resid_pre.L0 -> k.L0H0"),
        roles={"z.L0H1": "previous token", "z.L1H2": "first hop", "z.L2H1": "second hop"},
    )  # fmt: skip


def _two_hop_pairs(n: int, rng: Random) -> list[PromptPair]:
    strangers, candidates = _WORDS[:12], _WORDS[12:]
    pairs = []
    for i, (z, w) in enumerate(answers_and_foils(candidates, n, rng)):
        x, y, u, v = rng.sample([c for c in candidates if c not in (z, w)], 4)
        facts = rng.sample([(x, y), (y, z), (u, v), (v, w)], _FACTS)
        words = [*(word for fact in facts for word in fact), x]
        at = {"fact1": 2 * facts.index((x, y)) + 1, "fact2": 2 * facts.index((y, z)) + 1, "END": 2 * _FACTS + 1}
        places = {"x": at["fact1"], "y": at["fact1"] + 1, "key2": at["fact2"], "z": at["fact2"] + 1, "END": at["END"]}
        corrupt = list(words)
        corrupt[list(places.values())[i % len(places)] - 1] = rng.choice(strangers)
        pairs.append(
            PromptPair(" ".join(words), " ".join(corrupt), f" {z}", f" {w}", spans_of(words, places))
        )  # fmt: skip
    return pairs


def _two_hop_places(pair: PromptPair) -> tuple[int, int, int]:
    """Positions of the second words of the two facts that matter, and of the end."""
    words = pair.clean.split()
    facts = list(zip(words[0:-1:2], words[1:-1:2], strict=True))
    first = next(i for i, (key, _) in enumerate(facts) if key == words[-1])
    second = next(i for i, (key, _) in enumerate(facts) if key == facts[first][1])
    return 2 * first + 2, 2 * second + 2, len(words)


def _two_hop_resid(pair: PromptPair) -> Sites:
    one, two, end = _two_hop_places(pair)
    words = zip(pair.clean.split(), pair.corrupt.split(), strict=True)
    changed = next(i for i, (a, b) in enumerate(words, 1) if a != b)
    if changed == end:
        return positions_of([end] * 4)
    return positions_of([changed, one, end, end] if changed in (one - 1, one) else [changed, two, two, end])


def _two_hop_attends(pair: PromptPair) -> Mapping[Site, list[int]]:
    one, two, end = _two_hop_places(pair)
    words = ["", *pair.clean.split()]
    first, second = [0] * (end + 1), [0] * (end + 1)
    for i in range(1, end + 1):  # a fact's words are looked up at every position
        first[i] = next((k for k in range(2, i + 1, 2) if words[k - 1] == words[i]), 0)
    for i in range(1, end + 1):
        if first[i]:
            second[i] = next((k for k in range(2, i + 1, 2) if words[k - 1] == words[first[i]]), 0)
    assert (first[end], second[end]) == (one, two)
    return {PREVIOUS: [i - 1 if i and i % 2 == 0 else 0 for i in range(end + 1)], FIRST_HOP: first, SECOND_HOP: second}


def greater_than(*, dtype: torch.dtype | None = None) -> Known:
    """Build a comparison of numbers digit by digit.

    It answers "… 4 7 … 4" → " 8" or " 9", and no digit below. Three layers of four heads with MLPs. At the end, L0H1
    (*tens*) attends to the tens of the earlier number if they equal the present digit, and writes that they are equal;
    L0H2 (*units*) copies the units. L1's MLP gives each allowed digit 20 logits: those above the units if the tens are
    equal, all of them if not. The answer is above the units, the foil is not. The corrupt prompt changes, in turn from
    pair to pair, the units (to the answer or above it), the present tens (q of L0H1) or the earlier tens (k); the model
    then has no preference between answer and foil.
    """
    import torch

    from interp.zoo.planted import SOFT_MATCH, SOFT_SINK, Planted

    words = (*_DIGITS, *LETTERS)
    n, n_ctx, ten = len(SPECIALS) + len(words), 16, len(_DIGITS)
    channels = {"tok": n, "pos": n_ctx, "same": 1, "units": ten, "out": n, "junk": 32, "shift": 1}
    build = Planted("greater_than", words, channels, n_layers=3, n_heads=4, d_head=ten + 2, d_mlp=48, dtype=dtype)
    one = torch.eye(n)
    digit = torch.stack([one[build.ids[d]] for d in _DIGITS])  # [digit, token]
    place = torch.eye(n_ctx)[_NUMBER : _NUMBER + 2]  # of the tens and the units
    half = SOFT_MATCH / 2
    build.plant(  # the dimensions: digits, the place of the tens, the sink
        0, 1, q={"tok": half * digit}, q_bias=torch.cat([_at(ten, half), torch.tensor([SOFT_SINK])]),
        k={"tok": torch.cat([digit, torch.zeros(1, n), one[build.ids[BOS]][None]]), "pos": _shift(place[:1], ten)},
        v={"tok": digit.sum(0, keepdim=True)}, o={"same": torch.ones(1, 1)},
    )  # fmt: skip
    build.plant(
        0, 2, q={}, q_bias=_at(0, SOFT_MATCH), k={"pos": place[1:]}, v={"tok": digit}, o={"units": torch.eye(ten)}
    )  # fmt: skip
    above = torch.triu(torch.ones(ten, ten), 1)  # [units, digit]: is it greater?
    build.plant_neurons(
        1, 0, reads={"units": torch.eye(ten), "same": torch.ones(ten, 1)}, bias=-torch.ones(ten),
        writes={"out": above @ digit},
    )  # fmt: skip
    build.plant_neurons(
        1, ten, reads={"same": -torch.ones(1, 1)}, bias=torch.ones(1), writes={"out": digit.sum(0, keepdim=True)}
    )  # fmt: skip
    build.fill(neurons={1: ten + 1})
    return Known(
        "greater_than", build.bridge, Sites([TENS, UNITS, COMPARE]), _greater_pairs, _greater_resid, _greater_attends,
        None,
        carries=(
            "resid_pre.L0 -> q.L0H1", "resid_pre.L0 -> k.L0H1", "resid_pre.L0 -> v.L0H2", "z.L0H1 -> mlp_out.L1",
            "z.L0H2 -> mlp_out.L1", "mlp_out.L1 -> resid_post.L2",
        ),
        holds=("resid_pre.L0 -> v.L0H1", "resid_pre.L0 -> k.L0H2"),
        roles={"z.L0H1": "same tens?", "z.L0H2": "copies the units", "mlp_out.L1": "digits above the units"},
    )  # fmt: skip


def _greater_pairs(n: int, rng: Random) -> list[PromptPair]:
    pairs = []
    for i in range(n):
        tens, units = rng.randint(2, 8), rng.randint(1, 8)
        answer, foil = rng.randint(units + 1, 9), rng.randint(0, units)
        fill = rng.sample(LETTERS, 4)
        numbers = {3: tens, 4: units, 7: tens}
        other = dict(numbers)
        changed = (4, 7, 3)[i % 3]
        other[changed] = {4: rng.randint(answer, 9), 7: rng.randint(tens + 1, 9), 3: rng.randint(1, tens - 1)}[changed]
        clean, corrupt = (
            [*fill[:2], str(x[3]), str(x[4]), *fill[2:], str(x[7])] for x in (numbers, other)
        )  # fmt: skip
        spans = spans_of(clean, {"tens": _NUMBER, "units": _NUMBER + 1, "END": 7})
        pairs.append(PromptPair(" ".join(clean), " ".join(corrupt), f" {answer}", f" {foil}", spans))
    return pairs


def _greater_resid(pair: PromptPair) -> Sites:
    words = zip(pair.clean.split(), pair.corrupt.split(), strict=True)
    changed = next(i for i, (a, b) in enumerate(words, 1) if a != b)
    return positions_of([changed, 7, 7, 7])


def _greater_attends(pair: PromptPair) -> Mapping[Site, list[int]]:
    # At other queries than the last they attend arbitrarily, and nothing reads that: only the last one is listed.
    return {TENS: [_NUMBER], UNITS: [_NUMBER + 1]}


def _at(i: int, value: float) -> Tensor:
    """A bias [d_head or less] that is zero except in one dimension."""
    import torch

    return torch.cat([torch.zeros(i), torch.tensor([value])])


def _shift(matrix: Tensor, by: int) -> Tensor:
    """The same matrix in later dimensions of a head, with zero rows before it."""
    import torch

    return torch.cat([torch.zeros(by, matrix.shape[1]), matrix])
