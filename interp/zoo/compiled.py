"""A model compiled by Tracr from a program in RASP.

Tracr: Lindner et al. 2023, arXiv 2301.05062. The program, in ``experiments/compile_tracr.py``, is induction: which
token followed the previous occurrence of this one? TransformerLens converted the weights; only token ids were
renumbered. Using it needs neither Tracr nor JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random

from interp.prompts.pairs import PromptPair
from interp.sites import Site, Sites
from interp.zoo import shipped
from interp.zoo.known import Known, positions_of, spans_of
from interp.zoo.tokenizer import LETTERS

PREVIOUS, INDUCTION = Site("z", 0, 0), Site("z", 1, 0)
LENGTH = 11  # words of a prompt: the maximum that the program was compiled for


def tracr_induction(*, folder: Path | None = None) -> Known:
    """Load the Tracr model: "… a b … a" → " b" for letters.

    It has two layers of one head, with MLPs that the program leaves empty. L0H0 copies the previous token. L1H0 attends
    to the position whose previous token is the present one, and copies the token there, with a logit of 1; if no
    position matches, it attends to ``<bos>``. In the corrupt prompt the first "a" is another letter.
    """
    bridge, _ = shipped.load("tracr_induction", LETTERS, folder)
    return Known(
        "tracr_induction", bridge, Sites([PREVIOUS, INDUCTION]), _pairs, _resid, _attends, None,
        carries=("resid_pre.L0 -> v.L0H0", "z.L0H0 -> k.L1H0", "z.L1H0 -> resid_post.L1"),
        holds=("resid_pre.L0 -> q.L0H0", "resid_pre.L0 -> k.L0H0", "resid_pre.L0 -> q.L1H0", "resid_pre.L0 -> v.L1H0"),
        roles={"z.L0H0": "previous token", "z.L1H0": "induction"},
    )  # fmt: skip


def _pairs(n: int, rng: Random) -> list[PromptPair]:
    pairs = []
    for _ in range(n):
        *words, stranger = rng.sample(LETTERS, LENGTH)
        a, c = rng.sample(range(0, LENGTH - 2, 2), 2)
        clean, corrupt = [*words, words[a]], [*words, words[a]]
        corrupt[a] = stranger
        spans = spans_of(clean, {"A1": a + 1, "B1": a + 2, "A2": LENGTH})
        pairs.append(PromptPair(" ".join(clean), " ".join(corrupt), f" {words[a + 1]}", f" {words[c + 1]}", spans))
    return pairs


def _resid(pair: PromptPair) -> Sites:
    words = pair.clean.split()
    first = words.index(words[-1]) + 1
    return positions_of([first, first + 1, LENGTH])


def _attends(pair: PromptPair) -> Mapping[Site, list[int]]:
    words = pair.clean.split()
    return {INDUCTION: [words.index(words[-1]) + 2]}
