"""Induction on random words.

When a stretch of text is repeated, it should continue as it did before.
"""

from __future__ import annotations

from random import Random

from interp.prompts.pairs import PromptPair
from interp.tasks.generate import EVERY, Split, check_split, items_of_split, make_pairs
from interp.tasks.vocabulary import TaskModel, TaskPairs, words_of_tokenizer

LENGTH = 12  # words in the first part
STRETCH = 4  # words before A that are repeated with it
FEWEST, MOST = 24, 5000  # words of the tokenizer to draw from


def induction(model: TaskModel, n: int = 64, seed: int = 0, *, split: Split | None = None) -> TaskPairs:
    """Make ``n`` prompts "… A B … C D … A" → " B" of random words.

    The words are single tokens. The first part is twelve different random words; then a stretch of it is repeated and
    ends with A. C and D are two neighbours outside that stretch. In the corrupt prompt A and C have changed places in
    the first part: same words, same length, but now A was followed by D. So the answer B and the foil D swap roles, and
    the component that ties B to its predecessor (a previous-token head) is corrupted together with the one that looks
    it up (an induction head). The repeated words before A still point to where A used to be, so a model that matches
    several words at once prefers D less clearly than it prefers B in the clean prompt.

    All prompts have 17 words. Spans: ``A1``, ``B1``, ``C1``, ``D1`` (first part) and ``A2`` (the last word).
    ``split``: "train" and "test" share no word.

    Raises TaskError if the tokenizer has too few words that are single tokens.
    """
    check_split(split, "induction")
    words = items_of_split(words_of_tokenizer(model, fewest=FEWEST * (EVERY if split else 1), most=MOST), split)
    return make_pairs(model, "induction", n, seed, lambda rng, i: _pair(words, rng), split=split)


def _pair(words: list[str], rng: Random) -> PromptPair:
    first = rng.sample(words, LENGTH)
    a = rng.randrange(STRETCH + 2, LENGTH - 1)
    # C, D: away from the stretch, from A and B, and from the first word of the text, which has no space in
    # front and may therefore be another token.
    c = rng.choice([i for i in range(1, LENGTH - 1) if i + 1 < a - STRETCH or i > a + 1])
    changed = list(first)
    changed[a], changed[c] = first[c], first[a]
    again = first[a - STRETCH : a + 1]
    clean, corrupt = (" ".join([*start, *again]) for start in (first, changed))
    starts = [0]
    for word in clean.split():
        starts.append(starts[-1] + len(word) + 1)
    index = {"A1": a, "B1": a + 1, "C1": c, "D1": c + 1, "A2": LENGTH + STRETCH}
    spans = {name: (starts[i], starts[i + 1] - 1) for name, i in index.items()}
    return PromptPair(clean, corrupt, f" {first[a + 1]}", f" {first[c + 1]}", spans)
