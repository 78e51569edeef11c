"""Indirect object identification (Wang et al. 2022): two people, one acts, the other one receives.

"After Anna and Tom arrived at the park, Tom handed a ball to" → " Anna". The answer is the indirect object
(IO), the foil the subject (S), who is named twice.
"""

from __future__ import annotations

import logging
from random import Random
from string import Formatter
from typing import Literal

from interp.errors import TaskError
from interp.prompts import Coder, PromptPair, Span
from interp.tasks.vocabulary import TaskModel, TaskPairs, at_least_one, single_tokens

log = logging.getLogger("interp")

# {A} and {B}: the two people in order of mention; {S}: whichever of them acts. No name opens a text, so that
# each follows a space and is the same token wherever it stands.
TEMPLATES = (
    "After {A} and {B} arrived at the {place}, {S} handed a {object} to",
    "While {A} and {B} were walking to the {place}, {S} gave a {object} to",
    "Yesterday {A} and {B} met at the {place}, and {S} offered a {object} to",
    "Once {A} and {B} were inside the {place}, {S} passed a {object} to",
    "Because {A} and {B} were bored at the {place}, {S} showed a {object} to",
    "On Sunday {A} and {B} had lunch near the {place}. Afterwards {S} lent a {object} to",
    "Later that day {A} and {B} sat down in the {place}, and {S} handed a {object} to",
    "This morning {A} and {B} took a bus to the {place}, where {S} gave a {object} to",
    "In the evening {A} and {B} were still at the {place}, and {S} threw a {object} to",
    "Although {A} and {B} got lost on the way to the {place}, {S} still gave a {object} to",
    "Last week {A} and {B} had a long talk at the {place}, and then {S} sent a {object} to",
    "At the {place}, {A} and {B} looked for a seat, and {S} gave a {object} to",
    "When the rain stopped, {A} and {B} left the {place} and {S} handed a {object} to",
    "As soon as {A} and {B} saw the {place}, {S} showed a {object} to",
    "During the trip to the {place}, {A} and {B} grew tired. So {S} gave a {object} to",
)
NAMES = (
    "Adam", "Alan", "Alex", "Alice", "Amanda", "Amy", "Andrew", "Anna", "Anthony", "Ben", "Brian",
    "Carl", "Charles", "Chris", "Claire", "Daniel", "David", "Diana", "Edward", "Ellen", "Emily", "Emma",
    "Eric", "George", "Helen", "Henry", "Jack", "Jacob", "James", "Jane", "Jason",
    "Jennifer", "Jessica", "John", "Joseph", "Julia", "Karen", "Kate", "Kevin", "Laura", "Linda", "Lisa",
    "Lucy", "Margaret", "Maria", "Martin", "Mary", "Matthew", "Michael", "Michelle", "Nancy",
    "Nicole", "Oliver", "Patrick", "Paul", "Peter", "Rachel", "Richard", "Robert", "Ryan",
    "Samuel", "Sarah", "Simon", "Steven", "Susan", "Thomas", "Tom", "William",
)  # fmt: skip
PLACES = (
    "bakery", "bank", "beach", "bridge", "castle", "church", "cinema", "farm", "garden", "gym", "harbor",
    "hospital", "hotel", "lake", "library", "market", "museum", "office", "park", "restaurant", "school",
    "stadium", "station", "store", "theater", "zoo",
)  # fmt: skip
OBJECTS = (
    "bag", "ball", "basket", "blanket", "book", "bottle", "camera", "card", "coin", "drink", "flower", "gift",
    "guitar", "hat", "key", "lamp", "letter", "map", "necklace", "pen", "phone", "ring", "sandwich", "scarf",
    "ticket", "towel", "watch",
)  # fmt: skip


def ioi(model: TaskModel, n: int = 64, seed: int = 0, *, corruption: Literal["swap", "abc"] = "swap") -> TaskPairs:
    """``n`` IOI pairs for a model's tokenizer, half of them ABBA (the receiver is named first), half BABA.

    ``corruption="swap"``: the acting person's second mention becomes the other one's name, so that the
    right answer becomes the foil. ``"abc"``: it becomes a third person's, so that neither is right.
    One token differs, so the lengths are equal. Spans in the clean text: ``IO``, ``S1``, ``S1+1`` (the
    token after S1), ``S2``, ``END`` (the last token). Templates, orders, names, places and objects vary.

    Raises TaskError if the tokenizer has fewer than four of the names as single tokens.
    """
    at_least_one(n, "ioi")
    if corruption not in ("swap", "abc"):
        raise TaskError(f"ioi: corruption must be 'swap' or 'abc', got {corruption!r}")
    coder, rng = model.coder, Random(f"ioi/{seed}")
    names, dropped = single_tokens(NAMES, coder)
    if len(names) < 4:
        raise TaskError(
            f"{model.name}: ioi needs at least 4 first names that are single tokens after a space, but of its "
            f"{len(NAMES)} names the tokenizer has {', '.join(names) or 'none'} (missing: {', '.join(dropped[:6])}, …)"
        )
    if dropped:
        log.info("ioi: %d of %d names are not single tokens and were left out", len(dropped), len(NAMES))
    forms: list[tuple[str, bool]] = []
    while len(forms) < n:  # each template comes up once with each order before any does again
        templates = rng.sample(TEMPLATES, len(TEMPLATES))
        forms += [(t, abba) for t in templates for abba in (True, False)]
    pairs = [_pair(template, abba, names, corruption, coder, rng) for template, abba in forms[:n]]
    return TaskPairs(pairs, task="ioi" if corruption == "swap" else "ioi-abc", seed=seed, dropped=dropped)


def _pair(template: str, abba: bool, names: list[str], corruption: str, coder: Coder, rng: Random) -> PromptPair:
    receiver, actor, third = rng.sample(names, 3)
    first, second = (receiver, actor) if abba else (actor, receiver)
    slots = {"A": first, "B": second, "place": rng.choice(PLACES), "object": rng.choice(OBJECTS)}
    clean, where = fill(template, {**slots, "S": actor})
    corrupt, _ = fill(template, {**slots, "S": receiver if corruption == "swap" else third})
    io, s1 = ("A", "B") if abba else ("B", "A")
    offsets = coder.offsets(clean)
    after = next(i for i, (start, _) in enumerate(offsets) if start >= where[s1][1])
    end = next(o for o in reversed(offsets) if o[1] > o[0])  # special tokens have no characters
    spans = {"IO": where[io], "S1": where[s1], "S1+1": offsets[after], "S2": where["S"], "END": end}
    return PromptPair(clean, corrupt, f" {receiver}", f" {actor}", spans)


def fill(template: str, slots: dict[str, str]) -> tuple[str, dict[str, Span]]:
    """Fill ``{slots}`` and say at which characters each filling stands."""
    text, where = "", {}
    for literal, slot, _, _ in Formatter().parse(template):
        text += literal
        if slot is not None:
            where[slot] = (len(text), len(text) + len(slots[slot]))
            text += slots[slot]
    return text, where
