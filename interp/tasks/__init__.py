"""Tasks: seeded prompts with a known right answer, and the check that a model does them at all.

>>> pairs = interp.tasks.ioi(model, n=64, seed=0)  # doctest: +SKIP
>>> interp.tasks.check(model, pairs).require()  # doctest: +SKIP
>>> interp.tasks.colored_objects(model, n=64, split="test")  # doctest: +SKIP

Every task is built for one model's tokenizer: names, words and answers that are not single tokens there are left out
(``.dropped`` says which), pairs whose prompts do not align are not kept (``.refused`` says how many and why), and a
TaskError says so if too few remain. A set has no prompt twice. With ``split="train"`` and ``split="test"`` a task makes
sets that share neither prompts nor what the task's docstring names (words, templates, numbers); None takes everything.
"""

from interp.tasks.agreement import agreement
from interp.tasks.behaviour import Behaviour, check
from interp.tasks.colored_objects import colored_objects
from interp.tasks.docstring import docstring
from interp.tasks.fact_pairs import fact_pairs
from interp.tasks.gender_bias import gender_bias
from interp.tasks.indirect_object import ioi
from interp.tasks.known_facts import Facts, facts
from interp.tasks.multiple_choice import multiple_choice
from interp.tasks.numbers import addition, greater_than, subtraction
from interp.tasks.puzzles import puzzles
from interp.tasks.registry import TASKS, Task, task
from interp.tasks.repeated_tokens import induction
from interp.tasks.retrieval import key_value, needle
from interp.tasks.vocabulary import TaskPairs

__all__ = [
    "TASKS", "Behaviour", "Facts", "Task", "TaskPairs", "addition", "agreement", "check", "colored_objects",
    "docstring", "fact_pairs", "facts", "gender_bias", "greater_than", "induction", "ioi", "key_value",
    "multiple_choice", "needle", "puzzles", "subtraction", "task",
]  # fmt: skip
