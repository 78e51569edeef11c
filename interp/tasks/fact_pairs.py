"""Facts as prompt pairs: the same relation with another subject.

This is symmetric token replacement. It stays on the data's distribution, which embedding noise leaves (NOTICE,
Golovanevsky et al. 2024; Zhang & Nanda 2024).
"""

from __future__ import annotations

from collections import defaultdict
from random import Random

from interp.errors import TaskError
from interp.prompts.pairs import Fact, PromptPair
from interp.tasks.generate import Split, check_split, items_of_split
from interp.tasks.known_facts import all_facts, facts
from interp.tasks.vocabulary import TaskModel, TaskPairs, check_count


def fact_pairs(model: TaskModel, n: int = 32, seed: int = 0, *, split: Split | None = None) -> TaskPairs:
    """Make ``n`` pairs of known facts of one relation.

    They have equally long prompts and different answers. Clean: "The capital of France is the city of" → " Paris";
    corrupt: the same of Italy, so the foil is " Rome". The clean subject is the span ``subject``, the prompt's last
    word ``END``. Each ordered pair of facts occurs at most once. ``split``: "train" and "test" share no fact.

    Raises TaskError if the known facts do not make ``n`` such pairs.
    """
    check_count(n, "facts")
    check_split(split, "facts")
    prompts_of_split = {f.prompt for f in items_of_split(all_facts(), split)}
    known_facts = [f for f in facts(model) if f.prompt in prompts_of_split]
    alike: dict[tuple[str, int], list[Fact]] = defaultdict(list)
    for fact in known_facts:
        template = fact.prompt.replace(fact.subject, "{}", 1)
        alike[template, len(model.coder.encode(fact.prompt))].append(fact)
    possible = [(a, b) for group in alike.values() for a in group for b in group if a is not b and a.answer != b.answer]
    if len(possible) < n:
        raise TaskError(
            f"{model.name} knows {len(known_facts)} facts, which make {len(possible)} pairs of one relation and equal "
            f"length; {n} were asked for. Ask for fewer, or build custom PromptPairs."
        )
    sample = Random(f"fact_pairs/{seed}").sample(possible, n)
    return TaskPairs([_pair(a, b) for a, b in sample], task="facts", seed=seed, split=split)


def _pair(clean: Fact, corrupt: Fact) -> PromptPair:
    last = clean.prompt.split()[-1]
    end = len(clean.prompt)
    spans = {"subject": clean.subject_span, "END": (end - len(last), end)}
    return PromptPair(clean.prompt, corrupt.prompt, clean.answer, corrupt.answer, spans)
