"""Indirect object identification (IOI, Wang et al. 2022).

Of two people one acts, and the other receives: "After Anna and Tom arrived at the park, Tom handed a ball to" →
" Anna". The answer is the indirect object (IO), the foil the subject (S), who is named twice.
"""

from __future__ import annotations

import logging
from random import Random
from typing import Literal

from interp.prompts.coder import Coder
from interp.prompts.pairs import PromptPair
from interp.tasks.generate import (
    Split,
    check_choice,
    check_split,
    end_of,
    fill,
    items_of_split,
    make_pairs,
    usable_words,
    word_lists,
)
from interp.tasks.vocabulary import TaskModel, TaskPairs, check_count

log = logging.getLogger("interp")

_LISTS = word_lists("indirect_object")
TEMPLATES, NAMES = tuple(_LISTS["templates"]), tuple(_LISTS["names"])
PLACES, OBJECTS = tuple(_LISTS["places"]), tuple(_LISTS["objects"])

Corruption = Literal["swap", "abc", "names"]


def ioi(
    model: TaskModel, n: int = 64, seed: int = 0, *, corruption: Corruption = "swap", split: Split | None = None
) -> TaskPairs:
    """Make ``n`` IOI pairs for a model's tokenizer.

    Half of them are ABBA (the receiver is named first), half BABA.

        pairs = interp.tasks.ioi(model, n=64, seed=0)
        interp.tasks.check(model, pairs).require()  # does the model do the task?
        effects = interp.patch(model, pairs, model.sites("z"))

    ``corruption="swap"``: the actor's second mention becomes the receiver's name, so that the right answer becomes
    the foil. ``"abc"``: it becomes a third person's name, so that neither is right. ``"names"``: all three mentions
    become three other people's names (p_ABC of the paper), so that no name points anywhere.
    Names are single tokens, so the lengths are equal. Spans in the clean text: ``IO``, ``S1``, ``S1+1`` (the
    token after S1), ``S2``, ``END`` (the last token). 15 templates, orders, names, places and objects vary.
    ``split``: "train" and "test" share no template and no name.

    Raises TaskError if the tokenizer has too few of the names as single tokens: at least four, or six for "names".
    """
    check_count(n, "ioi")
    check_split(split, "ioi")
    check_choice(corruption, ("swap", "abc", "names"), "corruption", "ioi")
    coder, fewest = model.coder, 6 if corruption == "names" else 4
    names, dropped = usable_words(NAMES, model, "ioi", fewest=fewest, what="first names", split=split)
    if dropped:
        log.info("ioi: %d of %d names are not single tokens and were left out", len(dropped), len(NAMES))
    templates, rng = items_of_split(TEMPLATES, split), Random(f"ioi/{seed}" + (f"/{split}" if split else ""))
    forms: list[tuple[str, bool]] = []
    while len(forms) < n:  # each template occurs once with each order before any occurs again
        forms += [(t, abba) for t in rng.sample(templates, len(templates)) for abba in (True, False)]
    task = "ioi" if corruption == "swap" else f"ioi-{corruption}"
    return make_pairs(
        model, task, n, seed, lambda rng, i: _pair(*forms[i], names, corruption, coder, rng),
        split=split, dropped=dropped, rng=rng,
    )  # fmt: skip


def _pair(template: str, abba: bool, names: list[str], corruption: str, coder: Coder, rng: Random) -> PromptPair:
    receiver, actor, third = rng.sample(names, 3)
    first, second = (receiver, actor) if abba else (actor, receiver)
    slots = {"A": first, "B": second, "place": rng.choice(PLACES), "object": rng.choice(OBJECTS)}
    clean, ranges = fill(template, {**slots, "S": actor})
    if corruption == "names":
        others = rng.sample([x for x in names if x not in (receiver, actor)], 3)
        changed = dict(zip("ABS", others, strict=True))
    else:
        changed = {"S": receiver if corruption == "swap" else third}
    corrupt, _ = fill(template, {**slots, **changed})
    io, s1 = ("A", "B") if abba else ("B", "A")
    offsets = coder.offsets(clean)
    after = next(i for i, (start, _) in enumerate(offsets) if start >= ranges[s1][1])
    spans = {
        "IO": ranges[io], "S1": ranges[s1], "S1+1": offsets[after], "S2": ranges["S"], "END": end_of(clean, coder),
    }  # fmt: skip
    return PromptPair(clean, corrupt, f" {receiver}", f" {actor}", spans)
