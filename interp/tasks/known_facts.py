"""Facts that a model knows, for causal tracing (Meng et al. 2022): "The capital of France is the city of" → " Paris".

The list, `facts.toml`, is of common knowledge; which of it a model knows is measured, not assumed.
"""

from __future__ import annotations

import logging
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from random import Random
from typing import Any

from interp.errors import TaskError
from interp.prompts.pairs import Fact, encode_facts
from interp.tasks.behaviour import margins
from interp.tasks.vocabulary import TaskModel, at_least_one, token_of

log = logging.getLogger("interp")

NOT_A_TOKEN, NOT_KNOWN = "answer is not a single token", "not the model's first answer"


class Facts(list[Fact]):
    """Facts that a model knows; ``dropped`` says, by prompt, why others of the list were left out."""

    task = "facts"

    def __init__(self, facts: Iterable[Fact], dropped: Mapping[str, str]):
        super().__init__(facts)
        self.dropped = dict(dropped)

    def __repr__(self) -> str:
        first = f"; first: {self[0].prompt!r} → {self[0].answer!r}" if self else ""
        return f"Facts({len(self)} known, {len(self.dropped)} left out{first})"


@cache
def relations() -> list[dict[str, Any]]:
    """What facts.toml has: name, prompt, question and facts of each relation."""
    text = resources.files("interp.tasks").joinpath("facts.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["relation"]


def all_facts() -> list[Fact]:
    """The whole list, whatever a model knows of it, relation by relation."""
    return [
        Fact(relation["prompt"].format(subject=subject), subject, f" {answer}")
        for relation in relations()
        for subject, answer in relation["facts"]
    ]


def facts(model: TaskModel, n: int | None = None, seed: int = 0) -> Facts:
    """Facts that the model completes correctly: the answer is one token, and its first choice.

    ``n``: how many, drawn at random with ``seed`` (default: all that it knows, in the list's order). The
    result's ``dropped`` says why each other fact was left out; a log line counts them.

    Raises TaskError if the model knows fewer than ``n``, or none.
    """
    if n is not None:
        at_least_one(n, "facts")
    listed = all_facts()
    usable = [f for f in listed if token_of(f.answer.strip(), model.coder) is not None]
    dropped = {f.prompt: NOT_A_TOKEN for f in listed if f not in usable}
    known: list[Fact] = []
    if usable:
        gaps = margins(model, encode_facts(usable, model.coder))
        known = [f for f, gap in zip(usable, gaps, strict=True) if gap > 0]
        dropped |= {f.prompt: NOT_KNOWN for f in usable if f not in known}
    counts = Counter(dropped.values())
    why = ", ".join(f"{count} left out ({reason})" for reason, count in counts.items())
    if len(known) < (n or 1):
        raise TaskError(
            f"{model.name} knows {len(known)} of the {len(listed)} facts, and {n or 1} were asked for: {why}. "
            "Ask for fewer, use a larger model, or pass interp.Fact objects of your own."
        )
    log.info("facts: %s knows %d of %d: %s", model.name, len(known), len(listed), why or "none left out")
    chosen = known if n is None else Random(f"facts/{seed}").sample(known, n)
    return Facts(chosen, dropped)
