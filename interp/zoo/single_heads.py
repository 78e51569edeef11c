"""Hand-set models with one kind of head each: previous token, duplicate token.

Their other heads and MLPs are inert: they are active, but write only where nothing reads, and to all logits alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING

from interp.prompts.pairs import PromptPair
from interp.sites import Site, Sites
from interp.zoo.known import Known, answers_and_foils, positions_of, spans_of
from interp.zoo.tokenizer import BOS, LETTERS, SPECIALS, SYLLABLES

if TYPE_CHECKING:
    import torch

PREVIOUS = Site("z", 1, 1)
DUPLICATE = Site("z", 1, 3)
YES, NO = "YES", "NO"

_WORDS = (*LETTERS, *SYLLABLES[:34])
_LENGTH = 9


def previous_token(*, dtype: torch.dtype | None = None) -> Known:
    """Build a model with a previous-token head, L1H1.

    Three layers of four heads with MLPs; the other heads are inert. L1H1 attends to the previous token and copies it,
    so that the answer to "a b … y z" is " y". In the corrupt prompt another word, neither answer nor foil, takes that
    place. At most 48 pairs. ``dtype``: torch.float32 (default) or torch.float64.
    """
    import torch

    from interp.zoo.planted import SOFT_MATCH, Planted

    n, n_ctx = len(SPECIALS) + len(_WORDS), 16
    channels = {"tok": n, "pos": n_ctx, "out": n, "junk": 32, "shift": 1}
    build = Planted("previous_token", _WORDS, channels, n_layers=3, n_heads=4, d_head=n, d_mlp=32, dtype=dtype)
    back = torch.diag(torch.ones(n_ctx - 1), 1)  # [key position, query position]: one to the left
    back[0, 0] = 1.0  # <bos> has nothing to its left
    build.plant(
        1, 1, q={"pos": SOFT_MATCH * back}, k={"pos": torch.eye(n_ctx)},
        v={"tok": torch.eye(n)}, o={"out": torch.eye(n)},
    )  # fmt: skip
    build.fill()
    return Known(
        "previous_token", build.bridge, Sites([PREVIOUS]), _previous_pairs, _previous_resid,
        lambda pair: {PREVIOUS: [0, *range(len(pair.clean.split()))]}, 48,
        carries=("resid_pre.L0 -> v.L1H1", "z.L1H1 -> resid_post.L2"),
        holds=("resid_pre.L0 -> q.L1H1", "resid_pre.L0 -> k.L1H1"), roles={"z.L1H1": "previous token"},
    )  # fmt: skip


def _previous_pairs(n: int, rng: Random) -> list[PromptPair]:
    strangers, candidates = _WORDS[:8], _WORDS[8:]
    pairs = []
    for answer, foil in answers_and_foils(candidates, n, rng):
        words = rng.sample([w for w in candidates if w not in (answer, foil)], _LENGTH)
        words[-2] = answer
        corrupt = [*words[:-2], rng.choice(strangers), words[-1]]
        spans = spans_of(words, {"previous": _LENGTH - 1, "END": _LENGTH})
        pairs.append(PromptPair(" ".join(words), " ".join(corrupt), f" {answer}", f" {foil}", spans))
    return pairs


def _previous_resid(pair: PromptPair) -> Sites:
    end = len(pair.clean.split())
    return positions_of([end - 1, end - 1, end, end])


def duplicate_token(*, dtype: torch.dtype | None = None) -> Known:
    """Build a model with a duplicate-token head, L1H3.

    Does the last word occur earlier in the prompt? Three layers of four heads with MLPs; the others are inert. L1H3
    attends to an earlier occurrence of the present token, never to the token itself, and writes " YES"; without one it
    attends to ``<bos>`` and writes " NO". Pairs alternate: the answer is one or the other, and the corrupt prompt
    differs from the clean one in the last word (the word to look for, q) or in an earlier one (the word to match, k).
    ``dtype``: torch.float32 (default) or torch.float64.
    """
    import torch

    from interp.zoo.planted import SOFT_MATCH, SOFT_SINK, Planted

    words = (*_WORDS, YES, NO)
    n, n_ctx = len(SPECIALS) + len(words), 16
    channels = {"tok": n, "pos": n_ctx, "out": n, "junk": 32, "shift": 1}
    build = Planted(
        "duplicate_token", words, channels, n_layers=3, n_heads=4, d_head=n + n_ctx, d_mlp=32, dtype=dtype
    )  # fmt: skip
    everything, bos = torch.eye(n), torch.eye(n)[build.ids[BOS]]
    no_self = torch.cat([torch.zeros(n, n_ctx), torch.eye(n_ctx)])  # dimensions from n on compare positions
    flags = torch.zeros(2, n)
    flags[0], flags[1] = 1 - bos, bos
    answers = torch.zeros(2, n)
    answers[0, build.ids[YES]] = answers[1, build.ids[NO]] = 1.0
    words_only = everything.clone()
    words_only[: len(SPECIALS)] = 0
    build.plant(
        1, 3, q={"tok": SOFT_MATCH * words_only, "pos": -SOFT_MATCH / 2 * no_self}, q_bias=SOFT_SINK * bos,
        k={"tok": everything, "pos": no_self}, v={"tok": flags}, o={"out": answers},
    )  # fmt: skip
    build.fill()
    return Known(
        "duplicate_token", build.bridge, Sites([DUPLICATE]), _duplicate_pairs, _duplicate_resid, _duplicate_attends,
        None,
        carries=("resid_pre.L0 -> q.L1H3", "resid_pre.L0 -> k.L1H3", "z.L1H3 -> resid_post.L2"),
        holds=("resid_pre.L0 -> v.L1H3",), roles={"z.L1H3": "duplicate token"},
    )  # fmt: skip


def _duplicate_pairs(n: int, rng: Random) -> list[PromptPair]:
    pairs = []
    for i in range(n):
        *words, stranger = rng.sample(_WORDS, _LENGTH + 1)
        place = rng.randrange(_LENGTH - 1)
        twice, once = list(words), list(words)
        twice[place] = words[-1]
        if i // 2 % 2:  # the earlier word changes, not the last one
            once[place] = stranger
        else:
            once = [*twice[:-1], stranger]
        clean, corrupt = (twice, once) if i % 2 == 0 else (once, twice)
        answer, foil = (YES, NO) if i % 2 == 0 else (NO, YES)
        spans = spans_of(clean, {"first": place + 1, "last": _LENGTH})
        pairs.append(PromptPair(" ".join(clean), " ".join(corrupt), f" {answer}", f" {foil}", spans))
    return pairs


def _duplicate_resid(pair: PromptPair) -> Sites:
    words = zip(pair.clean.split(), pair.corrupt.split(), strict=True)
    changed = next(i for i, (a, b) in enumerate(words, 1) if a != b)
    return positions_of([changed, changed, _LENGTH, _LENGTH])


def _duplicate_attends(pair: PromptPair) -> Mapping[Site, list[int]]:
    words = pair.clean.split()
    return {DUPLICATE: [0, *(words[:i].index(w) + 1 if w in words[:i] else 0 for i, w in enumerate(words))]}
