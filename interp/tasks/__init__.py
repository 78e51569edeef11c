"""Tasks: seeded prompts with a known right answer, and the check that a model does them at all.

>>> pairs = interp.tasks.ioi(model, n=64, seed=0)  # doctest: +SKIP
>>> interp.tasks.check(model, pairs).require()  # doctest: +SKIP

Every task is built for one model's tokenizer: names, words and answers that are not single tokens there are
left out (``.dropped`` says which), and a TaskError says so if too few remain.
"""

from interp.tasks.behaviour import Behaviour, check
from interp.tasks.fact_pairs import fact_pairs
from interp.tasks.indirect_object import ioi
from interp.tasks.known_facts import Facts, facts
from interp.tasks.repeated_tokens import induction
from interp.tasks.vocabulary import TaskPairs

__all__ = ["Behaviour", "Facts", "TaskPairs", "check", "fact_pairs", "facts", "induction", "ioi"]
