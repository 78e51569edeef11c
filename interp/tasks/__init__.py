"""Tasks: seeded prompts with a known answer, and the check of a model on them.

>>> pairs = interp.tasks.ioi(model, n=64, seed=0)  # doctest: +SKIP
>>> interp.tasks.check(model, pairs).require()  # doctest: +SKIP
>>> interp.tasks.colored_objects(model, n=64, split="test")  # doctest: +SKIP

Every task is made for one model's tokenizer. Names, words and answers that are not single tokens of it are left out
(listed in ``.dropped``); pairs whose prompts do not align are not kept (counted by reason in ``.refused``); a TaskError
reports it if too few remain. No set contains a prompt twice. With ``split="train"`` and ``split="test"`` a task makes
sets that share neither prompts nor the items that the task's docstring names (words, templates, numbers); None takes
all of them. The functions that make the tasks are listed in `interp.tasks.registry`.
"""

from interp.tasks import registry
from interp.tasks.behaviour import Behaviour, check
from interp.tasks.known_facts import Facts, facts
from interp.tasks.ranking import rank
from interp.tasks.registry import *  # noqa: F403  (every task, by the registry's __all__)
from interp.tasks.vocabulary import TaskPairs

__all__ = ["Behaviour", "Facts", "TaskPairs", "check", "facts", "rank"]
__all__ += registry.__all__
