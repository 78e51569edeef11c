"""The table of tasks by name.

`interp.tasks`, the command line and sweeps read it. To add a task, write its module and add its import, its name in
``__all__`` and its row in `TASKS` here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from interp.errors import TaskError
from interp.tasks.agreement import agreement
from interp.tasks.colored_objects import colored_objects
from interp.tasks.docstring import docstring
from interp.tasks.fact_pairs import fact_pairs
from interp.tasks.gender_bias import gender_bias
from interp.tasks.indirect_object import ioi
from interp.tasks.multiple_choice import multiple_choice
from interp.tasks.numbers import addition, greater_than, subtraction
from interp.tasks.puzzles import puzzles
from interp.tasks.repeated_tokens import induction
from interp.tasks.retrieval import key_value, needle
from interp.tasks.vocabulary import TaskModel, TaskPairs
from interp.utils.checks import did_you_mean

__all__ = [
    "TASKS", "Task", "addition", "agreement", "colored_objects", "docstring", "fact_pairs", "gender_bias",
    "greater_than", "induction", "ioi", "key_value", "multiple_choice", "needle", "puzzles", "subtraction", "task",
]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task: ``task(model, n)`` makes its pairs.

    ``options`` are passed to the function ``make``.
    """

    make: Callable[..., TaskPairs]
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: TaskModel, n: int, seed: int = 0, **options: Any) -> TaskPairs:
        """Make ``n`` pairs. Raises TaskError as ``make`` does."""
        return self.make(model, n=n, seed=seed, **{**self.options, **options})

    @property
    def names(self) -> list[str]:
        """Names of the options that a caller may set."""
        parameters = inspect.signature(self.make).parameters.values()
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in self.options]


TASKS: dict[str, Task] = {
    "ioi": Task(ioi, "indirect objects: who gets the drink?"),
    "induction": Task(induction, "complete a stretch of random words that comes again"),
    "facts": Task(fact_pairs, "recall a fact about a subject (those that the model knows)"),
    "colored_objects": Task(colored_objects, "the color of one of three things"),
    "agreement": Task(agreement, "the verb that agrees with its subject, across another noun"),
    "greater_than": Task(greater_than, "a year that comes after another one"),
    "addition": Task(addition, "sums of two-digit numbers, after three solved ones"),
    "subtraction": Task(subtraction, "differences of two-digit numbers, after three solved ones"),
    "multiple_choice": Task(multiple_choice, "the letter of the right one of four options"),
    "docstring": Task(docstring, "the next argument of a function in its docstring"),
    "gender_bias": Task(gender_bias, "the pronoun that a stereotype gives to a profession"),
    "recall": Task(puzzles, "puzzles that a recalled fact solves", {"kind": "recall"}),
    "reasoning": Task(puzzles, "puzzles that reasoning from the prompt solves", {"kind": "reasoning"}),
    "needle": Task(needle, "a secret word in 512 tokens of prose"),
    "key_value": Task(key_value, "the value of a key in a list of eight"),
}

ALIASES = {"fact_pairs": "facts"}
UNLISTED = {"puzzles": Task(puzzles, "puzzles of either kind: kind=recall or kind=reasoning")}  # listed by their kinds


def task(text: str) -> Task:
    """Look up a task by its name, with options after a colon.

    For example ``"ioi"``, ``"needle:tokens=2048,depth=0.5"``. ``fact_pairs`` is another name of ``facts``, which gives
    pairs wherever two prompts are compared.

    Raises TaskError for an unknown task, and for an option that the task does not have.
    """
    name, _, rest = text.partition(":")
    name = ALIASES.get(name, name)
    known = {**TASKS, **UNLISTED}
    if name not in known:
        hint = did_you_mean(name, (*known, *ALIASES))
        raise TaskError(f"unknown task {name!r}: {hint}choose one of {', '.join(TASKS)}")
    row, options = known[name], {}
    for setting in filter(None, rest.split(",")):
        option, equals, value = (x.strip() for x in setting.partition("="))
        if not equals or option not in row.names:
            raise TaskError(f"task {text!r}: cannot read {setting!r}; {name} takes {'=…, '.join(row.names)}=…")
        options[option] = _value(value)
    return replace(row, options={**row.options, **options})


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
