"""Induction on random words: a pair of words that stood together once is completed when its first word returns."""

from __future__ import annotations

from random import Random

from interp.prompts import PromptPair
from interp.tasks.vocabulary import TaskModel, TaskPairs, at_least_one, words_of_tokenizer

N_PAIRS = 6  # word pairs in the first part of a prompt; all but two come again before the last word
FEWEST, MOST = 24, 2000  # words of the tokenizer to draw from


def induction(model: TaskModel, n: int = 64, seed: int = 0) -> TaskPairs:
    """``n`` prompts "… A B … C D … A" → " B", made of random words that are single tokens.

    The first part is six random word pairs; four of them return in another order (so that the context shows
    that pairs repeat, but not the answer), and the last word is A. In the corrupt prompt A and C have changed
    places in the first part: same words, same length, but now A was followed by D. So the answer B and the
    foil D swap roles, and whatever ties B to its predecessor (a previous-token head) is corrupted together
    with what looks it up (an induction head). Spans: ``A1``, ``B1``, ``C1``, ``D1`` (first part) and ``A2``
    (the last word).

    Raises TaskError if the tokenizer has too few words that are single tokens.
    """
    at_least_one(n, "induction")
    rng = Random(f"induction/{seed}")
    words = words_of_tokenizer(model, fewest=FEWEST, most=MOST)
    return TaskPairs([_pair(words, rng) for _ in range(n)], task="induction", seed=seed)


def _pair(words: list[str], rng: Random) -> PromptPair:
    chosen = rng.sample(words, 2 * N_PAIRS)
    couples = list(zip(chosen[::2], chosen[1::2], strict=True))
    # The first couple stays as it is: without a space in front, a text's first word may be another token.
    i, j = rng.sample(range(1, N_PAIRS), 2)
    (a, b), (c, d) = couples[i], couples[j]
    again = rng.sample([k for k in range(N_PAIRS) if k not in (i, j)], N_PAIRS - 2)
    changed = list(couples)
    changed[i], changed[j] = (c, b), (a, d)
    clean, corrupt = (
        " ".join(w for couple in (*first, *(couples[k] for k in again)) for w in couple) + f" {a}"
        for first in (couples, changed)
    )
    starts = [0]
    for word in clean.split():
        starts.append(starts[-1] + len(word) + 1)
    index = {"A1": 2 * i, "B1": 2 * i + 1, "C1": 2 * j, "D1": 2 * j + 1, "A2": len(starts) - 2}
    spans = {name: (starts[k], starts[k + 1] - 1) for name, k in index.items()}
    return PromptPair(clean, corrupt, f" {b}", f" {d}", spans)
